"""Published condition LoRA files -> deltas on the linear layers that a branch goes through.

A delta acts on activations, y += s * B(A x), never on weights: nothing has to be unpatched, it is
exact on fp8 and GGUF weights, and several conditions can bring different ones.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from .errors import Omini2Error

LISTED_KEYS = 4  # how many keys an error names before it says "and n more"


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
    """

    start: int
    down: Tensor
    up: Tensor
    scale: float = 1.0


Deltas = dict[str, list[Delta]]


@dataclass(frozen=True, eq=False, repr=False)
class BranchLora:
    """A condition LoRA: its deltas by module path and the file's own metadata."""

    name: str
    deltas: Deltas
    metadata: dict[str, str]

    @property
    def independent(self) -> bool:
        """Whether the file says that it was trained with the asymmetric mask."""
        return self.metadata.get("omini2.independent_condition", "").lower() in ("true", "1")


def load_lora(path: Path, targets: Mapping[str, Target], foreign: Iterable[str]) -> BranchLora:
    """Reads a condition LoRA in the published key format.

    Args:
        path: a ``.safetensors`` file.
        targets: diffusers' module name -> what it is in ComfyUI's model.
        foreign: diffusers' names of the modules that a condition never passes through.

    Raises:
        Omini2Error: not a whole safetensors file, no LoRA, a LoRA for other modules, or shapes
            that don't fit the model. Every key has to be used: none is skipped.
    """
    tensors, metadata = read_safetensors(path)
    modules: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        module, part = split_key(key)
        if part is None or module not in targets:
            unknown.append(key)
        else:
            modules.setdefault(module, {})[part] = tensor
    if unknown:
        raise _unknown_keys(path.name, unknown, set(foreign))
    deltas: Deltas = {}
    for module, parts in modules.items():
        target = targets[module]
        deltas.setdefault(target.path, []).append(_delta(path.name, module, target, parts))
    return BranchLora(path.name, deltas, metadata)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file.

    Raises:
        Omini2Error: another format, unreadable, truncated or empty.
    """
    if path.suffix not in (".safetensors", ".sft"):
        raise Omini2Error(
            f"lora_name: {path.name} is not a .safetensors file; other formats can run code when "
            "they are opened, so convert it to safetensors first."
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise Omini2Error(
            f"lora_name: {path.name} can't be read as a safetensors file ({error}); it is damaged "
            "or incomplete, so download it again."
        ) from error
    if not tensors:
        raise Omini2Error(f"lora_name: {path.name} holds no tensors; download it again.")
    return tensors, metadata


def split_key(key: str) -> tuple[str, str | None]:
    """``transformer.<module>.lora_A.weight`` -> (module, "down"), or (key, None) for other keys."""
    module, part = key.removeprefix("transformer."), None
    for ending, name in (
        (".lora_A.weight", "down"),
        (".lora_B.weight", "up"),
        (".alpha", "alpha"),
    ):
        if module.endswith(ending):
            module, part = module.removesuffix(ending), name
    return module, part


def _delta(file: str, module: str, target: Target, parts: dict[str, Tensor]) -> Delta:
    if "down" not in parts or "up" not in parts:
        raise Omini2Error(
            f"lora_name: {file} has only half of the LoRA for {module}; download it again."
        )
    down, up = parts["down"], parts["up"]
    fits = (
        down.ndim == up.ndim == 2
        and down.shape[1] == target.in_features
        and up.shape == (target.length, down.shape[0])
        and down.shape[0] > 0
    )
    if not fits:
        raise Omini2Error(
            f"lora_name: {file} was made for a model of another size: {module} is "
            f"{tuple(up.shape)} x {tuple(down.shape)}, this model needs ({target.length}, rank) x "
            f"(rank, {target.in_features}); choose the base model that the LoRA was trained on."
        )
    # The published files carry no alpha and are meant at scale 1, whatever they were trained
    # with (original `specify_lora`); an explicit alpha means alpha / rank as everywhere else.
    scale = float(parts["alpha"]) / down.shape[0] if "alpha" in parts else 1.0
    return Delta(target.start, down, up, scale)


def _unknown_keys(file: str, keys: list[str], foreign: set[str]) -> Omini2Error:
    listed = ", ".join(sorted(keys)[:LISTED_KEYS])
    if len(keys) > LISTED_KEYS:
        listed += f" and {len(keys) - LISTED_KEYS} more"
    if any(split_key(key)[0] in foreign for key in keys):
        return Omini2Error(
            f"lora_name: {file} is an ordinary LoRA, not a condition LoRA: it changes parts of the "
            f"model that no condition passes through ({listed}); load it with Load LoRA instead."
        )
    return Omini2Error(
        f"lora_name: {file} is no condition LoRA for FLUX.1: nothing in the model belongs to "
        f"{listed}; choose a LoRA made for OminiControl."
    )


class Linears:
    """The linear layers as one branch sees them: the model's own modules plus deltas.

    The modules are called as they are, so the host's casting, quantised formats and weight
    streaming do their work.
    """

    def __init__(self, deltas: Deltas, device: torch.device, dtype: torch.dtype) -> None:
        self._deltas = {
            path: _Stack(items, device, dtype) for path, items in deltas.items() if items
        }

    def __call__(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y: Tensor = module(x)
        stack = self._deltas.get(path)
        return y if stack is None else stack.add_to(y, x)


class _Stack:
    """All deltas of one layer: one product with the stacked A's, then one per slice with its B."""

    def __init__(self, items: list[Delta], device: torch.device, dtype: torch.dtype) -> None:
        self.down = torch.cat([item.down for item in items]).to(device, dtype)
        self.ranks = [item.down.shape[0] for item in items]
        self.ups = [
            (item.start, _scaled(item.up, item.scale).to(device, dtype).t()) for item in items
        ]

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        hidden = (x @ self.down.t()).split(self.ranks, dim=-1)
        for h, (start, up) in zip(hidden, self.ups, strict=True):
            y[..., start : start + up.shape[1]] += h @ up
        return y


def _scaled(up: Tensor, scale: float) -> Tensor:
    return up if scale == 1.0 else up.float() * scale


def merge(*parts: tuple[Deltas, float]) -> Deltas:
    """Several sets of deltas, each times a factor, as one."""
    merged: Deltas = {}
    for deltas, factor in parts:
        if factor:
            for path, items in deltas.items():
                merged.setdefault(path, []).extend(
                    Delta(d.start, d.down, d.up, d.scale * factor) for d in items
                )
    return merged
