"""Tiny FLUX.1 files in the formats that people have, for the host's own loaders.

The keys are FLUX.1's and so is the size of a head, 128; only width and depth are small, and the
text's. A format is a function from weights to what is stored, and back to the numbers that it
stands for: those are what a picture is compared with.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.model_detection
import comfy.utils
import folder_paths
import gguf
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from safetensors.torch import save_file
from tiny import flux_config, make_model
from torch import Tensor

HIDDEN = 256
SHAPE = {"hidden_size": HIDDEN, "axes_dim": [16, 56, 56]}
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Weights = dict[str, Tensor]


def weights(guidance_embed: bool = True, seed: int = 0, **changes: Any) -> Weights:
    """Random weights under the names that FLUX.1's files have."""
    empty = make_model(flux_config(guidance_embed, **SHAPE, **changes), dtype=torch.float32)
    shapes = {key: value.shape for key, value in empty.model.diffusion_model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    return {
        # Newer hosts call the scale of a norm its weight.
        key.replace("_norm.weight", "_norm.scale"): torch.randn(shape, generator=generator)
        * shape[-1] ** -0.5
        for key, shape in shapes.items()
    }


def model_of(given: Weights, guidance_embed: bool = True) -> ModelPatcher:
    """The model that these weights make, without a file or a loader: what others have to equal."""
    model = make_model(flux_config(guidance_embed, **SHAPE))
    own = model.model.model_config.process_unet_state_dict(dict(given))
    model.model.diffusion_model.load_state_dict(own)
    return model


def linears_of_blocks(given: Weights) -> list[str]:
    """The weights that files in small formats store so: the matrices of the blocks."""
    return [key for key, value in given.items() if "_blocks." in key and value.dim() == 2]


# --- what is stored, and the numbers that it stands for -----------------------------------------


@dataclass
class Stored:
    """What a safetensors file holds.

    Attributes:
        numbers: the weights in float32, as a loader that makes no mistake finds them.
    """

    tensors: Weights
    numbers: Weights
    metadata: dict[str, str] = field(default_factory=dict)


def cast(dtype: torch.dtype) -> Callable[[Weights], Stored]:
    """All weights in one number format."""

    def store(given: Weights) -> Stored:
        tensors = {key: value.to(dtype) for key, value in given.items()}
        return Stored(tensors, {key: value.float() for key, value in tensors.items()})

    return store


def _scaled(given: Weights) -> tuple[Weights, Weights, Weights]:
    """-> the tensors, the scale of each matrix, and the numbers."""
    tensors, scales, numbers = dict(given), {}, dict(given)
    for key in linears_of_blocks(given):
        scale = given[key].abs().max() / torch.finfo(E4M3).max
        tensors[key], scales[key.removesuffix(".weight")] = (given[key] / scale).to(E4M3), scale
        numbers[key] = tensors[key].float() * scale
    return tensors, scales, numbers


def scaled_fp8_marker(given: Weights) -> Stored:
    """With a tensor `scaled_fp8` in the file, and a `scale_weight` beside each matrix."""
    tensors, scales, numbers = _scaled(given)
    # In these files every linear layer is scaled, here by 1, and biases are in 8 bits too.
    for key, value in given.items():
        layer = key.removesuffix(".weight")
        if layer not in scales and not key.endswith("_norm.scale"):
            tensors[key] = value.to(E4M3)
            numbers[key] = tensors[key].float()
            if value.dim() == 2:
                scales[layer] = torch.tensor(1.0)
    tensors |= {f"{layer}.scale_weight": scale for layer, scale in scales.items()}
    # Two numbers in it say that the multiplication itself isn't in 8 bits.
    return Stored({**tensors, "scaled_fp8": torch.zeros(2, dtype=E4M3)}, numbers)


def scaled_fp8_header(given: Weights) -> Stored:
    """With the layers and their formats in the file's header."""
    tensors, scales, numbers = _scaled(given)
    tensors |= {f"{layer}.weight_scale": scale for layer, scale in scales.items()}
    layers = {layer: {"format": "float8_e4m3fn"} for layer in scales}
    header = json.dumps({"format_version": "1.0", "layers": layers})
    return Stored(tensors, numbers, {"_quantization_metadata": header})


def scaled_fp8_layers(given: Weights) -> Stored:
    """With a tensor `comfy_quant` beside each matrix, as newer hosts save it."""
    tensors, scales, numbers = _scaled(given)
    tensors |= {f"{layer}.weight_scale": scale for layer, scale in scales.items()}
    config = torch.tensor(list(json.dumps({"format": "float8_e4m3fn"}).encode()), dtype=torch.uint8)
    tensors |= {f"{layer}.comfy_quant": config.clone() for layer in scales}
    return Stored(tensors, numbers)


def gguf_blocks(kind: gguf.GGMLQuantizationType, given: Weights) -> tuple[np.ndarray, ...]:
    """A file's blocks for each matrix of the blocks, in their order.

    The package quantises to some formats only; of Q4_K it can read all, and any bits are a block.
    """
    matrices = [given[key].numpy() for key in linears_of_blocks(given)]
    if kind != gguf.GGMLQuantizationType.Q4_K:
        return tuple(gguf.quantize(matrix, kind) for matrix in matrices)
    random, blocks = np.random.default_rng(0), []
    for matrix in matrices:
        rows, columns = matrix.shape
        # Scale and minimum of a block of 256, 12 bytes of scales within it, 128 of 4 bit numbers.
        block = random.integers(0, 256, (rows, columns // 256, 144), dtype=np.uint8)
        size = columns**-0.5 / 150  # the scales go to 63, the numbers to 15
        block[..., :4] = np.array([size, 7.5 * size], dtype=np.float16).view(np.uint8)
        blocks.append(block.reshape(rows, -1))
    return tuple(blocks)


def save_gguf(path: Path, given: Weights, kind: gguf.GGMLQuantizationType) -> Weights:
    """Writes a GGUF file as ComfyUI-GGUF's converter does; returns the numbers in it."""
    writer, numbers = gguf.GGUFWriter(path, "flux"), dict(given)
    quantised = dict(zip(linears_of_blocks(given), gguf_blocks(kind, given), strict=True))
    for key, value in given.items():
        if key in quantised:
            writer.add_tensor(key, quantised[key], raw_dtype=kind)
            numbers[key] = torch.from_numpy(gguf.dequantize(quantised[key], kind))
        else:
            writer.add_tensor(key, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return numbers


# --- the host's folders and loaders ------------------------------------------------------------


@contextmanager
def model_folder(kind: str, folder: Path) -> Iterator[None]:
    """The host finds models of a kind in this folder."""
    paths = {kind: ([str(folder)], {".safetensors", ".gguf"})}
    with mock.patch.dict(folder_paths.folder_names_and_paths, paths):
        folder_paths.filename_list_cache.clear()
        yield
    folder_paths.filename_list_cache.clear()


@contextmanager
def tiny_heads() -> Iterator[None]:
    """The host's detection takes the number of heads from the width, as newer hosts' does.

    Older ones take it for granted that FLUX.1 has 24: then no smaller file could be loaded.
    """
    detect = comfy.model_detection.detect_unet_config

    def detect_heads(*args: Any, **kwargs: Any) -> Any:
        config = detect(*args, **kwargs)
        if config is not None and config.get("image_model") == "flux":
            config["num_heads"] = config["hidden_size"] // sum(config["axes_dim"])
        return config

    with mock.patch.object(comfy.model_detection, "detect_unet_config", detect_heads):
        yield


def load_diffusion_model(path: Path, stored: Stored, weight_dtype: str = "default") -> ModelPatcher:
    """*Load Diffusion Model* on a file with these weights."""
    from nodes import UNETLoader  # the host's

    save_file(stored.tensors, path, stored.metadata or None)
    with model_folder("diffusion_models", path.parent), tiny_heads():
        return UNETLoader().load_unet(path.name, weight_dtype)[0]


def load_checkpoint(path: Path, stored: Stored) -> ModelPatcher:
    """*Load Checkpoint* on a file with these weights."""
    from nodes import CheckpointLoaderSimple  # the host's

    tensors = {f"model.diffusion_model.{key}": value for key, value in stored.tensors.items()}
    save_file(tensors, path, stored.metadata or None)
    with model_folder("checkpoints", path.parent), tiny_heads():
        return CheckpointLoaderSimple().load_checkpoint(path.name)[0]
