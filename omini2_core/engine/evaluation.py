"""One call of the model: whose rows its batch holds, and where in the schedule it is."""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

AxisMap = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
NO_MAP: AxisMap = ((1, 0), (1, 0), (1, 0))


@dataclass(frozen=True)
class Chunk:
    """The rows of an evaluation's batch that one conditioning entry takes.

    Attributes:
        key: names the entry, the part of the picture and the pictures; None where nobody knows
            whose rows these are, so that nothing computed for them may be used again.
        rows: in any order, and maybe repeated.
        pictures: which of the sampler's pictures each row is, from 0; None where nobody knows.
        origin: row and column, in the picture's tokens, of the part of the picture that the entry
            is evaluated on (area conditioning, context windows); None for the whole picture.
    """

    key: Hashable | None
    rows: Sequence[int]
    pictures: Sequence[int] | None
    origin: tuple[float, float] | None = None

    @property
    def spans(self) -> Iterator[tuple[slice, slice]]:
        """Rows that lie side by side: where in the batch, and where in the chunk."""
        start = 0
        for i in range(1, len(self.rows) + 1):
            if i == len(self.rows) or self.rows[i] != self.rows[i - 1] + 1:
                yield slice(self.rows[start], self.rows[i - 1] + 1), slice(start, i)
                start = i


class Schedule:
    """Where in its noise levels a run is; they may rise, and jump back to where they were."""

    def __init__(self, sigmas: Sequence[float]) -> None:
        self._sigmas = sigmas
        self._step = 0
        self._called = self._started = False

    def call(self) -> None:
        """The sampler calls the model once more; that may take several evaluations."""
        self._called = True

    @cached_property
    def falls(self) -> bool:
        """Whether a noise level alone tells the step."""
        return all(a > b for a, b in pairwise(self._sigmas))

    def step(self, sigma: float) -> int:
        """The interval that a noise level lies in; a run goes through them in their order.

        A level on a boundary belongs to the interval that it opens, so a sampler's look-ahead to
        the end of its step counts as the next step's first evaluation. A level of several
        intervals belongs to the first one that isn't over yet; of intervals that are over, to the
        last one, since some samplers look ahead and come back. An interval without length is over
        with the next call.
        """
        pairs = list(pairwise(self._sigmas))
        found = [i for i, pair in enumerate(pairs) if _lies_in(sigma, *pair)]
        over = self._called and pairs and pairs[self._step][0] == pairs[self._step][1]
        ahead = [i for i in found if i >= self._step + bool(over and self._started)]
        self._called, self._started = False, True
        if found:
            self._step = ahead[0] if ahead else found[-1]
        elif len(self._sigmas) > 1 and sigma <= min(self._sigmas):
            self._step = len(self._sigmas) - 2  # as the last level of a schedule that falls
        return self._step


def _lies_in(sigma: float, start: float, end: float) -> bool:
    slack = 1e-5 * sigma
    if start == end:
        return abs(sigma - start) <= slack
    if start > end:
        return end + slack < sigma <= start + slack
    return start - slack <= sigma < end - slack


class Moment:
    """Where in the schedule an evaluation is.

    The noise level is on the device, where the sampler computes it. Reading it waits for all work
    that is queued there, so it is read only when something depends on it, and then once.
    """

    def __init__(self, sigma: Tensor, schedule: Schedule) -> None:
        self._sigma = sigma
        self._schedule = schedule
        if not schedule.falls:
            _ = self.step  # depends on the steps before it, so none may be left out

    @cached_property
    def sigma(self) -> float:
        """The noise level."""
        return float(self._sigma)

    @cached_property
    def step(self) -> int:
        """The interval of the schedule."""
        return self._schedule.step(self.sigma)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One call of the model.

    Attributes:
        pooled: (batch, pooled width) pooled text.
        picture_hw: the whole picture's size in tokens.
        axis_map: (scale, shift) on the time, row and column ids, as RoPE options say.
        guidance: (batch,) as the conditioning gives it; None if it gives none.
        time: (batch,) the picture's time, as the model takes it; None stands for 0.
    """

    chunks: tuple[Chunk, ...]
    pooled: Tensor
    picture_hw: tuple[int, int]
    moment: Moment
    axis_map: AxisMap = NO_MAP
    empty: bool = False
    guidance: Tensor | None = None
    time: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.pooled.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.pooled.dtype

    @cached_property
    def read(self) -> tuple[Tensor, Tensor | None]:
        """Pooled text and guidance on the CPU; waits for the device, once."""
        guidance = None if self.guidance is None else self.guidance.cpu()
        return self.pooled.cpu(), guidance

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
    return torch.cat([t[row : row + 1] for row in rows])


def alike(rows: Tensor) -> bool:
    """Whether all rows are the same; waits for the device."""
    return len(rows) == 1 or bool((rows == rows[:1]).all())
