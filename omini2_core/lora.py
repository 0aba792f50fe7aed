"""Published condition LoRA files -> deltas on the linear layers that a branch goes through.

A delta acts on activations, y += s * B(A x) (in some families B(A y)), never on weights: nothing
has to be unpatched, it is exact on fp8 and GGUF weights, and several conditions can bring different
ones.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from .digest import digest
from .errors import Omini2Error, brief
from .family import FAMILIES, OMINICONTROL, LoraFamily, family_of
from .tensor_file import open_tensors

LISTED_KEYS = 4  # how many keys an error names before it says "and n more"
MAX_RANK = 1 << 14
FORMATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")


@dataclass(frozen=True)
class Target:
    """A slice of the outputs of one linear layer of ComfyUI's FLUX.

    ``path`` is the module's, as in ``double_blocks.0.img_attn.qkv``.
    """

    path: str
    start: int
    length: int
    in_features: int


@dataclass(frozen=True, eq=False)
class Delta:
    """scale * up @ down, added to outputs ``start`` to ``start + len(up)`` of a linear layer.

    Attributes:
        down: (rank, in_features), A.
        up: (length, rank), B.
        reads_output: A reads the layer's output y instead of its input: y += s * B(A y).
    """

    start: int
    down: Tensor
    up: Tensor
    scale: float = 1.0
    reads_output: bool = False


Deltas = dict[str, list[Delta]]
# (linear layer, x, start, stop) -> outputs start to stop of the layer
Outputs = Callable[[Any, Tensor, int, int], Tensor]


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
        for module, parts in modules.items():
            _require_shapes(path.name, module, targets[module], parts, file)
        deltas: Deltas = {}
        for module, parts in modules.items():
            delta = _delta(path.name, module, targets[module], parts, file)
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
    """Module -> part ("down", "up", "alpha") -> key."""
    modules: dict[str, dict[str, str]] = {}
    conditions = {0}
    unknown = []
    for key in keys:
        named = family.parse(key)
        if named is None or named.module not in targets:
            unknown.append(key)
            continue
        conditions.add(named.condition)
        parts = modules.setdefault(named.module, {})
        if parts.setdefault(named.part, key) != key and len(conditions) == 1:
            raise Omini2Error(
                f"lora_name: {name} holds {named.module} twice, under {parts[named.part]} and "
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
    name: str, module: str, target: Target, parts: Mapping[str, str], file: Any
) -> None:
    if "down" not in parts or "up" not in parts:
        raise Omini2Error(
            f"lora_name: {name} has only half of the LoRA for {module}; download it again."
        )
    slices = {part: file.get_slice(key) for part, key in parts.items()}
    shapes = {part: tuple(found.get_shape()) for part, found in slices.items()}
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


def _delta(name: str, module: str, target: Target, parts: Mapping[str, str], file: Any) -> Delta:
    tensors = {part: _read(file, key) for part, key in parts.items()}
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


def part_of(items: Iterable[Delta], start: int, stop: int) -> list[Delta]:
    """What deltas add to outputs ``start`` to ``stop`` of a layer, counted from ``start``."""
    parts = []
    for d in items:
        first, last = max(d.start, start), min(d.start + d.up.shape[0], stop)
        if first < last:
            parts.append(replace(d, start=first - start, up=d.up[first - d.start : last - d.start]))
    return parts


class Linears:
    """The linear layers as one branch sees them: the model's own modules plus deltas.

    The modules are called as they are, so the host's casting, quantised formats and weight
    streaming do their work.
    """

    def __init__(self, deltas: Deltas, device: torch.device, dtype: torch.dtype) -> None:
        self._stacks = {
            path: _Stack(items, device, dtype) for path, items in deltas.items() if items
        }
        self._parts: dict[tuple[str, int, int], _Stack | None] = {}
        self._deltas = deltas

    def __call__(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y: Tensor = module(x)
        stack = self._stacks.get(path)
        return y if stack is None else stack.add_to(y, x)

    def part(
        self, path: str, module: nn.Module, x: Tensor, start: int, stop: int, outputs: Outputs
    ) -> Tensor:
        """(..., in_features) -> (..., stop - start): some of the layer's outputs.

        Only for layers whose deltas read the input.
        """
        y = outputs(module, x, start, stop)
        key = path, start, stop
        if key not in self._parts:
            items = part_of(self._deltas.get(path, ()), start, stop)
            self._parts[key] = _Stack(items, x.device, x.dtype) if items else None
        stack = self._parts[key]
        return y if stack is None else stack.add_to(y, x)


class _Stack:
    """All deltas of one layer: those that read its input first, then those that read its output.

    The first ones complete what the layer gives (ordinary LoRAs taken off it again), which is what
    the others were trained to read.
    """

    def __init__(self, items: list[Delta], device: torch.device, dtype: torch.dtype) -> None:
        by_input = [item for item in items if not item.reads_output]
        by_output = [item for item in items if item.reads_output]
        self._by_input = _Sum(by_input, device, dtype) if by_input else None
        self._by_output = _Sum(by_output, device, dtype) if by_output else None

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        if self._by_input is not None:
            self._by_input.add_to(y, x)
        if self._by_output is not None:
            self._by_output.add_to(y, y)
        return y


class _Sum:
    """Deltas on one layer: one product with the stacked A's, then one per slice with its B."""

    def __init__(self, items: list[Delta], device: torch.device, dtype: torch.dtype) -> None:
        self.down = torch.cat([item.down for item in items]).to(device, dtype)
        self.ranks = [item.down.shape[0] for item in items]
        self.ups = [
            (item.start, _scaled(item.up, item.scale).to(device, dtype).t()) for item in items
        ]

    def add_to(self, y: Tensor, x: Tensor) -> None:
        hidden = (x @ self.down.t()).split(self.ranks, dim=-1)
        for h, (start, up) in zip(hidden, self.ups, strict=True):
            y[..., start : start + up.shape[1]] += h @ up


def _scaled(up: Tensor, scale: float) -> Tensor:
    return up if scale == 1.0 else up.float() * scale


class SharedLinears:
    """The linear layers for all branches that share a LoRA; on the device only while needed."""

    def __init__(self, deltas: Deltas) -> None:
        self._deltas = deltas
        self._linears: Linears | None = None

    def on(self, like: Tensor) -> Linears:
        """On the device and in the format of ``like``."""
        if self._linears is None:
            self._linears = Linears(self._deltas, like.device, like.dtype)
        return self._linears

    @property
    def loaded(self) -> bool:
        """Whether the LoRA is on the device."""
        return self._linears is not None

    def release(self) -> None:
        """Frees the LoRA on the device; the next :meth:`on` puts it there again."""
        self._linears = None


def merge(*parts: tuple[Deltas, float]) -> Deltas:
    """Several sets of deltas, each times a factor, as one."""
    merged: Deltas = {}
    for deltas, factor in parts:
        if factor:
            for path, items in deltas.items():
                merged.setdefault(path, []).extend(
                    replace(d, scale=d.scale * factor) for d in items
                )
    return merged
