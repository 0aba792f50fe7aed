"""Spot Edit's reference file, and tiny editing models to run it on."""

import json
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import comfy.model_detection
import comfy.sample
import comfy.samplers
import torch
from comfy.ldm.modules.diffusionmodules.model import Decoder
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file, safe_open
from tiny import REFERENCE, flux_config, make_model
from torch import Tensor

import omini2_extension.nodes as nodes
from omini2_extension.omini2_core.engine.spot import Plan, SpotState

SELECT = {"LPIPS": "perceptual", "L4": "latent", "cosine": "cosine"}
FUSION = {"as_written": "off", "intended": "once", "paper": "recursive"}


def spot_edit(model: ModelPatcher, **options: Any) -> ModelPatcher:
    """Omini2 Spot Edit with its defaults."""
    given = {
        "select": "perceptual",
        "threshold": 0.2,
        "full_steps": 4,
        "reset_steps": "auto",
        "fusion": "off",
        "grow": 0,
        **options,
    }
    return nodes.SpotEditNode.execute(model, **given)[0]


@cache
def spot_file() -> "SpotFile":
    """The reference file."""
    return SpotFile()


class SpotFile:
    """What SpotEdit's own code computed on a tiny FLUX.1 Kontext."""

    def __init__(self) -> None:
        path = REFERENCE / "spotedit.safetensors"
        self.tensors = load_file(path)
        with safe_open(path, "pt") as file:
            self.meta = json.loads(file.metadata()["meta"])

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with a prefix, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def model(self) -> ModelPatcher:
        """A fresh model with the file's weights."""
        base = {key: value.clone() for key, value in self.under("base.").items()}
        weights = comfy.model_detection.convert_diffusers_mmdit(base, "")
        return make_model(flux_config(True), weights)

    def vae(self) -> Any:
        """The host's decoder with the file's weights, where a VAE has it."""
        shape = self.meta["vae"]
        decoder = Decoder(
            ch=shape["ch"], out_ch=3, ch_mult=tuple(shape["ch_mult"]),
            num_res_blocks=shape["num_res_blocks"], attn_resolutions=[], in_channels=3,
            resolution=256, z_channels=shape["z_channels"],
        )  # fmt: skip
        weights = decoder_weights(self.under("vae.decoder."), len(shape["ch_mult"]))
        decoder.load_state_dict(weights)
        return SimpleNamespace(first_stage_model=SimpleNamespace(decoder=decoder))


def decoder_weights(theirs: dict[str, Tensor], levels: int) -> dict[str, Tensor]:
    """diffusers' names of a VAE's decoder -> ComfyUI's."""
    out = {}
    for key, value in theirs.items():
        parts = key.split(".")
        if parts[0] == "mid_block":
            if parts[1] == "resnets":
                name = ".".join(["mid", f"block_{int(parts[2]) + 1}", *parts[3:]])
            else:
                rest = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
                part = rest.get(parts[3], "proj_out")
                name = f"mid.attn_1.{part}.{parts[-1]}"
                if value.ndim == 2:
                    value = value[..., None, None]
        elif parts[0] == "up_blocks":
            at = f"up.{levels - 1 - int(parts[1])}"
            rest = parts[3:] if parts[2] == "resnets" else parts[4:]
            name = ".".join([at, "block" if parts[2] == "resnets" else "upsample", *rest])
        else:
            name = key.replace("conv_norm_out", "norm_out")
        out[name.replace("conv_shortcut", "nin_shortcut")] = value
    return out


def unpacked(tokens: Tensor, hw: tuple[int, int]) -> Tensor:
    """(..., h w, 64) tokens, channel by channel -> (..., 16, 2h, 2w)."""
    h, w = hw
    t = tokens.unflatten(-2, (h, w)).unflatten(-1, (16, 2, 2))
    order = (*range(t.ndim - 5), -3, -5, -2, -4, -1)
    return t.permute(*(i % t.ndim for i in order)).flatten(-4, -3).flatten(-2, -1)


class SpotCase:
    """One case, run through the node and the host's sampling."""

    def __init__(self, name: str) -> None:
        file = spot_file()
        self.meta = file.meta["cases"][name]
        self.tensors = file.under(f"case.{name}.")
        self.hw = tuple(self.meta["hw"])

    def edited_model(self, **changes: Any) -> ModelPatcher:
        """The model behind the node, as the case has it."""
        meta = self.meta
        options = {
            "select": SELECT[meta["method"]],
            "threshold": meta["threshold"],
            "full_steps": meta["initial_steps"],
            "reset_steps": ", ".join(map(str, meta["reset_steps"])) or "none",
            "fusion": FUSION[meta["fusion"]],
            "vae": spot_file().vae() if meta["method"] == "LPIPS" else None,
        }
        return spot_edit(spot_file().model(), **{**options, **changes})

    def prompt(self, model: ModelPatcher) -> list[Any]:
        """The case's prompt with its reference."""
        given = model.model.process_latent_out(self.tensors["ref_latent"])
        said = {
            "pooled_output": self.tensors["pooled"],
            "guidance": self.meta["guidance"],
            "reference_latents": [given],
        }
        return [[self.tensors["txt"], said]]

    def sample(self, model: ModelPatcher, sampler: str = "euler") -> "Sampled":
        """KSampler's path."""
        noise = unpacked(self.tensors["noise"], self.hw)
        got = Sampled()

        def callback(step: int, denoised: Tensor, x: Tensor, total: int) -> None:
            got.before.append(x.clone())
            got.denoised.append(denoised.clone())

        prompt, latent = self.prompt(model), torch.zeros_like(noise)
        begin = SpotState.begin

        def keep(state: SpotState, step: int) -> Plan:
            plan = begin(state, step)
            none = torch.zeros(self.hw, dtype=torch.bool)
            got.unedited.append(none if plan.unedited is None else plan.unedited.cpu())
            return plan

        with mock.patch.object(SpotState, "begin", keep):
            out = comfy.sample.sample_custom(
                model, noise, 1.0, comfy.samplers.sampler_object(sampler), self.tensors["sigmas"],
                prompt, prompt, latent, callback=callback, disable_pbar=True,
            )  # fmt: skip
        got.final = model.model.process_latent_in(out)
        return got


@dataclass
class Sampled:
    """What happened in a run.

    Attributes:
        before, denoised: latents (1, 16, 2h, 2w) at each step, in the model's space.
        unedited: (h, w) bool, at each of the sampler's calls.
        final: what the sampler gives, in the model's space.
    """

    before: list[Tensor] = field(default_factory=list)
    denoised: list[Tensor] = field(default_factory=list)
    unedited: list[Tensor] = field(default_factory=list)
    final: Tensor = field(default_factory=lambda: torch.empty(0))
