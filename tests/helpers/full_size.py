"""Editing models in the host's own classes at full size, without memory for their weights."""

from typing import Any

import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from tiny import flux_config

from .editing import FLUX2, KREA2, has

DEV = {"hidden_size": 3072, "num_heads": 24, "axes_dim": [16, 56, 56], "context_in_dim": 4096}
FLUX2_AXES = {"axes_dim": [32, 32, 32, 32]}
QWEN = {"image_model": "qwen_image", "in_channels": 64, "num_layers": 60}


def _flux2(hidden: int, heads: int, depth: int, single: int, text: int) -> dict[str, Any]:
    sizes = {"hidden_size": hidden, "num_heads": heads, "depth": depth, "context_in_dim": text}
    return {**FLUX2, **FLUX2_AXES, **sizes, "depth_single_blocks": single}


# Their names in benchmarks/reference_memory.py -> class and configuration, as the host reads them
# out of the files.
FULL_SIZE: dict[str, tuple[str, dict[str, Any]]] = {
    "FLUX.1 Kontext": (
        "Flux",
        flux_config(True, **DEV, depth=19, depth_single_blocks=38, vec_in_dim=768, mlp_ratio=4.0),
    ),
    "FLUX.2 dev": ("Flux2", flux_config(True, **_flux2(6144, 48, 8, 48, 15360))),
    "FLUX.2 klein 9B": ("Flux2", flux_config(False, **_flux2(4096, 32, 8, 24, 12288))),
    "FLUX.2 klein 4B": ("Flux2", flux_config(False, **_flux2(3072, 24, 5, 20, 7680))),
    "Qwen-Image-Edit": ("QwenImage", QWEN),
}
if has("Krea2"):
    FULL_SIZE["Krea 2"] = ("Krea2", KREA2)


def full_size(name: str) -> ModelPatcher:
    """The model, computing in 16 bits."""
    kind, config = FULL_SIZE[name]
    model_config = getattr(comfy.supported_models, kind)(dict(config))
    model_config.set_inference_dtype(torch.bfloat16, None)
    meta = torch.device("meta")
    model = model_config.get_model({}, "", device=meta)
    return ModelPatcher(model, load_device=torch.device("cpu"), offload_device=meta)
