"""The frozen base: diffusers' FLUX.1 transformer from a folder or a single file of any size."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import Omini2Error
from ..flux1.numbers import rope_axes

DEMO = "demo"
DEMO_FILE = Path(__file__).resolve().parents[2] / "demo_model" / "transformer.safetensors"
PREFIX = "model.diffusion_model."
HEAD_KEY = "double_blocks.0.img_attn.norm.key_norm.scale"

_EMBEDDERS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "final_layer.linear": "proj_out",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE = {
    "modulation.lin": "norm.linear",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}


def base_file(base: str) -> Path:
    """What ``base:`` of a config names."""
    return DEMO_FILE if base == DEMO else Path(base).expanduser()


def load_base(base: str, dtype: torch.dtype, axes: list[int] | None = None) -> Any:
    """FLUX.1's transformer, diffusers' ``FluxTransformer2DModel``, frozen.

    Args:
        base: ``demo``, a diffusers folder, or a .safetensors as ComfyUI's users have it.
        axes: RoPE's shares of a head, where they aren't FLUX.1's.

    Raises:
        Omini2Error: nothing there, damaged, or another model.
    """
    path = base_file(base)
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        try:
            model = FluxTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
        except (OSError, ValueError) as error:
            raise Omini2Error(
                f"base: {path} holds no FLUX.1 transformer in diffusers' layout ({error}); name "
                "the folder with transformer/config.json in it, or a .safetensors file."
            ) from error
    else:
        model = from_tensors(read_single_file(path), dtype, axes)
    return model.requires_grad_(False)


def quantized(model: Any, kind: str) -> Any:
    """The base with its blocks' linear layers in fewer bits.

    Args:
        kind: ``none``, ``nf4`` (bitsandbytes) or ``int8`` (torchao).

    Raises:
        Omini2Error: the library isn't installed.
    """
    if kind == "none":
        return model
    blocks = (*model.transformer_blocks, *model.single_transformer_blocks)
    try:
        if kind == "nf4":
            import bitsandbytes

            for block in blocks:
                _to_nf4(block, bitsandbytes)
        else:
            from torchao.quantization import Int8WeightOnlyConfig, quantize_

            for block in blocks:
                quantize_(block, Int8WeightOnlyConfig())
    except ImportError as error:
        raise Omini2Error(
            f"quantize: {kind} needs {error.name}, which is not installed; install it with pip "
            f"install {error.name}, or set quantize to none."
        ) from error
    return model


def _to_nf4(module: Any, bitsandbytes: Any) -> None:
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            weight = child.weight
            small = bitsandbytes.nn.Linear4bit(
                child.in_features,
                child.out_features,
                child.bias is not None,
                compute_dtype=weight.dtype,
                quant_type="nf4",
            )
            small.weight = bitsandbytes.nn.Params4bit(
                weight.data, requires_grad=False, quant_type="nf4"
            )
            small.bias = child.bias
            setattr(module, name, small)  # the weights become nf4 on their way to the device
        else:
            _to_nf4(child, bitsandbytes)


def original_name(key: str) -> str:
    """What Black Forest Labs called a tensor of a single file.

    ComfyUI puts a prefix before it in checkpoints, and newer ones save the norms of queries and
    keys under another name.
    """
    name = key.removeprefix(PREFIX)
    for norm in ("query_norm", "key_norm"):
        name = name.replace(f"{norm}.weight", f"{norm}.scale")
    return name


def read_single_file(path: Path) -> dict[str, Tensor]:
    """All tensors of a FLUX.1 file under the names that Black Forest Labs gave them.

    Raises:
        Omini2Error: nothing there, damaged, or another model.
    """
    if path.suffix not in (".safetensors", ".sft"):
        raise Omini2Error(
            f"base: {path} is neither a folder nor a .safetensors file; train on the safetensors "
            "checkpoint that it was made from (the LoRA then runs on GGUF and fp8 as well)."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {original_name(key): file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise Omini2Error(
            f"base: {path} can't be read as a safetensors file ({error}); check the path, or "
            "download it again."
        ) from error
    if HEAD_KEY not in tensors or "vector_in.in_layer.weight" not in tensors:
        raise Omini2Error(
            f"base: {path} is no FLUX.1 transformer (no {HEAD_KEY}); use flux1-dev.safetensors, "
            "flux1-schnell.safetensors or another checkpoint of FLUX.1."
        )
    return tensors


def from_tensors(
    tensors: dict[str, Tensor], dtype: torch.dtype, axes: list[int] | None = None
) -> Any:
    """Diffusers' transformer around the tensors of a single file; empties ``tensors``.

    Raises:
        Omini2Error: tensors are missing.
    """
    config = config_of(tensors, axes)
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel(**config)
    expected = model.state_dict()
    weights = dict(_converted(tensors, dtype))
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise Omini2Error(
            f"base: the file lacks {len(missing)} of FLUX.1's tensors ({missing[0]} ...); it is "
            "incomplete or another model, so download it again."
        )
    model.load_state_dict({key: weights[key] for key in expected}, assign=True)
    return model


def config_of(tensors: dict[str, Tensor], axes: list[int] | None = None) -> dict[str, Any]:
    """The arguments of ``FluxTransformer2DModel`` that fit a single file's tensors."""
    hidden = tensors["img_in.weight"].shape[0]
    head_dim = tensors[HEAD_KEY].numel()
    return {
        "in_channels": tensors["img_in.weight"].shape[1],
        "out_channels": tensors["final_layer.linear.weight"].shape[0],
        "num_layers": _count(tensors, "double_blocks"),
        "num_single_layers": _count(tensors, "single_blocks"),
        "attention_head_dim": head_dim,
        "num_attention_heads": hidden // head_dim,
        "joint_attention_dim": tensors["txt_in.weight"].shape[1],
        "pooled_projection_dim": tensors["vector_in.in_layer.weight"].shape[1],
        "guidance_embeds": "guidance_in.in_layer.weight" in tensors,
        "axes_dims_rope": tuple(axes or rope_axes(head_dim)),
    }


