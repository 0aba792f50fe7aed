"""Tiny FLUX models in the real host, driven through the nodes and ``comfy.sample``."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import comfy.model_detection
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.supported_models
import folder_paths
import torch
from comfy.latent_formats import Flux as FluxLatents
from comfy.model_patcher import ModelPatcher
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

import omini2_extension.nodes as nodes
from dev.random_lora import DOUBLE_BLOCK, SINGLE_BLOCK
from omini2_extension.omini2_core.engine.run import Run, RunStats
from omini2_extension.omini2_core.host import kernels, sampling, versions

REFERENCE = Path(__file__).parent / "reference"
CONFIG = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 16,
    "context_in_dim": 24,
    "hidden_size": 32,
    "mlp_ratio": 4.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [4, 6, 6],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
}


def flux_config(guidance_embed: bool, **changes: Any) -> dict[str, Any]:
    """The reference models' shape in ComfyUI's terms."""
    return versions.flux_shape({**CONFIG, "guidance_embed": guidance_embed, **changes})


def make_model(
    config: dict[str, Any],
    weights: dict[str, Tensor] | None = None,
    dtype: Any = torch.float32,
    compute_dtype: Any = None,
) -> ModelPatcher:
    """A ModelPatcher around the host's own FLUX with these weights, or random ones."""
    guidance = config["guidance_embed"]
    kind = comfy.supported_models.Flux if guidance else comfy.supported_models.FluxSchnell
    model_config = kind(config)
    model_config.set_inference_dtype(dtype, compute_dtype)
    model = model_config.get_model(weights or {}, "")
    if weights is None:
        generator = torch.Generator().manual_seed(0)
        weights = {
            key: torch.randn(value.shape, generator=generator) * (value.shape[-1] ** -0.5)
            for key, value in model.diffusion_model.state_dict().items()
        }
    missing, unexpected = model.diffusion_model.load_state_dict(
        {key: value.to(dtype) for key, value in weights.items()}, strict=False
    )
    assert not missing and not unexpected
    cpu = comfy.model_management.get_torch_device()
    return ModelPatcher(model, load_device=cpu, offload_device=torch.device("cpu"))


@cache
def reference(name: str) -> "Reference":
    """One of the reference files."""
    return Reference(name)


class Reference:
    """A reference file: base weights, LoRAs and cases with what the original code computed."""

    def __init__(self, name: str) -> None:
        path = REFERENCE / f"{name}.safetensors"
        self.tensors = load_file(path)
        with safe_open(path, "pt") as file:
            self.meta = json.loads(file.metadata()["meta"])

    def model(self, dtype: Any = torch.float32) -> ModelPatcher:
        """A fresh model with the file's weights."""
        # The host's conversion swaps rows of its input in place.
        base = {key: value.clone() for key, value in self.under("base.").items()}
        weights = comfy.model_detection.convert_diffusers_mmdit(base, "")
        return make_model(flux_config(self.meta["guidance_embeds"]), weights, dtype)

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with a prefix, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def lora_file(self, name: str) -> str:
        """Writes a LoRA of the file into the host's loras folder; returns its lora_name."""
        return save_lora(f"{name}.{id(self)}.safetensors", self.under(f"lora.{name}."))

    def case(self, name: str) -> "Case":
        """One case."""
        return Case(self.meta["cases"][name], self.under(f"case.{name}."))


@dataclass
class Case:
    """Inputs and expected outputs of one case."""

    meta: dict[str, Any]
    tensors: dict[str, Tensor]

    def conditioning(self) -> list[Any]:
        """The prompt as the host's conditioning."""
        options = {
            "pooled_output": self.tensors["pooled"],
            "guidance": self.meta["guidance"],
        }
        return [[self.tensors["txt"], options]]


def save_lora(name: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """Writes a file into the host's loras folder; returns its lora_name."""
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / name, metadata)
    folder_paths.filename_list_cache.clear()
    return name


