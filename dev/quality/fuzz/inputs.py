"""What other people's files and nodes may hand to a parser or a node: texts, numbers, tensors."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import torch
from torch import Tensor

TEXTS = [
    "", " ", "x", "0", "1", "-1", "true", "false", "True", "1,0.5", "0,0", "0,-3", "96x64", "64x64",
    "512", "0x0", "x64", "-5x5", "nanxnan", "infx5", "1e400x5", "1e308,1e308", "nan", "inf",
    "-inf", "1e-320", "0.5,", ",", "1,,2", "1_0", "\u0661", "9" * 5000, "1" + "0" * 400,
    ",".join(["1"] * 5000), "\0", "a\nb", "\u202egpj.exe", "\ud800", "é" * 300,
    "<script>alert(1)</script>", "{0}", "%s%n",
    "<img src=x onerror=alert(1)>", "../../etc/passwd", "/etc/passwd", "C:\\x", "__class__",
    "[]", "{}", "[" * 20_000, '{"a":' * 5000, "null", "NaN", "dev", "schnell", "demo", "canny",
]  # fmt: skip
NUMBERS = [
    0, 1, -1, 2, 63, 64, 65, 1000, 1024, 1025, 1 << 31, 1 << 63, -(1 << 63), 10**40, 10**5000,
    0.0, -0.0,
    0.5, 1.0, 1e-3, 1e-9, 5e-324, 1e4, 1e6, 1e308, math.nan, math.inf, -math.inf,
]  # fmt: skip
SPECIAL = [math.nan, math.inf, -math.inf, 3e38, -3e38, 1e30, -1.0, 0.0, 1.0, 255.0]
SIDES = [1, 15, 16, 17, 31, 32, 33, 48, 64]
UNUSUAL = [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool,
           torch.complex64]  # fmt: skip


def metadata(rng: Random) -> dict[str, str]:
    """What a LoRA's file may say of its training."""
    names = ["independent_condition", "position_delta", "position_scale", "condition_size",
             "integration", "compression", "target_size", "base_model", "condition_type",
             "version", rng.choice(TEXTS)]  # fmt: skip
    right = {
        "independent_condition": "true", "position_delta": "0,-3", "position_scale": "2",
        "condition_size": "96x64", "integration": "false", "compression": "0.5",
        "target_size": "128x128", "base_model": "dev", "condition_type": "canny",
    }  # fmt: skip
    said = {f"omini2.{name}": value for name, value in right.items() if rng.random() < 0.8}
    for _ in range(rng.randrange(4)):
        pair = f"{rng.choice(NUMBERS[:14])}{rng.choice(',x ')}{rng.choice(NUMBERS[15:])}"
        said[f"omini2.{rng.choice(names)}"] = rng.choice([rng.choice(TEXTS), pair])
    return said


def image(rng: Random, longest: int = 64) -> Tensor:
    """Mostly an IMAGE, and mostly with something wrong."""
    n, channels = rng.choice((0, 1, 1, 1, 1, 2, 3)), rng.choice((0, 1, 2, 3, 3, 3, 3, 4, 5))
    height, width = (rng.choice([s for s in SIDES if s <= longest]) for _ in range(2))
    if rng.random() < 0.02:
        height, width = rng.choice(((16384, 16), (16, 16384), (0, 16), (16, 0), (1, 16384)))
    shape: list[int] = [n, height, width, channels]
    if rng.random() < 0.1:
        shape = rng.choice([shape[1:], [1, *shape], shape[2:], []])
    return spoilt(rng, shape)


def mask(rng: Random) -> Tensor:
    """Mostly a MASK, and mostly with something wrong."""
    shape = [rng.choice((0, 1, 1, 1, 2, 3)), *(rng.choice([0, *SIDES * 3]) for _ in range(2))]
    if rng.random() < 0.3:
        shape = rng.choice([shape[1:], [1, *shape], [*shape, 1], shape[2:], [], [1, 1, 16384]])
    return spoilt(rng, shape)


def spoilt(rng: Random, shape: list[int]) -> Tensor:
    """A tensor of noise with some values that no picture has."""
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(rng.getrandbits(32)))
    flat = noise.flatten()
    for _ in range(rng.choice((0, 0, 0, 1, 1, 3))):
        if flat.numel():
            at, value = rng.randrange(flat.numel()), rng.choice(SPECIAL)
            flat[at : at + rng.choice((1, 100_000))] = value
    made = (flat * rng.choice((1, 1, 1, 255))).nan_to_num() if rng.random() < 0.1 else flat
    dtype = torch.float32 if rng.random() < 0.6 else rng.choice(UNUSUAL)
    if not dtype.is_floating_point and not dtype.is_complex:
        made = made.nan_to_num().clamp(0, 255)
    return made.reshape(shape).to(dtype)


def number(rng: Random, low: float, high: float, default: float) -> Any:
    """A number for an input: at its bounds, just past them, far away, or in between."""
    whole = isinstance(default, int)
    if rng.random() < 0.75:  # or every input would be refused for several reasons
        return default
    step = 1 if whole else 1e-3
    near = [low, high, low - step, high + step, default, (low + high) / 2]
    drawn = rng.choice([rng.choice(near), rng.choice(near), rng.choice(NUMBERS)])
    # A node gets what the link brings, of whatever type; whole numbers stay so mostly.
    if whole and isinstance(drawn, float) and math.isfinite(drawn) and rng.random() < 0.9:
        return int(drawn)
    return drawn
