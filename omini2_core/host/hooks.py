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
from ..engine.evaluation import Evaluation, Moment, Schedule
from ..engine.run import Kernels, Run, RunStats
from ..errors import Omini2Error, warn
from ..flux1.model import Flux1
from .integration import Integration, WholePicture
from .kernels import Called, MaskHonouring, call_on, partial_of
from .memory import has_fp8, room_for
from .model import replaced_forward
from .out_of_memory import CONDITIONS, ELSEWHERE, PICTURE, Ways
from .parts import grown, name_parts
from .patches import replaced_calls, warn_of
from .rows import TAG, Rows
from .setup import KEY, Setup
from .sources import warn_about_size
from .versions import is_out_of_memory
from .watch import Watch

ATTENTION_OVERRIDE = "optimized_attention_override"
OUR_MASK = "omini2_mask"  # says that a mask comes from references, which are around this


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
        self.run = run
        self._model = model
        self._setup = setup
        self._picture = picture
        self._schedule = Schedule(schedule)
        self.canvas = canvas
        self._chunks = chunks
        self._replacements: dict[Hashable, Any] = {}
        self._watch = Watch(self._replacements)
        self._first = True
        self._masks = MaskHonouring(_say_unmasked)
        self._rows = Rows()
        self._passing_by = False
        self._previous_attention: Callable[..., Any] | None = None

    @property
    def shown(self) -> Setup:
        """Whose nodes are told of the run."""
        return self._setup

    @property
    def stats(self) -> RunStats:
        """What the run did."""
        return self.run.stats

    @property
    def ways_out(self) -> Ways:
        """What there is to do where the device runs out of memory."""
        return (ELSEWHERE if self.run.movable else {}) | CONDITIONS | PICTURE

    def close(self) -> None:
        """Frees what the run holds, but what the next one may need."""
        self.run.close()

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
            to.setdefault("patches", {}).setdefault("post_input", []).append(self.post_input)
            last = self._model.blocks[-1].slot
            self._replacements[last] = self._putting_back(self._replacements[last])
        slots.update(self._replacements)

    def prepare_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Before the model is loaded: room for the conditions."""
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        bound.arguments["noise_shape"] = room_for(
            self._setup,
            self.run.cache,
            self._chunks,
            bound.arguments["model"],
            bound.arguments["noise_shape"],
        )
        return executor(*bound.args, **bound.kwargs)

    def calc_cond_batch(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around the evaluation of all prompts: parts of the picture get names of their own."""
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        options = bound.arguments["model_options"]["transformer_options"]
        module = bound.arguments["model"].diffusion_model
        if getattr(module, "_orig_mod", module) is not self._model.module:
            return executor(*args, **kwargs)
        window = options.get("context_window")
        images = max((len(b.condition.latent) for b in self._setup.branches), default=1)
        if window is not None and window.dim == 0 and images > 1:
            raise Omini2Error(
                f"image: it holds {images} images, one for each picture of the batch, but context "
                "windows take the batch apart; use one image or leave the context windows out."
            )
        self._schedule.call()
        x = bound.arguments["x_in"]
        if window is None:
            self._grow(size_in_tokens(self._model.module, x))
        conds = name_parts(bound.arguments["conds"], window)
        certain = not others_between(bound.arguments["model_options"])
        bound.arguments["conds"] = self._rows.name(conds, len(x), certain)
        return executor(*bound.args, **bound.kwargs)

    def _grow(self, size: tuple[int, int]) -> None:
        """Follows the picture's size, and says what that means for conditions."""
        canvas = grown(size, self.canvas)
        if canvas != self.canvas:
            self.canvas = canvas
            for branch in self._setup.active_branches:
                warn_about_size(branch, canvas)

    def apply_model(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Denoises the known tokens to what is known, whatever the model said of them."""
        assert isinstance(self._picture, Integration)
        x, tag = (args[0] if args else kwargs["x"]), kwargs.get(TAG)
        pictures = self._rows.pictures(len(x), tag)
        return self._picture.known_in(executor(*args, **kwargs), self._picture.known, pictures)

    @uncompiled_itself
    def diffusion_model(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Around the model's whole forward; twice with image guidance."""
        if executor.class_obj is not self._model.module:
            return self._pass_by(executor, *args, **kwargs)
        tag = kwargs.pop(TAG, None)
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        arguments = bound.arguments
        call = self.evaluation(executor.class_obj, arguments, tag)
        self._picture.check_size(*arguments["x"].shape[-2:])
        if self._first:
            self._first = False
            warn_of(replaced_calls(self._model))
        control = arguments.get("control")
        if control is not None:
            _, last_output = self._model.blocks[-1].slot
            arguments["control"] = self._picture.select_control(control, last_output)
        evaluate = partial(self._evaluate, executor, bound)
        scale = self._setup.image_guidance_scale
        compared = scale != 1.0 and self.run.active(call)
        out = evaluate(call, compared)
        if not compared:
            return out
        empty = evaluate(replace(call, empty=True), compared)
        return empty + scale * (out - empty)

    @uncompiled_itself
    def _pass_by(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Another model's forward, which was handed this one's options: it has no conditions."""
        self._passing_by = True
        try:
            out: Tensor = executor(*args, **kwargs)
        finally:
            self._passing_by = False
        return out

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
                with self.run.evaluation(call):
                    out: Tensor = executor(*bound.args, **bound.kwargs)
                self._watch.end(compared)
                return out
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                # Its frames hold all that the evaluation has made, which K/V need to move.
                traceback.clear_frames(error.__traceback__)
                if not self.run.relieve(call.device, has_fp8(call.device)):
                    raise
            comfy.model_management.soft_empty_cache()

    @uncompiled
    def evaluation(self, flux: Any, arguments: Mapping[str, Any], tag: Tensor | None) -> Evaluation:
        """What the host hands over to the model's forward, as the engine needs it.

        Args:
            flux: the host's module.
            arguments: of its forward.
            tag: the rows' names, if they have come along.
        """
        x: Tensor = arguments["x"]
        options = arguments["transformer_options"]
        pooled = arguments.get("y")
        if pooled is None:
            pooled = x.new_zeros(len(x), flux.params.vec_in_dim)
        hw = size_in_tokens(flux, x)
        chunks = self._rows.chunks(len(x), options, tag, (hw, self.canvas))
        if hw != self.canvas and all(chunk.origin is None for chunk in chunks):
            patch = 8 * flux.params.patch_size
            raise Omini2Error(
                f"model: it is run on {hw[1] * patch}x{hw[0] * patch} pixels at a time, by another "
                "extension on tiles of the picture or by a sampler that makes the picture smaller, "
                "and conditions can't tell where these lie; take that extension's node or that "
                "sampler out of the graph, or Apply Omini2 LoRA."
            )
        sigmas = options.get("sigmas", arguments["timestep"])  # which are the same for FLUX.1
        rope = options.get("rope_options") or {}
        axis_map = (
            (1.0, rope.get("shift_t", 0.0)),
            (rope.get("scale_y", 1.0), rope.get("shift_y", 0.0)),
            (rope.get("scale_x", 1.0), rope.get("shift_x", 0.0)),
        )
        return Evaluation(
            chunks,
            pooled.to(x.dtype),
            self.canvas,
            Moment(sigmas[0], self._schedule),
            axis_map,
            guidance=arguments.get("guidance"),
            time=arguments["timestep"],
        )

    def post_input(self, args: dict[str, Any]) -> dict[str, Any]:
        """Behind the model's first layers: takes out what isn't painted."""
        assert isinstance(self._picture, Integration)
        return args if self._passing_by else self._picture.take(args)

    def _putting_back(self, last_block: Callable[..., Any]) -> Callable[..., Any]:
        """The last block's replacement, with what was taken out put back behind it."""

        def replacement(args: dict[str, Any], extra: dict[str, Any]) -> Any:
            out = last_block(args, extra)
            if self._passing_by:
                return out
            assert isinstance(self._picture, Integration)
            return {**out, "img": self._picture.put_back(out["img"])}

        return replacement

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
        if self._passing_by:
            return original_of(previous, extra["original_block"], args, extra)()
        self._watch.block()
        if number == 0:
            self._picture.before_blocks(self._watch.replaced_by)
        computed = partial(self._compute, extra["original_block"])
        original = original_of(previous, computed, args, extra)
        # TeaCache, WaveSpeed and PuLID run the blocks in a forward of their own, which gives them
        # no options; without these attention wouldn't come by here.
        module, told = self._model.blocks[number].module, "transformer_options" in args
        with nullcontext() if told else _given(module, self._watch.options):
            return self.run.block(number, original)

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
        if self._passing_by or not kwargs.get("skip_reshape") or rest:
            # Not how FLUX.1's blocks call it, or not this one's.
            return call_on(previous, function, *args, **kwargs)
        self._watch.attention()
        ours = kwargs.pop(OUR_MASK, False)
        mask = kwargs.pop("mask", None)
        if mask is not None and mask.shape[-1] != k.shape[2]:  # the host's, for all tokens
            mask = self._picture.select_mask(mask)
        main = Called(function, previous, heads, kwargs)
        own = Called(function, None, heads, kwargs)
        sums = partial_of(function, q, k, v)
        kernels = Kernels(
            self._masks.guard(main, ("main", function), None if ours else mask),
            self._masks.guard(own, ("own", function), mask),
            None if previous is not None else sums,  # an override may be anything
            sums,
        )
        return self.run.attend(kernels, q, k, v, mask)


def _say_unmasked() -> None:
    warn(
        "condition_scale: the attention that is switched on takes no masks, so PyTorch's takes its "
        "place where a scale or a prompt's mask needs one; set condition_scale to 1 for the speed "
        "of the other."
    )


def original_of(
    previous: Callable[..., Any] | None,
    computed: Callable[..., Any],
    args: dict[str, Any],
    extra: dict[str, Any],
) -> Callable[[], Any]:
    """A block as it would run without this extension, with what others have put around it."""
    if previous is None:
        return partial(computed, args)
    return partial(previous, args, {**extra, "original_block": computed})


def others_between(model_options: Mapping[str, Any]) -> bool:
    """Whether other extensions are called between the host's batch of prompts and the model."""
    wrappers = model_options["transformer_options"].get("wrappers", {})
    kinds = WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL
    others = {key for kind in kinds for key, each in wrappers.get(kind, {}).items() if each}
    return "model_function_wrapper" in model_options or bool(others - {KEY})


def _given(block: Any, options: dict[str, Any]) -> Any:
    """While it is entered, a block that is called without transformer options gets these."""

    def add(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {"transformer_options": options, **kwargs}

    return block.register_forward_pre_hook(add, with_kwargs=True)


def size_in_tokens(flux: Any, latent: Tensor) -> tuple[int, int]:
    """Rows and columns of a latent (..., height, width) in tokens."""
    height, width = latent.shape[-2:]
    patch = flux.params.patch_size
    return math.ceil(height / patch), math.ceil(width / patch)
