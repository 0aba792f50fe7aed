"""Omini2 Reference on tiny editing models."""

from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from helpers.editing import Tiny
from torch import Tensor

import omini2_extension.nodes as nodes


@dataclass
class TinyVae:
    """Stands in for an editing model's VAE: a fixed function of each place of the image."""

    tiny: Tiny

    @property
    def latent_dim(self) -> int:
        """Of the host's VAE: 3 where images are frames of a video."""
        return 3 if self.tiny.video else 2

    def encode(self, pixels: Tensor) -> Tensor:
        """(n, H, W, 3) -> latents, of whole places of the image only."""
        side = 16 // self.tiny.side
        height, width = (n // side for n in pixels.shape[1:3])
        cells = pixels[:, : side * height, : side * width].movedim(-1, 1)
        means = torch.nn.functional.avg_pool2d(cells, side)
        generator = torch.Generator().manual_seed(0)
        waves = 8 * torch.randn(self.tiny.channels, 3, generator=generator)
        latent = torch.sin(torch.einsum("dc,nchw->ndhw", waves, means))
        if not self.tiny.video:
            return latent
        return latent.movedim(0, 1)[None]  # as the host's: a batch is a video


def image(h: int, w: int, seed: int = 0, n: int = 1) -> Tensor:
    """A random image of h x w tokens."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.rand(n, 16 * h, 16 * w, 3, generator=generator)


def stock(tiny: Tiny, pixels: Tensor) -> Tensor:
    """What VAE Encode gives of it."""
    return TinyVae(tiny).encode(pixels)


def refer(
    model: ModelPatcher,
    tiny: Tiny,
    positive: list[Any],
    pixels: Tensor,
    negative: list[Any] | None = None,
    **options: Any,
) -> tuple[ModelPatcher, list[Any], list[Any]]:
    """Omini2 Reference."""
    given = {
        "compression": 1.0, "position_correcting": True, "strength": 1.0, "start_percent": 0.0,
        "end_percent": 1.0, **options,
    }  # fmt: skip
    made = nodes.Reference.execute(
        model, positive, given.pop("vae", TinyVae(tiny)), pixels, negative=negative, **given
    )
    return made[0], made[1], made[2]


def token_mask(tokens: list[list[int]]) -> Tensor:
    """A mask over an image, by its tokens."""
    mask = torch.tensor(tokens, dtype=torch.float32)
    return mask.repeat_interleave(16, 0).repeat_interleave(16, 1)[None]
