"""A FLUX.1 with few and small blocks, and the files that fit it."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import comfy.model_management
import comfy.supported_models
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.model_patcher import ModelPatcher
from safetensors.torch import save

from dev.quality.fuzz import inputs
from omini2_extension.omini2_core.cache import file as saved_file
from omini2_extension.omini2_core.cache.entry import FP8, Entry, KeysValues
from omini2_extension.omini2_core.host.model import lora_targets
from omini2_extension.omini2_core.lora.deltas import Target

CONFIG: dict[str, Any] = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 16,
    "context_in_dim": 24, "hidden_size": 16, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
    "depth_single_blocks": 1, "axes_dim": [2, 2, 4], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
FIT = saved_file.Fit("a model", 2, 2, 8, "torch.float32")


def flux_config() -> dict[str, Any]:
    """CONFIG for the host that is there; newer ones want one field more."""
    later = {"txt_ids_dims": []} if "txt_ids_dims" in FluxParams.__annotations__ else {}
    return {**CONFIG, **later}


@cache
def tiny_flux() -> ModelPatcher:
    """One for all inputs, as the host keeps what a loader loaded."""
    config = comfy.supported_models.Flux(flux_config())
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.diffusion_model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
    device = comfy.model_management.get_torch_device()
    return ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


@cache
def targets() -> tuple[dict[str, Target], set[str]]:
    """What a LoRA may act on in this model."""
    return lora_targets(tiny_flux())


def ominicontrol_file(rank: int = 2, hidden: int = 16) -> bytes:
    """A LoRA with the keys of OminiControl's files, for CONFIG."""
    shapes = {
        "x_embedder": (64, hidden),
        "transformer_blocks.0.attn.to_q": (hidden, hidden),
        "transformer_blocks.0.ff.net.2": (4 * hidden, hidden),
        "single_transformer_blocks.0.proj_mlp": (hidden, 4 * hidden),
    }
    tensors = {}
    for module, (inside, outside) in shapes.items():
        tensors[f"transformer.{module}.lora_A.weight"] = torch.ones(rank, inside)
        tensors[f"transformer.{module}.lora_B.weight"] = torch.ones(outside, rank).half()
    return save(tensors, inputs.metadata(Random(0)))


def easycontrol_file(rank: int = 2, hidden: int = 16) -> bytes:
    """A LoRA with the keys of EasyControl's files, for CONFIG."""
    tensors = {}
    for block, linears in (
        ("transformer_blocks", "q k v proj"),
        ("single_transformer_blocks", "q v"),
    ):
        for linear in linears.split():
            key = f"{block}.0.attn.processor.{linear}_loras.0"
            tensors[f"{key}.down.weight"] = torch.ones(rank, hidden).bfloat16()
            tensors[f"{key}.up.weight"] = torch.ones(hidden, rank)
    return save(tensors)


def cache_file(fp8: bool) -> bytes:
    """A condition's K/V for FIT."""
    entry = Entry(FIT.blocks)
    for number in range(FIT.blocks):
        k, v = (torch.ones(1, FIT.heads, 6, FIT.head_dim) for _ in range(2))
        scales = (torch.ones(1, FIT.heads, 1, 1), torch.ones(1, FIT.heads, 1, 1))
        entry.blocks[number] = (
            KeysValues(k.to(FP8), v.to(FP8), scales) if fp8 else KeysValues(k, v, None)
        )
        entry.filled.add(number)
    keys_values = saved_file.Saved(
        FIT, 6, None if fp8 else (6, 6), "a chair", "chair.safetensors", torch.ones(1, 16),
        3.5 if fp8 else None, {saved_file.IMAGE: entry},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        saved_file.save(keys_values, path)
        return path.read_bytes()
