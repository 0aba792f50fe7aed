"""A condition's K/V as a file: computed once, given on, used without its image, LoRA or VAE.

A ``.safetensors`` file holds K and V of each block, the pooled text that they were computed with,
and says in its header what it is and what it fits. Everything that the header says is checked
before a tensor is read.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..digest import digest
from ..errors import Omini2Error, brief
from ..files import open_tensors, whole_file
from .entry import FP8, Entry, KeysValues

VERSION = "2"  # 1 had no hash of the header
HEADER = "omini2.condition_cache"
IMAGE, EMPTY = "image", "empty"
FORMATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F8_E4M3": FP8}
HEADER_KEYS = {
    "version", "fit", "tokens", "picture_hw", "description", "lora", "guidance", "storage",
    "images", "hash",
}  # fmt: skip
MAX_TOKENS = 1 << 16
MAX_TEXT = 10_000  # letters of a description
MAX_HEADER = 1 << 17  # letters; more than this module writes


@dataclass(frozen=True)
class Fit:
    """What K/V have to agree with before they can be used.

    Attributes:
        model: names the weights of the base model, with ordinary LoRAs where these count.
        blocks, heads, head_dim: its shape.
        dtype: what it computes in, as in "torch.bfloat16".
    """

    model: str
    blocks: int
    heads: int
    head_dim: int
    dtype: str


@dataclass(frozen=True, eq=False)
class Saved:
    """A condition's K/V that were computed before.

    Attributes:
        tokens: how many.
        picture_hw: the picture's size in tokens where the K/V are made for one; None fits all.
        description: what the person who saved it said.
        lora: name of the LoRA.
        pooled: (1, width) pooled text that they were computed with.
        guidance: what the branch got, if it follows the conditioning's.
        entries: K/V of the image, and of a black one if image guidance was on.
    """

    fit: Fit
    tokens: int
    picture_hw: tuple[int, int] | None
    description: str
    lora: str
    pooled: Tensor
    guidance: float | None
    entries: Mapping[str, Entry] = field(repr=False)


def save(saved: Saved, path: Path) -> None:
    """Writes a file, wholly or not at all.

    Raises:
        Omini2Error: the description is too long, or it can't be written; an older one is as it
            was.
    """
    if len(saved.description) > MAX_TEXT:
        raise Omini2Error(
            f"description: it is longer than {MAX_TEXT} letters; shorten it, a file holds no more."
        )
    tensors = {"pooled": saved.pooled.cpu().contiguous()}
    for kind, entry in saved.entries.items():
        for number, keys_values in entry.blocks.items():
            for name, tensor in zip(_names(kind, number), keys_values.tensors, strict=False):
                tensors[name] = tensor.cpu().contiguous()
    header = {
        "version": VERSION,
        "fit": asdict(saved.fit),
        "tokens": saved.tokens,
        "picture_hw": saved.picture_hw,
        "description": saved.description,
        "lora": saved.lora,
        "guidance": saved.guidance,
        "storage": saved.entries[IMAGE].format,
        "images": list(saved.entries),
    }
    header["hash"] = _hash(header, tensors)
    with whole_file(path, "filename_prefix") as partial:
        save_file(tensors, partial, {HEADER: json.dumps(header)})


def load(path: Path, fit: Fit, patched: Callable[[], str] | None = None) -> Saved:
    """Reads a file that fits a model.

    Args:
        patched: names the model's weights with the ordinary LoRAs on them, as ``fit.model`` does
            without; K/V of conditions that those act on too belong to these weights.

    Raises:
        Omini2Error: no such file as :func:`save` writes, or K/V for something else.
    """
    try:
        with open_tensors(path) as file:
            header = _header(path.name, file.metadata() or {})
            _require_fit(path.name, header, fit, patched)
            _require_shapes(path.name, header, fit, file)
            # Copies: the reader's tensors are the file itself, and change or crash with it.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise _damaged(path.name, brief(error)) from error
    if _hash(header, tensors) != header["hash"]:
        raise _damaged(path.name, "its content isn't what its hash says")
    if not all(torch.isfinite(tensor.float()).all() for tensor in tensors.values()):
        raise _damaged(path.name, "it holds NaN or infinite values")
    return Saved(
        fit=fit,
        tokens=header["tokens"],
        picture_hw=_size(header["picture_hw"]),
        description=header["description"],
        lora=header["lora"],
        pooled=tensors["pooled"],
        guidance=header["guidance"],
        entries={kind: _entry(kind, fit.blocks, tensors) for kind in header["images"]},
    )


def fitted_to(path: Path) -> tuple[int, int] | None:
    """The picture's size in tokens that a file's K/V are made for; None fits all.

    Raises:
        Omini2Error: no such file as :func:`save` writes.
    """
    try:
        with open_tensors(path) as file:
            hw = _header(path.name, file.metadata() or {})["picture_hw"]
    except (SafetensorError, OSError) as error:
        raise _damaged(path.name, brief(error)) from error
    return _size(hw)


def _header(name: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    if HEADER not in metadata:
        raise Omini2Error(
            f"cache_name: {name} holds no condition's K/V; choose a file that Omini2 Save Cache "
            "has written."
        )
    if len(metadata[HEADER]) > MAX_HEADER:
        raise _damaged(name, "its header isn't one that this version writes")
    try:
        header: dict[str, Any] = json.loads(metadata[HEADER])
        right = (
            header["version"] == VERSION
            and _is_count(header["tokens"])
            and header["storage"] in ("model", "fp8")
            and header["images"] in ([IMAGE], [IMAGE, EMPTY])
            and _is_size(header["picture_hw"])
            and (header["guidance"] is None or _is_number(header["guidance"]))
            and all(isinstance(header[key], str) for key in ("description", "lora", "hash"))
            and len(header["description"]) <= MAX_TEXT
            and header.keys() == HEADER_KEYS
            and header["fit"].keys() == {each.name for each in fields(Fit)}
            and all(isinstance(value, str | int) for value in header["fit"].values())
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        right = False
    if not right:
        raise _damaged(name, "its header isn't one that this version writes")
    return header


def _size(hw: list[int] | None) -> tuple[int, int] | None:
    return None if hw is None else (hw[0], hw[1])


def _is_size(hw: Any) -> bool:
    return hw is None or (isinstance(hw, list) and len(hw) == 2 and all(map(_is_count, hw)))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_TOKENS


def _is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _require_fit(
    name: str, header: dict[str, Any], fit: Fit, patched: Callable[[], str] | None
) -> None:
    theirs, ours = header["fit"], asdict(fit)
    shape = [key for key in ("blocks", "heads", "head_dim") if theirs.get(key) != ours[key]]
    if shape:
        raise Omini2Error(
            f"cache_name: {name} was made for a model of another size; load the model that it was "
            "saved with."
        )
    if theirs.get("dtype") != fit.dtype:
        raise Omini2Error(
            f"cache_name: {name} was computed in {brief(theirs.get('dtype'))} and this model "
            f"computes in {fit.dtype}; load the model with the same weight_dtype, or save the file "
            "again."
        )
    model = theirs.get("model")
    if model != fit.model and (patched is None or model != patched()):
        raise Omini2Error(
            f"cache_name: {name} was made with other weights; load the model that it was saved "
            "with, quantised the same way and, for EasyControl's and its kin, with the same LoRAs "
            "of Load LoRA, or save it again with this one."
        )


def _require_shapes(name: str, header: dict[str, Any], fit: Fit, file: Any) -> None:
    """Every tensor is there, none is more, and each has the shape and format that it must have."""
    fp8 = header["storage"] == "fp8"
    shape = [1, fit.heads, header["tokens"], fit.head_dim]
    wanted: dict[str, tuple[list[int], torch.dtype]] = {}
    for kind in header["images"]:
        for number in range(fit.blocks):
            k, v, k_scale, v_scale = _names(kind, number)
            wanted[k] = wanted[v] = shape, FP8 if fp8 else _dtype(fit)
            if fp8:
                wanted[k_scale] = wanted[v_scale] = [1, fit.heads, 1, 1], torch.float32
    found = set(file.keys())
    if found != {*wanted, "pooled"}:
        raise _damaged(name, "it holds other tensors than its header says")
    for key, (size, dtype) in wanted.items():
        tensor = file.get_slice(key)
        if tensor.get_shape() != size or FORMATS.get(tensor.get_dtype()) != dtype:
            raise _damaged(name, f"{key} isn't what its header says")
    pooled = file.get_slice("pooled")
    size = pooled.get_shape()
    wide = len(size) != 2 or size[0] != 1 or size[1] > MAX_TOKENS
    if wide or pooled.get_dtype() not in FORMATS:
        raise _damaged(name, "pooled isn't what its header says")


def _dtype(fit: Fit) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, fit.dtype.removeprefix("torch."))
    return dtype


def _entry(kind: str, count: int, tensors: Mapping[str, Tensor]) -> Entry:
    entry = Entry(count)
    for number in range(count):
        k, v, k_scale, v_scale = (tensors.get(name) for name in _names(kind, number))
        assert k is not None and v is not None
        scales = None if k_scale is None or v_scale is None else (k_scale, v_scale)
        entry.blocks[number] = KeysValues(k, v, scales)
        entry.filled.add(number)
    return entry


def _names(kind: str, number: int) -> tuple[str, str, str, str]:
    start = f"{kind}.{number}"
    return f"{start}.k", f"{start}.v", f"{start}.k_scale", f"{start}.v_scale"


def _hash(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """Of everything in a file but the hash itself."""
    said = json.dumps({k: v for k, v in header.items() if k != "hash"}, sort_keys=True)
    return digest([said, *(part for name in sorted(tensors) for part in (name, tensors[name]))])


def _damaged(name: str, reason: str) -> Omini2Error:
    return Omini2Error(
        f"cache_name: {name} can't be used ({reason}); get the file again or save it anew."
    )