def random_lora(
    name: str, hidden: int = 32, rank: int = 4, seed: int = 0, scale: float = 0.3, **metadata: str
) -> str:
    """Writes a LoRA of the published shape on every module that a condition passes through.

    Unless told otherwise it says that it is OminiControl's, which its keys don't.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def add(module: str, out_features: int, in_features: int) -> None:
        for part, shape in (("A", (rank, in_features)), ("B", (out_features, rank))):
            value = torch.randn(shape, generator=generator) * scale * shape[1] ** -0.5
            tensors[f"transformer.{module}.lora_{part}.weight"] = value

    add("x_embedder", hidden, 64)
    for kind, count, modules in (
        ("transformer_blocks", CONFIG["depth"], DOUBLE_BLOCK),
        ("single_transformer_blocks", CONFIG["depth_single_blocks"], SINGLE_BLOCK),
    ):
        for i in range(count):
            for module, (out_features, in_features) in modules.items():
                add(f"{kind}.{i}.{module}", out_features * hidden, in_features * hidden)
    return save_lora(name, tensors, {"omini2.family": "OminiControl", **metadata})


def random_easycontrol_lora(
    name: str,
    hidden: int = 32,
    rank: int | Callable[[], int] = 4,
    seed: int = 0,
    scale: float = 0.3,
) -> str:
    """Writes a LoRA with the keys of EasyControl's files; ``rank`` may be asked for each layer."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for kind, count, linears in (
        ("transformer_blocks", CONFIG["depth"], ("q", "k", "v", "proj")),
        ("single_transformer_blocks", CONFIG["depth_single_blocks"], ("q", "k", "v")),
    ):
        for i in range(count):
            for linear in linears:
                r = rank() if callable(rank) else rank
                for part, shape in (("down", (r, hidden)), ("up", (hidden, r))):
                    value = torch.randn(shape, generator=generator) * scale * shape[1] ** -0.5
                    key = f"{kind}.{i}.attn.processor.{linear}_loras.0.{part}.weight"
                    tensors[key] = value
    return save_lora(name, tensors, {"omini2.family": "EasyControl"})


@dataclass
class LatentVae:
    """Stands in for FLUX's VAE, which can't be had here: gives the latents it was told to give."""

    latent: Tensor | None = None

    def encode(self, pixels: Tensor) -> Tensor:
        """Known latents for pictures, a fixed function of the size for black ones."""
        n, height, width, _ = pixels.shape
        if not pixels.any():
            return torch.full((n, 16, height // 8, width // 8), 0.1)
        if self.latent is not None and self.latent.shape[-2:] == (height // 8, width // 8):
            return self.latent
        means = pixels.unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2)).movedim(-1, 1)
        waves = torch.arange(1, 17)[None, :, None, None] * means.mean(1, keepdim=True)
        return torch.sin(7 * waves + means.repeat(1, 6, 1, 1)[:, :16])


def encode(
    latent: Tensor,
    placement: str = "aligned",
    delta: tuple[int, int] = (0, 0),
    position_scale: float = 1.0,
    keep: Tensor | None = None,
) -> Any:
    """Condition Encode on an image whose latent, in the model's space, is this one."""
    n, _, height, width = latent.shape
    vae = LatentVae(FluxLatents().process_out(latent))
    mask = None
    if keep is not None:
        mask = pixel_mask(keep)
    image = torch.ones(n, height * 8, width * 8, 3)
    return nodes.ConditionEncode.execute(
        image, vae, placement, delta[0], delta[1], position_scale, mask
    )[0]


def random_condition(h: int = 6, w: int = 6, seed: int = 0, **options: Any) -> Any:
    """Condition Encode on a random latent of h x w tokens."""
    generator = torch.Generator().manual_seed(seed)
    return encode(torch.randn(1, 16, 2 * h, 2 * w, generator=generator), **options)


def compact(condition: Any, **options: Any) -> Any:
    """Compact Tokens with its defaults; all its outputs."""
    defaults = {
        "compression": 1.0,
        "position_correcting": True,
        "prune": "off",
        "threshold": 0.1,
        "grow": 0,
        "token_integration": False,
    }
    return nodes.CompactTokens.execute(condition, **{**defaults, **options}).args


def pixel_mask(tokens: Tensor) -> Tensor:
    """(h, w) tokens -> the mask (1, 16h, 16w) that marks them."""
    return tokens.repeat_interleave(16, 0).repeat_interleave(16, 1).float()[None]


def apply(model: ModelPatcher, condition: Any, lora_name: str, **options: Any) -> ModelPatcher:
    """Apply Omini2 LoRA with its defaults."""
    defaults = {
        "strength": 1.0,
        "condition_scale": 1.0,
        "attention": "auto",
        "start_percent": 0.0,
        "end_percent": 1.0,
    }
    return nodes.ApplyLora.execute(model, condition, lora_name, **{**defaults, **options})[0]


def with_cache(
    model: ModelPatcher,
    reuse: str = "auto",
    refresh_every: int = 5,
    storage: str = "model",
    keep_on: str = "auto",
) -> ModelPatcher:
    """Condition Cache."""
    return nodes.ConditionCache.execute(model, reuse, refresh_every, storage, keep_on)[0]


def prompt(seed: int = 0, length: int = 5, batch: int = 1, **options: Any) -> list[Any]:
    """A random prompt in the host's conditioning format."""
    generator = torch.Generator().manual_seed(1000 + seed)
    text = torch.randn(batch, length, 24, generator=generator)
    pooled = torch.randn(batch, 16, generator=generator)
    return [[text, {"pooled_output": pooled, "guidance": 3.5, **options}]]


def sample(
    model: ModelPatcher,
    h: int = 6,
    w: int = 6,
    *,
    batch: int = 1,
    steps: int = 4,
    cfg: float = 1.0,
    sampler: str = "euler",
    scheduler: str = "simple",
    seed: int = 0,
    positive: list[Any] | None = None,
    negative: list[Any] | None = None,
    **options: Any,
) -> Tensor:
    """The stock KSampler's path on an empty picture of h x w tokens."""
    latent = torch.zeros(batch, 16, 2 * h, 2 * w)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model,
        noise,
        steps,
        cfg,
        sampler,
        scheduler,
        positive or prompt(0),
        negative or prompt(1),
        latent,
        disable_pbar=True,
        seed=seed,
        **options,
    )


