"""All K/V of one sampling run: which there are, how they lie, and what an earlier run has left."""

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

from ..errors import Remedy, warn
from .between_runs import BetweenRuns
from .entry import Entry, Storage
from .policy import CachePolicy

# What is tried, one after the other, when the device runs out of memory.
RELIEF = {
    Storage("model", "gpu"): Storage("fp8", "gpu"),
    Storage("fp8", "gpu"): Storage("fp8", "cpu"),
}


class RunCache:
    """All K/V that one run holds, by source and chunk.

    Attributes:
        storage: how K/V are stored; to be decided before the first evaluation.
        reused: how many an earlier run had left.
    """

    def __init__(
        self,
        policy: CachePolicy,
        left: BetweenRuns | None = None,
        model: Hashable = None,
    ) -> None:
        """Args:
        left: what earlier runs have left, if anything may be left between runs.
        model: names the model's weights and whatever is patched onto them.
        """
        self.policy = policy
        self.storage = Storage(policy.storage, "cpu" if policy.keep_on == "cpu" else "gpu")
        self.reused = 0
        self._entries: dict[Hashable, Entry] = {}
        self._left = left
        self._clearings = 0 if left is None else left.clearings
        self._model = model
        self._contents: dict[int, tuple[Hashable, Entry]] = {}

    def entry(self, key: Hashable | None, blocks: int) -> Entry:
        """The entry of a source and chunk, made when it is first asked for.

        Without a key it is for this once, since nobody could know it again.
        """
        return Entry(blocks) if key is None else self._entries.setdefault(key, Entry(blocks))

    def store(self, entry: Entry, number: int, k: Tensor, v: Tensor) -> None:
        """Stores the K/V of a block, (rows, heads, tokens, head_dim) each."""
        entry.store(number, k, v, self.storage)

    def adopt(self, entry: Entry, content: Callable[[], Hashable], device: torch.device) -> bool:
        """Whether an entry's K/V were left by an earlier run; they are the entry's then.

        Args:
            content: names all that they depend on, apart from the model.
        """
        if self._left is None:
            return False
        key = self._model, content()
        self._contents[id(entry)] = key, entry
        found = self._left.take((key, self.storage.format))
        if found is None:
            return False
        entry.adopt(found)
        entry.rearrange(self.storage, device)
        self.reused += 1
        return True

    def trim(self) -> None:
        """Before this run computes K/V of its own: lets go of what other runs left long ago."""
        if self._left is not None:
            self._left.trim()

    def relieve(self, device: torch.device, fp8: bool = True) -> bool:
        """After the device ran out of memory: stores K/V in fewer bytes, or elsewhere.

        Args:
            fp8: whether the device has such numbers.

        Returns:
            whether there was something left to try.
        """
        target = RELIEF.get(self.storage)
        if target is None:
            return False
        if target.format == "fp8" and not fp8:
            target = Storage("model", "cpu")
        self.storage = target
        how = "in fp8" if self.storage.keep_on == "gpu" else "in the computer's own memory"
        warn(
            f"keep_on: the device ran out of memory, so the conditions' K/V are kept {how} from "
            "here on; set storage and keep_on so in Condition Cache, or make the conditions "
            "smaller with Compact Tokens.",
            Remedy(
                {"storage": target.format, "keep_on": target.keep_on}, along=("model", "guider")
            ),
        )
        if self._left is not None:
            self._left.clear()
        try:
            for entry in self._entries.values():
                entry.rearrange(self.storage, device)
        except torch.OutOfMemoryError:  # not even room for a block's
            return self.relieve(device, fp8)
        return True

    @property
    def movable(self) -> bool:
        """Whether K/V are on the device that could be elsewhere."""
        return self.storage.keep_on == "gpu" and self.nbytes > 0

    @property
    def nbytes(self) -> int:
        """Bytes of everything held."""
        return sum(entry.nbytes for entry in self._entries.values())

    @property
    def refreshes(self) -> int:
        """How often those K/V were computed that were computed most often."""
        return max((entry.refreshes for entry in self._entries.values()), default=0)

    def close(self) -> None:
        """Lets go of everything, but what the next run may need."""
        if self._left is not None and self._left.clearings == self._clearings:
            for content, entry in self._contents.values():
                if entry.complete:
                    self._left.put((content, entry.format), entry)
        self._contents = {}
        self._entries = {}
