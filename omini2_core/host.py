"""Installs the engine on ComfyUI's own FLUX.1 through the host's public hooks.

The only module that knows ComfyUI's internals. A node adds one OUTER_SAMPLE wrapper and an
immutable :class:`Setup` to a clone of the model; everything else is installed when a run starts,
on the run's own copy of the options, and is gone when it ends, however it ends.
"""

import inspect
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.ldm.flux.model
import comfy.model_base
import comfy.model_patcher
import comfy.model_sampling
import comfy.utils
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor

from .attention import log_scale
from .cache import CachePolicy
from .engine import Chunk, Evaluation, Run, RunBranch
from .errors import Omini2Error, warn
from .integration import Integration, schedule_shift
from .lora import Delta, Deltas, Linears, Target, merge
from .setup import Branch, Setup

KEY = "omini2"
ATTENTION_OVERRIDE = "optimized_attention_override"
RESAMPLING = "area"
FLUX1_KV_BYTES_PER_TOKEN = 57 * 2 * 3072 * 2  # blocks, K and V, width, 16 bits
BRANCH_LINEARS = (  # the linear layers that a condition's tokens pass through
    ("img_in",),
    ("img_mod.lin", "img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2"),
    ("modulation.lin", "linear1", "linear2"),
)


# --- the model ---------------------------------------------------------------------------------


def require_flux1(model: ModelPatcher) -> Any:
    """The diffusion model, if it is ComfyUI's own FLUX.1 without extra picture channels.

    Raises:
        Omini2Error: it is anything else; decided by what it is, never by a file name.
    """
    base = model.model
    diffusion_model: Any = getattr(base, "diffusion_model", None)
    config = getattr(getattr(base, "model_config", None), "unet_config", {})
    # Flux.2 and Chroma share classes with FLUX.1, but have no pooled text.
    if (
        not isinstance(base, comfy.model_base.Flux)
        or type(diffusion_model) is not comfy.ldm.flux.model.Flux
        or config.get("image_model") != "flux"
        or diffusion_model.params.vec_in_dim is None
    ):
        raise Omini2Error(
            f"model: this is {_model_name(base)}, not FLUX.1 as ComfyUI runs it; load a FLUX.1 "
            "dev, schnell or Krea model with Load Diffusion Model or Load Checkpoint."
        )
    params = diffusion_model.params
    if diffusion_model.img_in.in_features != params.out_channels * params.patch_size**2:
        raise Omini2Error(
            "model: this FLUX.1 takes extra picture channels (Fill, Canny, Depth or a control "
            "LoRA); load plain FLUX.1 dev, schnell or Krea instead."
        )
    return diffusion_model


def _model_name(base: object) -> str:
    inner = type(getattr(base, "diffusion_model", base)).__name__
    outer = type(base).__name__
    return outer if inner == outer else f"{outer} ({inner})"


def lora_targets(flux: Any, config: dict[str, Any]) -> tuple[dict[str, Target], set[str]]:
    """Diffusers' module names -> where they are in ComfyUI's model.

    Returns:
        the modules that a condition passes through, and the names of all the others.
    """
    first, double, single = BRANCH_LINEARS
    targets: dict[str, Target] = {}
    foreign: set[str] = set()
    for name, where in comfy.utils.flux_to_diffusers(config).items():
        if not name.endswith(".weight"):
            continue
        module = name.removesuffix(".weight")
        key, offset = (where, None) if isinstance(where, str) else where[:2]
        path = key.removesuffix(".weight")
        kind, _, rest = path.partition(".")
        inner = rest.partition(".")[2]
        if (
            path in first
            or (kind, inner in double) == ("double_blocks", True)
            or (kind == "single_blocks" and inner in single)
        ):
            linear = flux.get_submodule(path)
            start, length = (0, linear.out_features) if offset is None else offset[1:]
            targets[module] = Target(path, start, length, linear.in_features)
        else:
            foreign.add(module)
    return targets, foreign


