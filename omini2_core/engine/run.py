"""One sampling run: beside text and picture, every source of K/V has its say in every block.

Whoever runs the model tells it of each evaluation, block and attention call.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..cache.courier import Courier
from ..cache.entry import Entry, KeysValues
from ..cache.run_cache import RunCache
from .attention import (
    Attention,
    KeyGroup,
    Partial,
    beside,
    joint_attention,
    main_attention,
)
from .compiled import uncompiled, uncompiled_itself
from .evaluation import Evaluation, rows_of
from .model import Model
from .prefill import prefill
from .source import Job, Pass, Source
from .spot import SpotStats


@dataclass(frozen=True)
class Kernels:
    """The attention of one of the model's blocks.

    Attributes:
        main: for text and picture, through other extensions' override, if any.
        own: without, for the sources' own queries.
        main_partial, own_partial: the same, telling log-sum-exps; None where it can't.
    """

    main: Attention
    own: Attention
    main_partial: Partial | None = None
    own_partial: Partial | None = None


@dataclass
class ReferenceStats:
    """What a run did with an editing model's references.

    Attributes:
        isolated: whether they looked at each other only.
        count, tokens: of the prompt that has most.
        evaluated, computed: how often a prompt's references were needed, and were computed.
        drift: how far K/V were from those that they took the place of, relative to these, in the
            worst block; None where nothing was compared.
    """

    isolated: bool
    count: int = 0
    tokens: int = 0
    evaluated: int = 0
    computed: int = 0
    drift: float | None = None

    @property
    def spared(self) -> float:
        """The share of the references' work that was spared."""
        return 1 - self.computed / self.evaluated if self.evaluated else 0.0


@dataclass
class RunStats:
    """What a run did, for the log, the node and the demo.

    Attributes:
        references: what it did with references, where it acted on them.
        spot: what Spot Edit left out, where it did.
        reused: K/V that an earlier run had left.
        storage, keep_on: how K/V were stored in the end.
    """

    tokens: list[int]
    evaluations: int = 0
    branch_evaluations: int = 0
    branches_computed: int = 0
    kv_bytes: int = 0
    refreshes: int = 0
    reused: int = 0
    storage: str = "model"
    keep_on: str = "gpu"
    references: ReferenceStats | None = None
    spot: SpotStats | None = None

    @property
    def spared(self) -> float:
        """The share of the branches' work that reuse spared."""
        if not self.branch_evaluations:
            return 0.0
        return 1 - self.branches_computed / self.branch_evaluations

    def note(self, cache: RunCache) -> None:
        """What the cache holds and did so far."""
        self.kv_bytes = max(self.kv_bytes, cache.nbytes)
        self.refreshes = max(self.refreshes, cache.refreshes)
        self.reused = cache.reused
        self.storage, self.keep_on = cache.storage.format, cache.storage.keep_on


