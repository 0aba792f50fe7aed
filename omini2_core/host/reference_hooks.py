"""What one run installs into ComfyUI to act on references: a wrapper around the model's forward and
an override of its attention.

No patches on blocks or attention: some models keep K/V of their own and stop at the sight of one.
Whatever conditions install beside it stays the inner part: it gets attention with the kept
references' K/V behind the picture's, as if the model had computed them.
"""

import inspect
import itertools
import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import comfy.conds
import comfy.model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..digest import digest
from ..engine.attention import Attention
from ..engine.compiled import uncompiled, uncompiled_itself
from ..engine.evaluation import Chunk, Moment, Schedule, alike
from ..engine.references import Content, References
from ..engine.run import Kernels, Run, RunStats
from ..errors import Omini2Error, warn
from .hooks import OUR_MASK, others_between
from .kernels import Called, MaskHonouring, call_on, partial_of
from .memory import has_fp8, room_for_references
from .out_of_memory import ELSEWHERE, PICTURE, REFERENCES, Ways
from .parts import grown
from .reference_calls import apart, changed, some
from .reference_layout import BY_PICTURE, Layout, Layouts, Said, unreached
from .reference_settings import PromptReferences, references_of
from .references import Family
from .rows import TAG, Rows
from .setup import KEY, Setup
from .versions import is_out_of_memory

