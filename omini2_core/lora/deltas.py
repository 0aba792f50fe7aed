"""What a LoRA adds to the linear layers that a condition passes through.

A delta acts on activations, y += s * B(A x) (in some families B(A y)), never on weights: nothing
has to be unpatched, it is exact on fp8 and GGUF weights, and several conditions can bring different
ones.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..digest import digest
from ..transfer import sent_together

# (layer, x) -> what the layer makes of it
Call = Callable[[nn.Module, Tensor], Tensor]


def call_module(module: nn.Module, x: Tensor) -> Tensor:
    """The layer as it is."""
    y: Tensor = module(x)
    return y


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


def digest_of(deltas: Deltas) -> str:
    """Names what deltas do."""
    return digest(
        part
        for path in sorted(deltas)
        for d in deltas[path]
        for part in (path, d.start, d.scale, d.reads_output, d.down, d.up)
    )


def outputs_of(items: Iterable[Delta], start: int, stop: int) -> list[Delta]:
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

    def __init__(
        self, deltas: Deltas, device: torch.device, dtype: torch.dtype, call: Call = call_module
    ) -> None:
        self._call = call
        self._stacks = {path: _Stack(items) for path, items in deltas.items() if items}
        _send(self._stacks.values(), device, dtype)
        self._some: dict[tuple[str, int, int], _Stack | None] = {}
        self._deltas = deltas

    def __call__(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y = self._call(module, x)
        stack = self._stacks.get(path)
        return y if stack is None else stack.add_to(y, x)

    def outputs(
        self, path: str, module: nn.Module, x: Tensor, start: int, stop: int, outputs: Outputs
    ) -> Tensor:
        """(..., in_features) -> (..., stop - start): some of the layer's outputs.

        Only for layers whose deltas read the input.
        """
        y = outputs(module, x, start, stop)
        key = path, start, stop
        if key not in self._some:
            items = outputs_of(self._deltas.get(path, ()), start, stop)
            stack = _Stack(items) if items else None
            _send([stack] if stack else [], x.device, x.dtype)
            self._some[key] = stack
        stack = self._some[key]
        return y if stack is None else stack.add_to(y, x)


class _Stack:
    """All deltas of one layer: those that read its input first, then those that read its output.

    The first ones complete what the layer gives (ordinary LoRAs taken off it again), which is what
    the others were trained to read.
    """

    def __init__(self, items: list[Delta]) -> None:
        by_input = [item for item in items if not item.reads_output]
        by_output = [item for item in items if item.reads_output]
        self._by_input = _Sum(by_input) if by_input else None
        self._by_output = _Sum(by_output) if by_output else None

    @property
    def sums(self) -> list["_Sum"]:
        return [each for each in (self._by_input, self._by_output) if each is not None]

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        if self._by_input is not None:
            self._by_input.add_to(y, x)
        if self._by_output is not None:
            self._by_output.add_to(y, y)
        return y


class _Sum:
    """Deltas on one layer: one product with the stacked A's, then one per slice with its B.

    Attributes:
        matrices: the stacked A's, and each B.
    """

    def __init__(self, items: list[Delta]) -> None:
        self._ranks = [item.down.shape[0] for item in items]
        self._starts = [item.start for item in items]
        downs = torch.cat([item.down for item in items])
        self.matrices = [downs, *(_scaled(item.up, item.scale) for item in items)]

    def add_to(self, y: Tensor, x: Tensor) -> None:
        down, *ups = self.matrices
        hidden = (x @ down.t()).split(self._ranks, dim=-1)
        for h, start, up in zip(hidden, self._starts, ups, strict=True):
            y[..., start : start + up.shape[0]].add_(h @ up.t())


def _send(stacks: Iterable[_Stack], device: torch.device, dtype: torch.dtype) -> None:
    """Puts all matrices where they are needed, in one copy."""
    sums = [each for stack in stacks for each in stack.sums]
    there = iter(sent_together([m for each in sums for m in each.matrices], device, dtype))
    for each in sums:
        each.matrices = [next(there) for _ in each.matrices]


def _scaled(up: Tensor, scale: float) -> Tensor:
    return up if scale == 1.0 else up.float() * scale


class SharedLinears:
    """The linear layers for all branches that share a LoRA; on the device only while needed."""

    def __init__(self, deltas: Deltas, call: Call = call_module) -> None:
        """Args:
        call: calls the model's own layer.
        """
        self._deltas = deltas
        self._call = call
        self._linears: Linears | None = None

    def on(self, like: Tensor) -> Linears:
        """On the device and in the format of ``like``."""
        if self._linears is None:
            self._linears = Linears(self._deltas, like.device, like.dtype, self._call)
        return self._linears

    def release(self) -> None:
        """Frees the LoRA on the device; the next :meth:`on` puts it there again."""
        self._linears = None


def summed(*parts: tuple[Deltas, float]) -> Deltas:
    """Several sets of deltas, each times a factor, as one."""
    total: Deltas = {}
    for deltas, factor in parts:
        if factor:
            for path, items in deltas.items():
                total.setdefault(path, []).extend(replace(d, scale=d.scale * factor) for d in items)
    return total
