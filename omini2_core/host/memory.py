"""Room for the conditions: how much they take, where it is, and asking the host for it."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ..cache.courier import SLOTS
from ..cache.entry import FP8
from ..cache.policy import CachePolicy
from ..cache.run_cache import RunCache
from ..errors import Omini2Error
from ..flux1.numbers import TEXT_TOKENS
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
    needed = working_bytes(model, setup, policy, noise_shape, chunks)
    left = between_runs(model).nbytes
    if policy.keep_on == "auto":
        plain = model.model.memory_required(list(noise_shape))
        # K/V from the last run are either the same or give way.
        place = "gpu" if kept <= room_beside(model, plain + needed) + left else "cpu"
        cache.storage = replace(cache.storage, keep_on=place)
    kept -= min(kept, left)  # there already, or making room
    kept += sum(entry.nbytes for b in setup.saved for entry in b.saved.entries.values())
    if cache.storage.keep_on == "cpu":
        kept = SLOTS * kept // len(flux1(model).blocks)
    # The host counts every picture of the batch anew.
    per_pixel = model.model.memory_required([batch, channels, height, width]) / (height * width)
    extra = math.ceil((kept + needed) / per_pixel / width)
    return [batch, channels, height + extra, width]


# What is alive at once in a block of FLUX.1, in numbers of a token's width: q, k and v in one, the
# MLP, and what becomes of them. `benchmarks.simulate` counts it, and the tests hold these to it.
BLOCK = 17  # of a token on its way through a block, at most; plain FLUX has as much
ATTENDING = 16  # of text and picture in their attention
JOINED = 2  # K and V once more, with the conditions' behind them
HALFWAY = 10  # of a condition's token that is computed beside them, while they look at it


def working_bytes(
    model: ModelPatcher,
    setup: Setup,
    policy: CachePolicy,
    noise_shape: Sequence[int],
    chunks: int,
) -> int:
    """Bytes that conditions need beside their K/V, beyond those that plain FLUX works in.

    Not all of it at once: what is computed before the model's first block is over by then.
    """
    batch, _, height, width, *_ = noise_shape
    plain = TEXT_TOKENS + -(-height // 2) * -(-width // 2)
    paint = None if setup.integration is None else setup.integration.condition.paint
    main = plain if paint is None else TEXT_TOKENS + int(paint.sum())
    keys, beside, walks = sum(b.saved.tokens for b in setup.saved), 0, Counter[Hashable]()
    for b in setup.branches:
        tokens = b.condition.token_count
        keys += tokens
        if b.joint or policy.interval(b.joint) == 0:
            beside += tokens
        else:
            rows = batch if len(b.condition.latent) > 1 else 1
            walks[_lora(b), tokens] += tokens * rows * chunks
    looking = batch * (ATTENDING * main + JOINED * (main + keys) + HALFWAY * beside)
    behind = batch * (JOINED * main + BLOCK * beside)
    widths = max(looking, behind, BLOCK * max(walks.values(), default=0)) - BLOCK * batch * plain
    flux = flux1(model)
    loras = {_lora(b): b.lora.parameters for b in setup.branches}
    numbers = max(0, widths) * flux.heads * flux.head_dim + sum(loras.values())
    return numbers * number_bytes(model)


def _lora(branch: Branch) -> Hashable:
    """Branches that have the same share a LoRA on the device."""
    return branch.lora.digest, branch.strength, branch.lora.family.name


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
        kept = SLOTS * kept // blocks
    kept += beside
    pixels = math.prod(shape[2:])
    per_pixel = model.model.memory_required(shape) / pixels
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
