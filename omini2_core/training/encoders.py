"""Text encoders and VAE: ComfyUI's own loaders, or diffusers' pipelines."""

import hashlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..errors import Omini2Error
from .base import DEMO, DEMO_FILE
from .config import EncoderConfig, TrainConfig

ROOT = Path(__file__).resolve().parents[2]
COMFY_TEXT_TOKENS = 256  # what its T5 tokenizer pads shorter prompts to


class Fingerprint(NamedTuple):
    """Says which encoders they are; what they gave is cached under it."""

    text: str
    images: str


class Encoders(Protocol):
    """What the trainer asks of a text encoder and a VAE."""

    fingerprint: Fingerprint

    def encode_images(self, pixels: Tensor) -> Tensor:
        """(n, H, W, 3), 0 to 1 -> (n, 16, H/8, W/8) latents in the model's space."""

    def decode_images(self, latents: Tensor) -> Tensor:
        """The way back."""

    def encode_text(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """(n, tokens, width) features and (n, pooled width) pooled text of CLIP."""

    def release_text(self) -> None:
        """Frees the text encoders; only images come after this."""


class ComfyEncoders:
    """The host's CLIP and VAE objects: features are what its CLIP Text Encode node gives."""

    def __init__(
        self, clip: Any, vae: Any, fingerprint: Fingerprint, dtype: torch.dtype = torch.float32
    ) -> None:
        import comfy.latent_formats

        self.fingerprint = fingerprint
        self._clip, self._vae, self._dtype = clip, vae, dtype
        self._space = comfy.latent_formats.Flux()

    def encode_images(self, pixels: Tensor) -> Tensor:
        # The host runs a VAE on the CPU in float32, however slow that is.
        with torch.no_grad(), torch.autocast("cpu", self._dtype, self._dtype != torch.float32):
            encoded: Tensor = self._vae.encode(pixels)
            latents: Tensor = self._space.process_in(encoded.float().cpu())
            return latents.clone()

    def decode_images(self, latents: Tensor) -> Tensor:
        with torch.no_grad():
            decoded: Tensor = self._vae.decode(self._space.process_out(latents))
            return decoded.float().cpu().clone()

    def encode_text(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        features, pooled = [], []
        with torch.no_grad():
            for text in texts:
                tokens = self._clip.tokenize(text)
                [[feature, more]] = self._clip.encode_from_tokens_scheduled(tokens)
                features.append(feature.float().cpu().clone())
                pooled.append(more["pooled_output"].float().cpu().clone())
        return torch.cat(features), torch.cat(pooled)

    def release_text(self) -> None:
        import comfy.model_management

        self._clip = None
        comfy.model_management.unload_all_models()
        comfy.model_management.soft_empty_cache()


class DiffusersEncoders:
    """The text encoders, tokenizers and VAE in a diffusers folder of FLUX.1."""

    def __init__(
        self, folder: Path, device: torch.device, dtype: torch.dtype, fingerprint: Fingerprint
    ) -> None:
        from diffusers import AutoencoderKL, FluxPipeline

        self.fingerprint = fingerprint
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", torch_dtype=dtype)
        # Without its transformer the pipeline is just the encoders and what goes around them.
        self._pipe: Any = FluxPipeline.from_pretrained(
            folder, transformer=None, vae=vae, torch_dtype=dtype
        ).to(device)
        self._vae: Any = vae.to(device)

    def encode_images(self, pixels: Tensor) -> Tensor:
        vae = self._vae
        with torch.no_grad():
            images = (pixels.movedim(-1, 1) * 2 - 1).to(vae.device, vae.dtype)
            latents: Tensor = vae.encode(images).latent_dist.mode()
        scaled: Tensor = (latents.float() - vae.config.shift_factor) * vae.config.scaling_factor
        return scaled.cpu()

    def decode_images(self, latents: Tensor) -> Tensor:
        vae = self._vae
        with torch.no_grad():
            latents = latents / vae.config.scaling_factor + vae.config.shift_factor
            images: Tensor = vae.decode(latents.to(vae.device, vae.dtype)).sample.float().cpu()
        return (images.movedim(1, -1) / 2 + 0.5).clamp(0, 1)

    def encode_text(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        # As long as ComfyUI makes it, where the LoRA will be used; the pipeline's own is 512.
        longest = max(len(self._pipe.tokenizer_2(text).input_ids) for text in texts)
        with torch.no_grad():
            features, pooled, _ = self._pipe.encode_prompt(
                list(texts), None, max_sequence_length=max(COMFY_TEXT_TOKENS, longest)
            )
        return features.float().cpu(), pooled.float().cpu()

    def release_text(self) -> None:
        self._pipe = None


def load_encoders(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> Encoders:
    """The encoders that a config names; the demo model and diffusers folders bring their own.

    Raises:
        Omini2Error: none are named, or ComfyUI isn't found.
    """
    chosen = config.encoders
    if chosen is None and (Path(config.base) / "text_encoder").is_dir():
        chosen = EncoderConfig(diffusers=Path(config.base))
    if chosen is not None and chosen.diffusers is not None:
        return DiffusersEncoders(chosen.diffusers, device, dtype, fingerprint_of(config))
    import_host(chosen.comfyui if chosen is not None else None)
    if chosen is None:
        from ..demo import model as demo_model

        _, clip, vae = demo_model.load()
        return ComfyEncoders(clip, vae, fingerprint_of(config), dtype)
    import comfy.sd

    files = [chosen.clip_l, chosen.t5xxl, chosen.vae]
    texts = [str(path) for path in files[:2]]
    clip = comfy.sd.load_clip(texts, clip_type=comfy.sd.CLIPType.FLUX)
    vae = comfy.sd.VAE(sd=load_file(str(chosen.vae)))
    return ComfyEncoders(clip, vae, fingerprint_of(config), dtype)


def has_encoders(config: TrainConfig) -> bool:
    """Whether a config says where text features and latents come from."""
    return (
        config.encoders is not None
        or is_demo(config.base)
        or (Path(config.base) / "text_encoder").is_dir()
    )


def is_demo(base: str) -> bool:
    """Whether a base is the model that comes with the extension."""
    return base == DEMO or Path(base).expanduser().resolve() == DEMO_FILE


def fingerprint_of(config: TrainConfig) -> Fingerprint:
    """Which encoders a config names, without loading them."""
    chosen = config.encoders
    if chosen is None and is_demo(config.base):
        text, vae = (
            hashlib.sha256((DEMO_FILE.parent / f"{name}.safetensors").read_bytes()).hexdigest()
            for name in ("text_encoder", "vae")
        )
        return Fingerprint(text, vae)
    if chosen is None or chosen.diffusers is not None:
        folder = Path(config.base) if chosen is None else chosen.diffusers
        images = f"diffusers {folder.resolve()}"  # type: ignore[union-attr]
        return Fingerprint(f"{images} {COMFY_TEXT_TOKENS}", images)
    files = [p for p in (chosen.clip_l, chosen.t5xxl, chosen.vae) if p is not None]
    clip_l, t5xxl, vae = (f"{p.name} {p.stat().st_size}" for p in files)
    return Fingerprint(f"{clip_l} {t5xxl}", vae)


def import_host(given: Path | None = None) -> None:
    """Makes ComfyUI importable.

    Its own ``nodes`` must not be hidden by this extension's, and ``python -m`` puts the
    extension's root first on ``sys.path``: it is taken out.

    Raises:
        Omini2Error: no ComfyUI found.
    """
    if "comfy" in sys.modules:
        return
    # The extension usually lies in ComfyUI/custom_nodes; dev/setup.py puts one in .cache.
    places = [given, os.environ.get("COMFYUI_PATH"), ROOT.parents[1], ROOT / ".cache" / "comfyui"]
    found = [Path(p).expanduser() for p in places if p]
    host = next((p.resolve() for p in found if (p / "comfy" / "sd.py").is_file()), None)
    if host is None:
        raise Omini2Error(
            "encoders.comfyui: ComfyUI isn't found; set it, or COMFYUI_PATH, to ComfyUI's folder."
        )
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() not in (ROOT, host)]
    sys.path.insert(0, str(host))
    from comfy.cli_args import args

    if not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        args.cpu = True  # read once, when comfy.model_management is imported
