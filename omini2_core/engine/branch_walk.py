"""Conditions' tokens on their way through the model's blocks, alone or beside the main branch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import Omini2Error
from ..lora.deltas import Linears
from .model import Half, Model, Rotate


@dataclass(eq=False)
class BranchWalk:
    """Tokens of one or more conditions of one length and LoRA on their way through the blocks.

    Attributes:
        rows: the rows of the evaluation's batch that its own rows stand for.
        q: in the block that is half done.
    """

    model: Model
    x: Tensor
    vec: Tensor
    rows: tuple[int, ...]
    linear: Linears
    rotate: Rotate
    q: Tensor | None = None
    _own: tuple[Tensor, Tensor] | None = None
    _half: Half | None = None

    def keys_values(self, number: int) -> tuple[Tensor, Tensor]:
        """K and V in a block; its second half waits for :meth:`finish`, but the last one's."""
        block = self.model.blocks[number]
        arguments = self.linear, self.x, self.vec, self.rotate
        if number == len(self.model.blocks) - 1:  # of which nobody needs more
            return block.keys_values(*arguments)
        self._half = block.halves(*arguments)
        self.q, k, v = next(self._half)
        self._own = k, v
        return k, v

    def finish_alone(self) -> None:
        """The second half of a block, the tokens having looked at themselves only."""
        if self.q is not None and self._own is not None:
            self.finish(self.model.attend(self.q, *self._own, None))

    def finish(self, attended: Tensor) -> None:
        """The second half of a block."""
        half, self._half, self._own, self.q = self._half, None, None, None
        assert half is not None
        try:
            half.send(attended)
        except StopIteration as done:
            self.x = done.value


class Beside:
    """A walk of branches beside the main branch, each with rows of its own."""

    def __init__(self, walk: BranchWalk) -> None:
        self.walk = walk
        self._rows = 0
        self._number = -1
        self._keys_values: tuple[Tensor, Tensor] | None = None
        self._answers: dict[int, Tensor] = {}

    def add(self, rows: int) -> slice:
        """The next branch's rows."""
        self._rows += rows
        return slice(self._rows - rows, self._rows)

    def keys_values(self, number: int, span: slice) -> tuple[Tensor, Tensor]:
        """A branch's K and V in a block; the first one to ask has them computed for all."""
        if self._number != number or self._keys_values is None:
            self._number, self._keys_values = number, self.walk.keys_values(number)
        k, v = self._keys_values
        return k[span], v[span]

    def asks(self, span: slice) -> Tensor | None:
        """A branch's q, until it has its answer."""
        q = self.walk.q
        return None if q is None or span.start in self._answers else q[span]

    def answer(self, span: slice, attended: Tensor) -> None:
        """What attention gave a branch."""
        self._answers[span.start] = attended

    def finish(self, joint: bool) -> None:
        """The second half of the block, when the first of its branches comes to it.

        Raises:
            Omini2Error: joint ones have had no answer.
        """
        if self._keys_values is None:
            return
        answers = [self._answers[start] for start in sorted(self._answers)]
        self._keys_values = None
        self._answers.clear()
        if self.walk.q is None:  # the last block
            return
        if not joint:
            self.walk.finish_alone()
        elif sum(map(len, answers)) == self._rows:
            self.walk.finish(answers[0] if len(answers) == 1 else torch.cat(answers))
        else:
            raise Omini2Error(
                "attention: another extension skipped one of the model's blocks or replaced its "
                "attention while a joint condition needed it; take it out of the graph or, if it "
                "skips blocks, set attention to independent."
            )
