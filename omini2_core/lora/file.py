"""Published condition LoRA files -> deltas; what is no such file is refused by name."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from ..digest import digest
from ..errors import Omini2Error, brief
from ..files import open_tensors
from .deltas import Delta, Deltas, Target
from .family import FAMILIES, OMINICONTROL, LoraFamily, family_of

LISTED_KEYS = 4  # how many keys an error names before it says "and n more"
MAX_RANK = 1 << 14
FORMATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


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
        if "joint" not in self.family.attention:
            return True
        return self.metadata.get("omini2.independent_condition", "").lower() in ("true", "1")

    @cached_property
    def digest(self) -> str:
        """Names what it does, whatever its file is called."""
        return digest(
            part
            for path in sorted(self.deltas)
            for d in self.deltas[path]
            for part in (path, d.start, d.scale, d.reads_output, d.down, d.up)
        )

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return sum(d.down.numel() + d.up.numel() for ds in self.deltas.values() for d in ds)


def load_lora(path: Path, targets: Mapping[str, Target], foreign: Iterable[str]) -> BranchLora:
    """Reads a condition LoRA of any family.

    Args:
        path: a ``.safetensors`` file.
        targets: diffusers' module name -> what it is in ComfyUI's model.
        foreign: diffusers' names of the modules that a condition never passes through.

    Raises:
        Omini2Error: not a whole safetensors file, no LoRA, a LoRA for other modules or several
            conditions, shapes that don't fit the model, or NaN. Every key has to be used: none is
            skipped.
    """
    with _opened(path) as file:
        keys = list(file.keys())
        family = family_of(keys)
        modules = _modules(path.name, keys, family, targets, set(foreign))
        # All shapes before any tensor: what doesn't fit may be of any size.
        for module, named in modules.items():
            _require_shapes(path.name, module, targets[module], named, file)
        deltas: Deltas = {}
        for module, named in modules.items():
            delta = _delta(path.name, module, targets[module], named, file)
            if module.endswith(family.reads_output):
                delta = replace(delta, reads_output=True)
            deltas.setdefault(targets[module].path, []).append(delta)
        return BranchLora(path.name, deltas, file.metadata() or {}, family)


def _modules(
    name: str,
    keys: Iterable[str],
    family: LoraFamily,
    targets: Mapping[str, Target],
    foreign: set[str],
) -> dict[str, dict[str, str]]:
    """Module -> tensor ("down", "up", "alpha") -> key."""
    modules: dict[str, dict[str, str]] = {}
    conditions = {0}
    unknown = []
    for key in keys:
        named = family.parse(key)
        if named is None or named.module not in targets:
            unknown.append(key)
            continue
        conditions.add(named.condition)
        found = modules.setdefault(named.module, {})
        if found.setdefault(named.tensor, key) != key and len(conditions) == 1:
            raise Omini2Error(
                f"lora_name: {name} holds {named.module} twice, under {found[named.tensor]} and "
                f"{key}; download it again."
            )
    if unknown:
        raise _unknown_keys(name, family, unknown, foreign)
    if len(conditions) > 1:
        raise Omini2Error(
            f"lora_name: {name} holds LoRAs for several conditions, but a "
            f"condition takes one; choose {family.name}'s single-condition files, each in an Apply "
            "Omini2 LoRA node of its own."
        )
    return modules


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
    if path.suffix not in (".safetensors", ".sft"):
        raise Omini2Error(
            f"lora_name: {path.name} is not a .safetensors file; other formats can run code when "
            "they are opened, so convert it in Python with safetensors.torch.save_file(torch.load("
            f'"{path.name}", weights_only=True), "{path.stem}.safetensors") and choose the result.'
        )
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
    name: str, module: str, target: Target, named: Mapping[str, str], file: Any
) -> None:
    if "down" not in named or "up" not in named:
        raise Omini2Error(
            f"lora_name: {name} has only half of the LoRA for {module}; download it again."
        )
    slices = {tensor: file.get_slice(key) for tensor, key in named.items()}
    shapes = {tensor: tuple(found.get_shape()) for tensor, found in slices.items()}
    down, up = shapes["down"], shapes["up"]
    fits = (
        len(down) == len(up) == 2
        and down[1] == target.in_features
        and up == (target.length, down[0])
        and 0 < down[0] <= MAX_RANK
    )
    if not fits:
        raise Omini2Error(
            f"lora_name: {name} was made for a model of another size: {module} is "
            f"{brief(up)} x {brief(down)}, this model needs ({target.length}, rank) x "
            f"(rank, {target.in_features}); choose the base model that the LoRA was trained on."
        )
    formats = {found.get_dtype() for found in slices.values()}
    if not formats <= set(FORMATS) or math.prod(shapes.get("alpha", ())) != 1:
        raise Omini2Error(
            f"lora_name: {name} holds something else than a LoRA for {module} "
            f"({', '.join(sorted(formats))}); choose a file in fp32, bf16, fp16 or fp8."
        )


def _delta(name: str, module: str, target: Target, named: Mapping[str, str], file: Any) -> Delta:
    tensors = {tensor: _read(file, key) for tensor, key in named.items()}
    if not all(torch.isfinite(tensor.float()).all() for tensor in tensors.values()):
        raise Omini2Error(
            f"lora_name: {name} holds NaN or infinite values for {module}; it is damaged, or its "
            "training failed, so download it again or choose an earlier checkpoint."
        )
    down, up = tensors["down"], tensors["up"]
    # The published files carry no alpha and are meant at scale 1, whatever they were trained
    # with (original `specify_lora`); an explicit alpha means alpha / rank as everywhere else.
    scale = float(tensors["alpha"]) / down.shape[0] if "alpha" in tensors else 1.0
    return Delta(target.start, down, up, scale)


def _unknown_keys(file: str, family: LoraFamily, keys: list[str], foreign: set[str]) -> Omini2Error:
    listed = ", ".join(map(brief, sorted(keys)[:LISTED_KEYS]))
    if len(keys) > LISTED_KEYS:
        listed += f" and {len(keys) - LISTED_KEYS} more"
    if any((named := family.parse(key)) and named.module in foreign for key in keys):
        return Omini2Error(
            f"lora_name: {file} is an ordinary LoRA, not a condition LoRA: it changes parts of the "
            f"model that no condition passes through ({listed}); load it with Load LoRA instead."
        )
    return Omini2Error(
        f"lora_name: {file} is no condition LoRA for FLUX.1: nothing in the model belongs to "
        f"{listed}; choose a LoRA made for {' or '.join(known.name for known in FAMILIES)}."
    )
