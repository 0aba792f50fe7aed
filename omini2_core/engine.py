"""One sampling run: carries every condition through the model's blocks beside text and picture.

Knows nothing of ComfyUI: ``host`` tells it of each evaluation, block and attention call.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .attention import Attention, KeysValues, Partial, joint_attention, main_attention
from .backbone import Backbone, block_count
from .branch import double_block, last_keys_values, single_block
from .cache import CachePolicy, KVStore, too_old
from .compiled import uncompiled, uncompiled_itself
from .errors import Omini2Error, warn
from .kept import Kept
from .prefill import Job, prefill
from .run_branch import Chunk, Evaluation, RunBranch, RunSaved, Stream, rows_of
from .store import Block, Courier, Entry, Keeping


@dataclass(frozen=True)
class Kernels:
    """The attention of one of the model's blocks.

    Attributes:
        main: for text and picture, through other extensions' override, if any.
        own: the host's, for the branches' own queries.
        main_partial, own_partial: the same, telling log-sum-exps; None where it can't.
    """

    main: Attention
    own: Attention
    main_partial: Partial | None = None
    own_partial: Partial | None = None


@dataclass(eq=False)
class _Pass:
    """One branch in one evaluation.

    Attributes:
        chunks: its K/V for each chunk.
        due: those of them that are computed beside the main branch in this evaluation.
        stream: its tokens then, the rows of all due chunks behind each other.
        now: the K/V in the block that is running.
        attended: a joint branch's attention in it.
    """

    branch: RunBranch | RunSaved
    chunks: list[tuple[Entry, Chunk]]
    due: list[tuple[Entry, Chunk, range]]
    stream: Stream | None = None
    own: tuple[Tensor, Tensor] | None = None
    now: KeysValues | None = None
    attended: Tensor | None = None


@dataclass
class RunStats:
    """What a run did, for the log, the node and the demo.

    Attributes:
        reused: K/V that an earlier run had left.
        storage, keep_on: how K/V were kept in the end.
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

    @property
    def saved(self) -> float:
        """The share of the branches' work that reuse spared."""
        if not self.branch_evaluations:
            return 0.0
        return 1 - self.branches_computed / self.branch_evaluations


