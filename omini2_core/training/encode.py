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

from ..errors import Omini2Error, warn
from ..files import write_atomically
from ..tokens.compact import tokens_with_content
from ..tokens.encode import masked_tokens
from .conditions import made_from, prepared, reduced
from .config import MADE_ON_THE_FLY, TrainConfig
from .data import Sample, samples
from .encoders import Encoders, Fingerprint

LISTED = 20  # bad images that are named one by one
MEMORY_BYTES = 2 << 30  # what is held in memory of what is on disk
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
        data = save(tensors, {"crc32": _checksum(tensors)})
        write_atomically(self.path(key), data, "cache")


def _checksum(tensors: dict[str, Tensor]) -> str:
    value = 0
    for tensor in tensors.values():
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return str(value)


@dataclass(frozen=True)
class Item:
    """Where a sample's tensors are in the cache.

    Attributes:
        target: the picture's latent.
        text: its caption's features and pooled text.
        conditions: for each condition, the keys by (variant, size index); none with integration.
        paint: the tokens to paint, if masks came with the data.
    """

    target: str
    text: str
    conditions: tuple[dict[tuple[int, int], str], ...]
    paint: str | None

    @property
    def keys(self) -> list[str]:
        """All of them."""
        conditions = [key for by in self.conditions for key in by.values()]
        return [self.target, self.text, *conditions, *([self.paint] if self.paint else [])]


@dataclass(eq=False)
class EncodedData:
    """A run's data set, encoded.

    Attributes:
        items: one for each sample.
        empty_text: the key of the empty prompt's features.
        black: the keys of black images' latents, by condition and size.
    """

    cache: Cache
    items: list[Item]
    empty_text: str
    black: list[list[str]]
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
    fingerprint: Fingerprint,
    dtype: torch.dtype,
    share: Share = Share(),
    progress: Callable[[int], None] = lambda count: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EncodedData:
    """Encodes what isn't cached yet.

    Args:
        encoders: called when something has to be encoded.
        fingerprint: the encoders'.
        dtype: what text features are cached in.
        progress: told how many samples are done.

    Raises:
        Omini2Error: no usable image.
        Stopped: ``should_stop`` said so; what is encoded stays cached.
    """
    work = _Work(config, Cache(config.cache_folder), encoders, fingerprint, dtype)
    if share.rank == 0:
        work.put_text("")
        for index in range(len(config.conditions)):
            for size in config.condition_sizes(index):
                work.put_black(size)
    found: list[tuple[str, Item]] = []
    problems: dict[str, str] = {}
    for number, sample in enumerate(samples(config)):
        item = work.item(sample)
        found.append((sample.name, item))
        if number % share.processes != share.rank:
            continue
        if should_stop():
            raise Stopped
        try:
            if sample.problem is not None:
                raise ValueError(sample.problem)
            work.encode(sample, item)
        except BAD_IMAGE as error:
            if isinstance(error, Omini2Error):
                raise
            problems[sample.name] = f"{error}" or type(error).__name__
        progress(number + 1)
    share.wait()
    usable = [work.complete(item) for _, item in found]
    if share.rank == 0:
        bad = [name for (name, _), good in zip(found, usable, strict=True) if not good]
        _report_bad(bad, problems)
    if not any(usable):
        raise Omini2Error(
            f"data: {len(found)} images were found and none can be used; check the path and the "
            "files named above."
            if found
            else "data: no image was found; check the path (png, jpg, webp and bmp are read)."
        )
    return EncodedData(
        work.cache,
        [item for (_, item), good in zip(found, usable, strict=True) if good],
        work.text_key(""),
        [
            [work.black_key(size) for size in config.condition_sizes(index)]
            for index in range(len(config.conditions))
        ],
    )


def _report_bad(names: list[str], problems: dict[str, str]) -> None:
    for name in names[:LISTED]:
        warn(f"data: {name} is left out: {problems.get(name, 'it can not be read')}.")
    if names:
        warn(f"data: {len(names)} image{'s were' if len(names) > 1 else ' was'} left out.")


