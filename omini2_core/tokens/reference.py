"""An image for an editing model's reference: its size, and which of its tokens are kept.

As long as nothing is asked for the image stays as it is, so that the model gets what the stock
nodes would give it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..errors import Omini2Error, Remedy, warn
from .compact import Resize, compressed
from .condition import TOKEN_PIXELS
from .encode import crop_to_tokens, fitted_mask, require_mask

FIT = ("off", "picture", "megapixel")
MEGAPIXEL = 1024 * 1024
Size = tuple[int, int]  # height, width


@dataclass(frozen=True, eq=False)
class ReferenceImage:
    """What is encoded of a reference image.

    Attributes:
        pixels: (n, H, W, 3), values 0 to 1.
        whole: rows and columns of tokens before compression; None without.
        keep: (rows, columns) bool of its tokens; None keeps all.
    """

    pixels: Tensor
    whole: Size | None = None
    keep: Tensor | None = None

    @property
    def of_tokens(self) -> bool:
        """Whether it is made of whole tokens; a VAE may crop any other image to what it takes."""
        return self.whole is not None or self.keep is not None

    @property
    def hw(self) -> Size:
        """Rows and columns of tokens, of an image of whole tokens."""
        return self.pixels.shape[1] // TOKEN_PIXELS, self.pixels.shape[2] // TOKEN_PIXELS


def reference_image(
    image: Tensor,
    mask: Tensor | None,
    target: Size | None,
    compression: float,
    resize: Resize,
    sharp: Resize,
) -> ReferenceImage:
    """An image as it is to be encoded.

    Args:
        image: (n, H, W, c >= 3), values 0 to 1; alpha is left out.
        mask: (m, H', W') or (H', W'); a token is kept where any of its pixels is above 0.5.
        target: size to scale to, with what is too much cropped around the centre; None leaves it.
        compression: sides relative to now; they are rounded to whole tokens.
        resize: for compression, and ``sharp`` for another size.

    Raises:
        Omini2Error: no token would be left, or the mask leaves none.
    """
    pixels = image[..., :3]
    if min(pixels.shape[1:3]) < TOKEN_PIXELS:
        raise Omini2Error(
            f"image: {pixels.shape[2]}x{pixels.shape[1]} pixels is smaller than one token of "
            f"{TOKEN_PIXELS}x{TOKEN_PIXELS}; use a larger image."
        )
    if mask is not None:
        mask = fitted_mask(require_mask(mask), (pixels.shape[1], pixels.shape[2]))
    if target is not None and target != tuple(pixels.shape[1:3]):
        pixels = sharp(_cropped(pixels.movedim(-1, 1), target).movedim(1, -1).float(), *target)
        mask = None if mask is None else F.adaptive_max_pool2d(_cropped(mask, target), target)
    rows, columns = (side // TOKEN_PIXELS for side in pixels.shape[1:3])
    h, w = compressed((rows, columns), compression)
    if (h, w) == (rows, columns) and mask is None:
        return ReferenceImage(pixels)
    pixels = _whole_tokens(pixels)
    keep = None if mask is None else _kept(_centre(mask, pixels.shape[1:3]), (h, w))
    if (h, w) == (rows, columns):
        return ReferenceImage(pixels, None, keep)
    pixels = resize(pixels.float(), h * TOKEN_PIXELS, w * TOKEN_PIXELS)
    return ReferenceImage(pixels, (rows, columns), keep)


def megapixel(size: Size) -> Size:
    """The size of about a megapixel, in whole tokens, that an image is nearest to in its shape."""
    scale = math.sqrt(MEGAPIXEL / (size[0] * size[1])) / TOKEN_PIXELS
    height, width = (max(1, round(side * scale)) * TOKEN_PIXELS for side in size)
    return height, width


def _whole_tokens(pixels: Tensor) -> Tensor:
    """(n, H, W, 3) cropped around the centre, which is said."""
    cropped = crop_to_tokens(pixels)
    if cropped.shape != pixels.shape:
        warn(
            f"image: {pixels.shape[2]}x{pixels.shape[1]} was cropped around its centre to "
            f"{cropped.shape[2]}x{cropped.shape[1]}, a whole number of {TOKEN_PIXELS}-pixel "
            "tokens; set fit to picture or megapixel to scale it instead.",
            Remedy({"fit": "megapixel"}),
        )
    return cropped


def _kept(mask: Tensor, hw: Size) -> Tensor | None:
    """(m, 1, H, W) -> (h, w) bool on the CPU; None where all tokens are kept.

    Raises:
        Omini2Error: none is.
    """
    keep = F.adaptive_max_pool2d(mask.amax(0), hw)[0].cpu() > 0.5
    if not keep.any():
        raise Omini2Error(
            "mask: it keeps no token of the reference; paint the part to keep, or disconnect it."
        )
    return None if keep.all() else keep


def _cropped(t: Tensor, target: Size) -> Tensor:
    """(..., H, W) cropped around the centre to another size's shape, as the host's upscale does."""
    height, width = t.shape[-2:]
    wide = min(width, height * target[1] / target[0])
    high = min(height, width * target[0] / target[1])
    rows, columns = height - 2 * round((height - high) / 2), width - 2 * round((width - wide) / 2)
    return _centre(t, (max(rows, 1), max(columns, 1)))


def _centre(t: Tensor, size: Sequence[int]) -> Tensor:
    top, left = ((have - want) // 2 for have, want in zip(t.shape[-2:], size, strict=True))
    return t[..., top : top + size[0], left : left + size[1]]
