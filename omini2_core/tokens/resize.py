"""Condition images of any size and shape -> the square that a LoRA was trained on."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..errors import require_choice, require_range
from .condition import TOKEN_PIXELS, Condition
from .encode import fitted_mask, masked_tokens, require_image, require_mask
from .fit import Fit

RESIZE = ("off", "stretch", "pad", "crop")
# What EasyControl's pipeline pads with: 0 after the pixels were mapped to -1 .. 1.
PAD_COLOUR = 0.5
# (n, H, W, c), height, width -> (n, height, width, c)
Resample = Callable[[Tensor, int, int], Tensor]


def resized(
    image: Tensor, mask: Tensor | None, how: str, size: int, resample: Resample
) -> tuple[Tensor, Tensor | None, Fit | None]:
    """An image, and its mask with it, as a square.

    ``stretch`` gives up the aspect, as EasyControl's ``FluxPipeline.__call__`` does with spatial
    images. ``pad`` keeps it, as that function does with subjects: the longer side becomes
    ``size``, the shorter one whole tokens, and grey surrounds it evenly. ``crop`` keeps it too:
    the shorter side becomes ``size``, and the longer one's ends are left out, as OminiControl's
    examples do. A square of that size already stays as it is with all three.

    Args:
        image: (n, H, W, c >= 3), values 0 to 1.
        mask: (m, H', W') or (H', W'), or none.
        how: one of ``RESIZE``; "off" gives back what it got.
        size: side of the square in pixels.

    Returns:
        (n, size, size, 3) and (m, size, size); padding is outside of the mask. And how other
        masks of the image follow; none with "off".

    Raises:
        Omini2Error: the image is none, or holds NaN or infinity, which resampling would hide.
    """
    require_choice("resize", how, RESIZE)
    if how == "off":
        return image, mask, None
    require_range("size", size, TOKEN_PIXELS, 16384)
    size = int(size)  # a link can bring 512.0
    require_image(image)
    fit = _fit(how, (image.shape[1], image.shape[2]), size)
    pixels = fit.cut(image[..., :3].float())
    if pixels.shape[1:3] != fit.content:
        pixels = resample(pixels, *fit.content)
    square = F.pad(pixels.movedim(-1, 1), fit.around, value=PAD_COLOUR).movedim(1, -1)
    if mask is not None:
        mask = fit.of_mask(fitted_mask(require_mask(mask), fit.given))
    return square, mask, fit


def _fit(how: str, given: tuple[int, int], size: int) -> Fit:
    """How an image of this height and width becomes the square."""
    if how == "pad":
        return Fit(given, given, padded_content(*given, size), size)
    shorter = min(given)
    return Fit(given, (shorter, shorter) if how == "crop" else given, (size, size), size)


def padded_content(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image inside its padded square, in pixels: whole tokens each."""
    longest = max(height, width)

    def tokens(side: int) -> int:
        return max(side * size // longest // TOKEN_PIXELS, 1)

    return tokens(height) * TOKEN_PIXELS, tokens(width) * TOKEN_PIXELS


def tokens_under(mask: Tensor, condition: Condition) -> Tensor:
    """A mask over a condition's image -> (h, w) bool, true for each token that it touches.

    Args:
        mask: (m, H', W') or (H', W'), over the image as it was given or as it was encoded.
    """
    fit = condition.fit
    if fit is not None and tuple(require_mask(mask).shape[-2:]) == fit.given:
        mask = fit.of_mask(require_mask(mask))
    return masked_tokens(mask, condition.hw, condition.image_size)
