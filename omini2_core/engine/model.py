"""What the engine asks of a diffusion model: its blocks in order, and the steps around them."""

from collections.abc import Callable, Generator, Sequence
from typing import Protocol

from torch import Tensor

from ..lora.deltas import Linears

# q, k -> both after RoPE; (rows, heads, tokens, head_dim) each.
Rotate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
# Yields q, k, v after RoPE, is sent what attention made of them, returns the tokens.
Half = Generator[tuple[Tensor, Tensor, Tensor], Tensor, Tensor]


class Block(Protocol):
    """One of the model's blocks, as a condition's tokens pass it."""

    def halves(self, linear: Linears, x: Tensor, vec: Tensor, rotate: Rotate) -> Half:
        """The way through the block in two halves, before and behind the attention.

        Args:
            linear: the branch's linear layers.
            x: (rows, tokens, hidden).
            vec: (rows or 1, hidden), what modulates.
        """

    def keys_values(
        self, linear: Linears, x: Tensor, vec: Tensor, rotate: Rotate
    ) -> tuple[Tensor, Tensor]:
        """K after RoPE and V alone, (rows, heads, tokens, head_dim) each; for the last block."""


class Model(Protocol):
    """The diffusion model."""

    @property
    def blocks(self) -> Sequence[Block]:
        """All blocks, in the order in which the model runs them."""

    def embed(self, linear: Linears, tokens: Tensor) -> Tensor:
        """(rows, tokens, 64) -> (rows, tokens, hidden)."""

    def vector(
        self, linear: Linears, pooled: Tensor, guidance: Tensor | None, time: Tensor
    ) -> Tensor:
        """The modulation vector: (rows, pooled), (rows,) or none, (rows,) -> (rows, hidden)."""

    def rope(self, ids: Tensor) -> Tensor:
        """(1, tokens, axes) position ids -> rotations (1, 1, tokens, ...)."""

    def rotate(self, q: Tensor, k: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE on q and k."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Attention of a condition's tokens over themselves."""
