"""Templates executed on tiny models: the host's own nodes, with stand-ins for what needs files."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nodes as host_nodes
import torch
from torch import Tensor

import omini2_extension.nodes as our_nodes
from dev.host.prompts import Prompt

from .editing import Tiny

MODULES = [
    importlib.import_module(f"comfy_extras.nodes_{name}")
    for name in ("cfg", "custom_sampler", "edit_model", "flux", "model_advanced", "qwen", "sd3")
]
PIXELS = 128  # along a token's side: fewer tokens than a real VAE would give


def node_class(kind: str) -> Any:
    """A node by its id, of the host or of the extension."""
    ours = {node.define_schema().node_id: node for node in our_nodes.NODES}
    if kind in ours:
        return ours[kind]
    if kind in host_nodes.NODE_CLASS_MAPPINGS:
        return host_nodes.NODE_CLASS_MAPPINGS[kind]
    return next(getattr(module, kind) for module in MODULES if hasattr(module, kind))


@dataclass
class TextEncoder:
    """Gives a tiny model its text, another one for other words."""

    tiny: Tiny

    def tokenize(self, text: str, **options: Any) -> str:
        return f"{text} {len(options.get('images', ()))}"

    def encode_from_tokens_scheduled(self, tokens: str, **options: Any) -> list[Any]:
        ((text, values),) = self.tiny.prompt(sum(map(ord, tokens)))
        return [[text, {key: values[key] for key in ("pooled_output",)}]]


@dataclass
class Pictures:
    """A VAE whose latents depend on the pixels, and that paints nothing."""

    tiny: Tiny

    def encode(self, pixels: Tensor) -> Tensor:
        height, width = (n // PIXELS for n in pixels.shape[1:3])
        return self.tiny.latent(height, width, int(1000 * pixels.mean()))

    def decode(self, samples: Tensor) -> Tensor:
        return torch.zeros(1, 8, 8, 3)


def execute(
    prompt: Prompt, tiny: Tiny, instead: dict[str, Callable[..., Any]] | None = None
) -> Tensor:
    """Runs a template; returns what its sampler gave.

    Args:
        instead: node ids of kinds -> what gives their only output from their inputs.
    """
    seed = iter(range(1, 100))
    stand_ins: dict[str, Callable[..., Any]] = {
        "UNETLoader": lambda **_: tiny.make(),
        "CLIPLoader": lambda **_: TextEncoder(tiny),
        "DualCLIPLoader": lambda **_: TextEncoder(tiny),
        "VAELoader": lambda **_: Pictures(tiny),
        "LoraLoaderModelOnly": lambda model, **_: model.clone(),
        "LoadImage": lambda **_: torch.full((1, 768, 1024, 3), next(seed) / 10),
        "EmptySD3LatentImage": lambda **_: {"samples": torch.zeros_like(tiny.latent(8, 8, 0))},
        **(instead or {}),
    }
    given: dict[str, Any] = {}

    def output(link: list[Any]) -> Any:
        node_id, number = link
        if node_id not in given:
            given[node_id] = run(prompt[node_id])
        return given[node_id][number]

    def run(node: dict[str, Any]) -> tuple[Any, ...]:
        inputs = {
            name: output(value) if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        kind = node["class_type"]
        if kind in stand_ins:
            return (stand_ins[kind](**inputs),)
        found = node_class(kind)
        if hasattr(found, "execute"):
            return found.execute(**inputs).args
        return getattr(found(), found.FUNCTION)(**inputs)

    (decode,) = (node for node in prompt.values() if node["class_type"] == "VAEDecode")
    return output(decode["inputs"]["samples"])["samples"]
