"""An image -> a reference's latent, as the host's own nodes make it; and what it is to lie on."""

import inspect
from collections.abc import Mapping
from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..errors import Omini2Error, require_choice, require_kind
from ..tokens.condition import TOKEN_PIXELS
from ..tokens.encode import require_image
from ..tokens.reference import FIT, ReferenceImage, Size, megapixel
from .references import Family


def require_fit(fit: str, latent: object) -> None:
    """Refuses a way to fit an image that isn't there, or that the picture's size lacks for.

    Raises:
        Omini2Error: which one.
    """
    require_choice("fit", fit, FIT)
    if fit == "picture" and latent is None:
        raise Omini2Error(
            "fit: picture needs the picture's size; connect latent with what goes to the sampler, "
            "or set fit to megapixel or off."
        )


def target_size(
    fit: str, image: Tensor, latent: Any, family: Family, model: ModelPatcher
) -> Size | None:
    """Height and width in pixels that a reference image is scaled to; None leaves it as it is.

    Args:
        fit: one of ``FIT``.
        image: (n, H, W, 3).
        latent: what goes to the sampler, if it is connected.

    Raises:
        Omini2Error: the picture's size is wanted and not known.
    """
    require_fit(fit, latent)
    require_image(image)
    if fit == "megapixel":
        return megapixel((image.shape[1], image.shape[2]))
    if fit == "off":
        return None
    right = isinstance(latent, Mapping) and isinstance(latent.get("samples"), Tensor)
    require_kind("latent", latent, right, "latent", "what goes to the sampler")
    side = TOKEN_PIXELS // family.patch(model.model.diffusion_model)  # of a latent pixel
    rows, columns = _as_sampled(model, latent).shape[-2:]
    return rows * side, columns * side


def encode_reference(
    image: ReferenceImage, vae: Any, family: Family, model: ModelPatcher
) -> Tensor:
    """The latent that VAE Encode gives; each image has its own, where the VAE is a video's.

    Raises:
        Omini2Error: it isn't one that the model takes.
    """
    # Text has an `encode` as well.
    require_kind("vae", vae, hasattr(vae, "encode") and not isinstance(vae, str), "VAE", "Load VAE")
    video = getattr(vae, "latent_dim", 2) == 3
    each = image.pixels.split(1) if video else (image.pixels,)
    latent = torch.cat([vae.encode(pixels) for pixels in each])
    space = model.get_model_object("latent_format")
    size = tuple(latent.shape[-2:])
    if image.of_tokens:
        side = family.patch(model.model.diffusion_model)
        size = image.hw[0] * side, image.hw[1] * side
    want = (space.latent_channels, *(1,) * (space.latent_dimensions - 2), *size)
    if tuple(latent.shape[1:]) != want:
        raise Omini2Error(
            f"vae: it gives latents of shape {tuple(latent.shape[1:])} instead of {want}; load the "
            f"VAE that belongs to {family.name}."
        )
    if not torch.isfinite(latent).all():
        raise Omini2Error(
            "vae: it gives NaN or infinite values for this image; load the VAE in another format, "
            "or check that the image's values are between 0 and 1."
        )
    return latent


def _as_sampled(model: ModelPatcher, latent: Mapping[str, Any]) -> Tensor:
    """A latent as the sampler makes it fit the model: newer hosts scale empty ones."""
    fix = comfy.sample.fix_empty_latent_channels
    name = "downscale_ratio_spacial"
    known = name in inspect.signature(fix).parameters
    fixed: Tensor = fix(model, latent["samples"], **({name: latent.get(name)} if known else {}))
    return fixed
