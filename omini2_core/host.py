"""Installs the engine on ComfyUI's own FLUX.1 through the host's public hooks.

With ``host_model`` and ``host_memory`` it is all that knows ComfyUI's internals. A node adds one
OUTER_SAMPLE wrapper and an immutable :class:`Setup` to a clone of the model; everything else is
installed when a run starts, on the run's own copy of the options, and is gone when it ends,
however it ends.
"""

import inspect
import math
import time
import traceback
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.model_sampling
import comfy.utils
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP, add_wrapper_with_key
from torch import Tensor

from .attention import Attention, honours_masks, log_scale
from .cache import CachePolicy
from .compiled import uncompiled, uncompiled_itself
from .engine import Kernels, Run
from .errors import Omini2Error, warn
from .figures import node_figures
from .host_memory import has_fp8, memory_wrapper
from .host_model import (
    FluxBackbone,
    kept_of,
    lora_targets,
    ordinary_lora_deltas,
    partial_of,
    replaced_forward,
    require_flux1,
    require_own_parts,
    weights_identity,
)
from .host_report import cache_progress
from .host_report import report as _report
from .host_versions import is_out_of_memory
from .integration import Integration, schedule_shift
from .lora import SharedLinears, merge
from .parts import Part, name_parts
from .run_branch import Chunk, Evaluation, Moment, RunBranch, RunSaved
from .setup import Branch, SavedBranch, Setup
from .watch import Watch

__all__ = [
    "add_branch",
    "get_setup",
    "lanczos",
    "lora_targets",
    "require_flux1",
    "resize",
    "with_setup",
]

KEY = "omini2"
ATTENTION_OVERRIDE = "optimized_attention_override"
RESAMPLING = "area"
FLUX1_KV_BYTES_PER_TOKEN = 57 * 2 * 3072 * 2  # blocks, K and V, width, 16 bits


# --- what the nodes add ------------------------------------------------------------------------


def get_setup(model: ModelPatcher) -> Setup:
    """What the extension's nodes have said about this model so far."""
    return model.model_options["transformer_options"].get(KEY) or Setup()


def with_setup(model: ModelPatcher, setup: Setup) -> ModelPatcher:
    """A clone of the model with this setup; the model given stays as it was."""
    clone = model.clone()
    clone.model_options["transformer_options"][KEY] = setup
    # Adding appends: without removing, a second node would run the wrapper twice.
    clone.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _outer_sample)
    clone.remove_callbacks_with_key(CallbacksMP.ON_DETACH, KEY)
    clone.add_callback_with_key(CallbacksMP.ON_DETACH, KEY, _unloaded)
    return clone


def _unloaded(model: ModelPatcher, unpatch_all: bool) -> None:
    """What is kept between runs leaves the device with the model, not when a clone takes over."""
    if unpatch_all:
        kept_of(model).clear()


def add_branch(model: ModelPatcher, branch: Branch) -> ModelPatcher:
    """A clone of the model with one more condition.

    Raises:
        Omini2Error: a second token integration.
    """
    setup = get_setup(model)
    paint = branch.condition.paint
    if paint is not None and setup.integration is not None:
        raise Omini2Error(
            "condition: this model has a token integration already, and a picture can have only "
            "one; join the masks in one Compact Tokens node."
        )
    clone = with_setup(model, replace(setup, branches=(*setup.branches, branch)))
    if branch.condition.shift_schedule and paint is not None and not paint.all():
        _shift_schedule(clone, int(paint.sum()))
    return clone


def _shift_schedule(model: ModelPatcher, tokens: int) -> None:
    """Shifts FLUX.1-dev's noise schedule for this many picture tokens, as the original does.

    FLUX.1-schnell's schedule has no shift, here as in the original.
    """
    current = model.get_model_object("model_sampling")
    if not isinstance(current, comfy.model_sampling.ModelSamplingFlux):
        return
    shifted = type(current)(model.model.model_config)
    shifted.set_parameters(shift=schedule_shift(tokens))
    model.add_object_patch("model_sampling", shifted)


class Captured(Exception):
    """Ends a run that was only to compute K/V."""


# --- one run -----------------------------------------------------------------------------------