ATTENTION_OVERRIDE = "optimized_attention_override"
RUNS = itertools.count()  # numbers that no two runs share
SAID = "omini2_references"  # what is said of a prompt's references, on its way to the model


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
        prompts: Sequence[PromptReferences],
        acting: bool,
        shown: Setup,
        conditions: Run | None = None,
    ) -> None:
        """Args:
        schedule: the noise levels.
        noise: of the pictures.
        prompts: the references of each prompt that is expected to be evaluated and has any.
        acting: whether any prompt says of its references what the model doesn't do by itself.
        conditions: the run of the conditions beside the references, if there are any.
        """
        self.stats = RunStats([])
        self.shown = shown
        self.canvas = noise.shape[-2], noise.shape[-1]
        self._references = references
        self._family = family
        self._base = model.model
        self._run_number = next(RUNS)
        self._model = model.model.diffusion_model
        self._schedule = Schedule(schedule)
        self._rows = Rows()
        self._picture: tuple[int, ...] = tuple(noise.shape[2:])
        self._prompts = prompts
        references.stats.count = max((len(each.latents) for each in prompts), default=0)
        self._acting = acting
        self._layouts = Layouts(family, self._model, model.get_model_object("model_sampling"))
        self._layout: Layout | None = None
        self._in_place = self._attended = self._tried = False
        self._conditions = conditions
        if conditions is not None:
            conditions.shares_cache = references.interval != 0
        self._numbers = family.numbers(self._model)
        self._masks = MaskHonouring(_say_unmasked)
        self._previous: Callable[..., Any] | None = None
        self._said, self._beside = False, 0

    @property
    def ways_out(self) -> Ways:
        """What there is to do where the device runs out of memory."""
        kept, cache = self._references.interval != 0, self._references.cache
        return (ELSEWHERE if kept and cache.movable else {}) | REFERENCES | PICTURE

    def install(self, to: dict[str, Any]) -> None:
        """Puts the hooks into a run's own transformer options, behind those of conditions."""
        if self._conditions is None:
            add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self.calc_cond_batch, to)
        if self._acting:
            add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self.say, to)
            # The first one: a token integration counts the rows that it finds.
            to.setdefault("patches", {}).setdefault("post_input", []).insert(0, self.post_input)
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
            self._beside,
        )
        return executor(*bound.args, **bound.kwargs)

    def _kv_bytes(self, model: ModelPatcher, batch: int) -> int:
        """Bytes of K/V that a run keeps, in the model's own format."""
        if self._references.interval == 0:
            return 0
        each: dict[Hashable, PromptReferences] = dict(enumerate(self._prompts))
        if self._references.isolated:
            batch = 1
            if "y" not in self._family.modulated_by(self._model):  # the same for all prompts
                each = {tuple(map(id, p.latents)): p for p in self._prompts}
        tokens = sum(self._layouts.tokens(p.latents, p.settings) for p in each.values())
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

    def say(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the same: what is said of a prompt's references goes where they go.

        Prompts of which other things are said are not evaluated in one batch.
        """
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        bound.arguments["conds"] = [
            prompts and [_told(cond) for cond in prompts] for prompts in bound.arguments["conds"]
        ]
        return executor(*bound.args, **bound.kwargs)

    @uncompiled_itself
    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the model's whole forward."""
        if executor.class_obj is not self._model:
            return executor(*args, **kwargs)
        tag, said = kwargs.pop(TAG, None), kwargs.pop(SAID, None)
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        if not self._concerns(bound.arguments):
            return executor(*args, **kwargs)
        if self._acting and said is None:
            raise Omini2Error(
                "model: another extension runs it without saying for which prompt, so what Omini2 "
                "Reference says of its references can't be told; take that extension's node off "
                "this model."
            )
        while True:
            try:
                return self._evaluate(executor, bound, tag, said)
            except Exception as error:
                # Conditions' hooks see to it for both.
                if self._conditions is not None or not is_out_of_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)
                device, cache = bound.arguments["x"].device, self._references.cache
                if self._references.interval == 0 or not cache.relieve(device, has_fp8(device)):
                    raise
            comfy.model_management.soft_empty_cache()

    def _concerns(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call of the model has anything that is acted on."""
        if not arguments.get("ref_latents"):
            return False
        return self._family.method(self._model, arguments) is not None or not self._ignored()

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
    def _evaluate(
        self, executor: Any, bound: inspect.BoundArguments, tag: Tensor | None, said: Said | None
    ) -> Any:
        chunks, moment = self._moment_of(bound.arguments, tag)
        layout = self._layouts.of(executor, bound, said, moment)
        bound = changed(bound, {"ref_latents": layout.latents or None})
        if not layout.latents:
            return executor(*bound.args, **bound.kwargs)
        device, references = bound.arguments["x"].device, self._references
        if references.isolated:
            weights, steady = self._hooked()
            if not steady:
                chunks = tuple(replace(chunk, key=None) for chunk in chunks)
            describe = partial(self._content, bound.arguments, layout, weights)
            parts = references.alone(chunks, moment, device, describe, layout.which)
            rows = [row for part in parts if part.due for row in part.computed]
            if rows:
                with references.computing(parts, layout.tail.tokens), self._laid_out(layout):
                    self._alone(executor, bound, rows)
        elif references.as_they_are or any(chunk.key is None for chunk in chunks):
            with references.weighing(len(chunks), layout.tail), self._laid_out(layout):
                return executor(*bound.args, **bound.kwargs)
        else:
            parts = references.joint(chunks, moment, layout.which)
            if any(part.due for part in parts):
                with references.keeping(parts, layout.tail), self._laid_out(layout):
                    return executor(*bound.args, **bound.kwargs)
        without = changed(bound, {"ref_latents": None})
        with references.appending(parts, layout.tail, device):
            return executor(*without.args, **without.kwargs)

    @contextmanager
    def _laid_out(self, layout: Layout) -> Iterator[None]:
        """While the model runs with references that lie so.

        Raises:
            Omini2Error: it didn't come by here. Others' caches may skip calls, but not the first.
        """
        self._layout = layout
        self._in_place = self._attended = False
        try:
            yield
        finally:
            self._layout = None
        deaf = layout.tail.weighed and not self._attended
        if not self._tried and (deaf or (layout.moves_rows and not self._in_place)):
            raise unreached()
        self._tried = True

    def post_input(self, args: dict[str, Any]) -> dict[str, Any]:
        """Behind the model's first layers: the references' rows as they are to be."""
        layout = self._layout
        if layout is None or not layout.moves_rows:
            return args
        self._in_place = True
        return layout.post_input(args, self._family.tokens(self._model, layout.latents))

    @uncompiled_itself
    def _alone(self, executor: Any, bound: inspect.BoundArguments, rows: Sequence[int]) -> None:
        """Runs the model's own forward on the references of some rows, at time 0.

        What stands for the picture and the prompt is a token each, which the references don't see.
        """
        given, batch = bound.arguments, len(bound.arguments["x"])
        method = self._family.placing_method(self._model, given)
        side = self._family.patch(self._model)
        picture = given["x"] if method == BY_PICTURE else given["x"][..., :side, :side]
        latents = [some(t, rows, batch) for t in given["ref_latents"]]
        call = apart(bound, rows, picture, latents, method, self.post_input)
        executor.original(*call.args, **call.kwargs)

    @uncompiled
    def _hooked(self) -> tuple[Sequence[Any], bool]:
        """What names the weights that hooks on the prompts patch onto the model in this run.

        And whether they stay as they are from step to step.
        """
        hooks = getattr(self._base.current_patcher.current_hooks, "hooks", ())
        # An id is of use only as long as the run holds what it is of.
        weights = [(self._run_number, id(hook.hook_ref), hook.strength) for hook in hooks]
        return weights, all(len(hook.hook_keyframe.keyframes) < 2 for hook in hooks)

    @uncompiled
    def _content(
        self,
        arguments: Mapping[str, Any],
        layout: Layout,
        weights: Sequence[Any],
        chunk: Chunk,
    ) -> Content:
        """What a prompt's isolated K/V depend on.

        Args:
            weights: as :meth:`_hooked` gives them.
        """
        x, more = arguments["x"], arguments.get("kwargs", {})
        method = self._family.method(self._model, arguments)
        names = self._family.modulated_by(self._model)
        values = [*arguments["ref_latents"], *(arguments.get(n, more.get(n)) for n in names)]
        tensors = [some(t, chunk.rows, len(x)) for t in values if isinstance(t, Tensor)]
        same = all(alike(t) for t in tensors)
        rope = arguments["transformer_options"].get("rope_options")
        size = tuple(x.shape) if method == BY_PICTURE else ()
        said = repr((method, rope, size, x.dtype, 1 if same else len(chunk.rows), weights))
        name = digest([said, layout.name, *(t[:1] if same else t for t in tensors)])
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
        self._attended = True
        told = sum(options.get("reference_image_num_tokens") or [seen.tokens])
        if told != seen.tokens:
            raise Omini2Error(
                f"references: this {self._family.name} has {told} tokens of references where "
                f"{seen.tokens} were counted, so none can be kept; set references to off."
            )
        mask = rest[0] if rest else kwargs.pop("mask", None)
        own = Called(function, None, heads, kwargs)
        sums = partial_of(function, q, k, v)
        kernels = Kernels(
            self._main(function, heads, kwargs, mask),
            own,
            None if previous is not None else sums,
            sums,
        )
        return seen.attend(number, kernels, q, k, v, mask)

    def _main(
        self, function: Callable[..., Tensor], heads: int, kwargs: dict[str, Any], given: Any
    ) -> Attention:
        """The attention of text and picture, which looks at masks of ours too.

        Args:
            given: the host's own mask.
        """
        main = Called(function, self._previous, heads, kwargs)
        if self._conditions is None:
            return self._masks.guard(main, ("main", function), given)
        # Conditions see to it themselves: to try it on them would count for them.
        marked = Called(function, self._previous, heads, {**kwargs, OUR_MASK: True})

        def through(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return (main if mask is given else marked)(q, k, v, mask)

        return through


def _say_unmasked() -> None:
    warn(
        "strength: the attention that is switched on takes no masks, so PyTorch's takes its place "
        "where a strength or a prompt's mask needs one; set strength to 1 for the speed of the "
        "other."
    )


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


def _told(cond: dict[str, Any]) -> dict[str, Any]:
    """A prompt with what is said of its references, if it has any."""
    references = references_of(cond)
    if references is None:
        return cond
    told = comfy.conds.CONDConstant(references.settings)
    return {**cond, "model_conds": {**cond["model_conds"], SAID: told}}
