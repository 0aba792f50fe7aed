"""Published condition LoRA files -> deltas; what is no such file is refused by name."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import Omini2Error, brief
from ..files import open_tensors
from .deltas import Delta, Deltas, Target, digest_of
from .family import NO_LORA, OMINICONTROL, LoraFamily, family_of
from .layout import Part, layout_of, require_suffix
from .names import PLAIN

MAX_RANK = 1 << 14
FORMATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
WHOLE = ("I64", "I32", "I16")  # an alpha may be one of these


@dataclass(frozen=True, eq=False, repr=False)
class BranchLora:
    """A condition LoRA: its deltas by module path, the file's own metadata and its family."""

    name: str
    deltas: Deltas
    metadata: dict[str, str]
    family: LoraFamily = OMINICONTROL

    @property
    def independent(self) -> bool:
        """Whether it was trained with the asymmetric mask, as its family or the file says."""
        if len(self.family.attention) == 1:
            return self.family.attention == ("independent",)
        return self.metadata.get("omini2.independent_condition", "").lower() in ("true", "1")

    @cached_property
    def digest(self) -> str:
        """Names what it does, whatever its file is called."""
        return digest_of(self.deltas)

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(d.down.numel() + d.up.numel() for ds in self.deltas.values() for d in ds)


def no_lora(family: LoraFamily) -> BranchLora:
    """In a LoRA's place where conditions of a family have none of their own."""
    return BranchLora(NO_LORA, {}, {}, family)


def load_lora(
    path: Path,
    targets: Mapping[str, Target],
    foreign: Iterable[str],
    family: LoraFamily | None = None,
) -> BranchLora:
    """Reads a condition LoRA of any family.

    Args:
        path: a ``.safetensors`` file.
        targets: diffusers' module name -> what it is in ComfyUI's model.
        foreign: diffusers' names of the modules that a condition never passes through.
        family: whose rules it follows; None takes the first one that its keys fit.

    Raises:
        Omini2Error: not a whole safetensors file, no LoRA, a LoRA for other modules or several
            conditions, shapes that don't fit the model, or NaN. Every key has to be used: none is
            skipped.
    """
    passes = passes_of(targets, foreign)
    with _opened(path) as file:
        keys = list(file.keys())
        family = family or family_of(keys)
        layout = layout_of(path.name, keys, family.way or PLAIN, passes)
        modules = {
            module: {tensor: _Piece(part, module, targets) for tensor, part in parts.items()}
            for module, parts in sorted(layout.items(), key=lambda item: _place(targets[item[0]]))
        }
        # All shapes before any tensor: what doesn't fit may be of any size.
        for module, pieces in modules.items():
            _require_shapes(path.name, module, targets[module], pieces, file)
        deltas: Deltas = {}
        for module, pieces in modules.items():
            delta = _delta(path.name, module, targets[module], pieces, file)
            if family.unused and module.endswith(family.unused):
                continue
            if module.endswith(family.reads_output):
                delta = replace(delta, reads_output=True)
            deltas.setdefault(targets[module].path, []).append(delta)
        return BranchLora(path.name, deltas, file.metadata() or {}, family)


def passes_of(
    targets: Mapping[str, Target], foreign: Iterable[str]
) -> Callable[[str], bool | None]:
    """Whether a condition passes a module of a model; None where it has none of this name."""
    others = set(foreign)
    return lambda module: True if module in targets else False if module in others else None


def _place(target: Target) -> tuple[str, int]:
    """Deltas lie in the model's order, however a file is sorted."""
    return target.path, target.start


class _Piece:
    """A tensor of a module: where in the file it is, and which rows of B are the module's."""

    def __init__(self, part: Part, module: str, targets: Mapping[str, Target]) -> None:
        self.key = part.key
        lengths = {each: targets[each].length for each in part.modules}
        before = part.modules[: part.modules.index(module)]
        self.total = sum(lengths.values())
        self.start = sum(lengths[each] for each in before)
        self.stop = self.start + lengths[module]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        Omini2Error: another format, unreadable, truncated or empty.
    """
    with _opened(path) as file:
        return {key: _read(file, key) for key in file.keys()}, file.metadata() or {}


def _read(file: Any, key: str) -> Tensor:
    """A copy: the reader's tensors are the file itself, so one that is written over while ComfyUI
    runs would change the next picture, and one that is cut short end the process."""
    return file.get_tensor(key).clone()  # type: ignore[no-any-return]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A safetensors file that holds something; whatever fails inside is the file's fault."""
    require_suffix(path.name)
    try:
        with open_tensors(path) as file:
            if not file.keys():
                raise Omini2Error(f"lora_name: {path.name} holds no tensors; download it again.")
            yield file
    except (SafetensorError, OSError) as error:
        raise Omini2Error(
            f"lora_name: {path.name} can't be read as a safetensors file ({brief(error)}); it is "
            "damaged or incomplete, so download it again."
        ) from error


def _require_shapes(
    name: str, module: str, target: Target, pieces: Mapping[str, _Piece], file: Any
) -> None:
    slices = {tensor: file.get_slice(piece.key) for tensor, piece in pieces.items()}
    shapes = {tensor: tuple(found.get_shape()) for tensor, found in slices.items()}
    down, up, rows = shapes["down"], shapes["up"], pieces["up"].total
    fits = (
        len(down) == len(up) == 2
        and down[1] == target.in_features
        and up == (rows, down[0])
        and 0 < down[0] <= MAX_RANK
    )
    if not fits:
        raise Omini2Error(
            f"lora_name: {name} was made for a model of another size: {module} is "
            f"{brief(up)} x {brief(down)}, this model needs ({rows}, rank) x "
            f"(rank, {target.in_features}); choose the base model that the LoRA was trained on."
        )
    formats = {tensor: found.get_dtype() for tensor, found in slices.items()}
    right = all(
        given in (*FORMATS, *WHOLE) if tensor == "alpha" else given in FORMATS
        for tensor, given in formats.items()
    )
    if not right or math.prod(shapes.get("alpha", ())) != 1:
        raise Omini2Error(
            f"lora_name: {name} holds something else than a LoRA for {module} "
            f"({', '.join(sorted(set(formats.values())))}); choose a file in fp32, bf16, fp16 or "
            "fp8."
        )


def _delta(
    name: str, module: str, target: Target, pieces: Mapping[str, _Piece], file: Any
) -> Delta:
    tensors = {tensor: _read(file, piece.key) for tensor, piece in pieces.items()}
    if not all(torch.isfinite(tensor.float()).all() for tensor in tensors.values()):
        raise Omini2Error(
            f"lora_name: {name} holds NaN or infinite values for {module}; it is damaged, or its "
            "training failed, so download it again or choose an earlier checkpoint."
        )
    down, up, rows = tensors["down"], tensors["up"], pieces["up"]
    if rows.total != target.length:
        up = up[rows.start : rows.stop].clone()
    # The published files carry no alpha and are meant at scale 1, whatever they were trained
    # with (original `specify_lora`); an explicit alpha means alpha / rank as everywhere else.
    scale = float(tensors["alpha"]) / down.shape[0] if "alpha" in tensors else 1.0
    return Delta(target.start, down, up, scale)