def _outer_sample(executor: Any, *args: Any, **kwargs: Any) -> Any:
    guider = executor.class_obj
    given = guider.model_options
    setup: Setup = given["transformer_options"][KEY]
    arguments = inspect.signature(executor.original).bind(*args, **kwargs).arguments
    patcher: ModelPatcher = guider.model_patcher
    integration = _integration(patcher, setup, arguments["noise"])
    # A condition_scale of 0 shuts a condition out, so it isn't run at all; nor is one of which
    # token integration leaves nothing known.
    branches = [b for b in setup.branches if b.condition_scale > 0 and b.condition.token_count]
    saved = [b for b in setup.saved if b.condition_scale > 0]
    if not branches and not saved and integration is None:
        if not setup.branches and not setup.saved:
            warn("model: no condition is applied to it; add an Apply Omini2 LoRA node.")
        return executor(*args, **kwargs)

    flux = require_flux1(patcher)
    require_own_parts(patcher)
    if patcher.get_additional_models_with_key("multigpu"):
        raise Omini2Error(
            "model: MultiGPU CFG Split runs prompts on several devices at once, and conditions are "
            "computed on one; take that node out of the graph."
        )
    weights = weights_identity(patcher)
    run = Run(
        FluxBackbone(flux),
        _run_branches(patcher, branches, arguments["noise"].shape),
        setup.policy or CachePolicy(),
        None if weights is None else kept_of(patcher),
        weights,
        _run_saved(patcher, saved),
    )
    run.progress = cache_progress(setup.policy_node)
    schedule = [float(sigma) for sigma in arguments["sigmas"]]
    options = comfy.model_patcher.create_model_options_clone(given)
    canvas = _size_in_tokens(flux, arguments["noise"])
    _install(options["transformer_options"], run, setup, integration, schedule, flux, canvas)
    to_host = memory_wrapper(setup, run, _chunk_count(guider))
    add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, to_host, options["transformer_options"])
    guider.model_options = options
    started = time.perf_counter()
    try:
        out = executor(*args, **kwargs)
        if integration is not None and schedule[-1] == 0:
            # Samplers add and subtract noise, which floats don't undo to the last bit.
            out = integration.known_in(out, integration.given)
        return out
    finally:
        guider.model_options = given
        run.close()
        steps = len(schedule) - 1
        on_cpu = comfy.model_management.is_device_cpu(patcher.load_device)
        # A run that only computes K/V for a file is none that a node should tell of.
        shown = setup if setup.capture is None else Setup()
        nodes = node_figures(shown, run.stats, steps, canvas, on_cpu)
        _report(run, steps, time.perf_counter() - started, nodes)


def _chunk_count(guider: Any) -> int:
    """How many prompts the sampler will evaluate, positive and negative."""
    conds = guider.conds
    if getattr(guider, "cfg", None) == 1.0 and "positive" in conds:
        return len(conds["positive"])  # the host leaves the negative out
    return sum(map(len, conds.values()))


def _integration(patcher: ModelPatcher, setup: Setup, noise: Tensor) -> Integration | None:
    if setup.integration is None:
        return None
    condition = setup.integration.condition
    assert condition.paint is not None
    known = patcher.model.process_latent_in(condition.latent)
    integration = Integration(condition.paint, condition.latent, known)
    integration.check_size(*noise.shape[-2:])
    # With nothing known there is nothing to take out: plain sampling.
    return None if condition.paint.all() else integration


def _run_branches(
    patcher: ModelPatcher, branches: list[Branch], picture: torch.Size
) -> list[RunBranch]:
    batch, _, height, width = picture
    sampling = patcher.get_model_object("model_sampling")
    ordinary = ordinary_lora_deltas(patcher)
    prepared = []
    loras: dict[tuple[str, float], SharedLinears] = {}
    for branch in branches:
        condition = branch.condition
        if len(condition.pixels) > batch:
            warn(
                f"image: it holds {len(condition.pixels)} images for {batch} pictures, "
                "so the last ones are not used; raise batch_size or leave them out."
            )
        covered = condition.coverage()
        if (
            covered is not None
            and max(abs(covered[0] - height / 2), abs(covered[1] - width / 2)) > 1
        ):
            warn(
                f"placement: aligned, the condition covers {16 * covered[1]:.0f}x"
                f"{16 * covered[0]:.0f} pixels from the upper left of a picture of "
                f"{8 * width}x{8 * height}; set placement to fit or make the sizes equal."
            )
        lora = branch.lora.digest, branch.strength
        if lora not in loras:
            deltas = merge((branch.lora.deltas, branch.strength), (ordinary, -1.0))
            loras[lora] = SharedLinears(deltas)
        prepared.append(
            RunBranch(
                condition=condition,
                latent=patcher.model.process_latent_in(condition.latent),
                empty=patcher.model.process_latent_in(condition.empty),
                lora=f"{lora}",
                linears=loras[lora],
                joint=branch.joint,
                bias=log_scale(branch.condition_scale),
                start_sigma=_start_sigma(sampling, branch.start_percent),
                end_sigma=_end_sigma(sampling, branch.end_percent),
                guidance=branch.lora.family.branch_guidance,
                centred=branch.lora.family.centred,
            )
        )
    return prepared