class Run:
    """The mutable state of one sampling run; made when it starts, closed when it ends.

    Attributes:
        cache: all its K/V.
        call: the evaluation that is under way.
        progress: is told how many of the model's blocks have their K/V while those are computed
            that are stored.
        shares_cache: whether something beside the sources keeps K/V in the cache.
    """

    def __init__(self, model: Model, sources: Sequence[Source], cache: RunCache) -> None:
        self.cache = cache
        self.progress: Callable[[int, int], None] | None = None
        self.shares_cache = False
        self.stats = RunStats([source.token_count for source in sources])
        self._model = model
        self._sources = sources
        self._passes: list[Pass] = []
        self._courier: Courier | None = None
        self._in_block = False
        self.call: Evaluation | None = None

    # torch.compile leaves the hooks alone: what they do changes from step to step, and would be
    # compiled anew each time. What they are around, the model's own blocks, is compiled.
    @uncompiled
    def active(self, call: Evaluation) -> bool:
        """Whether any source takes part in an evaluation."""
        return any(source.active(call) for source in self._sources)

    @property
    def entries(self) -> list[Entry]:
        """The K/V of the evaluation that is under way."""
        return [entry for each in self._passes for entry, _ in each.entries]

    @contextmanager
    def evaluation(self, call: Evaluation) -> Iterator[None]:
        """Around one call of the model."""
        try:
            self._open(call)
            yield
            self.stats.evaluations += not call.empty
            self.stats.branch_evaluations += sum(len(each.entries) for each in self._passes)
            self.stats.branches_computed += sum(len(each.computed) for each in self._passes)
        finally:
            self._shut()

    @uncompiled
    def _open(self, call: Evaluation) -> None:
        self.call = call
        active = [source for source in self._sources if source.active(call)]
        self._passes = [source.begin(self._model, call, self.cache) for source in active]
        self._prefill([job for each in self._passes for job in each.jobs])
        beside = defaultdict(list)
        for each in self._passes:
            beside[each.together].append(each)
        for together, passes in beside.items():
            if together is not None:
                passes[0].start(passes)
        if self.cache.storage.keep_on == "cpu":
            self._courier = self._courier or Courier(call.device)
            self._courier.send(0, self._away())

    def _prefill(self, jobs: Sequence[Job]) -> None:
        if jobs:
            self.cache.trim()
            prefill(jobs, len(self._model.blocks), self._show)
            self.stats.branches_computed += len(jobs)

    @uncompiled
    def _shut(self) -> None:
        self.call = None
        self._passes = []
        if self._courier is not None:
            self._courier.drop()
        self.stats.note(self.cache)

    def relieve(self, device: torch.device, fp8: bool = True) -> bool:
        """After the device ran out of memory: as :meth:`RunCache.relieve`."""
        return self._stores and self.cache.relieve(device, fp8)

    @property
    def movable(self) -> bool:
        """Whether there are K/V on the device that could be elsewhere."""
        return self._stores and self.cache.movable

    @property
    def _stores(self) -> bool:
        stores = (source.stores(self.cache.policy) for source in self._sources)
        return self.shares_cache or any(stores)

    def close(self) -> None:
        """Frees everything the run holds, but what the next run may need."""
        self.cache.close()
        self._passes = []
        self._sources = ()

    @uncompiled_itself
    def block(self, number: int, original: Callable[[], Any]) -> Any:
        """Runs one block of the model and, beside it, the sources' half of that block.

        Args:
            number: of the block, in the order in which the model runs them.
            original: the model's own block, including whatever else is patched onto it.

        Returns:
            What ``original`` returned.
        """
        self._before(number)
        self._in_block = True
        try:
            out = original()
        finally:
            self._in_block = False
        self._after()
        return out

    def attend(
        self, kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The main branch's attention, with the sources' K/V appended."""
        if not self._in_block or not self._passes:
            return kernels.main(q, k, v, mask)
        self._answer(kernels, k, v)
        groups = [each.now for each in self._passes if each.now is not None]
        return main_attention(kernels.main, kernels.main_partial, q, k, v, mask, groups)

    def _answer(self, kernels: Kernels, k: Tensor, v: Tensor) -> None:
        """Gives the sources what they want of the main branch; those of the same rows at once."""
        waiting = defaultdict(list)
        for each in self._passes:
            query = each.query
            if query is not None:
                own = beside(query.own, self._companions(each), k, v, query.rows)
                waiting[query.rows].append((each, query.q, own))
        for rows, together in waiting.items():
            results = joint_attention(
                kernels.own,
                kernels.own_partial,
                [q for _, q, _ in together],
                [own for _, _, own in together],
                *(rows_of(t, rows) for t in (k, v)),
            )
            for (each, _, _), attended in zip(together, results, strict=True):
                each.answer(attended)

    def _companions(self, of: Pass) -> list[KeyGroup]:
        """The K/V of the others in a source's sequence, in the block that runs."""
        if of.sequence is None:
            return []
        others = (each for each in self._passes if each is not of and each.sequence == of.sequence)
        return [each.now for each in others if each.now is not None]

    @uncompiled
    def _before(self, number: int) -> None:
        """The sources' first half of a block: each one's K/V."""
        arrived: dict[int, KeysValues] = {}
        if self._courier is not None:
            arrived = self._courier.receive(number)
            if number + 1 < len(self._model.blocks):
                self._courier.send(number + 1, self._away())
        for each in self._passes:
            each.before(number, arrived)
        if any(each.computed and each.stores for each in self._passes):
            self._show(number + 1)

    @uncompiled
    def _after(self) -> None:
        """The sources' second half of a block."""
        for each in self._passes:
            each.after()

    def _away(self) -> list[Entry]:
        """The entries whose K/V have to be fetched in this evaluation."""
        computed = {id(entry) for each in self._passes for entry in each.computed}
        return [entry for entry in self.entries if id(entry) not in computed]

    def _show(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, len(self._model.blocks))
