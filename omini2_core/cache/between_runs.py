"""K/V left between runs: a second seed of the same graph need not compute them again.

Only of independent conditions that are computed once: nothing that a new seed changes goes into
those. They are found by everything that does go into them, never by place or order.
"""

from collections import OrderedDict
from collections.abc import Hashable

from .entry import Entry

# What earlier runs have left may take so much when a run has K/V of its own to compute. 1 GB is one
# condition of 512x512 and its negative prompt on FLUX.1; all K/V of the latest run stay until then.
SPARE_BYTES = 1 << 30


class Identity:
    """An object as part of a key: equal to nothing but itself, and held so that it stays itself."""

    def __init__(self, thing: object) -> None:
        self._thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and other._thing is self._thing

    def __hash__(self) -> int:
        return id(self._thing)


class BetweenRuns:
    """The K/V that runs of one model have left.

    Attributes:
        clearings: how often everything was let go of; a run in which that happened leaves nothing,
            since the model may be off the device for good.
    """

    def __init__(self) -> None:
        self.clearings = 0
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()

    def take(self, key: Hashable) -> Entry | None:
        """Hands over what was left under a key; it is the run's again."""
        return self._entries.pop(key, None)

    def put(self, key: Hashable, entry: Entry) -> None:
        """Leaves a complete entry for later runs."""
        self._entries[key] = entry
        self._entries.move_to_end(key)

    def trim(self, limit: int = SPARE_BYTES) -> None:
        """Lets go of the oldest until the rest takes no more than ``limit`` bytes."""
        while self._entries and self.nbytes > limit:
            self._entries.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Bytes of everything left."""
        return sum(entry.nbytes for entry in self._entries.values())

    def clear(self) -> None:
        """Lets go of everything."""
        self.clearings += 1
        self._entries.clear()
