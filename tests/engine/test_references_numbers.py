"""What FLUX.2's and Krea 2's own code computes, through Condition Cache and the host's sampling."""

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from helpers.editing import EditingReference, cached, has
from tiny import relative_error
from torch import Tensor

FILES = ("flux2_klein_like", "flux2_dev_like", "krea2")
# The newer host's float32 RoPE at FLUX.2's text positions, up to 511, as the files' README says.
TOLERANCE = {True: {"krea2": 1e-5}, False: {}}[has("Krea2")]
LOOSE = 2e-4 if has("Krea2") else 1e-5


@cache
def file(name: str) -> EditingReference:
    return EditingReference(name)


CASES = [
    (name, case)
    for name in FILES
    if name != "krea2" or has("Krea2")
    for case in file(name).meta["cases"]
]


@dataclass
class Recorder:
    """A sampler that evaluates given noise levels and records every prompt's velocity."""

    latent: Tensor
    noise: Tensor
    denoised: list[Tensor] = field(default_factory=list)
    velocities: list[list[Tensor]] = field(default_factory=list)

    def __call__(self, model: Any, x: Tensor, sigmas: Tensor, **kw: Any) -> Tensor:
        for sigma, noise in zip(sigmas[:-1], self.noise, strict=True):
            x = self.latent + noise
            self.denoised = []
            model(x, sigma.expand(x.shape[0]), **kw["extra_args"])
            self.velocities.append([(x - each) / sigma for each in self.denoised])
        return x

    def keep(self, args: dict[str, Any]) -> Tensor:
        """The model's ``sampler_post_cfg_function``."""
        self.denoised = [args["cond_denoised"], args["uncond_denoised"]]
        return args["denoised"]


def velocities(ref: EditingReference, name: str, model: ModelPatcher) -> list[list[Tensor]]:
    meta, tensors = ref.meta["cases"][name], ref.under(f"case.{name}.")
    video = ref.name == "krea2"

    def shaped(t: Tensor) -> Tensor:
        return t.unsqueeze(-3) if video else t

    latents = [
        model.model.process_latent_out(shaped(tensors[f"ref{i}"])) for i in range(len(meta["refs"]))
    ]
    said: dict[str, Any] = {"guidance": meta.get("guidance", 3.5)}
    if latents:
        said["reference_latents"] = latents
    if video:
        said["reference_latents_method"] = "index_timestep_zero"
    prompts = [
        [[tensors[f"txt{i}"], {**said, "pooled_output": None}]] for i in range(len(meta["prompts"]))
    ]
    recorder = Recorder(shaped(tensors["latent"]), shaped(tensors["noise"]))
    model = model.clone()
    model.set_model_sampler_post_cfg_function(recorder.keep, disable_cfg1_optimization=True)
    latent = recorder.latent
    comfy.sample.sample_custom(
        model, torch.zeros_like(latent), 1.0 if len(prompts) == 1 else 3.0,
        comfy.samplers.KSAMPLER(recorder), torch.tensor([*meta["steps"], 0.0]),
        prompts[0], prompts[-1], latent, disable_pbar=True,
    )  # fmt: skip
    return recorder.velocities


@pytest.mark.parametrize(("name", "case"), CASES)
@pytest.mark.parametrize("reuse", ["off", "once"])
def test_velocity_is_the_originals(name: str, case: str, reuse: str) -> None:
    ref = file(name)
    meta, tensors = ref.meta["cases"][case], ref.under(f"case.{case}.")
    isolated = meta.get("isolated", False)
    if reuse == "once" and not isolated and meta["refs"]:
        pytest.skip("joint references that are computed once are an approximation")
    model = ref.model()
    if meta.get("lora"):
        model, _ = comfy.sd.load_lora_for_models(model, None, ref.lora(), 1.0, 0)
    mode = "isolated" if isolated else "joint"
    got = velocities(ref, case, cached(model, reuse, references=mode))
    for step in range(len(meta["steps"])):
        for i in range(len(meta["prompts"])):
            want = tensors[f"velocity.{step}.{i}"]
            error = relative_error(got[step][i].reshape(want.shape), want)
            assert error < TOLERANCE.get(name, LOOSE)
