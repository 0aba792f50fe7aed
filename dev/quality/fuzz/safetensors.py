"""Files that are nearly safetensors: hostile content in a valid file, lies in its header, damage.

The format: 8 bytes with the header's length, the header as JSON (tensor name -> dtype, shape,
offsets into what follows; ``__metadata__``: strings), the tensors' bytes.
"""

from __future__ import annotations

import copy
import json
import math
import struct
from dataclasses import dataclass
from random import Random
from typing import Any

from dev.quality.fuzz.inputs import TEXTS

SIZES = {"F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "F64": 8, "I64": 8, "C64": 8,
         "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "BOOL": 1}  # fmt: skip
DTYPES = [*SIZES, "F4", "F6_E2M3", "", "f32", None, 3]
NUMBERS = [-1, 0, 1, 2, 7, 1 << 31, 1 << 40, (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**40,
           1.5, 1e308, math.nan, math.inf, True, None, "4", [], {}]  # fmt: skip
LENGTHS = [0, 1, 7, 100_000_000, 100_000_001, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
# Bytes of numbers: NaN, infinity, the largest, zero, in whatever format they are read.
FILLS = [
    b"\xff",
    b"\x7f",
    b"\x00",
    b"\x80\x7f",
    b"\x00\x7c",
    b"\x00\x00\x80\x7f",
    b"\x00\x00\xc0\x7f",
]


@dataclass
class File:
    """A whole file: tensors as [name, dtype, shape, bytes], and metadata."""

    tensors: list[list[Any]]
    metadata: dict[str, Any]

    @classmethod
    def read(cls, content: bytes) -> File:
        """Takes a valid file apart."""
        start = 8 + struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8:start])
        metadata = header.pop("__metadata__", {})
        tensors = []
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            data = content[start + first : start + last]
            tensors.append([name, entry["dtype"], entry["shape"], data])
        return cls(tensors, metadata)

    def parts(self) -> tuple[list[tuple[str, Any]], bytes]:
        """The header's pairs, with offsets that fit, and the tensors' bytes."""
        pairs: list[tuple[str, Any]] = [("__metadata__", self.metadata)]
        end = 0
        for name, dtype, shape, data in self.tensors:
            entry = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
            pairs.append((name, entry))
            end += len(data)
        return pairs, b"".join(tensor[3] for tensor in self.tensors)


def mutated(rng: Random, real: File) -> bytes:
    """A real file with something, or several things, wrong with it."""
    file = copy.deepcopy(real)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        rng.choice(CONTENT)(rng, file)
    pairs, data = file.parts()
    for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
        rng.choice(LIES)(rng, pairs)
    content = pack(pairs, data)
    for _ in range(rng.choice((0, 0, 0, 0, 1, 3))):
        content = rng.choice(DAMAGE)(rng, content)
    return content


def pack(pairs: list[tuple[str, Any]], data: bytes) -> bytes:
    """Written by hand, so that names may come twice."""
    inside = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in pairs)
    header = f"{{{inside}}}".encode()
    return struct.pack("<Q", len(header)) + header + data


# --- hostile content in a valid file -------------------------------------------------------------


def _rename(rng: Random, file: File) -> None:
    name = rng.choice(file.tensors)[0] if file.tensors else "x"
    new = rng.choice([
        rng.choice(TEXTS), name.upper(), f"transformer.{name}", name.removeprefix("transformer."),
        name.replace(".0.", f".{rng.choice((1, 7, 10**30))}."), name.replace("lora_A", "lora_B"),
        name.replace("lora_A.weight", "alpha"), name.replace("down", "up"),
    ])  # fmt: skip
    _any(rng, file)[0] = new


def _add(rng: Random, file: File) -> None:
    extra = copy.deepcopy(_any(rng, file))
    extra[0] = rng.choice([extra[0], extra[0].replace("lora_A.weight", "alpha"), "x"])
    if rng.random() < 0.5:
        extra[1:] = ["F32", [], struct.pack("<f", rng.choice((math.nan, 0.0, 4.0, 1e38)))]
    file.tensors.append(extra)


def _drop(rng: Random, file: File) -> None:
    for _ in range(rng.choice((1, 1, len(file.tensors)))):
        if file.tensors:
            del file.tensors[rng.randrange(len(file.tensors))]


def _retype(rng: Random, file: File) -> None:
    """Another format of the same size."""
    tensor = _any(rng, file)
    size = SIZES[tensor[1]]
    tensor[1] = rng.choice([dtype for dtype, other in SIZES.items() if other == size])


