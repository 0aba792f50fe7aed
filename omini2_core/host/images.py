"""The host's own resampling."""

import comfy.utils
from torch import Tensor

RESAMPLING = "area"


def resize(pixels: Tensor, height: int, width: int, method: str = RESAMPLING) -> Tensor:
    """(n, H, W, 3) -> (n, height, width, 3) with the host's own resampling."""
    resized = comfy.utils.common_upscale(pixels.movedim(-1, 1), width, height, method, "disabled")
    back: Tensor = resized.movedim(1, -1).clamp(0, 1)
    return back


def lanczos(pixels: Tensor, height: int, width: int) -> Tensor:
    """:func:`resize` as the host's Upscale Image does with lanczos: sharp, in 8 bits."""
    return resize(pixels, height, width, "lanczos")
