"""Editing models in the host's own classes: the real ones' sizes, and small ones to be timed."""

from dataclasses import dataclass, field
from typing import Any

import torch

HEAD = 128  # width of an attention head in all of them


@dataclass(frozen=True)
class Kind:
    """An editing model.

    Attributes:
        kind, config: its class in ``comfy.supported_models``, and the host's words for its sizes.
        text: width of a text token.
        channels, side, video: of its latents, as in the tests' tiny models.
        padded: tokens that a shorter prompt is brought to.
    """

    kind: str
    config: dict[str, Any]
    text: int
    channels: int = 16
    side: int = 2
    video: bool = False
    padded: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def latent(self, side: int, device: str = "cpu") -> torch.Tensor:
        """Of side x side tokens."""
        sides = [side * self.side] * 2
        return torch.randn(1, self.channels, *([1] if self.video else []), *sides, device=device)


def flux2(heads: int, double: int, single: int, text: int, guided: bool = False) -> Kind:
    """FLUX.2 of so many heads and blocks."""
    from benchmarks.flux import text_ids

    config = {
        "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None,
        "context_in_dim": text, "hidden_size": heads * HEAD, "mlp_ratio": 3.0, "num_heads": heads,
        "depth": double, "depth_single_blocks": single, "axes_dim": [32] * 4, "theta": 2000,
        "patch_size": 1, "qkv_bias": False, "guidance_embed": guided, "global_modulation": True,
        "mlp_silu_act": True, "ops_bias": False, "default_ref_method": "index",
        "ref_index_scale": 10.0, **text_ids([3]),
    }  # fmt: skip
    return Kind("Flux2", config, text, channels=128, side=1, padded=512)


def qwen(heads: int, blocks: int, text: int) -> Kind:
    """Qwen-Image-Edit of so many heads and blocks."""
    config = {
        "image_model": "qwen_image", "in_channels": 64, "out_channels": 16, "num_layers": blocks,
        "attention_head_dim": HEAD, "num_attention_heads": heads, "joint_attention_dim": text,
        "axes_dims_rope": (16, 56, 56),
    }  # fmt: skip
    return Kind("QwenImage", config, text, video=True)


def models(small: bool) -> dict[str, Kind]:
    """The small ones to be timed, or the real ones; those that this host has."""
    from comfy import supported_models

    from benchmarks import costs, flux

    if small:
        shape = costs.Shape(3 * HEAD, 1, 2, text_width=256, pooled_width=64)
        return {
            "FLUX.1": Kind("Flux", flux.config(shape), 256),
            "FLUX.2": flux2(3, 1, 2, 256),
            "Qwen": qwen(3, 3, 256),
        }
    found = {
        "FLUX.1 Kontext": Kind("Flux", flux.config(costs.FLUX1_DEV), 4096),
        "FLUX.2 dev": flux2(48, 8, 48, 15360, guided=True),
        "FLUX.2 klein 9B": flux2(32, 8, 24, 12288),
        "FLUX.2 klein 4B": flux2(24, 5, 20, 7680),
        "Qwen-Image-Edit": qwen(24, 60, 3584),
    }
    if hasattr(supported_models, "Krea2"):
        at_zero = {"ref_latents_method": "index_timestep_zero"}
        krea = Kind("Krea2", {"image_model": "krea2"}, 12 * 2560, video=True, options=at_zero)
        found["Krea 2"] = krea
    return found
