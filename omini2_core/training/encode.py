"""Pictures, conditions and captions -> latents and text features, once, cached on disk.

What is cached is found by content: the undecoded image, the sizes and settings that shaped it and
the encoders' fingerprint. A file that is damaged or was cut short counts as not there.
"""

import hashlib
import io
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..compaction import tokens_with_content
from ..condition import masked_tokens
from ..errors import Omini2Error, warn
from .conditions import made_from, prepared, reduced
from .config import MADE_ON_THE_FLY, ConditionConfig, TrainConfig
from .data import Sample, samples
from .encoders import Encoders
from .lora_file import write_atomically

LISTED = 20  # bad images that are named one by one
MEMORY_BYTES = 2 << 30  # what is kept in memory of what is on disk
BAD_IMAGE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


class Stopped(Exception):
    """A run was told to stop before its pictures were encoded."""


class Cache:
    """A folder of safetensors files by key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where a key's tensors are, if they are there."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def get(self, key: str) -> dict[str, Tensor] | None:
        """The tensors; None if they aren't there as a whole."""
        try:
            with safe_open(self.path(key), framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
                expected = (file.metadata() or {}).get("crc32")
        except (SafetensorError, OSError):
            return None
        return tensors if expected == _checksum(tensors) else None

    def put(self, key: str, tensors: dict[str, Tensor]) -> None:
        """Keeps tensors under a key."""
        tensors = {name: tensors[name].contiguous() for name in sorted(tensors)}
        write_atomically(self.path(key), save(tensors, {"crc32": _checksum(tensors)}))


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for tensor in tensors.values():
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return str(value)


@dataclass(eq=False)
class EncodedData:
    """A run's data set, encoded.

    Attributes:
        items: the keys of each sample and of its caption's features.
        empty_text: the key of the empty prompt's features.
        black: (16, h, w) latents of a black image, for each condition.
    """

    cache: Cache
    items: list[tuple[str, str]]
    empty_text: str
    black: list[Tensor]
    _held: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    _bytes: int = 0

    def __len__(self) -> int:
        return len(self.items)

    def load(self, key: str) -> dict[str, Tensor]:
        """Tensors from the cache, held in memory as long as there is room.

        Raises:
            Omini2Error: they were there when the run began, but aren't any more.
        """
        if key in self._held:
            return self._held[key]
        tensors = self.cache.get(key)
        if tensors is None:
            raise Omini2Error(
                f"cache: {self.cache.path(key)} was removed or damaged during the run; start it "
                "again, and it goes on from the last checkpoint."
            )
        size = sum(t.nbytes for t in tensors.values())
        if self._bytes + size <= MEMORY_BYTES:
            self._held[key] = tensors
            self._bytes += size
        return tensors


@dataclass(frozen=True)
class Share:
    """Which of several processes this is; each encodes its part."""

    rank: int = 0
    processes: int = 1
    wait: Callable[[], None] = lambda: None


def encode_data(
    config: TrainConfig,
    encoders: Callable[[], Encoders],
    fingerprint: str,
    dtype: torch.dtype,
    share: Share = Share(),
    progress: Callable[[int], None] = lambda count: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EncodedData:
    """Encodes what isn't cached yet.

    Args:
        encoders: called when something has to be encoded.
        fingerprint: the encoders'.
        dtype: what text features are kept in.
        progress: told how many samples are done.

    Raises:
        Omini2Error: no usable image.
        Stopped: ``should_stop`` said so; what is encoded stays cached.
    """
    cache = Cache(config.cache_folder)
    settings = json.dumps(_settings(config), sort_keys=True)

    def text_key(caption: str) -> str:
        return _key("text", fingerprint, str(dtype), caption)

    def put_text(caption: str) -> None:
        key = text_key(caption)
        if cache.get(key) is None:
            features, pooled = encoders().encode_text([caption])
            cache.put(key, {"features": features[0].to(dtype), "pooled": pooled[0]})

    sizes = sorted({config.condition_size(i) for i in range(len(config.conditions))})
    if share.rank == 0:
        put_text("")
        for width, height in sizes:
            key = _key("black", fingerprint, f"{width}x{height}")
            if cache.get(key) is None:
                black = encoders().encode_images(torch.zeros(1, height, width, 3))
                cache.put(key, {"latent": black[0]})
    found: list[tuple[str, str, str]] = []
    problems: dict[str, str] = {}
    for number, sample in enumerate(samples(config)):
        key = _sample_key(sample, fingerprint, settings)
        found.append((sample.name, key, text_key(sample.caption)))
        if number % share.processes != share.rank:
            continue
        if should_stop():
            raise Stopped
        try:
            if sample.problem is not None:
                raise ValueError(sample.problem)
            if cache.get(key) is None:
                cache.put(key, _encode(sample, config, encoders))
            put_text(sample.caption)
        except BAD_IMAGE as error:
            if isinstance(error, Omini2Error):
                raise
            problems[sample.name] = f"{error}" or type(error).__name__
            cache.path(key).unlink(missing_ok=True)
        progress(number + 1)
    share.wait()
    kept = [(key, text) for _, key, text in found if cache.path(key).is_file()]
    if share.rank == 0:
        _report_bad([name for name, key, _ in found if not cache.path(key).is_file()], problems)
    if not kept:
        raise Omini2Error(
            f"data: {len(found)} images were found and none can be used; check the path and the "
            "files named above."
            if found
            else "data: no image was found; check the path (png, jpg, webp and bmp are read)."
        )
    data = EncodedData(cache, kept, text_key(""), [])
    for i in range(len(config.conditions)):
        width, height = config.condition_size(i)
        data.black.append(data.load(_key("black", fingerprint, f"{width}x{height}"))["latent"])
    return data


def _report_bad(names: list[str], problems: dict[str, str]) -> None:
    for name in names[:LISTED]:
        warn(f"data: {name} is left out: {problems.get(name, 'it can not be read')}.")
    if names:
        warn(f"data: {len(names)} image{'s were' if len(names) > 1 else ' was'} left out.")


def _encode(
    sample: Sample, config: TrainConfig, encoders: Callable[[], Encoders]
) -> dict[str, Tensor]:
    """All latents of a sample, and the tokens that pruning keeps or integration paints."""
    target = prepared(_opened(sample.image), config.target_size)
    images = {"target": target}
    tensors = {}
    for index, condition in enumerate(config.conditions):
        if condition.integration:
            continue
        for variant in range(condition.variants):
            pixels = _condition_image(sample, config, index, variant, target)
            images[f"condition.{index}.{variant}"] = pixels
            if condition.pruning:
                kept = tokens_with_content(pixels[None], condition.threshold, condition.grow)
                tensors[f"kept.{index}.{variant}"] = kept
    if sample.mask is not None:
        mask = prepared(_opened(sample.mask), config.target_size)
        height, width = mask.shape[:2]
        paint = masked_tokens(mask.amax(-1), (height // 16, width // 16), (height, width))
        if not paint.any():
            raise ValueError("its mask marks nothing to paint")
        tensors["paint"] = paint
    for name, pixels in images.items():
        tensors[name] = encoders().encode_images(pixels[None])[0]
    return tensors


def _condition_image(
    sample: Sample, config: TrainConfig, index: int, variant: int, target: Tensor
) -> Tensor:
    """(H, W, 3) at the condition's size.

    Made at the target's size and then reduced by area, as the Compact Tokens node does it; a
    larger condition or one of another aspect comes straight from its image.
    """
    condition, size = config.conditions[index], config.condition_size(index)
    width, height = config.target_size
    reducible = size[0] <= width and size[1] <= height and size[0] * height == size[1] * width
    if condition.type in MADE_ON_THE_FLY:
        source = target if reducible else prepared(_opened(sample.image), size)
        seed = _number(_key(str(config.seed), sample.name, str(index), str(variant)))
        pixels = made_from(source, condition, torch.Generator().manual_seed(seed))
    else:
        image = _opened(sample.conditions[index])
        pixels = prepared(image, config.target_size if reducible else size)
    return reduced(pixels, size)


def _opened(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("it is empty")
    image = Image.open(io.BytesIO(data))
    image.load()
    return ImageOps.exif_transpose(image)


def _settings(config: TrainConfig) -> dict[str, Any]:
    """What shapes a sample's tensors besides its content."""
    return {
        "target_size": config.target_size,
        "conditions": [
            _shaping(condition, config, i)
            for i, condition in enumerate(config.conditions)
            if not condition.integration
        ],
    }


def _shaping(condition: ConditionConfig, config: TrainConfig, index: int) -> dict[str, Any]:
    shaping: dict[str, Any] = {
        "index": index,
        "type": condition.type,
        "size": config.condition_size(index),
        "variants": condition.variants,
    }
    if condition.pruning:
        shaping["pruning"] = [condition.threshold, condition.grow]
    if condition.type == "canny":
        shaping["thresholds"] = [condition.low_threshold, condition.high_threshold]
    if condition.type == "blur":
        shaping["radius"] = condition.blur_radius
    if condition.type in ("blur", "mask"):
        shaping["seed"] = config.seed
    return shaping


def _sample_key(sample: Sample, fingerprint: str, settings: str) -> str:
    parts = [sample.image, *(sample.conditions[i] for i in sorted(sample.conditions))]
    digests = [hashlib.sha256(part).hexdigest() for part in (*parts, sample.mask or b"")]
    drawn = sample.name if '"seed"' in settings else ""
    return _key("sample", fingerprint, settings, drawn, *digests)


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def _number(key: str) -> int:
    return int(key[:15], 16)
