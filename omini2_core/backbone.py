"""What the engine asks of the host's FLUX model."""

from typing import Any, Protocol

from torch import Tensor

from .lora import Linears


class Backbone(Protocol):
    """FLUX.1 as the host runs it."""

    @property
    def double_blocks(self) -> Any:
        """The model's double-stream blocks, in order."""

    @property
    def single_blocks(self) -> Any:
        """The model's single-stream blocks, in order."""

    def embed(self, linear: Linears, tokens: Tensor) -> Tensor:
        """(rows, tokens, 64) -> (rows, tokens, hidden)."""

    def vector(self, linear: Linears, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """The modulation vector at time 0: (rows, pooled), (rows,) or none -> (rows, hidden)."""

    def outputs(self, module: Any, x: Tensor, start: int, stop: int) -> Tensor:
        """Outputs ``start`` to ``stop`` of a linear layer, without the others where possible."""

    def rope(self, ids: Tensor) -> Tensor:
        """(1, tokens, axes) position ids -> rotations (1, 1, tokens, ...)."""

    def rotate(self, q: Tensor, k: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE on q and k."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The host's selected attention."""


def block_count(backbone: Backbone) -> int:
    """Blocks of both kinds."""
    return len(backbone.double_blocks) + len(backbone.single_blocks)
