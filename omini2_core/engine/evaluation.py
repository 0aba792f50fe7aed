"""One call of the model: whose rows its batch holds, and where in the schedule it is."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

AxisMap = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
NO_MAP: AxisMap = ((1, 0), (1, 0), (1, 0))


@dataclass(frozen=True)
class Chunk:
    """The rows of an evaluation's batch that one conditioning entry takes.

    Attributes:
        origin: row and column, in the picture's tokens, of the part of the picture that the entry
            is evaluated on (area conditioning, context windows); None for the whole picture.
    """

    key: Hashable
    rows: range
    origin: tuple[float, float] | None = None


class Moment:
    """Where in the schedule an evaluation is.

    The noise level is on the device, where the sampler computes it. Reading it waits for all work
    that is queued there, so it is read only when something depends on it, and then once.
    """

    def __init__(self, sigma: Tensor, schedule: Sequence[float]) -> None:
        self._sigma = sigma
        self._schedule = schedule

    @cached_property
    def sigma(self) -> float:
        """The noise level."""
        return float(self._sigma)

    @cached_property
    def step(self) -> int:
        """The interval of the schedule."""
        return step_of(self.sigma, self._schedule)


def step_of(sigma: float, schedule: Sequence[float]) -> int:
    """The interval of a falling schedule that a noise level lies in.

    A level on a boundary belongs to the interval that it opens, so a sampler's look-ahead to the
    end of its step counts as the next step's first evaluation.
    """
    opened = sum(boundary >= sigma * (1 - 1e-5) for boundary in schedule)
    return min(max(opened - 1, 0), max(len(schedule) - 2, 0))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One call of the model.

    Attributes:
        pooled: (batch, pooled width) pooled text.
        picture_hw: the whole picture's size in tokens.
        axis_map: (scale, shift) on the time, row and column ids, as RoPE options say.
        guidance: (batch,) as the conditioning gives it; None if it gives none.
    """

    chunks: tuple[Chunk, ...]
    pooled: Tensor
    picture_hw: tuple[int, int]
    moment: Moment
    axis_map: AxisMap = NO_MAP
    empty: bool = False
    guidance: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.pooled.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.pooled.dtype

    def between(self, start_sigma: float, end_sigma: float) -> bool:
        """Whether start_sigma >= sigma >= end_sigma; bounds may be infinite."""
        if start_sigma == float("inf") and end_sigma == -float("inf"):
            return True
        return start_sigma >= self.moment.sigma >= end_sigma


def rows_of(t: Tensor, rows: Sequence[int]) -> Tensor:
    """Some rows of a tensor, without a copy where they lie side by side."""
    first, n = rows[0], len(rows)
    if list(rows) == list(range(first, first + n)):
        return t[first : first + n]
    return t[torch.tensor(rows, device=t.device)]


def alike(rows: Tensor) -> bool:
    """Whether all rows are the same; waits for the device."""
    return len(rows) == 1 or bool((rows == rows[:1]).all())
