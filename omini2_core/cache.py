"""When K/V are computed again, and all that one run keeps.

K/V depend on the condition, its LoRA and positions, the base weights and the pooled text. They
are therefore kept per branch and *chunk*: one entry of the conditioning (a positive and a
negative prompt are two), by identity and never by order, since the host batches chunks as it likes.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import torch

from .errors import require_choice, require_range
from .store import KEEP_ON, STORAGE, Entry, Keeping

REUSE = ("auto", "once", "every_n_steps", "off")


@dataclass(frozen=True)
class CachePolicy:
    """When a branch's K/V are computed again, and how they are kept until then.

    ``once`` is exact for an independent branch and an approximation for a joint one, ``auto``
    means once for the former and every ``refresh_every`` steps for the latter (paper section 3.3).
    """

    reuse: str = "off"
    refresh_every: int = 5
    storage: str = "model"
    keep_on: str = "auto"

    def __post_init__(self) -> None:
        require_choice("reuse", self.reuse, REUSE)
        require_range("refresh_every", self.refresh_every, 1, 1_000_000)
        require_choice("storage", self.storage, STORAGE)
        require_choice("keep_on", self.keep_on, KEEP_ON)

    def interval(self, joint: bool) -> int | None:
        """Steps between two refreshes; 0 computes at every evaluation, None only once."""
        reuse = self.reuse
        if reuse == "auto":
            reuse = "every_n_steps" if joint else "once"
        return {"off": 0, "once": None, "every_n_steps": self.refresh_every}[reuse]


def too_old(entry: Entry, step: int, interval: int) -> bool:
    """Whether K/V have to be computed again at this step.

    Some samplers look a step ahead and come back; only going back by more than the interval counts
    as a new pass over the schedule.
    """
    return step - entry.step >= interval or entry.step - step > interval


class KVStore:
    """All K/V of one sampling run."""

    def __init__(self) -> None:
        self._entries: dict[Hashable, Entry] = {}

    def entry(self, key: Hashable, count: int) -> Entry:
        """The entry of a branch and chunk, made when it is first asked for."""
        return self._entries.setdefault(key, Entry(count))

    @property
    def entries(self) -> Iterable[Entry]:
        """All of them."""
        return self._entries.values()

    def rearrange(self, keeping: Keeping, device: torch.device) -> bool:
        """Keeps everything otherwise; whether there was anything."""
        for entry in self._entries.values():
            entry.rearrange(keeping, device)
        return self.nbytes > 0

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
        self._entries.clear()
