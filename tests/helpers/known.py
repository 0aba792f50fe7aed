"""Encoders that need neither files nor the host: what they give is known."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STRENGTH = 3.0  # of the latents, so that knowing the picture is worth more than knowing the noise


class Fingerprint(NamedTuple):
    """The trainer's own, without importing it: the tests know it under two names."""

    text: str
    images: str


class KnownEncoders:
    """Latents are a fixed mixture of the pixels' means; text features follow from the letters."""

    fingerprint = Fingerprint("known", "known")

    def __init__(self) -> None:
        self.images = self.texts = 0

    def encode_images(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        return latents_of(pixels)

    def decode_images(self, latents: Tensor) -> Tensor:
        return latents[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3).movedim(1, -1)

    def encode_text(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.texts += len(texts)
        seeds = [sum(text.encode()) for text in texts]
        made = [torch.Generator().manual_seed(seed) for seed in seeds]
        lengths = [5 + len(text) % 2 for text in texts]
        features = [torch.randn(n, 24, generator=g) for n, g in zip(lengths, made, strict=True)]
        return torch.stack(features), torch.stack([torch.randn(16, generator=g) for g in made])

    def release_text(self) -> None:
        pass


def latents_of(pixels: Tensor) -> Tensor:
    """(n, H, W, 3) -> (n, 16, H/8, W/8) in the model's space."""
    means = pixels.unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2))
    mixture = torch.randn(3, 16, generator=torch.Generator().manual_seed(9))
    return STRENGTH * ((2 * means - 1) @ mixture / 3**0.5).movedim(-1, 1)
