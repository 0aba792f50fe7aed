"""Where K/V live between steps, and when they are computed again.

K/V depend on the condition, its LoRA and positions, the base weights and the pooled text. They
are therefore kept per branch and *chunk*: one entry of the conditioning (a positive and a
negative prompt are two), by identity and never by order, since the host batches chunks as it likes.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from .errors import require_choice, require_range

REUSE = ("auto", "once", "every_n_steps", "off")


@dataclass(frozen=True)
class CachePolicy:
    """When a branch's K/V are computed again.

    ``once`` is exact for an independent branch and an approximation for a joint one, ``auto``
    means once for the former and every ``refresh_every`` steps for the latter (paper section 3.3).
    """

    reuse: str = "off"
    refresh_every: int = 5

    def __post_init__(self) -> None:
        require_choice("reuse", self.reuse, REUSE)
        require_range("refresh_every", self.refresh_every, 1)

    def interval(self, joint: bool) -> int | None:
        """Steps between two refreshes; 0 computes at every evaluation, None only once."""
        reuse = self.reuse
        if reuse == "auto":
            reuse = "every_n_steps" if joint else "once"
        return {"off": 0, "once": None, "every_n_steps": self.refresh_every}[reuse]


@dataclass
class Entry:
    """The K/V of one branch for one chunk: block -> (rows, heads, tokens, head_dim) each."""

    step: int = -1
    refreshes: int = 0
    blocks: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def due(self, step: int, interval: int | None, block_count: int) -> bool:
        """Whether the K/V have to be computed at this step.

        An entry that an error left incomplete is due. Some samplers look a step ahead and come
        back; only going back by more than the interval counts as a new pass over the schedule.
        """
        if len(self.blocks) < block_count or interval == 0:
            return True
        if interval is None:
            return False
        return step - self.step >= interval or self.step - step > interval

    def restart(self, step: int) -> None:
        """Begins a refresh; what was there is given up first, so that memory doesn't double."""
        self.step = step
        self.refreshes += 1
        self.blocks.clear()

    @property
    def nbytes(self) -> int:
        """Bytes that the K/V take."""
        return sum(k.nbytes + v.nbytes for k, v in self.blocks.values())


class KVStore:
    """All K/V of one sampling run."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, Entry] = {}

    def entry(self, key: Hashable) -> Entry:
        """The entry of a branch and chunk, made when it is first asked for."""
        return self._entries.setdefault(key, Entry())

    @property
    def nbytes(self) -> int:
        """Bytes of everything held."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def refreshes(self) -> int:
        """How often those K/V were computed that were computed most often."""
        return max((entry.refreshes for entry in self._entries.values()), default=0)

    def clear(self) -> None:
        """Lets go of every tensor."""
        for entry in self._entries.values():
            entry.blocks.clear()
        self._entries.clear()
