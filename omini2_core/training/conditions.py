"""Condition images made on the fly from the picture to draw."""

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .config import ConditionConfig

# The blur's radius and the mask's rectangle follow the original `ImageConditionDataset`.


def prepared(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """An image scaled to cover a size and cropped around its centre: (height, width, 3), 0 to 1.

    Args:
        size: width and height in pixels.
    """
    image = image.convert("RGB")
    width, height = size
    scale = max(width / image.width, height / image.height)
    covered = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(covered, Image.Resampling.LANCZOS)
    left, top = (covered[0] - width) // 2, (covered[1] - height) // 2
    image = image.crop((left, top, left + width, top + height))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, 3).float() / 255


def reduced(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """(H, W, 3) -> (height, width, 3) by area, as the Compact Tokens node does it."""
    width, height = size
    if pixels.shape[:2] == (height, width):
        return pixels
    small = F.interpolate(pixels.movedim(-1, 0)[None], (height, width), mode="area")
    return small[0].movedim(0, -1).clamp(0, 1)


def made_from(pixels: Tensor, condition: ConditionConfig, generator: torch.Generator) -> Tensor:
    """A condition image from the picture itself, both (H, W, 3), 0 to 1.

    Args:
        generator: draws the blur's radius and the mask's rectangle.
    """
    if condition.type == "canny":
        from kornia.filters import canny

        # What ComfyUI's own Canny node computes.
        edges = canny(
            pixels.movedim(-1, 0)[None], condition.low_threshold, condition.high_threshold
        )[1]
        return edges[0, 0, :, :, None].expand(-1, -1, 3).contiguous()
    if condition.type == "grey":
        weights = torch.tensor([0.299, 0.587, 0.114])  # ITU-R 601, as PIL's mode L
        return (pixels * weights).sum(-1, keepdim=True).expand(-1, -1, 3).contiguous()
    if condition.type == "blur":
        low, high = condition.blur_radius
        radius = low + (high - low) * float(torch.rand((), generator=generator))
        return _blurred(pixels, radius)
    if condition.type == "mask":
        hidden = random_rectangle(pixels.shape[0], pixels.shape[1], generator)
        return pixels * ~hidden[:, :, None]
    return pixels


def random_rectangle(height: int, width: int, generator: torch.Generator) -> Tensor:
    """(height, width) bool: a random rectangle or all around it, neither nothing nor everything."""
    while True:
        rows = sorted(torch.randint(0, height + 1, (2,), generator=generator).tolist())
        columns = sorted(torch.randint(0, width + 1, (2,), generator=generator).tolist())
        area = torch.zeros(height, width, dtype=torch.bool)
        area[rows[0] : rows[1], columns[0] : columns[1]] = True
        if area.any() and not area.all():
            break
    inside = torch.rand((), generator=generator) < 0.5
    return area if inside else ~area


def _blurred(pixels: Tensor, sigma: float) -> Tensor:
    """A Gaussian of this standard deviation in pixels, which is what PIL calls its radius."""
    reach = min(int(3 * sigma + 0.5), min(pixels.shape[:2]) - 1)
    x = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = torch.exp(-(x**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, -1)
    image = F.pad(pixels.movedim(-1, 0)[None], (reach,) * 4, mode="reflect")
    image = F.conv2d(image, kernel[:, :, None, :], groups=3)
    image = F.conv2d(image, kernel[:, :, :, None], groups=3)
    return image[0].movedim(0, -1).clamp(0, 1)
