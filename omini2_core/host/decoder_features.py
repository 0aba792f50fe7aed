"""The first stages of a VAE's decoder, by whose feature maps Spot Edit compares latents.

Three maps: behind the first convolution, behind the middle, and behind the first upsampling. The
stages are copied to where the model computes and live as long as a run: decoding through the host
would load the VAE, which could push the model off the device.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import Omini2Error

IMAGE = ("conv_in", "mid", "up")  # a decoder's parts, as FLUX.1's and FLUX.2's have them
VIDEO = ("conv1", "middle", "upsamples")  # and Qwen-Image's, whose pictures are films of one frame


def require_decoder(vae: object, channels: int) -> None:
    """Refuses a VAE whose decoder has no such stages, or is for other latents.

    Args:
        channels: of the model's latents.
    """
    found = _channels(getattr(vae, "first_stage_model", None))
    if found is None:
        raise Omini2Error(
            "vae: its decoder has no features that Spot Edit knows how to compare; load the "
            "model's own VAE, or set select to latent."
        )
    if found != channels:
        raise Omini2Error(
            f"vae: it takes latents of {found} channels, but this model's have {channels}; load "
            "the model's own VAE, or set select to latent."
        )


def _channels(inner: Any) -> int | None:
    """How many channels a VAE's latents have; None if its decoder isn't known here."""
    decoder: Any = getattr(inner, "decoder", None)
    if _has(decoder, IMAGE):
        channels: int = decoder.conv_in.in_channels
        return 4 * channels if _packed(inner) else channels
    return int(decoder.conv1.in_channels) if _has(decoder, VIDEO) else None


def _has(decoder: Any, parts: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(decoder, part, None), nn.Module) for part in parts)


def _packed(inner: Any) -> bool:
    """Whether latents are 2x2 patches, normalised by their statistics, as FLUX.2 has them."""
    return getattr(inner, "bn", None) is not None


class DecoderFeatures:
    """The stages of one run, on the device of its model."""

    def __init__(self, vae: Any, to_vae: Callable[[Tensor], Tensor], device: torch.device) -> None:
        """Args:
        to_vae: a latent in the model's space -> as the VAE takes it.
        """
        inner = vae.first_stage_model
        self._to_vae = to_vae
        self._stages = _stages(inner.decoder, lambda part: copy.deepcopy(part).to(device).eval())
        self._video = _has(inner.decoder, VIDEO)
        self._scale: tuple[Tensor, Tensor] | None = None
        if _packed(inner):
            std = torch.sqrt(inner.bn.running_var.float() + inner.bn_eps)
            mean = inner.bn.running_mean.float()
            self._scale = tuple(t.view(1, -1, 1, 1).to(device) for t in (std, mean))  # type: ignore[assignment]
        weights = next(inner.decoder.parameters())
        self._dtype = weights.dtype

    @torch.no_grad()
    def __call__(self, latent: Tensor) -> list[Tensor]:
        """(batch, channels, ..., height, width) in the model's space -> three maps.

        Each is (batch, features, height, width).
        """
        z = self._to_vae(latent)
        if not self._video:
            z = z.flatten(1, -3)
        if self._scale is not None:
            std, mean = self._scale
            z = F.pixel_shuffle(z * std + mean, 2)
        z = z.to(self._dtype)
        maps = []
        for stage in self._stages:
            z = stage(z)
            maps.append(z.flatten(1, -3))
        return maps


def _stages(decoder: Any, copied: Callable[[Any], Any]) -> list[Callable[[Tensor], Tensor]]:
    if _has(decoder, VIDEO):
        layers = list(decoder.upsamples)
        first = next(i for i, layer in enumerate(layers) if hasattr(layer, "resample")) + 1
        return [
            copied(decoder.conv1),
            copied(decoder.middle),
            copied(nn.Sequential(*layers[:first])),
        ]
    middle, up = copied(decoder.mid), copied(decoder.up[-1])

    def through_middle(x: Tensor) -> Tensor:
        attended = middle.attn_1(middle.block_1(x, None))
        out: Tensor = middle.block_2(attended, None)
        return out

    def through_up(x: Tensor) -> Tensor:
        for block in up.block:
            x = block(x, None)
        out: Tensor = up.upsample(x)
        return out

    return [copied(decoder.conv_in), through_middle, through_up]
