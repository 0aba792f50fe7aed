"""An image, with a VAE and maybe a mask -> a condition; what other nodes hand over is checked."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Omini2Error, require_kind, warn
from .condition import LATENT_CHANNELS, TOKEN_PIXELS, Condition, Placement

MAX_COLOUR = 1e3  # other nodes leave 0 to 1, but not by that much


def encode_condition(
    image: Tensor,
    encode: Callable[[Tensor], Tensor],
    placement: Placement,
    mask: Tensor | None = None,
) -> Condition:
    """Turns an image into a condition.

    Args:
        image: (n, H, W, c >= 3), values 0 to 1; alpha is left out.
        encode: the VAE's encode.
        placement: where its tokens go.
        mask: (m, H', W') or (H', W'); a token is kept where any of its pixels is above 0.5.

    Raises:
        Omini2Error: the image is none, smaller than one token, holds NaN or infinity, the mask
            leaves no token, or the VAE is not FLUX.1's.
    """
    require_image(image)
    height, width = image.shape[1:3]
    hw = height // TOKEN_PIXELS, width // TOKEN_PIXELS
    if min(hw) < 1:
        raise Omini2Error(
            f"image: {width}x{height} pixels is smaller than one token of "
            f"{TOKEN_PIXELS}x{TOKEN_PIXELS}; use a larger image."
        )
    pixels = crop_to_tokens(image[..., :3]).float()
    if pixels.shape[1:3] != image.shape[1:3]:
        warn(
            f"image: {width}x{height} was cropped around its centre to "
            f"{hw[1] * TOKEN_PIXELS}x{hw[0] * TOKEN_PIXELS}, a whole number of "
            f"{TOKEN_PIXELS}-pixel tokens; resize it beforehand to keep its borders."
        )
    keep = None
    if mask is not None:
        keep = masked_tokens(mask, hw, (height, width))
        if not keep.any():
            raise Omini2Error(
                "mask: it keeps no token of the condition; paint the part to keep, or disconnect "
                "it."
            )
    latent = encode(pixels)
    if latent.shape[1:] != (LATENT_CHANNELS, 2 * hw[0], 2 * hw[1]):
        raise Omini2Error(
            f"vae: it gives latents of shape {tuple(latent.shape[1:])} instead of "
            f"{(LATENT_CHANNELS, 2 * hw[0], 2 * hw[1])}; load FLUX.1's VAE (ae.safetensors)."
        )
    if not torch.isfinite(latent).all():
        raise Omini2Error(
            "vae: it gives NaN or infinite values for this image; load the VAE in another format, "
            "or check that the image's values are between 0 and 1."
        )
    empty = encode(torch.zeros_like(pixels[:1]))
    return Condition(pixels, latent, empty, encode, (height, width), placement, keep)


def require_image(image: Tensor, name: str = "image") -> None:
    """Refuses what other nodes may give for an image: no pictures, no colours, NaN.

    Args:
        name: of the node's input.
    """
    require_kind(name, image, isinstance(image, Tensor), "image", "Load Image")
    colours = image.ndim == 4 and image.shape[-1] >= 3 and image.is_floating_point()
    if not colours or not image.numel():
        kind = f"{tuple(image.shape)} of {str(image.dtype).removeprefix('torch.')}"
        raise Omini2Error(
            f"{name}: it is {kind} instead of pictures x height x width x 3 colours from 0 to 1; "
            "check the node that made it."
        )
    if not image.abs().amax() <= MAX_COLOUR:  # NaN isn't either
        raise Omini2Error(
            f"{name}: it holds NaN, infinite or huge values instead of colours from 0 to 1; check "
            "the node that made it."
        )


def require_mask(mask: Tensor) -> Tensor:
    """A mask from another node as (m, 1, H, W) float32; refuses what isn't one."""
    require_kind("mask", mask, isinstance(mask, Tensor), "mask", "Load Image's mask")
    if mask.ndim < 2 or not mask.numel() or mask.is_complex():
        raise Omini2Error(
            f"mask: it is {tuple(mask.shape)} instead of masks x height x width; check the node "
            "that made it, or disconnect it."
        )
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if not torch.isfinite(mask).all():
        raise Omini2Error("mask: it holds NaN or infinite values; check the node that made it.")
    return mask


def fitted_mask(mask: Tensor, image_size: tuple[int, int]) -> Tensor:
    """(m, 1, H', W') -> (m, 1, *image_size), with a warning if that is another size.

    The strongest pixel counts, so that a thin stroke survives.
    """
    if tuple(mask.shape[-2:]) == tuple(image_size):
        return mask
    warn(
        f"mask: {mask.shape[-1]}x{mask.shape[-2]} was resized to the image's "
        f"{image_size[1]}x{image_size[0]}; paint it on that image if its edges matter."
    )
    return F.adaptive_max_pool2d(mask, image_size)


def crop_to_tokens(pixels: Tensor) -> Tensor:
    """(..., H, W, c) -> cropped around the centre to whole tokens."""
    height, width = (side // TOKEN_PIXELS * TOKEN_PIXELS for side in pixels.shape[-3:-1])
    top, left = (pixels.shape[-3] - height) // 2, (pixels.shape[-2] - width) // 2
    return pixels[..., top : top + height, left : left + width, :]


def masked_tokens(mask: Tensor, hw: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """A mask over an image -> (h, w) bool on the CPU, true for each token that the mask touches.

    Args:
        mask: (m, H', W') or (H', W'); a pixel is in it above 0.5. Another size than the image's
            is resized, with a warning.
        hw: the condition's size in tokens; it may be smaller than the image's.
        image_size: height and width of the image that the mask belongs to.
    """
    mask = require_mask(mask).amax(dim=0, keepdim=True)
    mask = fitted_mask(mask, image_size)
    mask = crop_to_tokens(mask.movedim(1, -1)).movedim(-1, 1)
    return (F.adaptive_max_pool2d(mask, hw)[0, 0] > 0.5).cpu()