class FluxBackbone:
    """The engine's view of ComfyUI's FLUX; see ``engine.Backbone``."""

    def __init__(self, flux: Any) -> None:
        self._flux = flux

    @property
    def double_blocks(self) -> Any:
        return self._flux.double_blocks

    @property
    def single_blocks(self) -> Any:
        return self._flux.single_blocks

    def embed(self, linear: Linears, tokens: Tensor) -> Tensor:
        return linear("img_in", self._flux.img_in, tokens)

    def vector(self, linear: Linears, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        flux = self._flux

        def mlp(path: str, module: Any, x: Tensor) -> Tensor:
            hidden = linear(f"{path}.in_layer", module.in_layer, x)
            return linear(f"{path}.out_layer", module.out_layer, module.silu(hidden))

        def embedding(t: Tensor) -> Tensor:
            return comfy.ldm.flux.layers.timestep_embedding(t, 256).to(pooled.dtype)

        start = torch.zeros(pooled.shape[0], device=pooled.device)
        vector = mlp("time_in", flux.time_in, embedding(start))
        if flux.params.guidance_embed and guidance is not None:
            vector = vector + mlp("guidance_in", flux.guidance_in, embedding(guidance))
        return vector + mlp("vector_in", flux.vector_in, pooled[:, : flux.params.vec_in_dim])

    def rope(self, ids: Tensor) -> Tensor:
        return self._flux.pe_embedder(ids)

    def rotate(self, q: Tensor, k: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
        return comfy.ldm.flux.math.apply_rope(q, k, rotations)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return optimized_attention(q, k, v, q.shape[1], mask=mask, skip_reshape=True)


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
    return clone


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
    if not branches and integration is None:
        if not setup.branches:
            warn("no condition is applied to this model; add an Apply Omini2 LoRA node.")
        return executor(*args, **kwargs)

    flux = require_flux1(patcher)
    run = Run(
        FluxBackbone(flux),
        _run_branches(patcher, branches, arguments["noise"].shape),
        setup.policy or CachePolicy(),
    )
    schedule = [float(sigma) for sigma in arguments["sigmas"]]
    options = comfy.model_patcher.create_model_options_clone(given)
    _install(options["transformer_options"], run, setup, integration, schedule, flux)
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
        _report(run, len(schedule) - 1, time.perf_counter() - started)


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
    ordinary = _ordinary_lora_deltas(patcher)
    prepared = []
    for branch in branches:
        condition = branch.condition
        if len(condition.pixels) > batch:
            warn(
                f"image: it holds {len(condition.pixels)} images for {batch} pictures; "
                "the last ones are not used."
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
        prepared.append(
            RunBranch(
                condition=condition,
                latent=patcher.model.process_latent_in(condition.latent),
                empty=patcher.model.process_latent_in(condition.empty),
                deltas=merge((branch.lora.deltas, branch.strength), (ordinary, -1.0)),
                joint=branch.joint,
                bias=log_scale(branch.condition_scale),
                start_sigma=float(sampling.percent_to_sigma(branch.start_percent)),
                end_sigma=float(sampling.percent_to_sigma(branch.end_percent)),
                guidance=branch.lora.family.branch_guidance,
                centred=branch.lora.family.centred,
            )
        )
    return prepared


def _ordinary_lora_deltas(patcher: ModelPatcher) -> Deltas:
    """What LoRAs loaded the ordinary way add to the model's weights.

    They are meant for text and picture only, but the branches go through the same weights; so
    each branch takes them off again, on its activations. Patches of other kinds than plain LoRA
    (merged models above all) stay.

    Raises:
        Omini2Error: a control LoRA, which changes what the model's first layer takes.
    """
    deltas: Deltas = {}
    others: set[str] = set()
    for key, patches in patcher.patches.items():
        path = key.removeprefix("diffusion_model.").removesuffix(".weight")
        kept: list[Delta] = []
        for strength, patch, strength_model, offset, function, *_ in patches:
            if strength_model != 1.0:
                kept = [replace(d, scale=d.scale * strength_model) for d in kept]
            name = getattr(patch, "name", None)
            if name is None:
                continue
            if name != "lora" or function is not None:
                others.add(name)
                continue
            up, down, alpha, mid, dora_scale, reshape = patch.weights
            if reshape is not None:
                raise Omini2Error(
                    "model: a control LoRA gives this FLUX.1 extra picture channels, which "
                    "conditions have none of; take it out of the graph."
                )
            if mid is not None or dora_scale is not None:
                others.add("lora with mid weights" if dora_scale is None else "dora")
                continue
            scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
            start = 0 if offset is None else offset[1]
            kept.append(Delta(start, down.flatten(1), up.flatten(1), scale))
        if kept:
            deltas[path] = kept
    if patcher.hook_patches:
        others.add("hook")
    if others:
        warn(
            f"model: a LoRA of type {', '.join(sorted(others))} changes the conditions too; only "
            "plain LoRAs can be kept to text and picture, so check the result or leave it out."
        )
    return deltas


def _install(
    to: dict[str, Any],
    run: Run,
    setup: Setup,
    integration: Integration | None,
    schedule: list[float],
    flux: Any,
) -> None:
    """Puts the run's hooks into a run's own transformer options, around what is there already."""
    forward = _forward_wrapper(run, setup, integration, schedule)
    add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, forward, to)
    add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _memory_wrapper(setup), to)
    to[ATTENTION_OVERRIDE] = _attention_override(run, integration, to.get(ATTENTION_OVERRIDE))
    blocks = to.setdefault("patches_replace", {}).setdefault("dit", {})
    for kind, modules in (("double", flux.double_blocks), ("single", flux.single_blocks)):
        for index in range(len(modules)):
            slot = f"{kind}_block", index
            blocks[slot] = _block_replacement(run, kind, index, blocks.get(slot))
    if integration is not None:
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, _known_wrapper(integration), to)
        to.setdefault("patches", {}).setdefault("post_input", []).append(integration.take)
        blocks[slot] = _putting_back(integration, blocks[slot])


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


