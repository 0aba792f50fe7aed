"""Room for the conditions: how much they take, where it is, and asking the host for it."""

import math
from collections.abc import Sequence
from dataclasses import replace

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ..cache.entry import FP8
from ..cache.policy import CachePolicy
from ..cache.run_cache import RunCache
from ..errors import Omini2Error
from .identity import between_runs
from .model import flux1, kv_bytes_per_token, number_bytes
from .setup import Branch, Setup


def room_for(
    setup: Setup, cache: RunCache, chunks: int, model: ModelPatcher, noise_shape: Sequence[int]
) -> list[int]:
    """Decides where K/V are stored, and asks for room for branches, K/V and LoRAs.

    The host's only public way to ask for more memory at this point is the size of the picture, so
    it is asked for a larger one. Other models make room then, before sampling starts.

    Args:
        cache: the run's, whose ``storage`` is decided.
        chunks: how many prompts take part, positive and negative.

    Returns:
        the picture's shape (batch, channels, height, width), with the height that all of it takes.
    """
    batch, channels, height, width, *_ = noise_shape
    policy = cache.policy
    if policy.storage == "fp8" and not has_fp8(model.load_device):
        raise Omini2Error(
            f"storage: {model.load_device} has no 8-bit floats; set storage to model in Condition "
            "Cache."
        )
    kept = kv_bytes(model, setup, policy, batch, chunks)
    loras = sum(b.lora.parameters for b in setup.branches) * number_bytes(model)
    left = between_runs(model).nbytes
    if policy.keep_on == "auto":
        needed = model.model.memory_required([2 * batch, *noise_shape[1:]]) + loras
        # K/V from the last run are either the same or give way.
        place = "gpu" if kept <= room_beside(model, needed) + left else "cpu"
        cache.storage = replace(cache.storage, keep_on=place)
    kept -= min(kept, left)  # there already, or making room
    if cache.storage.keep_on == "cpu" and kept:
        # Those of the block that computes and of the next one.
        kept = 2 * kept // len(flux1(model).blocks)
    per_pixel = model.model.memory_required([1, channels, height, width]) / (height * width)
    kept += sum(entry.nbytes for b in setup.saved for entry in b.saved.entries.values())
    tokens = sum(b.condition.token_count for b in setup.branches)
    tokens += sum(b.saved.tokens for b in setup.saved)
    extra = math.ceil((4 * tokens + (kept + loras) / per_pixel) / width)
    return [batch, channels, height + extra, width]


def room_for_references(
    cache: RunCache,
    model: ModelPatcher,
    noise_shape: Sequence[int],
    kept: int,
    blocks: int,
    beside: int = 0,
) -> list[int]:
    """As :func:`room_for`, for the K/V of an editing model's references.

    Args:
        noise_shape: of the pictures, (batch, channels, ..., height, width).
        kept: bytes of K/V in the model's own format.
        blocks: how many the model has.
        beside: bytes that are needed on the device besides.
    """
    shape, policy = list(noise_shape), cache.policy
    if policy.storage == "fp8":
        if not has_fp8(model.load_device):
            raise Omini2Error(
                f"storage: {model.load_device} has no 8-bit floats; set storage to model in "
                "Condition Cache."
            )
        kept //= number_bytes(model)
    left = between_runs(model).nbytes
    if policy.keep_on == "auto" and cache.storage.keep_on == "gpu":
        needed = model.model.memory_required([2 * shape[0], *shape[1:]])
        place = "gpu" if kept <= room_beside(model, needed) + left else "cpu"
        cache.storage = replace(cache.storage, keep_on=place)
    kept -= min(kept, left)
    if cache.storage.keep_on == "cpu":
        kept = 2 * kept // blocks  # those of the block that computes and of the next one
    kept += beside
    pixels = math.prod(shape[2:])
    per_pixel = model.model.memory_required([1, *shape[1:]]) / pixels
    shape[-2] += math.ceil(kept / per_pixel / (pixels // shape[-2]))
    return shape


def has_fp8(device: torch.device) -> bool:
    """Whether a device can hold 8-bit floats."""
    return bool(comfy.model_management.supports_cast(device, FP8))


def kv_bytes(
    model: ModelPatcher, setup: Setup, policy: CachePolicy, batch: int, chunks: int
) -> int:
    """Bytes of K/V that a run keeps.

    Args:
        batch: pictures at once; each has K/V of its own where a condition sees it.
        chunks: how many prompts take part.
    """

    def rows(branch: Branch) -> int:
        if policy.interval(branch.joint) == 0:
            return 0
        return batch if branch.joint or len(branch.condition.latent) > 1 else 1

    tokens = sum(rows(b) * b.condition.token_count for b in setup.branches)
    images = 2 if setup.image_guidance_scale != 1.0 else 1
    total = tokens * images * chunks * kv_bytes_per_token(model)
    return total // number_bytes(model) if policy.storage == "fp8" else total


def room_beside(model: ModelPatcher, needed: float) -> float:
    """Bytes that are left on the model's device with the whole model and its work on it.

    What other models take there counts as free: the host unloads them. Where the whole model
    doesn't fit anyway, its weights are fetched block by block, and K/V may as well be.
    """
    device = model.load_device
    if comfy.model_management.is_device_cpu(device):
        return math.inf
    loaded = comfy.model_management.loaded_models()
    available: float = comfy.model_management.get_free_memory(device) + sum(
        each.loaded_size() for each in loaded if each.load_device == device
    )
    reserved = comfy.model_management.extra_reserved_memory()
    working: float = max(comfy.model_management.minimum_inference_memory(), needed + reserved)
    size: int = model.model_size()
    return available - size - working
