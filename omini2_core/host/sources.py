"""What the nodes say of conditions -> the sources of K/V of one run."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ..engine.attention import log_scale
from ..engine.branch import BranchSource
from ..engine.saved import SavedSource
from ..errors import Remedy, warn
from ..lora.deltas import Deltas, SharedLinears, summed
from .kernels import call
from .setup import LATENT, Branch, SavedBranch


def branch_sources(
    model: ModelPatcher, branches: Sequence[Branch], taken_off: Deltas, picture: torch.Size
) -> list[BranchSource]:
    """The condition branches of a run; those with the same LoRA share it.

    Args:
        taken_off: what branches take off the model's weights again, where their family's do.
        picture: shape of the pictures' latents.
    """
    sampling = model.get_model_object("model_sampling")
    batch, _, height, width = picture
    sources = []
    loras: dict[tuple[str, float, str], SharedLinears] = {}
    for branch in branches:
        condition = branch.condition
        if len(condition.pixels) > batch:
            warn(
                f"image: it holds {len(condition.pixels)} images for {batch} pictures, so the last "
                "ones are not used; raise batch_size or leave them out.",
                Remedy({"batch_size": len(condition.pixels)}, LATENT),
            )
        warn_about_size(branch, (height / 2, width / 2))
        family = branch.lora.family
        lora = branch.lora.digest, branch.strength, family.name
        if lora not in loras:
            off = 0.0 if family.keeps_ordinary else -1.0
            deltas = summed((branch.lora.deltas, branch.strength), (taken_off, off))
            loras[lora] = SharedLinears(deltas, call)
        sources.append(
            BranchSource(
                condition=condition,
                latent=model.model.process_latent_in(condition.latent),
                empty=model.model.process_latent_in(condition.empty),
                lora=f"{lora}",
                linears=loras[lora],
                joint=branch.joint,
                bias=log_scale(branch.condition_scale),
                start_sigma=start_sigma(sampling, branch.start_percent),
                end_sigma=end_sigma(sampling, branch.end_percent),
                guidance=family.branch_guidance,
                at_step=family.at_step,
                sequence=family.name if family.one_sequence else None,
                centred=family.centred,
            )
        )
    return sources


def saved_sources(model: ModelPatcher, branches: Sequence[SavedBranch]) -> list[SavedSource]:
    """The conditions of a run whose K/V come from files."""
    sampling = model.get_model_object("model_sampling")
    return [
        SavedSource(
            branch.saved,
            log_scale(branch.condition_scale),
            start_sigma(sampling, branch.start_percent),
            end_sigma(sampling, branch.end_percent),
        )
        for branch in branches
    ]


def warn_about_size(branch: Branch, picture_hw: tuple[float, float]) -> None:
    """Says it where an aligned condition isn't as large as the picture, (rows, columns)."""
    condition = branch.condition
    covered, (rows, columns) = condition.coverage(), picture_hw
    if covered is not None and max(abs(covered[0] - rows), abs(covered[1] - columns)) > 1:
        warn(
            f"placement: aligned, the condition covers {16 * covered[1]:.0f}x"
            f"{16 * covered[0]:.0f} pixels from the upper left of a picture of "
            f"{16 * columns:.0f}x{16 * rows:.0f}; set placement to fit or make the sizes equal.",
            Remedy({"placement": "fit"}, ("condition",), branch.node),
            Remedy({"width": round(16 * covered[1]), "height": round(16 * covered[0])}, LATENT),
        )


def start_sigma(sampling: Any, percent: float) -> float:
    """The noise level that a share of sampling begins at."""
    return float(sampling.percent_to_sigma(percent)) if percent > 0 else math.inf


def end_sigma(sampling: Any, percent: float) -> float:
    """The noise level that a share of sampling ends at."""
    return float(sampling.percent_to_sigma(percent)) if percent < 1 else -math.inf
