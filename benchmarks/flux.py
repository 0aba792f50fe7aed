"""A FLUX-shaped model with random weights in the host's own classes, driven through our nodes.

Speed depends on shapes, not on what the weights say. Imports the host: `host.start()` comes first.
"""

import inspect
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.supported_models
import folder_paths
import torch
from comfy.ldm.flux.model import FluxParams
from comfy.model_patcher import ModelPatcher
from safetensors.torch import save_file
from torch import Tensor

import omini2_extension.nodes as nodes
from benchmarks import costs
from benchmarks.costs import PATCH, Shape
from benchmarks.side_by_side import Timing
from omini2_extension.omini2_core.host import identity

HEAD = 128  # as FLUX.1 has, with its RoPE axes
AXES = [16, 56, 56]
LORA = "omini2_benchmark.safetensors"
# diffusers' modules that a condition passes through, as published: (inputs, outputs).
LORA_DOUBLE = ("norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2")
LORA_SINGLE = ("norm.linear", "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp", "proj_out")


def device() -> torch.device:
    """Where the host computes."""
    return comfy.model_management.get_torch_device()


def dtype() -> torch.dtype:
    """The format that users of this device compute in."""
    return torch.bfloat16 if device().type == "cuda" else torch.float32


def model(shape: Shape, weights: torch.dtype | None = None) -> ModelPatcher:
    """The host's FLUX of this shape, its weights in the format given or that of the device."""
    # Made where it is to be used, which on a GPU takes seconds instead of minutes; where it
    # doesn't fit, as ComfyUI would load it.
    size = costs.weights(shape) * (weights or dtype()).itemsize
    comfy.model_management.unload_all_models()
    fits = comfy.model_management.get_free_memory(device()) > 1.5 * size
    at = device() if fits else comfy.model_management.unet_offload_device()
    return built("Flux" if shape.guidance else "FluxSchnell", config(shape), weights, at)


def config(shape: Shape) -> dict[str, Any]:
    """The host's words for a FLUX.1 of this shape."""
    return {
        "image_model": "flux",
        "in_channels": PATCH // 4,
        "out_channels": PATCH // 4,
        "vec_in_dim": shape.pooled_width,
        "context_in_dim": shape.text_width,
        "hidden_size": shape.hidden,
        "mlp_ratio": shape.mlp_ratio,
        "num_heads": shape.hidden // HEAD,
        "depth": shape.depth,
        "depth_single_blocks": shape.depth_single,
        "axes_dim": AXES,
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": shape.guidance,
        **text_ids([]),
    }


def text_ids(axes: list[int]) -> dict[str, Any]:
    """Which axes of the positions count text tokens, where the host wants to be told."""
    newer = "txt_ids_dims" in inspect.signature(FluxParams).parameters
    return {"txt_ids_dims": axes} if newer else {}


def built(
    kind: str, config: dict[str, Any], weights: torch.dtype | None, at: torch.device
) -> ModelPatcher:
    """One of the host's models with random weights; on the meta device with none."""
    model_config = getattr(comfy.supported_models, kind)(config)
    cast = None if weights in (None, dtype()) else dtype()
    model_config.set_inference_dtype(weights or dtype(), cast)
    base = model_config.get_model({}, "", device=at)
    for weight in base.diffusion_model.parameters():
        values = torch.empty(weight.shape, dtype=dtype(), device=weight.device)
        weight.data.copy_(values.normal_(std=weight.shape[-1] ** -0.5))
    return ModelPatcher(
        base, load_device=device(), offload_device=comfy.model_management.unet_offload_device()
    )


@contextmanager
def lora_folder(
    shape: Shape, rank: int, tensors: dict[str, Tensor] | None = None
) -> Iterator[None]:
    """The host's loras folder holds LORA: these tensors, or one of this rank as published."""
    with TemporaryDirectory() as folder:
        save_file(tensors or _lora(shape, rank), Path(folder) / LORA)
        folder_paths.add_model_folder_path("loras", folder)
        yield
        folder_paths.get_folder_paths("loras").remove(folder)
        folder_paths.filename_list_cache.pop("loras", None)


