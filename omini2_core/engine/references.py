"""References of an editing model: rows of its own sequence, whose K/V are kept between steps.

An editing model runs the tokens of its reference images through every block beside the picture, and
they come last in its sequence. Where their K/V are kept, the model runs without them, and text and
picture attend to what is kept.

*Joint* references look at text and picture, as the model runs them: it computes them every few
steps, and in between they are what they were. *Isolated* ones look at references only, at time 0:
their K/V hold nothing of the step, so one computation is exact.

A reference's strength is a constant in the logits of text and picture towards it. Its own K/V hold
nothing of it, and references look at each other as they are.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from ..cache.courier import Courier
from ..cache.entry import Entry, KeysValues, Storage
from ..cache.policy import is_due
from ..cache.run_cache import RunCache
from ..errors import Omini2Error, warn
from .attention import KeyGroup, main_attention, strength_attention
from .compiled import uncompiled
from .evaluation import Chunk, Moment, rows_of
from .run import Kernels, ReferenceStats


@dataclass(frozen=True, eq=False)
class Content:
    """What the K/V of one prompt's isolated references depend on, apart from the model.

    Attributes:
        name: of all of it.
        alike: whether all rows of the prompt have the same, so that one has to be computed.
    """

    name: str
    alike: bool


@dataclass(frozen=True, eq=False)
class Part:
    """The references of one prompt in one call of the model.

    Attributes:
        due: whether they are computed in this call.
        computed: the rows that they are computed from.
    """

    entry: Entry
    chunk: Chunk
    due: bool
    computed: Sequence[int]


@dataclass(frozen=True)
class Tail:
    """The references' rows at the end of the sequence, in one call of the model.

    Attributes:
        runs: for each reference how many rows it has, and log(strength).
    """

    runs: tuple[tuple[int, float], ...]

    @property
    def tokens(self) -> int:
        """How many rows there are."""
        return sum(n for n, _ in self.runs)

    @property
    def weighed(self) -> bool:
        """Whether any is looked at more or less than the model does."""
        return any(bias for _, bias in self.runs)

    @property
    def groups(self) -> list[tuple[slice, float]]:
        """Rows that lie behind one another and are looked at alike, with what is added."""
        found: list[tuple[slice, float]] = []
        start = 0
        for bias, together in groupby(self.runs, key=lambda run: run[1]):
            stop = start + sum(n for n, _ in together)
            found.append((slice(start, stop), bias))
            start = stop
        return found


class Seen(Protocol):
    """What is done in the attention of each block while the model runs.

    Attributes:
        tokens: the references' rows at the end of the sequence.
    """

    tokens: int

    def attend(
        self, number: int, kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The attention of a block, (batch, tokens, heads * head_dim).

        Args:
            number: of the block, in the order in which the model runs them.
            q, k, v: (batch, heads, tokens, head_dim), after RoPE.
        """


