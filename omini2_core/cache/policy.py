"""When K/V are computed again.

K/V depend on the condition, its LoRA and positions, the base weights and the pooled text. They
are therefore stored per branch and *chunk*: one entry of the conditioning (a positive and a
negative prompt are two), by identity and never by order, since the host batches chunks as it likes.
"""

from collections.abc import Callable
from dataclasses import dataclass

from ..errors import require_choice, require_range
from .entry import KEEP_ON, STORAGE, Entry

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


def is_due(entry: Entry, interval: int | None, step: Callable[[], int]) -> bool:
    """Whether K/V have to be computed now.

    Some samplers look a step ahead and come back; only going back by more than the interval counts
    as a new pass over the schedule.

    Args:
        interval: as :meth:`CachePolicy.interval` gives it.
        step: gives the step of the schedule; only asked if it matters.
    """
    if interval == 0 or not entry.complete:
        return True
    if interval is None:
        return False
    return step() - entry.step >= interval or entry.step - step() > interval
