"""What an edit left as it was: found by its tokens, and given back the reference's own pixels.

A VAE's round trip changes every pixel a little, also where the latent is the reference's. So what
was left alone gets the pixels that were there before, and only within what was changed the two are
mixed, from the border inwards.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import Omini2Error, require_kind, require_range
from .condition import TOKEN_PIXELS
from .encode import fitted_mask, require_image, require_mask

# Of a latent's size: kernels that add up in another order differ by less, edits by more.
SAME = 1e-3
MAX_FEATHER = 1024


@dataclass(frozen=True, eq=False)
class Kept:
    """A result with the reference's pixels where nothing was changed.

    Attributes:
        pixels: (n, H, W, 3).
        changed: (n, H, W) bool, where they aren't the reference's own.
    """

    pixels: Tensor
    changed: Tensor


def changed_tokens(latent: Tensor, reference: Tensor, size: tuple[int, int]) -> Tensor:
    """Which tokens aren't the reference's: (n, H, W) bool, of the picture's size.

    Args:
        latent, reference: (n, channels, ..., h, w); one reference serves all.
        size: height and width of the picture.
    """
    height, width = size
    far = (latent - reference.to(latent)).flatten(1, -3).abs().amax(1, keepdim=True)
    limit = SAME * reference.float().square().mean().sqrt()
    side = max(1, TOKEN_PIXELS * latent.shape[-1] // width)  # latent pixels along a token's side
    tokens = F.max_pool2d(far.float(), side, ceil_mode=True)[:, 0] > limit
    pixels = tokens.repeat_interleave(TOKEN_PIXELS, 1).repeat_interleave(TOKEN_PIXELS, 2)
    return pixels[:, :height, :width]


def keep_unchanged(
    image: Tensor, reference: Tensor, changed: Tensor, mask: Tensor | None, feather: int
) -> Kept:
    """Puts the reference's pixels where nothing was changed.

    Args:
        image: (n, H, W, 3), the result.
        reference: (n or 1, H, W, 3).
        changed: (n or 1, H, W) bool.
        mask: (m, H', W'), outside of which nothing counts as changed.
        feather: pixels over which the two are mixed, inside of what was changed.
    """
    require_range("feather", feather, 0, MAX_FEATHER)
    if mask is not None:
        within = fitted_mask(require_mask(mask), (image.shape[1], image.shape[2]))[:, 0] > 0.5
        if len(within) not in (1, len(image)):
            within = within.any(0, keepdim=True)
        changed = changed & within.to(changed.device)
    changed = changed.to(image.device).expand(len(image), -1, -1)
    reference = reference[..., :3].to(image).expand(len(image), -1, -1, -1)
    share = _inwards(changed, feather)[..., None]
    mixed = torch.lerp(reference, image[..., :3], share)
    return Kept(torch.where(changed[..., None], mixed, reference), changed)


def _inwards(changed: Tensor, feather: int) -> Tensor:
    """(n, H, W) bool -> how much of the result is taken: 1 from ``feather`` pixels inwards."""
    inner = changed[:, None].float()
    total = inner.clone()
    for _ in range(feather):
        inner = 1 - F.max_pool2d(1 - inner, 3, stride=1, padding=1)
        total += inner
    return total[:, 0] / (feather + 1)


def require_same_size(image: Tensor, samples: object, reference: Tensor) -> Tensor:
    """The latent of ``samples``, if all three are of one picture.

    Raises:
        Omini2Error: which isn't, and the way out.
    """
    require_image(image)
    require_image(reference, "reference")
    latent = samples.get("samples") if isinstance(samples, dict) else None
    require_kind("samples", latent, isinstance(latent, Tensor), "latent", "KSampler")
    assert isinstance(latent, Tensor)
    if reference.shape[1:3] != image.shape[1:3]:
        raise Omini2Error(
            f"reference: it is {_size(reference)} and the image {_size(image)}; connect the image "
            "that went into VAE Encode for ReferenceLatent, after any resizing."
        )
    if len(reference) not in (1, len(image)):
        raise Omini2Error(
            f"reference: it holds {len(reference)} images and the result {len(image)}; use one, or "
            "one for each."
        )
    per_pixel = image.shape[1] / latent.shape[-2], image.shape[2] / latent.shape[-1]
    if len(latent) != len(image) or per_pixel[0] != per_pixel[1]:
        raise Omini2Error(
            f"samples: this latent isn't that of the image, which is {_size(image)}; connect what "
            "goes into the VAE Decode that makes the image."
        )
    return latent


def _size(image: Tensor) -> str:
    return f"{image.shape[2]}x{image.shape[1]}"
