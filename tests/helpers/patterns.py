"""Patterns of tokens, and conditions compacted by them or encoded from pictures."""

import torch
from tiny import LatentVae, compact, pixel_mask

import omini2_extension.nodes as nodes


def token_pattern(kind: str, h: int, w: int, seed: int = 0) -> torch.Tensor:
    keep = torch.zeros(h, w, dtype=torch.bool)
    if kind == "full":
        keep[:] = True
    elif kind == "one":
        keep[h // 2, w // 3] = True
    elif kind == "checkerboard":
        keep[::2, ::2] = keep[1::2, 1::2] = True
    elif kind == "random":
        keep = torch.rand(h, w, generator=torch.Generator().manual_seed(seed)) > 0.5
    return keep


def box(h: int = 6, w: int = 6) -> torch.Tensor:
    paint = torch.zeros(h, w, dtype=torch.bool)
    paint[1:4, 2:5] = True
    return paint


def integrated(condition, paint, **options):
    return compact(condition, token_integration=True, mask=pixel_mask(paint), **options)[0]


def image_condition(pixels, placement="aligned", delta=(0, 0), mask=None, latent=None):
    vae = LatentVae(latent)
    return nodes.ConditionEncode.execute(pixels, vae, placement, *delta, 1.0, mask)[0]
