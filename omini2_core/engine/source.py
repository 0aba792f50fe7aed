"""Sources of K/V: where the keys and values come from that text and picture attend to besides.

A condition's own branch is one, a file another. A run asks them all the same questions.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..cache.entry import Entry, KeysValues
from ..cache.policy import CachePolicy
from ..cache.run_cache import RunCache
from .attention import KeyGroup
from .evaluation import Chunk, Evaluation
from .model import Model

# An entry with the chunk that it stands for.
ChunkEntry = tuple[Entry, Chunk]


class Walk(Protocol):
    """Tokens on their way through the model's blocks, a block at a time."""

    def keys_values(self, number: int) -> tuple[Tensor, Tensor]:
        """K and V in a block, (rows, heads, tokens, head_dim) each: its first half."""

    def finish_alone(self) -> None:
        """The second half, if there is one, the tokens having looked at themselves only."""


@dataclass(frozen=True, eq=False)
class Job:
    """K/V that are computed before the model's first block, by a walk of their own.

    Attributes:
        together: jobs that have the same can be one walk.
        rows: how many rows of the walk are this job's.
        start: jobs that can go together -> their walk, each one's rows behind the last one's.
        store: takes the number of a block and its K/V, (rows, heads, tokens, head_dim) each.
    """

    together: object
    rows: int
    start: Callable[[Sequence["Job"]], Walk]
    store: Callable[[int, Tensor, Tensor], None]


@dataclass(frozen=True, eq=False)
class Query:
    """What a source wants of the main branch's attention in a block.

    Attributes:
        rows: the rows of the evaluation's batch that its own rows stand for.
        q: (len(rows), heads, tokens, head_dim).
        own: K/V of the same tokens.
    """

    rows: tuple[int, ...]
    q: Tensor
    own: KeyGroup


@dataclass(eq=False)
class Pass:
    """A source in one evaluation; this one only hands over K/V that are there.

    Attributes:
        entries: its K/V for each chunk.
        bias: log(condition_scale).
        stores: whether what it computes is for later evaluations too.
        jobs: what is to be computed before the model's first block.
        sequence: sources that have the same see each other too; None has no other.
        now: the K/V in the block that is running.
    """

    entries: Sequence[ChunkEntry]
    bias: float
    stores: bool = True
    jobs: Sequence[Job] = ()
    sequence: Hashable | None = None
    now: KeyGroup | None = field(default=None, init=False)

    @property
    def computed(self) -> Sequence[Entry]:
        """The entries whose K/V are computed beside the main branch in this evaluation."""
        return ()

    @property
    def together(self) -> Hashable | None:
        """Passes that have the same compute beside the main branch as one batch; None: nothing."""
        return None

    def start(self, together: Sequence["Pass"]) -> None:
        """Begins what is computed beside the main branch, for all that do it as one batch."""

    def before(self, number: int, arrived: Mapping[int, KeysValues]) -> None:
        """The first half of a block: its K/V.

        Args:
            arrived: K/V that were brought from elsewhere, by the identity of their entries.
        """
        self._gather(number, arrived)

    @property
    def query(self) -> Query | None:
        """What it wants of the main branch's attention in this block, until it has the answer."""
        return None

    def answer(self, attended: Tensor) -> None:
        """What the query gave."""
        raise NotImplementedError

    def after(self) -> None:
        """The second half of a block; behind the last one nobody looks any more."""
        self.now = None

    def _gather(self, number: int, there: Mapping[int, KeysValues]) -> None:
        """K/V for every row of the evaluation's batch."""
        spans = []
        for entry, chunk in self.entries:
            keys_values = there.get(id(entry)) or entry.blocks[number]
            spans += [(rows, keys_values.rows(within)) for rows, within in chunk.spans]
        self.now = KeyGroup(spans, self.bias)


class Source(Protocol):
    """Something that brings K/V into a run."""

    @property
    def token_count(self) -> int:
        """How many keys."""

    def stores(self, policy: CachePolicy) -> bool:
        """Whether its K/V are for later evaluations too."""

    def active(self, call: Evaluation) -> bool:
        """Whether it takes part in an evaluation."""

    def begin(self, model: Model, call: Evaluation, cache: RunCache) -> Pass:
        """What it has to do in an evaluation."""
