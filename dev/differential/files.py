"""Models, LoRA files and a ControlNet of random weights, for graphs to use."""

from __future__ import annotations

from functools import cache
from typing import Any

import comfy.controlnet
import comfy.model_management
import comfy.ops
import tiny
import torch
from comfy.ldm.flux.controlnet import ControlNetFlux
from helpers.editing import MODELS, Tiny
from torch import Tensor

from .graph import FLUX1, Graph, Lora

KINDS = "lora", "lokr", "loha", "dora", "glora", "diff", "diff_b", "set_weight"
# What a condition passes through, and what it doesn't.
PASSED = (
    "img_in",
    "time_in.in_layer",
    "vector_in.out_layer",
    "double_blocks.0.img_attn.qkv",
    "double_blocks.1.img_attn.proj",
    "double_blocks.0.img_mod.lin",
    "double_blocks.1.img_mlp.0",
    "double_blocks.0.img_mlp.2",
    "single_blocks.0.linear1",
    "single_blocks.1.linear2",
    "single_blocks.2.modulation.lin",
)
BESIDE = (
    "txt_in",
    "double_blocks.0.txt_attn.qkv",
    "double_blocks.1.txt_mlp.0",
    "double_blocks.1.txt_mod.lin",
    "final_layer.linear",
    "final_layer.adaLN_modulation.1",
)
# Of the other models', a layer that references pass through.
ELSEWHERE = {
    "Qwen": "transformer_blocks.0.attn.to_k",
    "Qwen 2511": "transformer_blocks.0.attn.to_k",
    "Mage-Flow": "transformer_blocks.0.attn.to_k",
    "Krea 2": "blocks.0.attn.wk",
}
NORM = "double_blocks.0.img_attn.norm.key_norm"  # has no bias, and takes no LoRA


@cache
def weights(dev: bool, second: bool = False) -> dict[str, Tensor]:
    """A model's weights, the same every time; of the model that is merged with it, or another."""
    first = tiny.make_model(tiny.flux_config(dev)).model.diffusion_model.state_dict()
    first = {key: value.clone() for key, value in first.items()}
    if not second:
        return first
    draw = torch.Generator().manual_seed(7)
    return {k: v + 0.1 * _random(draw, *v.shape) * v.shape[-1] ** -0.5 for k, v in first.items()}


def model(dev: bool, second: bool = False, given: dict[str, Tensor] | None = None) -> Any:
    """A fresh MODEL, since what runs leave behind belongs to their model."""
    return tiny.make_model(tiny.flux_config(dev), given or weights(dev, second))


def kind(graph: Graph) -> Tiny:
    """The sizes of a graph's model."""
    return MODELS[graph.model]


def base(graph: Graph) -> Any:
    """A fresh MODEL of a graph."""
    return model(graph.dev) if graph.model == FLUX1 else kind(graph).make()


def _random(draw: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=draw)


@cache
def _weight(layer: str) -> tuple[str, Tensor]:
    """A layer's name in the model, without ``.weight``, and its weight."""
    for name, where in ELSEWHERE.items():
        if layer == where and name in MODELS:
            return layer, MODELS[name].make().model.diffusion_model.state_dict()[f"{layer}.weight"]
    found = weights(True)
    if f"{layer}.weight" in found:
        return layer, found[f"{layer}.weight"]
    return f"{layer}.scale", found[f"{layer}.scale"]


def lora_tensors(lora: Lora) -> dict[str, Tensor]:
    """A LoRA file's content in the names that every host reads."""
    draw = torch.Generator().manual_seed(lora.seed)
    key, weight = _weight(lora.layer)
    shape, scale, name = weight.shape, 0.3, f"diffusion_model.{key}."
    if lora.kind == "diff_b":
        return {f"{name}diff_b": scale * _random(draw, shape[0])}
    if lora.kind in ("diff", "set_weight"):
        return {f"{name}{lora.kind}": scale * _random(draw, *shape)}
    out, inside = shape
    r = 2

    def pair(a: str, b: str) -> dict[str, Tensor]:
        down, up = _random(draw, r, inside) * inside**-0.5, scale * _random(draw, out, r)
        return {f"{name}{a}": down, f"{name}{b}": up}

    if lora.kind == "lokr":
        halves = _random(draw, 2, 2), scale * _random(draw, out // 2, inside // 2) * inside**-0.5
        return {f"{name}lokr_w1": halves[0], f"{name}lokr_w2": halves[1]}
    if lora.kind == "loha":
        return {**pair("hada_w1_b", "hada_w1_a"), **pair("hada_w2_b", "hada_w2_a")}
    if lora.kind == "glora":
        return {
            f"{name}a1.weight": scale * _random(draw, r, inside) * inside**-0.5,
            f"{name}a2.weight": _random(draw, inside, r),
            f"{name}b1.weight": scale * _random(draw, r, inside) * inside**-0.5,
            f"{name}b2.weight": scale * _random(draw, out, r),
        }
    tensors = pair("lora_down.weight", "lora_up.weight")
    if lora.kind == "dora":
        tensors[f"{name}dora_scale"] = weight.norm(dim=1, keepdim=True) * 1.1
    return tensors


@cache
def lora_file(lora: Lora) -> str:
    """An ordinary LoRA's lora_name."""
    name = f"soak-{lora.kind}-{lora.layer}-{lora.seed}.safetensors"
    return tiny.save_lora(name, lora_tensors(lora))


@cache
def condition_lora(family: str) -> str:
    """A condition LoRA's lora_name."""
    if family == "easycontrol":
        return tiny.random_easycontrol_lora("soak-easycontrol.safetensors")
    return tiny.random_lora("soak-omini.safetensors")


@cache
def _control_weights() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return {k: 0.2 * _random(draw, *v.shape) for k, v in _control_net().state_dict().items()}


def _control_net() -> Any:
    config = tiny.flux_config(True, depth=2, depth_single_blocks=0)
    config.pop("image_model")
    return ControlNetFlux(operations=comfy.ops.disable_weight_init, dtype=torch.float32, **config)


@cache
def controlnet() -> Any:
    """A tiny ControlNet of XLabs' kind."""
    net = _control_net()
    net.load_state_dict(_control_weights())
    device = comfy.model_management.get_torch_device()
    return comfy.controlnet.ControlNet(net, load_device=device, extra_conds=["y", "guidance"])
