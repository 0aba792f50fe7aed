"""What one run installs into ComfyUI to act on references: a wrapper around the model's forward and
an override of its attention.

No patches on blocks or attention: some models keep K/V of their own and stop at the sight of one.
Whatever conditions install beside it stays the inner part: it gets attention with the kept
references' K/V behind the picture's, as if the model had computed them.
"""

import inspect
import traceback
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..digest import digest
from ..engine.compiled import uncompiled, uncompiled_itself
from ..engine.evaluation import Chunk, Moment, Schedule, alike, rows_of
from ..engine.references import Content, References
from ..engine.run import Kernels, Run, RunStats
from ..errors import Omini2Error, warn
from .hooks import others_between
from .kernels import Called, MaskHonouring, call_on, partial_of
from .memory import has_fp8, room_for_references
from .parts import grown
from .references import T0_METHOD, Family
from .rows import TAG, Rows
from .setup import KEY, Setup
from .versions import is_out_of_memory

ATTENTION_OVERRIDE = "optimized_attention_override"
BY_PICTURE = "uxo"  # the one method that places references by the picture's size


class Place(NamedTuple):
    """Names a prompt on a part of the picture, which the host names by the prompt alone."""

    prompt: Hashable
    which: int
    area: tuple[Any, ...] | None
    window: tuple[Any, ...] | None


