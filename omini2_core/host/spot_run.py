"""From what the Omini2 Spot Edit node says to the hooks of a run; what it can't be used with."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..cache.policy import CachePolicy
from ..cache.run_cache import RunCache
from ..engine.spot import Scores, SpotState
from ..engine.spot_keys import SpotKeys
from ..engine.spot_scores import LatentScores, PerceptualScores
from ..errors import Omini2Error, Remedy, require_kind, warn
from ..tokens.encode import masked_tokens
from .decoder_features import DecoderFeatures
from .model import model_name
from .reference_settings import all_references
from .references import Family, family_of, require_alone
from .report import cache_progress
from .setup import Setup, Spot
from .spot_hooks import SpotHooks

SERVED = ("Flux", "Flux2", "QwenImage")  # classes in ``comfy.model_base``
COMPILED_SIZES = 8  # numbers of rows that torch.compile has to make code for
WAY_OUT = "load FLUX.1 Kontext, Qwen-Image-Edit or FLUX.2, or take Omini2 Spot Edit off this model"


def require_editing(model: ModelPatcher) -> Family:
    """The row of a model that Spot Edit works on.

    Raises:
        Omini2Error: why not this model, or not with what is patched onto it.
    """
    require_kind("model", model, isinstance(model, ModelPatcher), "model", "Load Diffusion Model")
    family = family_of(model)
    if family is None or family.base not in SERVED:
        raise Omini2Error(
            f"model: this is {model_name(model.model)}, on which Spot Edit isn't known to work; "
            f"{WAY_OUT}."
        )
    require_alone(model, "model", "take Omini2 Spot Edit off this model")
    return family


def spot_hooks(
    model: ModelPatcher,
    setup: Setup,
    schedule: Sequence[float],
    noise: Tensor,
    prompts: Sequence[Mapping[str, Any]],
) -> SpotHooks:
    """The hooks of a run.

    Args:
        schedule: the noise levels.
        noise: of the pictures, (batch, channels, ..., height, width).
        prompts: in the host's form, positive ones first.

    Raises:
        Omini2Error: Spot Edit can't take part in it.
    """
    spot = setup.spot
    assert spot is not None
    family = require_editing(model)
    _require_no_others(setup)
    _require_as_they_are(prompts)
    latents = [cond.get("reference_latents") or () for cond in prompts]
    inner = model.model.diffusion_model
    side = family.patch(inner)
    given = _reference(latents, noise, spot.token_pixels // side)
    device = model.load_device
    known = model.model.process_latent_in(given.to(device))
    mask = None if spot.mask is None else _mask(spot, known, side)
    steps = len(schedule) - 1
    scores, beside = _scores(spot, model, known, side)
    multiple = _multiple(model, known, side)
    state = SpotState(spot.edit, steps, known, given, side, scores, mask, multiple)
    _say_if_idle(spot, state, steps)
    heads, _ = family.kv(inner)
    policy = setup.policy or CachePolicy()
    cache = RunCache(policy)
    keys = SpotKeys(cache, len(family.numbers(inner)), heads, spot.edit.fusion)
    keys.progress = cache_progress(setup.policy_node)
    return SpotHooks(keys, state, family, model, schedule, noise, latents, setup, beside)


def _require_no_others(setup: Setup) -> None:
    if setup.branches or setup.saved:
        raise Omini2Error(
            "model: Omini2 Spot Edit can't be used together with conditions; take it or Apply "
            "Omini2 LoRA and Omini2 Load Cache off this model."
        )
    if setup.references == "isolated":
        raise Omini2Error(
            "references: isolated ones look at each other only, so Omini2 Spot Edit can't leave "
            "them out with the picture; set references to joint in Condition Cache, or take Omini2 "
            "Spot Edit off this model."
        )


def _require_as_they_are(prompts: Sequence[Mapping[str, Any]]) -> None:
    if any(each.act for each in all_references(prompts)):
        raise Omini2Error(
            "model: Omini2 Spot Edit compares the picture with the whole reference, as the model "
            "has it; use Reference Latent in place of Omini2 Reference, set that node back to its "
            "defaults, or take Omini2 Spot Edit off this model."
        )


def require_same_place(reference: tuple[int, int], picture: tuple[int, int]) -> None:
    """Refuses a reference, by height and width in pixels, of another size than the picture.

    Raises:
        Omini2Error: it is.
    """
    if reference != picture:
        (h, w), (height, width) = reference, picture
        raise Omini2Error(
            f"model: the first reference is {w}x{h} and the picture {width}x{height}, but Spot "
            "Edit compares them place by place; give KSampler the reference's own latent, or "
            "resize the reference."
        )


def _reference(latents: Sequence[Sequence[Tensor]], noise: Tensor, pixels: int) -> Tensor:
    """The first reference's latent, one for each picture of the batch.

    Args:
        pixels: of the picture, along a latent pixel's side.
    """
    first = next((each[0] for each in latents if each), None)
    if first is None:
        raise Omini2Error(
            "model: no prompt has a reference to edit; put the picture through VAE Encode and "
            "ReferenceLatent into the positive prompt, or take Omini2 Spot Edit off this model."
        )
    of_reference, of_picture = (
        (each.shape[-2] * pixels, each.shape[-1] * pixels) for each in (first, noise)
    )
    require_same_place(of_reference, of_picture)
    first = first.reshape(len(first), *noise.shape[1:])
    return first[torch.arange(len(noise)) % len(first)]


def _mask(spot: Spot, known: Tensor, side: int) -> Tensor:
    h, w = (-(-n // side) for n in known.shape[-2:])
    pixels = spot.token_pixels
    assert spot.mask is not None
    mask = masked_tokens(spot.mask, (h, w), (h * pixels, w * pixels))
    if spot.edit.select == "mask" and mask.all():
        warn("mask: it covers the whole picture, so Spot Edit leaves nothing out.")
    return mask


def _scores(spot: Spot, model: ModelPatcher, known: Tensor, side: int) -> tuple[Scores | None, int]:
    """What tokens are chosen by, and about how many bytes that takes."""
    if spot.edit.select == "mask":
        return None, 0
    if spot.edit.select != "perceptual":
        return LatentScores(spot.edit.select, known, side), 0
    features = DecoderFeatures(spot.vae, model.model.process_latent_out, known.device)
    return PerceptualScores(features, known, side), features.nbytes(known)


def _multiple(model: ModelPatcher, known: Tensor, side: int) -> int:
    """Computed tokens come in multiples of it where each number of rows is compiled for itself."""
    h, w = (-(-n // side) for n in known.shape[-2:])
    keys = {key for kind in model.wrappers.values() for key, each in kind.items() if each}
    inner = model.model.diffusion_model
    paths = (*model.object_patches, *(name for name, _ in inner.named_modules()))
    compiled = "torch.compile" in keys or any("_orig_mod" in path for path in paths)
    return -(-h * w // COMPILED_SIZES) if compiled else 1


def _say_if_idle(spot: Spot, state: SpotState, steps: int) -> None:
    if not state.saves and not state.by_mask:
        full, fewer = spot.edit.full_steps, max(1, steps // 4)
        warn(
            f"full_steps: all {steps} steps of this run compute the whole picture, so Spot Edit "
            "leaves nothing out; lower full_steps, take more steps, or paint a mask and set select "
            "to mask.",
            *([Remedy({"full_steps": fewer}, node=spot.node)] if fewer < full else []),
        )
