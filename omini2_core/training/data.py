"""Pictures with captions from a folder, Hugging Face ``datasets`` or WebDataset shards.

Every source yields undecoded bytes, so that what is cached already need not be decoded.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..errors import Omini2Error, warn
from .config import ConditionConfig, DataConfig, TrainConfig

IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
CAPTION_KEYS = ("text", "caption", "prompt")


@dataclass(frozen=True, eq=False)
class Sample:
    """One picture, undecoded.

    Attributes:
        name: what messages call it.
        conditions: the images that come with it, by the condition's index.
        mask: what integration paints, if masks are given.
        problem: why it can't be used, if that is known already.
    """

    name: str
    image: bytes
    caption: str
    conditions: dict[int, bytes] = field(default_factory=dict)
    mask: bytes | None = None
    problem: str | None = None


def samples(config: TrainConfig) -> Iterator[Sample]:
    """All samples of a run in a fixed order.

    Raises:
        Omini2Error: the source can't be opened.
    """
    data = config.data
    if data.folder is not None:
        found = _from_folder(data, data.folder)
    elif data.datasets is not None:
        found = _from_datasets(data, data.datasets, config.conditions)
    else:
        found = _from_shards(data, config.conditions)
    partners = _Partners(config.conditions)
    for sample in islice(found, data.limit):
        yield partners.added_to(sample)


class _Partners:
    """Condition images and masks from second folders, by the picture's name without ending."""

    def __init__(self, conditions: list[ConditionConfig]) -> None:
        self._folders = {i: _by_stem(c.folder) for i, c in enumerate(conditions) if c.folder}
        masks = next((c.masks for c in conditions if c.masks is not None), None)
        self._masks = None if masks is None else _by_stem(masks)

    def added_to(self, sample: Sample) -> Sample:
        stem = str(Path(sample.name).with_suffix(""))
        found = dict(sample.conditions)
        mask = None
        try:
            for index, folder in self._folders.items():
                found[index] = folder[stem].read_bytes()
            if self._masks is not None:
                mask = self._masks[stem].read_bytes()
        except KeyError:
            problem = f"the second folder has no image called {stem}"
            return Sample(sample.name, sample.image, sample.caption, problem=problem)
        except OSError as error:
            return Sample(sample.name, sample.image, sample.caption, problem=str(error))
        return Sample(sample.name, sample.image, sample.caption, found, mask, sample.problem)


def _images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGES and p.is_file())


def _by_stem(folder: Path) -> dict[str, Path]:
    return {str(p.relative_to(folder).with_suffix("")): p for p in _images_in(folder)}


def _from_folder(data: DataConfig, folder: Path) -> Iterator[Sample]:
    listed = _metadata(folder, data.caption_column)
    uncaptioned = 0
    for path in _images_in(folder):
        name = path.relative_to(folder).as_posix()
        beside = path.with_suffix(".txt")
        if name in listed:
            caption = listed[name]
        elif beside.is_file():
            caption = beside.read_text(encoding="utf-8").strip()
        else:
            caption = data.caption or ""
            uncaptioned += data.caption is None
        try:
            yield Sample(name, path.read_bytes(), caption)
        except OSError as error:
            yield Sample(name, b"", caption, problem=str(error))
    if uncaptioned:
        warn(
            f"data.folder: {uncaptioned} pictures have no caption and are trained with an empty "
            "one; put a .txt of the same name beside each, or set data.caption."
        )


def _metadata(folder: Path, column: str | None) -> dict[str, str]:
    """Captions by file name from ``metadata.jsonl``, as Hugging Face's image folders have it."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            captions[entry["file_name"]] = _caption(entry, column) or ""
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise Omini2Error(
                f"data.folder: line {number} of {path} is no JSON object with file_name and text "
                f"({error}); correct it."
            ) from error
    return captions


def _caption(entry: dict[str, Any], column: str | None) -> str | None:
    """The caption in a record; the first of several."""
    keys = CAPTION_KEYS if column is None else (column,)
    value = next((entry[key] for key in keys if key in entry), None)
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    return None if value is None else str(value)


def _from_datasets(
    data: DataConfig, name: str, conditions: list[ConditionConfig]
) -> Iterator[Sample]:
    import datasets

    path = Path(name).expanduser()
    try:
        if path.suffix in (".parquet", ".arrow", ".json", ".jsonl", ".csv"):
            kind = {".jsonl": "json"}.get(path.suffix, path.suffix[1:])
            found = datasets.load_dataset(kind, data_files=str(path), split=data.split)
        else:
            source = str(path) if path.exists() else name
            found = datasets.load_dataset(source, data.subset, split=data.split)
    except Exception as error:  # whatever a download or a format's reader raises
        raise Omini2Error(
            f"data.datasets: {name} can't be loaded ({error}); check its name, or name a folder."
        ) from error
    columns = {i: c.column for i, c in enumerate(conditions) if c.column is not None}
    for column in (data.image_column, *columns.values()):
        if column not in found.column_names:
            raise Omini2Error(
                f"data.datasets: {name} has no column {column}; it has "
                f"{', '.join(found.column_names)}: set data.image_column and conditions.column."
            )
        found = found.cast_column(column, datasets.Image(decode=False))
    for number, row in enumerate(found):
        caption = _caption(row, data.caption_column)
        try:
            images = {i: _bytes(row[column]) for i, column in columns.items()}
            image = _bytes(row[data.image_column])
        except OSError as error:
            yield Sample(f"{number:06d}", b"", "", problem=str(error))
            continue
        yield Sample(f"{number:06d}", image, caption or data.caption or "", images)


def _bytes(image: dict[str, Any] | None) -> bytes:
    if image is None:
        return b""
    return image["bytes"] or Path(image["path"]).read_bytes()


def _from_shards(data: DataConfig, conditions: list[ConditionConfig]) -> Iterator[Sample]:
    import webdataset

    def skip(error: Exception) -> bool:
        warn(f"data.webdataset: a part of a shard was left out ({error}); get it again.")
        return True

    columns = {i: c.column for i, c in enumerate(conditions) if c.column is not None}
    shards = webdataset.WebDataset(
        data.webdataset, shardshuffle=False, handler=skip, empty_check=False
    )
    for record in shards:
        name = record["__key__"]
        endings = IMAGES if data.image_column == "image" else (f".{data.image_column}",)
        image = next((record[e[1:]] for e in endings if e[1:] in record), b"")
        missing = [column for column in columns.values() if column not in record]
        if missing or not image:
            problem = f"it has no {missing[0] if missing else data.image_column} in its shard"
            yield Sample(name, b"", "", problem=problem)
            continue
        try:
            texts = json.loads(record["json"]) if "json" in record else {}
        except ValueError as error:
            yield Sample(name, b"", "", problem=f"its json can't be read ({error})")
            continue
        if "txt" in record:
            texts.setdefault("text", record["txt"].decode("utf-8", "replace").strip())
        caption = _caption(texts, data.caption_column)
        images = {i: record[column] for i, column in columns.items()}
        yield Sample(name, image, caption or data.caption or "", images)