def _reshape(rng: Random, file: File) -> None:
    """Another shape of as many numbers, or of other numbers with the bytes to go with it."""
    tensor = _any(rng, file)
    shape = tensor[2]
    new = rng.choice([
        shape[::-1], [math.prod(shape)], [1, *shape], [*shape, 1], [], [0], [0, *shape[1:]],
        [2, 2], [1], [1] * 20, [*shape[:-1], 1], [max(1, math.prod(shape) // 2), 2],
    ])  # fmt: skip
    size = SIZES[tensor[1]]
    tensor[2], tensor[3] = new, (tensor[3] + bytes(size * 8))[: size * math.prod(new)]
    missing = size * math.prod(new) - len(tensor[3])
    tensor[3] += bytes(missing)


def _fill(rng: Random, file: File) -> None:
    tensor = _any(rng, file)
    fill, length = rng.choice(FILLS), len(tensor[3])
    at = rng.randrange(length + 1) // 4 * 4
    many = (fill * (length // len(fill) + 1))[:length]
    tensor[3] = (
        many if rng.random() < 0.5 else tensor[3][:at] + many[at : at + 4] + tensor[3][at + 4 :]
    )


def _say(rng: Random, file: File) -> None:
    """Other metadata: its texts, or what is in them if that is JSON."""
    names = [*file.metadata, "omini2.condition_size", "omini2.target_size", "format"]
    name = rng.choice([*names, rng.choice(TEXTS)])
    old = file.metadata.get(name, "")
    said = _json(old) if rng.random() < 0.6 else None
    if said:
        fit = said.get("fit")
        inner = rng.choice([said, fit if isinstance(fit, dict) else said])
        inner[rng.choice([*inner, "more"])] = rng.choice([*NUMBERS, *TEXTS])
        if rng.random() < 0.2:
            inner.pop(rng.choice(list(inner)))
        file.metadata[name] = json.dumps(said)
    elif rng.random() < 0.2:
        file.metadata.pop(name, None)
    else:
        file.metadata[name] = rng.choice(TEXTS)


def _json(text: Any) -> Any:
    try:
        said = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _any(rng: Random, file: File) -> list[Any]:
    if not file.tensors:
        file.tensors.append(["x", "F32", [1], bytes(4)])
    return rng.choice(file.tensors)


CONTENT = [_rename, _add, _drop, _retype, _reshape, _fill, _say, _say]


# --- lies in the header --------------------------------------------------------------------------


def _lie(rng: Random, pairs: list[tuple[str, Any]]) -> None:
    """One number of one tensor's entry."""
    at = rng.randrange(len(pairs))
    name, entry = pairs[at]
    entry = copy.deepcopy(entry)
    if not isinstance(entry, dict):
        return  # another lie already
    if "data_offsets" in entry:
        kind = rng.choice(("shape", "shape", "data_offsets", "data_offsets", "dtype"))
        if kind == "dtype":
            entry[kind] = rng.choice(DTYPES)
        elif isinstance(entry.get(kind), list) and entry[kind] and rng.random() < 0.8:
            entry[kind][rng.randrange(len(entry[kind]))] = rng.choice(NUMBERS)
        else:
            entry[kind] = rng.choice([*NUMBERS, [1 << 40, 1 << 40], [-4, 4], [4, 0], [0, 1 << 40]])
    else:
        entry[rng.choice([*entry, "x"])] = rng.choice(NUMBERS)
    pairs[at] = name, entry


def _overlap(rng: Random, pairs: list[tuple[str, Any]]) -> None:
    """Two tensors in one place."""
    first, second = rng.randrange(len(pairs)), rng.randrange(len(pairs))
    pairs[first] = pairs[first][0], copy.deepcopy(pairs[second][1])


def _twice(rng: Random, pairs: list[tuple[str, Any]]) -> None:
    pairs.insert(rng.randrange(len(pairs) + 1), rng.choice(pairs))


def _foreign(rng: Random, pairs: list[tuple[str, Any]]) -> None:
    """An entry that is none."""
    at = rng.randrange(len(pairs))
    pairs[at] = pairs[at][0], rng.choice([*NUMBERS, *TEXTS, {"dtype": "F32"}])


LIES = [_lie, _lie, _lie, _overlap, _twice, _foreign]


# --- damage --------------------------------------------------------------------------------------


def _flip(rng: Random, content: bytes) -> bytes:
    changed = bytearray(content)
    # Half of all flips in the header: in most files it is a small part.
    end = min(len(changed), 2000) if rng.random() < 0.5 else len(changed)
    for _ in range(rng.choice((1, 1, 2, 8))):
        if end:
            changed[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: Random, content: bytes) -> bytes:
    return content[: rng.randrange(len(content) + 1)]


def _longer(rng: Random, content: bytes) -> bytes:
    return content + bytes(rng.choice((1, 4, 1000)))


def _length(rng: Random, content: bytes) -> bytes:
    return struct.pack("<Q", rng.choice(LENGTHS)) + content[8:]


def _nested(rng: Random, content: bytes) -> bytes:
    """A header as deep as it is long."""
    header = rng.choice((b"[", b'{"a":', b'{"__metadata__":')) * rng.choice((10, 1000, 20_000))
    return struct.pack("<Q", len(header)) + header + content[-100:]


def _not_utf8(rng: Random, content: bytes) -> bytes:
    at = rng.randrange(8, max(9, min(len(content), 2000)))
    return (
        content[:at] + rng.choice((b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80")) + content[at + 2 :]
    )


DAMAGE = [_flip, _flip, _flip, _cut, _longer, _length, _nested, _not_utf8]
