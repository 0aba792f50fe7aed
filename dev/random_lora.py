"""Condition LoRAs of random weights in the demo model's shape, for tests and the soak.

In the key format of the published files; the same for the same arguments.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dev.paths import ROOT

DEMO_MODEL = ROOT / "demo_model"

# diffusers' module -> (outputs, inputs), in multiples of the model's width.
DOUBLE_BLOCK = {
    "norm1.linear": (6, 1),
    "attn.to_q": (1, 1),
    "attn.to_k": (1, 1),
    "attn.to_v": (1, 1),
    "attn.to_out.0": (1, 1),
    "ff.net.2": (1, 4),
}
SINGLE_BLOCK = {
    "norm.linear": (3, 1),
    "attn.to_q": (1, 1),
    "attn.to_k": (1, 1),
    "attn.to_v": (1, 1),
    "proj_mlp": (4, 1),
    "proj_out": (1, 5),
}


def module_shapes(transformer: Path) -> dict[str, tuple[int, int]]:
    """diffusers' names of the linears that a condition passes through -> (outputs, inputs)."""
    with safe_open(transformer, "pt") as file:
        keys = list(file.keys())
        width, inputs = file.get_slice("img_in.weight").get_shape()
    shapes = {"x_embedder": (width, inputs)}
    for prefix, diffusers, modules in (
        ("double_blocks", "transformer_blocks", DOUBLE_BLOCK),
        ("single_blocks", "single_transformer_blocks", SINGLE_BLOCK),
    ):
        blocks = {found[1] for key in keys if (found := re.match(rf"{prefix}\.(\d+)\.", key))}
        for block in sorted(blocks, key=int):
            for module, (n_out, n_in) in modules.items():
                shapes[f"{diffusers}.{block}.{module}"] = n_out * width, n_in * width
    return shapes


def random_lora(
    shapes: dict[str, tuple[int, int]], rank: int, scale: float, seed: int
) -> dict[str, Tensor]:
    """A and B for every module; each changes its layer's output by about `scale` of its input."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (n_out, n_in) in shapes.items():
        down = torch.randn(rank, n_in, generator=generator) * n_in**-0.5
        up = torch.randn(n_out, rank, generator=generator) * scale * rank**-0.5
        tensors[f"transformer.{module}.lora_A.weight"] = down.half()
        tensors[f"transformer.{module}.lora_B.weight"] = up.half()
    return tensors


def make_lora(path: Path, rank: int = 4, scale: float = 0.3, seed: int = 0) -> None:
    """Writes one for the demo model as it is now."""
    shapes = module_shapes(DEMO_MODEL / "transformer.safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(save(random_lora(shapes, rank, scale, seed)))
