"""Condition images of any size and shape -> the square that a LoRA was trained on."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..errors import require_choice, require_range
from .condition import TOKEN_PIXELS
from .encode import fitted_mask, require_image, require_mask

RESIZE = ("off", "stretch", "pad")
# What EasyControl's pipeline pads with: 0 after the pixels were mapped to -1 .. 1.
PAD_COLOUR = 0.5
# (n, H, W, c), height, width -> (n, height, width, c)
Resample = Callable[[Tensor, int, int], Tensor]


def resized(
    image: Tensor, mask: Tensor | None, how: str, size: int, resample: Resample
) -> tuple[Tensor, Tensor | None]:
    """An image, and its mask with it, as a square.

    ``stretch`` gives up the aspect, as EasyControl's ``FluxPipeline.__call__`` does with spatial
    images. ``pad`` keeps it, as that function does with subjects: the longer side becomes
    ``size``, the shorter one whole tokens, and grey surrounds it evenly.

    Args:
        image: (n, H, W, c >= 3), values 0 to 1.
        mask: (m, H', W') or (H', W'), or none.
        how: one of ``RESIZE``; "off" gives back what it got.
        size: side of the square in pixels.

    Returns:
        (n, size, size, 3) and (m, size, size); padding is outside of the mask.

    Raises:
        Omini2Error: the image is none, or holds NaN or infinity, which resampling would hide.
    """
    require_choice("resize", how, RESIZE)
    if how == "off":
        return image, mask
    require_range("size", size, TOKEN_PIXELS, 16384)
    size = int(size)  # a link can bring 512.0
    require_image(image)
    shape = image.shape[1], image.shape[2]
    height, width = (size, size) if how == "stretch" else padded_content(*shape, size)
    around = _around(size, height, width)
    pixels = resample(image[..., :3].float(), height, width).movedim(-1, 1)
    square = F.pad(pixels, around, value=PAD_COLOUR).movedim(1, -1)
    if mask is None:
        return square, None
    mask = fitted_mask(require_mask(mask), shape)[:, 0]
    return square, F.pad(F.adaptive_max_pool2d(mask, (height, width)), around)


def padded_content(height: int, width: int, size: int) -> tuple[int, int]:
    """Height and width of an image inside its padded square, in pixels: whole tokens each."""
    longest = max(height, width)

    def tokens(side: int) -> int:
        return max(side * size // longest // TOKEN_PIXELS, 1)

    return tokens(height) * TOKEN_PIXELS, tokens(width) * TOKEN_PIXELS


def _around(size: int, height: int, width: int) -> tuple[int, int, int, int]:
    """Pixels to add left, right, above and below; an odd one goes right and below."""
    left, top = (size - width) // 2, (size - height) // 2
    return left, size - width - left, top, size - height - top
