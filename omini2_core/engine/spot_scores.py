"""How far an edit's tokens are from the reference's: one number a token, for Spot Edit's choice."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Features = Callable[[Tensor], Sequence[Tensor]]


class LatentScores:
    """From the latents alone.

    ``latent``: the mean of a token's differences to the fourth power. ``cosine``: minus the
    cosine between its values and the reference's.
    """

    def __init__(self, select: str, known: Tensor, side: int) -> None:
        """Args:
        known: (batch, channels, ..., height, width) the reference's latent.
        side: latent pixels along a token's side.
        """
        self._cosine = select == "cosine"
        self._known = flat(known)
        self._side = side

    def __call__(self, denoised: Tensor) -> Tensor:
        """(batch, channels, ..., height, width) -> (h, w)."""
        x, y = flat(denoised).float(), self._known.float()
        if not self._cosine:
            return furthest(self._mean((x - y) ** 4))
        dot, xx, yy = (self._mean(t) for t in (x * y, x * x, y * y))
        return furthest(-dot / (xx.sqrt() * yy.sqrt()).clamp_min(1e-8))

    def _mean(self, t: Tensor) -> Tensor:
        return F.avg_pool2d(t.mean(1, keepdim=True), self._side, ceil_mode=True)


class PerceptualScores:
    """From what a VAE's decoder makes of the latents: LPIPS' distance on its first feature maps."""

    def __init__(self, features: Features, known: Tensor, side: int) -> None:
        """Args:
        features: a latent's maps, (batch, channels, height, width), the first one's size counts.
        known: (batch, channels, ..., height, width), the reference's latent.
        side: latent pixels along a token's side.
        """
        self._features = features
        self._known = known
        self._known_maps: list[Tensor] = []
        self._tokens_across = math.ceil(known.shape[-1] / side)

    def __call__(self, denoised: Tensor) -> Tensor:
        """(batch, channels, ..., height, width) -> (h, w)."""
        if not self._known_maps:  # they are the same throughout a run
            maps = self._features(self._known)
            self._known_maps = [F.normalize(each.float(), dim=1) for each in maps]
        total: Tensor | None = None
        for one, other in zip(self._features(denoised), self._known_maps, strict=True):
            distance = (F.normalize(one.float(), dim=1) - other).square().sum(1, keepdim=True)
            if total is None:
                total = distance
                continue
            size = total.shape[-2:]
            if distance.shape[-2:] != size:
                distance = F.interpolate(distance, size, mode="bilinear", align_corners=False)
            total = total + distance
        assert total is not None
        mean = total / len(self._known_maps)
        side = math.ceil(mean.shape[-1] / self._tokens_across)
        return furthest(F.avg_pool2d(mean, side, ceil_mode=True))


def furthest(scores: Tensor) -> Tensor:
    """(batch, 1, h, w) -> (h, w): a token is unedited where it is so in all pictures of a batch."""
    return scores[:, 0].amax(0)


def flat(latent: Tensor) -> Tensor:
    """(batch, channels, ..., height, width) -> (batch, all channels, height, width)."""
    return latent.flatten(1, -3)


def turned(k: Tensor, turn: Tensor) -> Tensor:
    """Keys after RoPE, at other positions.

    Args:
        k: (batch, heads, n, head_dim).
        turn: (1, 1, n, head_dim / 2, 2, 2), a rotation for each pair.
    """
    pairs = k.to(turn.dtype).unflatten(-1, (-1, 1, 2))
    return torch.sum(turn * pairs, -1).flatten(-2).to(k.dtype)