class _Work:
    """Where a run's images and captions are cached, and how they get there.

    Every image is cached by itself, so that runs which share pictures share their latents.
    """

    def __init__(
        self,
        config: TrainConfig,
        cache: Cache,
        encoders: Callable[[], Encoders],
        fingerprint: Fingerprint,
        dtype: torch.dtype,
    ) -> None:
        self.config, self.cache, self.encoders = config, cache, encoders
        self.fingerprint, self.dtype = fingerprint, dtype

    def item(self, sample: Sample) -> Item:
        """The keys of everything that belongs to a sample."""
        config, image = self.config, _digest(sample.image)
        size = json.dumps(config.target_size)
        conditions = []
        for index, condition in enumerate(config.conditions):
            source = image if condition.type in MADE_ON_THE_FLY else ""
            source = source or _digest(sample.conditions.get(index, b""))
            by = {}
            if not condition.integration:
                for variant in range(condition.variants):
                    for number, own in enumerate(config.condition_sizes(index)):
                        shaping = json.dumps(self._shaping(sample, index, variant, own))
                        by[variant, number] = self._image_key("condition", source, shaping)
            conditions.append(by)
        mask = sample.mask
        return Item(
            self._image_key("target", image, size),
            self.text_key(sample.caption),
            tuple(conditions),
            None if mask is None else _key("paint", _digest(mask), size),
        )

    def complete(self, item: Item) -> bool:
        """Whether all of a sample is there."""
        return all(self.cache.path(key).is_file() for key in item.keys)

    def encode(self, sample: Sample, item: Item) -> None:
        """Encodes what a sample lacks.

        Raises:
            OSError, ValueError: one of its images is of no use.
        """
        config = self.config
        if self.cache.get(item.target) is None:
            pixels = prepared(_opened(sample.image), config.target_size)
            self.cache.put(item.target, self._latent(pixels))
        for index, by in enumerate(item.conditions):
            condition = config.conditions[index]
            for (variant, number), key in by.items():
                if self.cache.get(key) is not None:
                    continue
                size = config.condition_sizes(index)[number]
                pixels = _condition_image(sample, config, index, variant, size)
                tensors = self._latent(pixels)
                if condition.pruning:
                    kept = tokens_with_content(pixels[None], condition.threshold, condition.grow)
                    tensors["kept"] = kept
                self.cache.put(key, tensors)
        if item.paint is not None and self.cache.get(item.paint) is None:
            self.cache.put(item.paint, {"paint": _paint(sample, config.target_size)})
        self.put_text(sample.caption)

    def text_key(self, caption: str) -> str:
        return _key("text", self.fingerprint.text, str(self.dtype), caption)

    def put_text(self, caption: str) -> None:
        key = self.text_key(caption)
        if self.cache.get(key) is None:
            features, pooled = self.encoders().encode_text([caption])
            self.cache.put(key, {"features": features[0].to(self.dtype), "pooled": pooled[0]})

    def black_key(self, size: tuple[int, int]) -> str:
        return self._image_key("black", json.dumps(size))

    def put_black(self, size: tuple[int, int]) -> None:
        key = self.black_key(size)
        if self.cache.get(key) is None:
            self.cache.put(key, self._latent(torch.zeros(size[1], size[0], 3)))

    def _latent(self, pixels: Tensor) -> dict[str, Tensor]:
        return {"latent": self.encoders().encode_images(pixels[None])[0]}

    def _image_key(self, *parts: str) -> str:
        return _key(self.fingerprint.images, str(self.dtype), *parts)

    def _shaping(
        self, sample: Sample, index: int, variant: int, size: tuple[int, int]
    ) -> dict[str, Any]:
        """What shapes a condition besides the image that it is made from."""
        condition = self.config.conditions[index]
        shaping: dict[str, Any] = {
            "type": condition.type if condition.type in MADE_ON_THE_FLY else "read",
            "size": size,
            "target_size": self.config.target_size,
        }
        if condition.pruning:
            shaping["pruning"] = [condition.threshold, condition.grow]
        if condition.type == "canny":
            shaping["thresholds"] = [condition.low_threshold, condition.high_threshold]
        if condition.type == "blur":
            shaping["radius"] = condition.blur_radius
        if condition.type in ("blur", "mask"):
            shaping["drawn"] = [self.config.seed, sample.name, index, variant]
        return shaping


def _paint(sample: Sample, size: tuple[int, int]) -> Tensor:
    """(h, w) bool, the tokens that a sample's mask marks."""
    mask = prepared(_opened(sample.mask or b""), size)
    height, width = mask.shape[:2]
    paint = masked_tokens(mask.amax(-1), (height // 16, width // 16), (height, width))
    if not paint.any():
        raise ValueError("its mask marks nothing to paint")
    return paint


def _condition_image(
    sample: Sample, config: TrainConfig, index: int, variant: int, size: tuple[int, int]
) -> Tensor:
    """(H, W, 3) at one of the condition's sizes.

    Made at the target's size and then reduced by area, as the Compact Tokens node does it; a
    larger condition or one of another aspect comes straight from its image.
    """
    condition = config.conditions[index]
    width, height = config.target_size
    reducible = size[0] <= width and size[1] <= height and size[0] * height == size[1] * width
    if condition.type in MADE_ON_THE_FLY:
        source = prepared(_opened(sample.image), config.target_size if reducible else size)
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


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:40]


def _number(key: str) -> int:
    return int(key[:15], 16)