def _run_saved(patcher: ModelPatcher, branches: list[SavedBranch]) -> list[RunSaved]:
    sampling = patcher.get_model_object("model_sampling")
    return [
        RunSaved(
            branch.saved,
            log_scale(branch.condition_scale),
            _start_sigma(sampling, branch.start_percent),
            _end_sigma(sampling, branch.end_percent),
        )
        for branch in branches
    ]


def _start_sigma(sampling: Any, percent: float) -> float:
    return float(sampling.percent_to_sigma(percent)) if percent > 0 else math.inf


def _end_sigma(sampling: Any, percent: float) -> float:
    return float(sampling.percent_to_sigma(percent)) if percent < 1 else -math.inf


def _install(
    to: dict[str, Any],
    run: Run,
    setup: Setup,
    integration: Integration | None,
    schedule: list[float],
    flux: Any,
    canvas: tuple[int, int],
) -> None:
    """Puts the run's hooks into a run's own transformer options, around what is there already."""
    own: dict[Hashable, Any] = {}
    watch = Watch(own)
    add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, _parts_wrapper(setup), to)
    forward = _forward_wrapper(run, watch, setup, integration, schedule, canvas)
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, forward, to)
    attention = _attention_override(run, watch, integration, to.get(ATTENTION_OVERRIDE))
    to[ATTENTION_OVERRIDE] = attention
    blocks = to.setdefault("patches_replace", {}).setdefault("dit", {})
    for kind, modules in (("double", flux.double_blocks), ("single", flux.single_blocks)):
        for index, module in enumerate(modules):
            slot = f"{kind}_block", index
            own[slot] = _block_replacement(run, watch, kind, index, module, blocks.get(slot))
    if integration is not None:
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _known_wrapper(integration), to)
        to.setdefault("patches", {}).setdefault("post_input", []).append(integration.take)
        own[slot] = _putting_back(integration, own[slot])
        own["double_block", 0] = _taken_out(integration, flux, own["double_block", 0])
    blocks.update(own)