class ReferenceHooks:
    """One run's hooks for references.

    Attributes:
        stats: what the run did, where no conditions' run tells it.
        shown: whose nodes are told of it.
        canvas: the picture's size, rows and columns of its latent.
    """

    def __init__(
        self,
        references: References,
        family: Family,
        model: ModelPatcher,
        schedule: Sequence[float],
        noise: Tensor,
        latents: Sequence[Sequence[Tensor]],
        shown: Setup,
        conditions: Run | None = None,
    ) -> None:
        """Args:
        schedule: the noise levels.
        noise: of the pictures.
        latents: each prompt's references.
        conditions: the run of the conditions beside the references, if there are any.
        """
        self.stats = RunStats([])
        self.shown = shown
        self.canvas = noise.shape[-2], noise.shape[-1]
        self._references = references
        self._family = family
        self._base = model.model
        self._model = model.model.diffusion_model
        self._schedule = Schedule(schedule)
        self._rows = Rows()
        self._picture: tuple[int, ...] = tuple(noise.shape[2:])
        self._latents = latents
        references.stats.count = max(map(len, latents), default=0)
        self._conditions = conditions
        self._numbers = family.numbers(self._model)
        self._masks = MaskHonouring()
        self._previous: Callable[..., Any] | None = None
        self._said = False

    def install(self, to: dict[str, Any]) -> None:
        """Puts the hooks into a run's own transformer options, behind those of conditions."""
        if self._conditions is None:
            add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self.calc_cond_batch, to)
        add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, self.prepare_sampling, to)
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, self.diffusion_model, to)
        self._previous = to.get(ATTENTION_OVERRIDE)
        to[ATTENTION_OVERRIDE] = self.attention

    def close(self) -> None:
        """Frees what the run holds, but what the next one may need, and sums up what it did."""
        self._references.finish()
        stats = self.stats if self._conditions is None else self._conditions.stats
        stats.note(self._references.cache)
        stats.references = self._references.stats
        if self._conditions is None:
            self._references.cache.close()

    def prepare_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Before the model is loaded: room for the references' K/V."""
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        arguments = bound.arguments
        arguments["noise_shape"] = room_for_references(
            self._references.cache,
            arguments["model"],
            arguments["noise_shape"],
            self._kv_bytes(arguments["model"], arguments["noise_shape"][0]),
            len(self._numbers),
        )
        return executor(*bound.args, **bound.kwargs)

    def _kv_bytes(self, model: ModelPatcher, batch: int) -> int:
        """Bytes of K/V that a run keeps, in the model's own format."""
        if self._references.interval == 0:
            return 0
        each: dict[Hashable, Sequence[Tensor]] = dict(enumerate(self._latents))
        if self._references.isolated:
            batch = 1
            if "y" not in self._family.modulated_by(self._model):  # the same for all prompts
                each = {tuple(map(id, latents)): latents for latents in self._latents}
        tokens = sum(self._family.tokens(self._model, latents) for latents in each.values())
        return batch * tokens * self._family.kv_bytes_per_token(model)

    def calc_cond_batch(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the evaluation of all prompts: parts of the picture get names of their own."""
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        given = bound.arguments
        module = given["model"].diffusion_model
        if getattr(module, "_orig_mod", module) is not self._model:
            return executor(*args, **kwargs)
        self._schedule.call()
        window = given["model_options"]["transformer_options"].get("context_window")
        if window is None:
            self._picture = grown(tuple(given["x_in"].shape[2:]), self._picture)
        conds = [
            prompts and [_placed(cond, which, window) for cond in prompts]
            for which, prompts in enumerate(given["conds"])
        ]
        certain = not others_between(given["model_options"])
        given["conds"] = self._rows.name(conds, len(given["x_in"]), certain)
        return executor(*bound.args, **bound.kwargs)

    @uncompiled_itself
    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the model's whole forward."""
        if executor.class_obj is not self._model:
            return executor(*args, **kwargs)
        tag = kwargs.pop(TAG, None)
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        if not bound.arguments.get("ref_latents"):
            return executor(*args, **kwargs)
        if self._family.method(self._model, bound.arguments) is None and self._ignored():
            return executor(*args, **kwargs)
        while True:
            try:
                return self._evaluate(executor, bound, tag)
            except Exception as error:
                # Conditions have a way of their own, which stores all K/V otherwise.
                if self._conditions is not None or not is_out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)
                device = bound.arguments["x"].device
                cache = self._references.cache
                if self._references.interval == 0 or not cache.relieve(device, has_fp8(device)):
                    raise
            comfy.model_management.soft_empty_cache()

    def _ignored(self) -> bool:
        """Whether the model leaves references out, as no method says where they are to lie."""
        if self._references.isolated:
            return False  # which says it
        if not self._said:
            self._said = True
            warn(
                f"references: {self._family.name} ignores references unless the prompt says "
                "how they are placed; add Edit Model Reference Method with index_timestep_zero."
            )
        return True

    @uncompiled_itself
    def _evaluate(self, executor: Any, bound: inspect.BoundArguments, tag: Tensor | None) -> Any:
        arguments = bound.arguments
        chunks, moment = self._moment_of(arguments, tag)
        device = arguments["x"].device
        references = self._references
        tokens = self._family.tokens(self._model, arguments["ref_latents"])
        if not references.isolated:
            if any(chunk.key is None for chunk in chunks):
                return executor(*bound.args, **bound.kwargs)
            parts = references.joint(chunks, moment)
            if any(part.due for part in parts):
                with references.keeping(parts, tokens):
                    return executor(*bound.args, **bound.kwargs)
        else:
            hooks = getattr(self._base.current_patcher.current_hooks, "hooks", ())
            if any(len(hook.hook_keyframe.keyframes) > 1 for hook in hooks):
                chunks = tuple(replace(chunk, key=None) for chunk in chunks)  # others at each step
            weights = [(id(hook.hook_ref), hook.strength) for hook in hooks]
            describe = partial(self._content, arguments, weights)
            parts = references.alone(chunks, moment, device, describe)
            rows = [row for part in parts if part.due for row in part.computed]
            if rows:
                with references.computing(parts, tokens):
                    self._alone(executor, bound, rows)
        without = _changed(bound, {"ref_latents": None})
        with references.appending(parts, tokens, device):
            return executor(*without.args, **without.kwargs)

    @uncompiled_itself
    def _alone(self, executor: Any, bound: inspect.BoundArguments, rows: Sequence[int]) -> None:
        """Runs the model's own forward on the references of some rows, at time 0.

        What stands for the picture and the prompt is a token each, which the references don't see.
        Nothing that is patched onto the picture or the prompt is there.
        """
        given, batch = bound.arguments, len(bound.arguments["x"])
        method = self._family.method(self._model, given)
        if method is None or method == T0_METHOD:
            method = "index"  # the same places
        side = self._family.patch(self._model)
        foreign = ("patches", "patches_replace")
        changes: dict[str, Any] = {
            "ref_latents": [_some(t, rows, batch) for t in given["ref_latents"]],
            "context": _some(given["context"], rows, batch)[:, :1],
            "control": None,
            "attention_mask": None,
            "transformer_options": {
                key: value
                for key, value in given["transformer_options"].items()
                if key not in foreign
            },
        }
        for name, value in given.items():
            if name == "x":
                picture = value if method == BY_PICTURE else value[..., :side, :side]
                changes[name] = _some(picture, rows, batch)
            elif name.startswith("timestep"):
                changes[name] = 0 * _some(value, rows, batch)
            elif name == "kwargs":
                changes[name] = {key: _some(each, rows, batch) for key, each in value.items()}
            elif name not in changes:
                changes[name] = _some(value, rows, batch)
        more = changes.setdefault("kwargs", {})
        more.pop("attention_mask", None)
        more.pop("control", None)
        more["ref_latents_method"] = method
        alone = _changed(bound, changes)
        executor.original(*alone.args, **alone.kwargs)

    @uncompiled
    def _content(
        self, arguments: Mapping[str, Any], weights: Sequence[Any], chunk: Chunk
    ) -> Content:
        """What a prompt's isolated K/V depend on.

        Args:
            weights: that hooks on the prompt patch onto the model.
        """
        x, more = arguments["x"], arguments.get("kwargs", {})
        method = self._family.method(self._model, arguments)
        names = self._family.modulated_by(self._model)
        values = [*arguments["ref_latents"], *(arguments.get(n, more.get(n)) for n in names)]
        tensors = [_some(t, chunk.rows, len(x)) for t in values if isinstance(t, Tensor)]
        same = all(alike(t) for t in tensors)
        rope = arguments["transformer_options"].get("rope_options")
        size = tuple(x.shape) if method == BY_PICTURE else ()
        said = repr((method, rope, size, x.dtype, 1 if same else len(chunk.rows), weights))
        name = digest([said, *(t[:1] if same else t for t in tensors)])
        return Content(name, same)

    @uncompiled
    def _moment_of(
        self, arguments: Mapping[str, Any], tag: Tensor | None
    ) -> tuple[tuple[Chunk, ...], Moment]:
        """Whose rows a batch holds, and where in the schedule it is.

        A chunk without a key is one that nothing may be kept for: nobody knows whose it is, or
        where on the picture.
        """
        x, options = arguments["x"], arguments["transformer_options"]
        if self._conditions is not None:  # who name rows and count calls for both
            call = self._conditions.call
            assert call is not None
            keys = [chunk.key and (chunk.key, call.empty) for chunk in call.chunks]
            chunks = [replace(c, key=key) for c, key in zip(call.chunks, keys, strict=True)]
            return tuple(chunks), call.moment
        size = tuple(x.shape[2:])
        found = self._rows.chunks(len(x), options, tag, (size, self._picture))
        tile = size != self._picture and not all(_is_placed(chunk) for chunk in found)
        if tile:
            found = tuple(replace(chunk, key=None) for chunk in found)
        time = next(value for name, value in arguments.items() if name.startswith("timestep"))
        return found, Moment(options.get("sigmas", time)[0], self._schedule)

    @uncompiled
    def attention(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Any:
        """The attention of a block, with q and k after RoPE."""
        previous, seen = self._previous, self._references.seen
        options = kwargs.get("transformer_options") or {}
        block = options.get("block_type"), options.get("block_index")
        number = self._numbers.get(block)  # type: ignore[arg-type]
        q, k, v, heads, *rest = args
        plain = kwargs.get("skip_reshape") and not kwargs.get("skip_output_reshape")
        if seen is None or number is None or not plain or len(rest) > 1:
            return call_on(previous, function, *args, **kwargs)
        told = sum(options.get("reference_image_num_tokens") or [seen.tokens])
        if told != seen.tokens:
            raise Omini2Error(
                f"references: this {self._family.name} has {told} tokens of references where "
                f"{seen.tokens} were counted, so none can be kept; set references to off."
            )
        mask = rest[0] if rest else kwargs.pop("mask", None)
        main = Called(function, previous, heads, kwargs)
        own = Called(function, None, heads, kwargs)
        sums = partial_of(function, q, k, v)
        kernels = Kernels(
            self._masks.guard(main, ("main", function), mask),
            own,
            None if previous is not None else sums,
            sums,
        )
        return seen.attend(number, kernels, q, k, v, mask)


def _placed(cond: dict[str, Any], which: int, window: Any) -> dict[str, Any]:
    """A prompt under a name that tells the part of the picture, if it is on one."""
    area = cond.get("area")
    if area is None and window is None:
        return cond
    taken = None if window is None else (window.dim, *window.index_list)
    place = Place(cond["uuid"], which, None if area is None else tuple(area), taken)
    return {**cond, "uuid": place}


def _is_placed(chunk: Chunk) -> bool:
    return isinstance(chunk.key, tuple) and isinstance(chunk.key[0], Place)


def _some(value: Any, rows: Sequence[int], batch: int) -> Any:
    """Some rows of what has one for each of the batch; anything else as it is."""
    whole = isinstance(value, Tensor) and value.ndim > 0 and len(value) == batch
    return rows_of(value, rows) if whole else value


def _changed(bound: inspect.BoundArguments, changes: Mapping[str, Any]) -> inspect.BoundArguments:
    """The same call with other arguments, as far as the model takes them."""
    known = bound.signature.parameters
    taken = {name: value for name, value in changes.items() if name in known}
    return inspect.BoundArguments(bound.signature, OrderedDict({**bound.arguments, **taken}))