class References:
    """The references of one run.

    Attributes:
        seen: what the attention is to do in the call that is under way; None leaves it alone.
        progress: is told how many of the model's blocks have their K/V while they are computed.
    """

    def __init__(
        self, cache: RunCache, blocks: int, kv_heads: int, isolated: bool, kept: bool = True
    ) -> None:
        """Args:
        blocks: how many the model has.
        kv_heads: the heads that K/V have of their own; queries may share them in groups.
        kept: whether the cache's policy is for them too; else they are computed every time.
        """
        self.cache = cache
        self.isolated = isolated
        self._kept = kept
        self.stats = ReferenceStats(isolated)
        self.seen: Seen | None = None
        self.progress: Callable[[int, int], None] | None = None
        self._blocks = blocks
        self._kv_heads = kv_heads
        self._contents: dict[Hashable, Content] = {}
        self._courier: Courier | None = None
        self._drift: Tensor | None = None
        self._reached = 0

    @property
    def interval(self) -> int | None:
        """Steps between two computations, as :meth:`CachePolicy.interval` gives it."""
        return self.cache.policy.interval(not self.isolated) if self._kept else 0

    @property
    def as_they_are(self) -> bool:
        """Whether the model runs them itself, every time."""
        return self.interval == 0 and not self.isolated

    @uncompiled
    def joint(self, chunks: Sequence[Chunk], moment: Moment, which: Hashable = None) -> list[Part]:
        """What each prompt's joint references need in a call.

        Args:
            which: of a prompt's references take part; others' K/V are other ones.
        """
        parts = []
        for chunk in chunks:
            entry = self.cache.entry(("references", chunk.key, which), self._blocks)
            due = is_due(entry, self.interval, lambda: moment.step)
            if due and self.interval:
                entry.step = moment.step
            parts.append(Part(entry, chunk, due, chunk.rows))
        return parts

    @uncompiled
    def alone(
        self,
        chunks: Sequence[Chunk],
        moment: Moment,
        device: torch.device,
        describe: Callable[[Chunk], Content],
        which: Hashable = None,
    ) -> list[Part]:
        """What each prompt's isolated references need in a call; equal ones share their K/V.

        Args:
            describe: says what K/V depend on; reads it from the device, so it is asked once.
            which: of a prompt's references take part.
        """
        parts: list[Part] = []
        there: dict[str, Entry] = {}
        for chunk in chunks:
            known = chunk.key is not None
            content = self._contents.get((chunk.key, which))
            if content is None:
                content = describe(chunk)
                if known:
                    self._contents[chunk.key, which] = content
            rows = chunk.rows[:1] if content.alike else chunk.rows
            entry = there.get(content.name)
            if entry is not None:
                parts.append(Part(entry, chunk, False, rows))
                continue
            keeps = known and self.interval != 0
            name = ("references", content.name)
            entry = self.cache.entry(name, self._blocks) if keeps else Entry(self._blocks)
            there[content.name] = entry
            due = is_due(entry, self.interval, lambda: moment.step)
            if due and keeps and self.interval is None:
                due = not self.cache.adopt(entry, lambda n=name: (n, device), device)  # type: ignore[misc]
            if due and self.interval:
                entry.step = moment.step
            parts.append(Part(entry, chunk, due, rows))
        return parts

    @contextmanager
    def weighing(self, prompts: int, tail: Tail) -> Iterator[None]:
        """While the model runs as it is, but for how much its references are looked at.

        Args:
            prompts: how many the batch holds.
        """
        with self._seeing(_Weighing(tail) if tail.weighed else None):
            yield
        self._count(prompts, prompts, tail.tokens)

    @contextmanager
    def keeping(self, parts: Sequence[Part], tail: Tail) -> Iterator[None]:
        """While the model runs as it is: K/V of the references are kept.

        What isn't due in this call is as it was kept, so that the way in which the host puts
        prompts together makes no difference.
        """
        due = [part.entry for part in parts if part.due]
        for entry in due:
            entry.restart()
        with self._seeing(_Keeping(self, parts, tail)):
            yield
        if not all(entry.complete for entry in due):
            warn(
                "references: another extension computes attention past ComfyUI's, so the "
                "references are computed at every step; take it out of the graph for the speed."
            )
        self._count(len(parts), len(parts), tail.tokens)

    @contextmanager
    def computing(self, parts: Sequence[Part], tokens: int) -> Iterator[None]:
        """While the model runs on the isolated references that are due, one behind the other.

        Its last ``tokens`` rows see each other only, and nothing else of it is of use.
        """
        due = [part for part in parts if part.due]
        self.cache.trim()
        for part in due:
            part.entry.restart()
        with self._seeing(_Alone(self, due, tokens)):
            yield
        if not all(part.entry.complete for part in due):
            raise Omini2Error(
                "references: another extension computes attention past ComfyUI's, so references "
                "can't be isolated; take it out of the graph or set references to off."
            )

    @contextmanager
    def appending(self, parts: Sequence[Part], tail: Tail, device: torch.device) -> Iterator[None]:
        """While the model runs without references: it attends to what is kept.

        Args:
            device: where it computes.
        """
        computed = sum(part.due for part in parts)
        seen = _Appending(self, parts, tail)
        if self.cache.storage.keep_on == "cpu":
            self._courier = self._courier or Courier(device)
            self._courier.send(0, seen.entries)
        self._reached = 0
        with self._seeing(seen):
            yield
        if computed and self._reached != self._blocks:
            raise Omini2Error(
                "references: another extension skips blocks of the model or computes their "
                "attention past ComfyUI's, so isolated references can't be seen; take it out of "
                "the graph or set references to off."
            )
        self._count(len(parts), computed, tail.tokens)

    @contextmanager
    def _seeing(self, seen: Seen | None) -> Iterator[None]:
        self.seen = seen
        try:
            yield
        finally:
            self.seen = None
            if self._courier is not None:
                self._courier.drop()

    @uncompiled
    def _count(self, evaluated: int, computed: int, tokens: int) -> None:
        stats = self.stats
        stats.evaluated += evaluated
        stats.computed += computed
        stats.tokens = max(stats.tokens, tokens)

    def store(self, entry: Entry, number: int, k: Tensor, v: Tensor) -> None:
        """Keeps K/V of references in a block, (rows, heads, tokens, head_dim) each."""
        group = k.shape[1] // self._kv_heads  # queries share heads, but K/V arrive repeated
        k, v = k[:, ::group], v[:, ::group]
        if self.interval == 0:
            entry.store(number, k, v, Storage())
        else:
            self.cache.store(entry, number, k, v)

    def compare(self, kept: KeysValues | None, k: Tensor, v: Tensor) -> None:
        """How far new K/V are from those that are kept, where these can be had for nothing."""
        if kept is None or kept.k.device != k.device:
            return
        old_k, old_v = torch.empty_like(k), torch.empty_like(v)
        if kept.k.shape[2:] != k.shape[2:] or kept.k.shape[0] != k.shape[0]:
            return
        kept.write(old_k, old_v)
        for old, new in ((old_k, k), (old_v, v)):
            far = (new - old).float().norm() / old.float().norm().clamp_min(1e-12)
            self._drift = far if self._drift is None else torch.maximum(self._drift, far)

    def show(self, done: int) -> None:
        """So many blocks have their K/V."""
        if self.progress is not None and self.interval != 0:
            self.progress(done, self._blocks)

    def arrived(self, number: int, entries: Sequence[Entry]) -> dict[int, KeysValues]:
        """K/V of a block that were away, while the next block's are on their way."""
        self._reached += 1
        if self._courier is None:
            return {}
        there = self._courier.receive(number)
        if number + 1 < self._blocks:
            self._courier.send(number + 1, entries)
        return there

    def finish(self) -> None:
        """Fills in what is known at the end of a run."""
        stats = self.stats
        if self._drift is not None:
            stats.drift = float(self._drift)
        self._contents.clear()