def _block_replacement(
    run: Run, kind: str, index: int, previous: Callable[..., Any] | None
) -> Callable[..., Any]:
    def replacement(args: dict[str, Any], extra: dict[str, Any]) -> Any:
        def original() -> Any:
            if previous is None:
                return extra["original_block"](args)
            return previous(args, extra)

        return run.block(kind, index, original)

    return replacement


def _attention_override(
    run: Run, integration: Integration | None, previous: Callable[..., Any] | None
) -> Callable[..., Any]:
    def override(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        q, k, v, heads, *rest = args
        if not kwargs.get("skip_reshape") or rest:  # not how FLUX's blocks call it
            return _call_on(previous, function, *args, **kwargs)
        mask = kwargs.pop("mask", None)
        if integration is not None:
            mask = integration.select_mask(mask)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return _call_on(previous, function, q, k, v, heads, mask=mask, **kwargs)

        def own(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            return function(q, k, v, heads, mask=mask, **kwargs)

        return run.attend(attend, own, q, k, v, mask)

    return override


def _call_on(
    previous: Callable[..., Any] | None, function: Callable[..., Tensor], *args: Any, **kwargs: Any
) -> Tensor:
    return function(*args, **kwargs) if previous is None else previous(function, *args, **kwargs)


def _forward_wrapper(
    run: Run, setup: Setup, integration: Integration | None, schedule: list[float]
) -> Callable[..., Any]:
    def forward(executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        arguments = bound.arguments
        call = _evaluation(executor.class_obj, arguments, schedule)
        if integration is not None:
            integration.check_size(*arguments["x"].shape[-2:])
            last = len(executor.class_obj.single_blocks) - 1
            arguments["control"] = integration.select_control(arguments.get("control"), last)
            args, kwargs = bound.args, bound.kwargs
        with run.evaluation(call):
            out = executor(*args, **kwargs)
        scale = setup.image_guidance_scale
        if scale == 1.0 or not run.active(call.sigma):
            return out
        with run.evaluation(replace(call, empty=True)):
            empty = executor(*args, **kwargs)
        return empty + scale * (out - empty)

    return forward


def _evaluation(flux: Any, arguments: dict[str, Any], schedule: list[float]) -> Evaluation:
    x: Tensor = arguments["x"]
    options = arguments["transformer_options"]
    batch, _, height, width = x.shape
    pooled = arguments.get("y")
    if pooled is None:
        pooled = x.new_zeros(batch, flux.params.vec_in_dim)
    patch = flux.params.patch_size
    hw = math.ceil(height / patch), math.ceil(width / patch)
    identities = options.get("uuids") or [None]
    rows = batch // len(identities)
    chunks = tuple(
        Chunk((identity, hw), range(i * rows, (i + 1) * rows))
        for i, identity in enumerate(identities)
    )
    sigma = float(options["sigmas"][0])
    rope = options.get("rope_options") or {}
    axis_map = (
        (1.0, rope.get("shift_t", 0.0)),
        (rope.get("scale_y", 1.0), rope.get("shift_y", 0.0)),
        (rope.get("scale_x", 1.0), rope.get("shift_x", 0.0)),
    )
    step = step_of(sigma, schedule)
    guidance = arguments.get("guidance")
    return Evaluation(chunks, pooled.to(x.dtype), hw, sigma, step, axis_map, guidance=guidance)


def step_of(sigma: float, schedule: list[float]) -> int:
    """The interval of a falling schedule that a noise level lies in.

    A level on a boundary belongs to the interval that it opens, so a sampler's look-ahead to the
    end of its step counts as the next step's first evaluation.
    """
    opened = sum(boundary >= sigma * (1 - 1e-5) for boundary in schedule)
    return min(max(opened - 1, 0), max(len(schedule) - 2, 0))


def _memory_wrapper(setup: Setup) -> Callable[..., Any]:
    """Reserves room for the branches, K/V and LoRAs by asking for a larger picture."""

    def prepare(executor: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        model: ModelPatcher = bound.arguments["model"]
        batch, channels, height, width, *_ = bound.arguments["noise_shape"]
        per_pixel = model.model.memory_required([1, channels, height, width]) / (height * width)
        tokens = sum(b.condition.token_count for b in setup.branches)
        kv = tokens * kv_bytes_per_token(model) * (2 if setup.image_guidance_scale != 1.0 else 1)
        kv += sum(b.lora.parameters for b in setup.branches) * number_bytes(model)
        extra = math.ceil((4 * tokens + kv / per_pixel) / width)
        bound.arguments["noise_shape"] = [batch, channels, height + extra, width]
        return executor(*bound.args, **bound.kwargs)

    return prepare


def resize(pixels: Tensor, height: int, width: int, method: str = RESAMPLING) -> Tensor:
    """(n, H, W, 3) -> (n, height, width, 3) with the host's own resampling."""
    resized = comfy.utils.common_upscale(pixels.movedim(-1, 1), width, height, method, "disabled")
    return resized.movedim(1, -1).clamp(0, 1)


def lanczos(pixels: Tensor, height: int, width: int) -> Tensor:
    """:func:`resize` as the host's Upscale Image does with lanczos: sharp, in 8 bits."""
    return resize(pixels, height, width, "lanczos")


def kv_bytes_per_token(model: ModelPatcher) -> int:
    """Bytes of K and V that one condition token takes over all blocks."""
    flux = model.model.diffusion_model
    blocks = len(flux.double_blocks) + len(flux.single_blocks)
    return 2 * blocks * flux.hidden_size * number_bytes(model)


def number_bytes(model: ModelPatcher) -> int:
    """Bytes of one number in the model's own computation."""
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    return comfy.model_management.dtype_size(dtype)


def _report(run: Run, steps: int, seconds: float) -> None:
    """One log line a run, and the same figures for whoever listens to the server's events."""
    stats = run.stats
    logging.info(
        "Omini2: %d condition(s), %s tokens, K/V %.1f MB, computed %d time(s) in %d step(s), "
        "%.0f %% of the condition work saved.",
        len(stats.tokens),
        "+".join(map(str, stats.tokens)),
        stats.kv_bytes / 1e6,
        stats.refreshes,
        steps,
        100 * stats.saved,
    )
    server = getattr(sys.modules.get("server"), "PromptServer", None)
    instance = getattr(server, "instance", None)
    if instance is not None:
        figures = asdict(stats) | {"steps": steps, "seconds": seconds, "saved": stats.saved}
        instance.send_sync("omini2.run", figures, instance.client_id)
