"""What of a sampler's settings contradicts the model or its condition LoRAs; the run goes on."""

from collections.abc import Iterable, Sequence
from typing import Any

import comfy.model_base
from comfy.model_patcher import ModelPatcher

from ..errors import Remedy, warn
from ..lora.usage import Base, Sampling
from .setup import MODEL, Setup

DISTILLED_CFG = 3.0  # with more, a guidance-distilled model burns its colours
FURTHER = 2  # times as much or as little of something as a LoRA was shown with
USUAL_GUIDANCE = 3.5  # the host's own where no node sets any


def advise(
    guider: Any, setup: Setup, prompts: Sequence[dict[str, Any]], schedule: Sequence[float]
) -> None:
    """Says what of a run is likely not meant.

    Args:
        guider: the host's.
        prompts: those that it evaluates, the positive ones first.
        schedule: its noise levels.
    """
    model: ModelPatcher = guider.model_patcher
    if type(model.model) is not comfy.model_base.Flux:
        return
    _about_cfg(guider)
    base: Base = "dev" if model.model.diffusion_model.params.guidance_embed else "schnell"
    whole = schedule[-1] == 0 and schedule[0] >= 0.99 * float(_most_noise(model))
    for branch in setup.active_branches:
        usage = branch.usage
        if usage is None or base not in usage.sampling:
            continue
        known = usage.sampling[base]
        if whole and not model.patches:  # others' LoRAs may be what makes few steps enough
            _about_steps(usage.title, known, len(schedule) - 1)
        _about_guidance(usage.title, known, prompts)
        _about_image_guidance(usage.title, known, setup)


def _about_cfg(guider: Any) -> None:
    cfg = getattr(guider, "cfg", 1.0)
    own = {"sampler_cfg_function", "sampler_post_cfg_function"} & set(guider.model_options)
    if isinstance(cfg, int | float) and cfg > DISTILLED_CFG and not own:
        warn(
            f"cfg: {cfg:g} is too much for FLUX.1, whose guidance is built in, so colours burn and "
            "each step takes twice as long; set cfg to 1, unless the model was made for more.",
            Remedy({"cfg": 1.0}, ("guider",)),
        )


def _about_steps(title: str, known: Sampling, steps: int) -> None:
    if FURTHER * steps < known.steps:
        warn(
            f"steps: {steps} is few for {title}, which takes {known.steps} with this model; set "
            f"steps to {known.steps} if the picture is blurred.",
            Remedy({"steps": known.steps}, ("sigmas",)),
        )


def _about_guidance(title: str, known: Sampling, prompts: Iterable[dict[str, Any]]) -> None:
    if known.guidance is None:
        return
    given = next((float(prompt.get("guidance", USUAL_GUIDANCE)) for prompt in prompts), None)
    if given is None or known.guidance / FURTHER <= given <= known.guidance * FURTHER:
        return
    warn(
        f"guidance: {given:g} is far from the {known.guidance:g} that {title} was shown with; set "
        f"guidance to {known.guidance:g} in FluxGuidance if the picture is poor.",
        Remedy({"guidance": known.guidance}, ("positive", "guider")),
    )


def _about_image_guidance(title: str, known: Sampling, setup: Setup) -> None:
    wanted = known.image_guidance_scale
    if wanted == 1.0 or setup.image_guidance_scale != 1.0:
        return
    warn(
        f"image_guidance_scale: {title} needs {wanted:g} with this model and it is off; add Omini2 "
        f"Image Guidance with {wanted:g} before the sampler, if the subject is not to be seen.",
        Remedy({"image_guidance_scale": wanted}, MODEL),
    )


def _most_noise(model: ModelPatcher) -> Any:
    return model.get_model_object("model_sampling").sigma_max