def _count(tensors: dict[str, Tensor], blocks: str) -> int:
    return 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith(f"{blocks}."))


def _converted(tensors: dict[str, Tensor], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Each tensor under diffusers' name; taken out of ``tensors`` as it goes, to save memory."""
    hidden = tensors["img_in.weight"].shape[0]
    scales = {k: tensors.pop(k) for k in list(tensors) if k.endswith(("scale_weight", "_scale"))}
    for key in list(tensors):
        if key == "scaled_fp8" or key.endswith("scale_input"):
            continue
        tensor = tensors.pop(key).to(dtype)
        scale = scales.get(key.removesuffix("weight") + "scale_weight", scales.get(f"{key}_scale"))
        if scale is not None:  # ComfyUI's scaled fp8
            tensor = tensor * scale.to(dtype)
        module, _, kind = key.rpartition(".")
        kind = "weight" if kind == "scale" else kind
        for name, part in _placed(module, tensor, hidden):
            yield f"{name}.{kind}", part


def _placed(module: str, tensor: Tensor, hidden: int) -> Iterator[tuple[str, Tensor]]:
    """A module's tensor as the module or modules that diffusers makes of it."""
    if module in _EMBEDDERS:
        yield _EMBEDDERS[module], tensor
        return
    if module == "final_layer.adaLN_modulation.1":
        shift, scale = tensor.chunk(2)
        yield "norm_out.linear", torch.cat((scale, shift))
        return
    blocks, _, rest = module.partition(".")
    index, _, inner = rest.partition(".")
    if blocks == "double_blocks":
        name = f"transformer_blocks.{index}"
        if inner in _DOUBLE:
            yield f"{name}.{_DOUBLE[inner]}", tensor
        elif inner in ("img_attn.qkv", "txt_attn.qkv"):
            ends = "to_{}" if inner.startswith("img") else "add_{}_proj"
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                yield f"{name}.attn.{ends.format(letter)}", part
    elif blocks == "single_blocks":
        name = f"single_transformer_blocks.{index}"
        if inner in _SINGLE:
            yield f"{name}.{_SINGLE[inner]}", tensor
        elif inner == "linear1":
            *qkv, mlp = tensor.split([hidden, hidden, hidden, tensor.shape[0] - 3 * hidden])
            for letter, part in zip("qkv", qkv, strict=True):
                yield f"{name}.attn.to_{letter}", part
            yield f"{name}.proj_mlp", mlp