class _Rows:
    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def last(self, t: Tensor) -> Tensor:
        """The references' rows of (batch, heads, tokens, head_dim)."""
        return t[:, :, t.shape[2] - self.tokens :]


class _Weighing(_Rows):
    def __init__(self, tail: Tail) -> None:
        super().__init__(tail.tokens)
        self._groups = tail.groups if tail.weighed else []

    def attend(
        self, number: int, kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The model's own attention, but for the references' strength."""
        if not self._groups:
            return kernels.main(q, k, v, mask)
        attend, partial = kernels.main, kernels.main_partial
        return strength_attention(attend, partial, q, k, v, mask, self._groups)


class _Keeping(_Weighing):
    def __init__(self, references: References, parts: Sequence[Part], tail: Tail) -> None:
        super().__init__(tail)
        self._references = references
        self._parts = parts

    def attend(
        self, number: int, kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The same, with what isn't due as it was kept."""
        if not all(part.due for part in self._parts):
            k, v = k.clone(), v.clone()
        all_k, all_v = self.last(k), self.last(v)
        for part in self._parts:
            if part.due:
                own_k, own_v = (rows_of(t, part.chunk.rows) for t in (all_k, all_v))
                self._references.compare(part.entry.blocks.get(number), own_k, own_v)
                self._references.store(part.entry, number, own_k, own_v)
                continue
            for rows, within in part.chunk.spans:
                kept = part.entry.blocks[number].rows(within)
                kept.write(all_k[rows], all_v[rows])
        self._references.show(number + 1)
        return super().attend(number, kernels, q, k, v, mask)


class _Alone(_Rows):
    def __init__(self, references: References, parts: Sequence[Part], tokens: int) -> None:
        super().__init__(tokens)
        self._references = references
        self._parts = parts

    def attend(
        self, number: int, kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """References see each other; what else is in the sequence sees nothing."""
        whole = q.shape[2]
        q, k, v = self.last(q), self.last(k), self.last(v)
        start = 0
        for part in self._parts:
            rows = slice(start, start + len(part.computed))
            self._references.store(part.entry, number, k[rows], v[rows])
            start = rows.stop
        self._references.show(number + 1)
        attended = kernels.own(q, k, v, None)
        out = attended.new_zeros(attended.shape[0], whole, attended.shape[2])
        out[:, whole - self.tokens :] = attended
        return out


class _Appending:
    tokens = 0  # which are left out

    def __init__(self, references: References, parts: Sequence[Part], tail: Tail) -> None:
        self._references = references
        self._parts = parts
        self._groups = tail.groups
        self.entries = list({id(part.entry): part.entry for part in parts}.values())

    def attend(
        self, number: int, kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Text and picture see each other and what is kept of the references."""
        there = self._references.arrived(number, self.entries)
        spans = []
        for part in self._parts:
            kept = there.get(id(part.entry)) or part.entry.blocks[number]
            spans += [(rows, kept.rows(within)) for rows, within in part.chunk.spans]
        groups = [
            KeyGroup([(rows, kept.keys(which)) for rows, kept in spans], bias)
            for which, bias in self._groups
        ]
        return main_attention(kernels.main, kernels.main_partial, q, k, v, mask, groups)