def _taken_out(
    integration: Integration, flux: Any, first_block: Callable[..., Any]
) -> Callable[..., Any]:
    @uncompiled_itself
    def replacement(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        if not integration.picture_rows:
            raise Omini2Error(
                f"token_integration: another extension ({replaced_forward(flux)}) has replaced the "
                "model's forward by one that can't leave tokens out; take it out of the graph or "
                "switch token_integration off."
            )
        return first_block(args, extra)

    return replacement


def _putting_back(integration: Integration, last_block: Callable[..., Any]) -> Callable[..., Any]:
    def replacement(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        out = last_block(args, extra)
        return {**out, "img": integration.put_back(out["img"])}

    return replacement


def _known_wrapper(integration: Integration) -> Callable[..., Any]:
    """Denoises the known tokens to what is known, whatever the model said of them."""

    def apply_model(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        return integration.known_in(executor(*args, **kwargs), integration.known)

    return apply_model


def _parts_wrapper(setup: Setup) -> Callable[..., Any]:
    images = max((len(b.condition.latent) for b in setup.branches), default=1)

    def calc_cond_batch(executor: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        options = bound.arguments["model_options"]["transformer_options"]
        window = options.get("context_window")
        if window is not None and window.dim == 0 and images > 1:
            raise Omini2Error(
                f"image: it holds {images} images, one for each picture of the batch, but context "
                "windows take the batch apart; use one image or leave the context windows out."
            )
        bound.arguments["conds"] = name_parts(bound.arguments["conds"], window)
        return executor(*bound.args, **bound.kwargs)

    return calc_cond_batch


def _block_replacement(
    run: Run,
    watch: Watch,
    kind: str,
    index: int,
    block: Any,
    previous: Callable[..., Any] | None,
) -> Callable[..., Any]:
    @uncompiled_itself
    def replacement(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        @uncompiled_itself
        def computed(args: dict[str, Any]) -> Any:
            with watch.computing():
                return extra["original_block"](args)

        @uncompiled_itself
        def original() -> Any:
            if previous is None:
                return computed(args)
            return previous(args, {**extra, "original_block": computed})

        watch.block()
        if "transformer_options" in args:
            return run.block(kind, index, original)
        # TeaCache, WaveSpeed and PuLID run the blocks in a forward of their own, which gives them
        # no options; without these attention wouldn't come by here.
        with _given(block, watch.options):
            return run.block(kind, index, original)

    return replacement


def _given(block: Any, options: dict[str, Any]) -> Any:
    """While it is entered, a block that is called without transformer options gets these."""

    def add(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {"transformer_options": options, **kwargs}

    return block.register_forward_pre_hook(add, with_kwargs=True)


def _attention_override(
    run: Run,
    watch: Watch,
    integration: Integration | None,
    previous: Callable[..., Any] | None,
) -> Callable[..., Any]:
    honours: dict[Hashable, bool] = {}

    def masked(attend: Attention, name: Hashable, given: Tensor | None) -> Attention:
        """``attend``, or PyTorch's attention for masks of ours that it would ignore."""

        def careful(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            if mask is None or mask is given:
                return attend(q, k, v, mask)
            if name not in honours:
                honours[name] = honours_masks(attend, q, k, v)
                if not honours[name]:
                    warn(
                        "condition_scale: the attention that is switched on takes no masks, so "
                        "PyTorch's takes its place where a scale or a prompt's mask needs one; set "
                        "condition_scale to 1 for the speed of the other."
                    )
            if honours[name]:
                return attend(q, k, v, mask)
            out: Tensor = attention_pytorch(q, k, v, q.shape[1], mask=mask, skip_reshape=True)
            return out

        return careful

    @uncompiled
    def override(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        q, k, v, heads, *rest = args
        if not kwargs.get("skip_reshape") or rest:  # not how FLUX's blocks call it
            return _call_on(previous, function, *args, **kwargs)
        watch.attention()
        mask = kwargs.pop("mask", None)
        if integration is not None:
            mask = integration.select_mask(mask)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return _call_on(previous, function, q, k, v, heads, mask=mask, **kwargs)

        def own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return function(q, k, v, heads, mask=mask, **kwargs)

        sums = partial_of(function, q, k, v)
        # An override may be anything, so nothing is known of its sums.
        kernels = Kernels(
            masked(attend, ("main", function), mask),
            masked(own, ("own", function), mask),
            None if previous is not None else sums,
            sums,
        )
        return run.attend(kernels, q, k, v, mask)

    return override


def _call_on(
    previous: Callable[..., Any] | None, function: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    return function(*args, **kwargs) if previous is None else previous(function, *args, **kwargs)


def _forward_wrapper(
    run: Run,
    watch: Watch,
    setup: Setup,
    integration: Integration | None,
    schedule: list[float],
    canvas: tuple[int, int],
) -> Callable[..., Any]:
    @uncompiled_itself
    def forward(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        arguments = bound.arguments
        call = _evaluation(executor.class_obj, arguments, schedule, canvas)
        replaced_by = replaced_forward(executor.class_obj)
        if integration is not None:
            integration.check_size(*arguments["x"].shape[-2:])
            last = len(executor.class_obj.single_blocks) - 1
            arguments["control"] = integration.select_control(arguments.get("control"), last)
            args, kwargs = bound.args, bound.kwargs

        scale = setup.image_guidance_scale

        @uncompiled_itself
        def evaluate(call: Evaluation) -> Tensor:
            while True:
                try:
                    watch.begin(arguments["transformer_options"])
                    if integration is not None:
                        integration.picture_rows = 0
                    with run.evaluation(call):
                        out: Tensor = executor(*args, **kwargs)
                    watch.end(replaced_by, scale != 1.0 and run.active(call))
                    return out
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    # Its frames hold all that the evaluation has made, which K/V need to move.
                    traceback.clear_frames(error.__traceback__)
                    device = call.pooled.device
                    if not run.relieve(device, has_fp8(device)):
                        raise
                comfy.model_management.soft_empty_cache()

        if setup.capture is not None:
            for each in [call] if scale == 1.0 else [call, replace(call, empty=True)]:
                with run.evaluation(each):
                    setup.capture(each, run.first_entry(each))
            raise Captured
        out = evaluate(call)
        if scale == 1.0 or not run.active(call):
            return out
        empty = evaluate(replace(call, empty=True))
        return empty + scale * (out - empty)

    return forward


@uncompiled
def _evaluation(
    flux: Any, arguments: dict[str, Any], schedule: list[float], canvas: tuple[int, int]
) -> Evaluation:
    x: Tensor = arguments["x"]
    options = arguments["transformer_options"]
    batch = len(x)
    pooled = arguments.get("y")
    if pooled is None:
        pooled = x.new_zeros(batch, flux.params.vec_in_dim)
    hw = _size_in_tokens(flux, x)
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


def _size_in_tokens(flux: Any, latent: Tensor) -> tuple[int, int]:
    height, width = latent.shape[-2:]
    patch = flux.params.patch_size
    return math.ceil(height / patch), math.ceil(width / patch)


def resize(pixels: Tensor, height: int, width: int, method: str = RESAMPLING) -> Tensor:
    """(n, H, W, 3) -> (n, height, width, 3) with the host's own resampling."""
    resized = comfy.utils.common_upscale(pixels.movedim(-1, 1), width, height, method, "disabled")
    back: Tensor = resized.movedim(1, -1).clamp(0, 1)
    return back


def lanczos(pixels: Tensor, height: int, width: int) -> Tensor:
    """:func:`resize` as the host's Upscale Image does with lanczos: sharp, in 8 bits."""
    return resize(pixels, height, width, "lanczos")