class Run:
    """The mutable state of one sampling run; made when it starts, closed when it ends.

    Attributes:
        keeping: how K/V are kept; to be decided before the first evaluation.
        progress: is told how many of the model's blocks have their K/V while those are computed
            that a cache keeps.
    """

    def __init__(
        self,
        backbone: Backbone,
        branches: Sequence[RunBranch],
        policy: CachePolicy,
        kept: Kept | None = None,
        model: Hashable = None,
        saved: Sequence[RunSaved] = (),
    ) -> None:
        """Args:
        saved: conditions whose K/V were computed before.
        kept: what earlier runs have left, if anything may be kept between runs.
        model: names the model's weights and whatever is patched onto them.
        """
        every: list[RunBranch | RunSaved] = [*branches, *saved]
        self.stats = RunStats([branch.token_count for branch in every])
        self.keeping = Keeping(policy.storage, "cpu" if policy.keep_on == "cpu" else "gpu")
        self.progress: Callable[[int, int], None] | None = None
        self._backbone = backbone
        self._branches = branches
        self._saved = saved
        self._policy = policy
        self._store = KVStore()
        self._kept = kept
        self._clearings = 0 if kept is None else kept.clearings
        self._model = model
        self._contents: dict[int, tuple[Hashable, Entry]] = {}
        self._passes: list[_Pass] = []
        self._courier: Courier | None = None
        self._in_block = False

    # torch.compile leaves the hooks alone: what they do changes from step to step, and would be
    # compiled anew each time. What they are around, the model's own blocks, is compiled.
    @uncompiled
    def active(self, call: Evaluation) -> bool:
        """Whether any condition takes part in an evaluation."""
        return any(branch.active(call) for branch in self._branches) or any(
            branch.active(call) for branch in self._saved
        )

    @contextmanager
    def evaluation(self, call: Evaluation) -> Iterator[None]:
        """Around one call of the model."""
        try:
            self._open(call)
            yield
            self.stats.evaluations += not call.empty
            self.stats.branch_evaluations += sum(len(each.chunks) for each in self._passes)
            self.stats.branches_computed += sum(len(each.due) for each in self._passes)
        finally:
            self._shut()

    @uncompiled
    def _open(self, call: Evaluation) -> None:
        alone: list[tuple[RunBranch, Entry, Chunk, range]] = []
        self._passes = [
            self._begin(index, branch, call, alone)
            for index, branch in enumerate(self._branches)
            if branch.active(call)
        ]
        self._prefill(call, alone)
        self._passes += [
            self._begin_saved(index, branch, call)
            for index, branch in enumerate(self._saved)
            if branch.active(call)
        ]
        if self.keeping.keep_on == "cpu":
            self._courier = self._courier or Courier(call.pooled.device)
            self._courier.send(0, self._away())

    @uncompiled
    def _shut(self) -> None:
        for each in self._passes:
            if self._policy.interval(each.branch.joint) is None:
                # Rank 128 in every block of FLUX.1 is 300 MB that no later step needs.
                each.branch.release()
        self._passes = []
        if self._courier is not None:
            self._courier.drop()
        self.stats.kv_bytes = max(self.stats.kv_bytes, self._store.nbytes)
        self.stats.refreshes = max(self.stats.refreshes, self._store.refreshes)
        self.stats.storage, self.stats.keep_on = self.keeping.storage, self.keeping.keep_on

    def relieve(self, device: torch.device, fp8: bool = True) -> bool:
        """After the device ran out of memory: keeps K/V in fewer bytes, or elsewhere.

        Args:
            fp8: whether the device has such numbers.

        Returns:
            whether there was something left to try.
        """
        steps = {
            Keeping("model", "gpu"): Keeping("fp8", "gpu") if fp8 else Keeping("model", "cpu"),
            Keeping("fp8", "gpu"): Keeping("fp8", "cpu"),
        }
        keeps = self._saved or any(self._policy.interval(b.joint) != 0 for b in self._branches)
        if not keeps or self.keeping not in steps:
            return False
        self.keeping = steps[self.keeping]
        how = "in fp8" if self.keeping.keep_on == "gpu" else "in the computer's own memory"
        warn(
            f"keep_on: the device ran out of memory, so the conditions' K/V are kept {how} from "
            "here on; set storage and keep_on so in Condition Cache, or make the conditions "
            "smaller with Compact Tokens."
        )
        if self._kept is not None:
            self._kept.clear()
        self._store.rearrange(self.keeping, device)
        return True

    def close(self) -> None:
        """Frees everything the run holds, but what the next run may need."""
        if self._kept is not None and self._kept.clearings == self._clearings:
            for content, entry in self._contents.values():
                if entry.complete:
                    self._kept.put((content, entry.storage), entry)
        self._contents = {}
        self._passes = []
        self._store.clear()
        self._branches = self._saved = ()

    def first_entry(self, call: Evaluation) -> Entry:
        """The first condition's K/V for the first prompt of an evaluation that is under way."""
        return self._passes[0].chunks[0][0]

    @uncompiled_itself
    def block(self, kind: str, index: int, original: Callable[[], Any]) -> Any:
        """Runs one block of the model and, beside it, the branches' half of that block.

        Args:
            kind: "double" or "single".
            original: the model's own block, including whatever else is patched onto it.

        Returns:
            What ``original`` returned.
        """
        self._before(kind, index)
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
        """The main branch's attention, with the conditions' K/V appended."""
        if not self._in_block or not self._passes:
            return kernels.main(q, k, v, mask)
        waiting: dict[tuple[int, ...], list[_Pass]] = defaultdict(list)
        for each in self._passes:
            s = each.stream
            if s is not None and s.q is not None and each.branch.joint and each.attended is None:
                waiting[tuple(s.rows)].append(each)
        for rows, together in waiting.items():
            self._attend_joint(kernels, together, *(rows_of(t, list(rows)) for t in (k, v)))
        conditions = [each.now for each in self._passes if each.now is not None]
        return main_attention(kernels.main, kernels.main_partial, q, k, v, mask, conditions)

    @staticmethod
    def _attend_joint(kernels: Kernels, together: list[_Pass], k: Tensor, v: Tensor) -> None:
        """The attention of joint branches that stand for the same rows of the batch."""
        queries, own = [], []
        for each in together:
            assert each.stream is not None and each.stream.q is not None and each.own is not None
            queries.append(each.stream.q)
            own.append(KeysValues([(slice(None), Block(*each.own))], each.branch.bias))
        results = joint_attention(kernels.own, kernels.own_partial, queries, own, k, v)
        for each, attended in zip(together, results, strict=True):
            each.attended = attended

    def _begin(
        self,
        index: int,
        branch: RunBranch,
        call: Evaluation,
        alone: list[tuple[RunBranch, Entry, Chunk, range]],
    ) -> _Pass:
        """What a branch has to do in an evaluation; adds to ``alone`` what it does beforehand."""
        interval = self._policy.interval(branch.joint)
        count = block_count(self._backbone)
        chunks, due = [], []
        for chunk in call.chunks:
            entry = self._store.entry((index, call.empty, chunk.key), count)
            chunks.append((entry, chunk))
            if self._due(entry, call, interval):
                if interval:
                    entry.step = call.moment.step
                due.append((entry, chunk, branch.rows_to_run(call, chunk)))
        if interval != 0 and not branch.joint:
            alone += [(branch, *each) for each in due]
            due = []
        stream = None
        for entry, _, _ in due:
            entry.restart()
        if due:
            jobs = [(branch, chunk, rows) for _, chunk, rows in due]
            stream = Stream.start(self._backbone, call, jobs)
        return _Pass(branch, chunks, due, stream)

    def _begin_saved(self, index: int, branch: RunSaved, call: Evaluation) -> _Pass:
        """K/V from a file are brought to where they are kept, at their first evaluation."""
        chunks = []
        for chunk in call.chunks:
            given = branch.entry(call, chunk)
            entry = self._store.entry(("saved", index, call.empty), given.count)
            if not entry.complete:
                entry.adopt(Entry(given.count, dict(given.blocks), set(given.filled)))
                entry.rearrange(self.keeping, call.pooled.device)
            chunks.append((entry, chunk))
        return _Pass(branch, chunks, [])

    @staticmethod
    def _due(entry: Entry, call: Evaluation, interval: int | None) -> bool:
        if interval == 0 or not entry.complete:
            return True
        return interval is not None and too_old(entry, call.moment.step, interval)

    def _prefill(
        self, call: Evaluation, alone: list[tuple[RunBranch, Entry, Chunk, range]]
    ) -> None:
        """Computes the K/V of independent branches, if no earlier run has left them."""
        missing = [each for each in alone if not self._adopt(call, *each)]
        if not missing:
            return
        if self._kept is not None:
            self._kept.trim()

        def job(branch: RunBranch, entry: Entry, chunk: Chunk, rows: range) -> Job:
            entry.restart()
            return Job(branch, chunk, rows, partial(self._keep, entry))

        prefill(self._backbone, call, [job(*each) for each in missing], self._show)
        self.stats.branches_computed += len(missing)

    def _adopt(
        self, call: Evaluation, branch: RunBranch, entry: Entry, chunk: Chunk, rows: range
    ) -> bool:
        """Whether an entry's K/V were left by an earlier run."""
        if self._kept is None or self._policy.interval(branch.joint) is not None:
            return False
        like = call.pooled
        content = self._model, branch.content(call, chunk, rows), like.dtype, like.device
        self._contents[id(entry)] = content, entry
        found = self._kept.take((content, self.keeping.storage))
        if found is None:
            return False
        entry.adopt(found)
        entry.rearrange(self.keeping, like.device)
        self.stats.reused += 1
        return True

    def _show(self, done: int) -> None:
        if self.progress is not None:
            self.progress(done, block_count(self._backbone))

    def _keep(self, entry: Entry, number: int, k: Tensor, v: Tensor) -> None:
        entry.keep(number, k, v, self.keeping)

    def _away(self) -> list[Entry]:
        """The entries whose K/V have to be fetched in this evaluation."""
        computed = {id(entry) for each in self._passes for entry, _, _ in each.due}
        entries = [entry for each in self._passes for entry, _ in each.chunks]
        return [entry for entry in entries if id(entry) not in computed]

    @uncompiled
    def _before(self, kind: str, index: int) -> None:
        """The branches' first half of a block: each one's K/V."""
        backbone = self._backbone
        doubles = len(backbone.double_blocks)
        double = kind == "double"
        number = index if double else doubles + index
        block = (backbone.double_blocks if double else backbone.single_blocks)[index]
        arrived: dict[int, Block] = {}
        if self._courier is not None:
            arrived = self._courier.receive(number)
            if number + 1 < block_count(backbone):
                self._courier.send(number + 1, self._away())
        for each in self._passes:
            s = each.stream
            if s is not None:
                arguments = block, f"{kind}_blocks.{index}", s.linear, s.x, s.vec, s.rotate
                if number == block_count(backbone) - 1:
                    each.own = last_keys_values(*arguments, backbone.outputs)
                else:
                    s.half = (double_block if double else single_block)(*arguments)
                    s.q, *own = next(s.half)
                    each.own = own[0], own[1]
                self._keep_due(number, each)
            each.now = self._gather(number, each, arrived)
        if any(each.due and self._keeps(each) for each in self._passes):
            self._show(number + 1)

    def _keeps(self, each: _Pass) -> bool:
        """Whether a branch's K/V are for later evaluations too."""
        return self._policy.interval(each.branch.joint) != 0

    def _keep_due(self, number: int, each: _Pass) -> None:
        if not self._keeps(each):
            return
        for entry, k, v in self._computed(each):
            self._keep(entry, number, k, v)

    @staticmethod
    def _computed(each: _Pass) -> Iterator[tuple[Entry, Tensor, Tensor]]:
        """The K/V in the block that is running of each chunk that is computed now."""
        assert each.own is not None or not each.due
        start = 0
        for entry, _, rows in each.due:
            assert each.own is not None
            span = slice(start, start + len(rows))
            yield entry, each.own[0][span], each.own[1][span]
            start = span.stop

    def _gather(self, number: int, each: _Pass, arrived: dict[int, Block]) -> KeysValues:
        """One branch's K/V for every row of the evaluation's batch."""
        computed = {id(entry): Block(k, v) for entry, k, v in self._computed(each)}
        parts = []
        for entry, chunk in each.chunks:
            block = computed.get(id(entry)) or arrived.get(id(entry)) or entry.blocks[number]
            parts.append((slice(chunk.rows.start, chunk.rows.stop), block))
        return KeysValues(parts, each.branch.bias)

    @uncompiled
    def _after(self) -> None:
        """The branches' second half of a block; after the last one nobody looks any more."""
        for each in self._passes:
            s = each.stream
            if s is not None and s.q is not None:
                assert each.own is not None
                attended = each.attended
                if not each.branch.joint:
                    attended = self._backbone.attend(s.q, *each.own, None)
                if attended is None:
                    raise Omini2Error(
                        "attention: another extension skipped one of the model's blocks or "
                        "replaced its attention while a joint condition needed it; take it out of "
                        "the graph or, if it skips blocks, set attention to independent."
                    )
                s.finish(attended)
            each.own = each.now = each.attended = None
