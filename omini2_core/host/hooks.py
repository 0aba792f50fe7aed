"""What one run installs into ComfyUI: its public hooks, a method each."""

import inspect
import math
import traceback
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.model_management
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from ..engine.compiled import uncompiled, uncompiled_itself
from ..engine.evaluation import Chunk, Evaluation, Moment
from ..engine.run import Kernels, Run
from ..errors import Omini2Error
from ..flux1.model import Flux1
from .integration import Integration, WholePicture
from .kernels import Called, MaskHonouring, call_on, partial_of
from .memory import has_fp8, room_for
from .model import replaced_forward
from .parts import Part, name_parts
from .setup import KEY, Setup
from .versions import is_out_of_memory
from .watch import Watch

ATTENTION_OVERRIDE = "optimized_attention_override"


class Hooks:
    """One run's hooks, around what other extensions have put there already."""

    def __init__(
        self,
        run: Run,
        model: Flux1,
        setup: Setup,
        picture: WholePicture,
        schedule: Sequence[float],
        canvas: tuple[int, int],
        chunks: int,
    ) -> None:
        """Args:
        schedule: the noise levels.
        canvas: the picture's size in tokens.
        chunks: how many prompts take part, positive and negative.
        """
        self._run = run
        self._model = model
        self._setup = setup
        self._picture = picture
        self._schedule = schedule
        self._canvas = canvas
        self._chunks = chunks
        self._replacements: dict[Hashable, Any] = {}
        self._watch = Watch(self._replacements)
        self._masks = MaskHonouring()
        self._previous_attention: Callable[..., Any] | None = None

    @property
    def shown(self) -> Setup:
        """Whose nodes are told of the run."""
        return self._setup

    def install(self, to: dict[str, Any]) -> None:
        """Puts the hooks into a run's own transformer options."""
        add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, self.prepare_sampling, to)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self.calc_cond_batch, to)
        add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, self.diffusion_model, to)
        self._previous_attention = to.get(ATTENTION_OVERRIDE)
        to[ATTENTION_OVERRIDE] = self.attention
        slots = to.setdefault("patches_replace", {}).setdefault("dit", {})
        for number, block in enumerate(self._model.blocks):
            hook = self._block_hook(number, slots.get(block.slot))
            self._replacements[block.slot] = hook
        if isinstance(self._picture, Integration):
            add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.apply_model, to)
            to.setdefault("patches", {}).setdefault("post_input", []).append(self._picture.take)
            last = self._model.blocks[-1].slot
            self._replacements[last] = _putting_back(self._picture, self._replacements[last])
        slots.update(self._replacements)

    def prepare_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Before the model is loaded: room for the conditions."""
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        bound.arguments["noise_shape"] = room_for(
            self._setup,
            self._run.cache,
            self._chunks,
            bound.arguments["model"],
            bound.arguments["noise_shape"],
        )
        return executor(*bound.args, **bound.kwargs)

    def calc_cond_batch(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the evaluation of all prompts: parts of the picture get names of their own."""
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        options = bound.arguments["model_options"]["transformer_options"]
        window = options.get("context_window")
        images = max((len(b.condition.latent) for b in self._setup.branches), default=1)
        if window is not None and window.dim == 0 and images > 1:
            raise Omini2Error(
                f"image: it holds {images} images, one for each picture of the batch, but context "
                "windows take the batch apart; use one image or leave the context windows out."
            )
        bound.arguments["conds"] = name_parts(bound.arguments["conds"], window)
        return executor(*bound.args, **bound.kwargs)

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Denoises the known tokens to what is known, whatever the model said of them."""
        assert isinstance(self._picture, Integration)
        return self._picture.known_in(executor(*args, **kwargs), self._picture.known)

    @uncompiled_itself
    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Around the model's whole forward; twice with image guidance."""
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        arguments = bound.arguments
        call = evaluation(executor.class_obj, arguments, self._schedule, self._canvas)
        self._picture.check_size(*arguments["x"].shape[-2:])
        control = arguments.get("control")
        if control is not None:
            _, last_output = self._model.blocks[-1].slot
            arguments["control"] = self._picture.select_control(control, last_output)
        evaluate = partial(self._evaluate, executor, bound)
        scale = self._setup.image_guidance_scale
        compared = scale != 1.0 and self._run.active(call)
        out = evaluate(call, compared)
        if not compared:
            return out
        empty = evaluate(replace(call, empty=True), compared)
        return empty + scale * (out - empty)

    @uncompiled_itself
    def _evaluate(
        self, executor: Any, bound: inspect.BoundArguments, call: Evaluation, compared: bool
    ) -> Tensor:
        """One evaluation; where the device runs out of memory, again with K/V stored otherwise."""
        while True:
            try:
                by = replaced_forward(executor.class_obj)
                self._watch.begin(bound.arguments["transformer_options"], by)
                self._picture.begin()
                with self._run.evaluation(call):
                    out: Tensor = executor(*bound.args, **bound.kwargs)
                self._watch.end(compared)
                return out
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Its frames hold all that the evaluation has made, which K/V need to move.
                traceback.clear_frames(error.__traceback__)
                if not self._run.relieve(call.device, has_fp8(call.device)):
                    raise
            comfy.model_management.soft_empty_cache()

    def _block_hook(self, number: int, previous: Callable[..., Any] | None) -> Callable[..., Any]:
        """The replacement of one block, around the one that is there already."""

        @uncompiled_itself
        def replacement(args: dict[str, Any], extra: dict[str, Any]) -> Any:
            return self._block(number, previous, args, extra)

        return replacement

    @uncompiled_itself
    def _block(
        self,
        number: int,
        previous: Callable[..., Any] | None,
        args: dict[str, Any],
        extra: dict[str, Any],
    ) -> Any:
        self._watch.block()
        if number == 0:
            self._picture.before_blocks(self._watch.replaced_by)
        computed = partial(self._compute, extra["original_block"])
        original: Callable[[], Any] = partial(computed, args)
        if previous is not None:
            original = partial(previous, args, {**extra, "original_block": computed})
        # TeaCache, WaveSpeed and PuLID run the blocks in a forward of their own, which gives them
        # no options; without these attention wouldn't come by here.
        module, told = self._model.blocks[number].module, "transformer_options" in args
        with nullcontext() if told else _given(module, self._watch.options):
            return self._run.block(number, original)

    @uncompiled_itself
    def _compute(self, original_block: Callable[..., Any], args: dict[str, Any]) -> Any:
        """The model's own block, which has to reach its attention."""
        with self._watch.computing():
            return original_block(args)

    @uncompiled
    def attention(self, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """The attention of a block, with q and k after RoPE."""
        previous = self._previous_attention
        q, k, v, heads, *rest = args
        if not kwargs.get("skip_reshape") or rest:  # not how FLUX.1's blocks call it
            return call_on(previous, function, *args, **kwargs)
        self._watch.attention()
        mask = self._picture.select_mask(kwargs.pop("mask", None))
        main = Called(function, previous, heads, kwargs)
        own = Called(function, None, heads, kwargs)
        sums = partial_of(function, q, k, v)
        kernels = Kernels(
            self._masks.guard(main, ("main", function), mask),
            self._masks.guard(own, ("own", function), mask),
            None if previous is not None else sums,  # an override may be anything
            sums,
        )
        return self._run.attend(kernels, q, k, v, mask)


def _putting_back(integration: Integration, last_block: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        out = last_block(args, extra)
        return {**out, "img": integration.put_back(out["img"])}

    return replacement


def _given(block: Any, options: dict[str, Any]) -> Any:
    """While it is entered, a block that is called without transformer options gets these."""

    def add(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {"transformer_options": options, **kwargs}

    return block.register_forward_pre_hook(add, with_kwargs=True)


@uncompiled
def evaluation(
    flux: Any, arguments: Mapping[str, Any], schedule: Sequence[float], canvas: tuple[int, int]
) -> Evaluation:
    """What the host hands over to the model's forward, as the engine needs it.

    Args:
        flux: the host's module.
        arguments: of its forward.
    """
    x: Tensor = arguments["x"]
    options = arguments["transformer_options"]
    batch = len(x)
    pooled = arguments.get("y")
    if pooled is None:
        pooled = x.new_zeros(batch, flux.params.vec_in_dim)
    hw = size_in_tokens(flux, x)
    identities = options.get("uuids") or [None]
    rows = batch // len(identities)
    chunks = tuple(
        Chunk(
            (identity, hw),
            range(i * rows, (i + 1) * rows),
            identity.origin if isinstance(identity, Part) else None,
        )
        for i, identity in enumerate(identities)
    )
    if hw != canvas and all(chunk.origin is None for chunk in chunks):
        patch = 8 * flux.params.patch_size
        raise Omini2Error(
            f"model: another extension runs it on tiles of the picture, {hw[1] * patch}x"
            f"{hw[0] * patch} pixels at a time, and conditions can't tell where these lie; take "
            "that extension's node off this model, or Apply Omini2 LoRA."
        )
    moment = Moment(options["sigmas"][0], schedule)
    rope = options.get("rope_options") or {}
    axis_map = (
        (1.0, rope.get("shift_t", 0.0)),
        (rope.get("scale_y", 1.0), rope.get("shift_y", 0.0)),
        (rope.get("scale_x", 1.0), rope.get("shift_x", 0.0)),
    )
    guidance = arguments.get("guidance")
    return Evaluation(chunks, pooled.to(x.dtype), canvas, moment, axis_map, guidance=guidance)


def size_in_tokens(flux: Any, latent: Tensor) -> tuple[int, int]:
    """Rows and columns of a latent (..., height, width) in tokens."""
    height, width = latent.shape[-2:]
    patch = flux.params.patch_size
    return math.ceil(height / patch), math.ceil(width / patch)