def _lora(shape: Shape, rank: int) -> dict[str, Tensor]:
    """Random tensors under the published key names."""
    h, m = shape.hidden, shape.mlp
    sizes = {  # inputs, outputs
        "norm1.linear": (h, 6 * h),
        "norm.linear": (h, 3 * h),
        "ff.net.2": (m, h),
        "proj_mlp": (h, m),
        "proj_out": (h + m, h),
    }
    modules = {"x_embedder": (PATCH, h)}
    for blocks, count, names in (
        ("transformer_blocks", shape.depth, LORA_DOUBLE),
        ("single_transformer_blocks", shape.depth_single, LORA_SINGLE),
    ):
        for i in range(count):
            modules |= {f"{blocks}.{i}.{name}": sizes.get(name, (h, h)) for name in names}
    tensors = {}
    for module, (n_in, n_out) in modules.items():
        tensors[f"transformer.{module}.lora_A.weight"] = torch.randn(rank, n_in) * n_in**-0.5
        tensors[f"transformer.{module}.lora_B.weight"] = torch.randn(n_out, rank) * 0.1
    return tensors


class Vae:
    """Stands in for FLUX's VAE: encoding isn't part of what is measured."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Random latents of the right size."""
        n, height, width, _ = pixels.shape
        return torch.randn(n, 16, height // 8, width // 8)


def encoded(pixels: Tensor, placement: str) -> Any:
    """Condition Encode."""
    return nodes.ConditionEncode.execute(pixels, Vae(), placement, 0, 0, 1.0)[0]


def applied(
    to: ModelPatcher, condition: Any, attention: str, scale: float = 1.0,
    lora: str = LORA, strength: float = 1.0,
) -> ModelPatcher:  # fmt: skip
    """Apply Omini2 LoRA."""
    return nodes.ApplyLora.execute(to, condition, lora, strength, scale, attention, 0.0, 1.0)[0]


def with_condition(to: ModelPatcher, side: int, *values: Any) -> ModelPatcher:
    """One more condition of side x side tokens, through the nodes; the rest as for `applied`."""
    return applied(to, encoded(torch.rand(1, 16 * side, 16 * side, 3), "fit"), *values)


def with_cache(
    to: ModelPatcher, reuse: str, every: int, storage: str = "model", keep_on: str = "auto"
) -> ModelPatcher:
    """Condition Cache."""
    return nodes.ConditionCache.execute(to, reuse, every, storage, keep_on)[0]


def forget(of: ModelPatcher) -> None:
    """What earlier runs have left is gone: the next one computes its conditions."""
    identity.between_runs(of).clear()


@dataclass(frozen=True)
class Task:
    """What is sampled: an empty picture of side x side tokens, a random prompt of text tokens."""

    shape: Shape
    text: int
    side: int
    steps: int

    def timed(self, conditioned: ModelPatcher, second_seed: bool = False) -> Timing:
        """Samples as the stock KSampler does; cfg 1, so one evaluation a step.

        Args:
            second_seed: whether the run may use the K/V that the one before it has left.
        """
        if not second_seed:
            forget(conditioned)
        latent = torch.zeros(1, 16, 2 * self.side, 2 * self.side)
        noise = comfy.sample.prepare_noise(latent, 0)
        options: dict[str, Any] = {
            "pooled_output": torch.ones(1, self.shape.pooled_width),
            "guidance": 3.5,
        }
        prompt = [[torch.randn(1, self.text, self.shape.text_width), options]]
        _finish()
        clock, processor = time.perf_counter(), time.process_time()
        comfy.sample.sample(
            conditioned, noise, self.steps, 1.0, "euler", "simple", prompt, prompt, latent,
            disable_pbar=True, seed=0,
        )  # fmt: skip
        _finish()
        return Timing(time.perf_counter() - clock, time.process_time() - processor)


def _finish() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()