@dataclass
class Recorder:
    """A sampler that evaluates given noise levels and records the model's velocity."""

    latent: Tensor
    noise: Tensor
    velocities: list[Tensor] = field(default_factory=list)

    def __call__(self, model: Any, x: Tensor, sigmas: Tensor, **kw: Any) -> Tensor:
        """The k-diffusion sampler interface."""
        for sigma, noise in zip(sigmas[:-1], self.noise, strict=True):
            x = self.latent + noise
            denoised = model(x, sigma.expand(x.shape[0]), **kw["extra_args"])
            self.velocities.append((x - denoised) / sigma)
        return x


def record(model: ModelPatcher, case: Case) -> Tensor:
    """Velocities at a case's times through ``comfy.sample``: (steps, batch, 16, 2h, 2w)."""
    latent = case.tensors["latent"]
    recorder = Recorder(latent, case.tensors["noise"])
    comfy.sample.sample_custom(
        model,
        torch.zeros_like(latent),
        1.0,
        comfy.samplers.KSAMPLER(recorder),
        torch.tensor([*case.meta["steps"], 0.0]),
        case.conditioning(),
        case.conditioning(),
        latent,
        disable_pbar=True,
    )
    return torch.stack(recorder.velocities)


@contextmanager
def recorded_runs(keep: bool = False) -> Iterator[list[RunStats]]:
    """Collects what each sampling run reports about itself.

    Args:
        keep: whether a run may use what an earlier one has left.
    """
    runs: list[RunStats] = []
    report = sampling.report

    def collect(run: Run, *args: Any) -> None:
        runs.append(run.stats)
        report(run, *args)

    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(sampling, "report", collect))
        if not keep:
            alone = mock.patch.object(sampling, "between_runs", lambda model: None)
            patches.enter_context(alone)
        yield runs


@contextmanager
def pytorch_attention() -> Iterator[None]:
    """The host computes attention with PyTorch's kernels, as it does on a GPU."""
    from comfy.ldm.flux import math
    from comfy.ldm.modules.attention import attention_pytorch

    with (
        mock.patch.object(math, "optimized_attention", attention_pytorch),
        mock.patch.object(kernels, "optimized_attention", attention_pytorch),
    ):
        yield


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||."""
    return float((got - want).norm() / want.norm())
