"""The condition branch: a condition's tokens go through the model's own blocks, with its LoRA.

An independent branch looks at itself only, so its K/V are the same at every step; a joint one looks
at text and picture as well (paper section 3.3).
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..cache.entry import Entry, KeysValues
from ..cache.policy import CachePolicy, is_due
from ..cache.run_cache import RunCache
from ..digest import digest
from ..errors import Omini2Error
from ..lora.deltas import SharedLinears
from ..tokens.condition import Condition, pack
from ..transfer import sent
from .attention import KeyGroup
from .branch_walk import Beside, BranchWalk
from .evaluation import Chunk, Evaluation, alike, rows_of
from .model import Model
from .source import ChunkEntry, Job, Pass, Query


@dataclass(eq=False)
class BranchSource:
    """One condition with its LoRA, ready for one run.

    Attributes:
        latent, empty: (n, 16, 2h, 2w) latents in the model's space, of the image and of black.
        lora: names the LoRA's content and strength.
        linears: the LoRA less whatever ordinary LoRAs added to the model's weights; branches that
            have the same one share it.
        bias: log(condition_scale).
        start_sigma, end_sigma: it takes part while start_sigma >= sigma >= end_sigma; infinite
            where it takes part from the start or to the end.
        guidance: what it gets in place of the picture's; None gives it the evaluation's own.
        at_step: whether it is at the picture's time, not at 0; only joint branches are.
        sequence: branches that have the same see each other too; None has no other.
        centred: see ``Condition.positions``.
    """

    condition: Condition
    latent: Tensor
    empty: Tensor
    lora: str
    linears: SharedLinears
    joint: bool
    bias: float
    start_sigma: float
    end_sigma: float
    guidance: float | None = 1.0
    at_step: bool = False
    sequence: Hashable | None = None
    centred: bool = True
    _tokens: dict[Hashable, Tensor] = field(default_factory=dict)
    _same: dict[Hashable | None, bool] = field(default_factory=dict)
    _rotations: dict[Hashable, Tensor] = field(default_factory=dict)

    @property
    def token_count(self) -> int:
        """The number of tokens that take part."""
        return self.condition.token_count

    def active(self, call: Evaluation) -> bool:
        """Whether it takes part at this noise level."""
        return call.between(self.start_sigma, self.end_sigma)

    def stores(self, policy: CachePolicy) -> bool:
        """Whether its K/V are for later evaluations too."""
        return policy.interval(self.joint) != 0

    def begin(self, model: Model, call: Evaluation, cache: RunCache) -> Pass:
        """What it has to do in an evaluation.

        What an independent branch has to store is computed before the model's first block, all
        else beside the main branch.
        """
        interval = cache.policy.interval(self.joint)
        entries, due = [], []
        for chunk in call.chunks:
            key = None if chunk.key is None else (id(self), call.empty, chunk.key)
            entry = cache.entry(key, len(model.blocks))
            entries.append((entry, chunk))
            if is_due(entry, interval, lambda: call.moment.step):
                if interval:
                    entry.step = call.moment.step
                due.append((entry, chunk, self.rows_to_run(call, chunk)))
        if interval is None and not due:
            self.linears.release()  # which no later step needs: 300 MB at rank 128
        if interval == 0 or self.joint:
            return BranchPass(self, model, call, cache, entries, due)
        jobs = [
            self._job(model, call, cache, *each)
            for each in due
            if interval is not None or not self._left(call, cache, *each)
        ]
        return BranchPass(self, model, call, cache, entries, [], jobs)

    def _left(
        self, call: Evaluation, cache: RunCache, entry: Entry, chunk: Chunk, rows: Sequence[int]
    ) -> bool:
        """Whether an earlier run has left the K/V, which are the entry's then."""

        if chunk.key is None:
            return False

        def content() -> Hashable:
            return self.content(call, chunk, rows), call.dtype, call.device

        return cache.adopt(entry, content, call.device)

    def _job(
        self, model: Model, call: Evaluation, cache: RunCache, entry: Entry, chunk: Chunk,
        rows: Sequence[int],
    ) -> Job:  # fmt: skip
        entry.restart()
        return BranchJob(
            together=(id(self.linears), self.token_count),
            rows=len(rows),
            start=partial(_walk, model, call),
            store=partial(cache.store, entry),
            part=(self, chunk, rows),
        )

    def latents(self, call: Evaluation) -> Tensor:
        """What an evaluation is conditioned on: the images, or black for image guidance."""
        return self.empty if call.empty else self.latent

    def rows_to_run(self, call: Evaluation, chunk: Chunk) -> Sequence[int]:
        """The rows of a chunk that K/V have to be computed for.

        One, where nothing tells the pictures of the chunk apart for this branch.
        """
        if self.joint or len(self.latents(call)) > 1 or len(chunk.rows) == 1:
            return chunk.rows
        same = self._same.get(chunk.key)
        if same is None or chunk.key is None:
            pooled, guidance = call.read
            values = [pooled]
            if self.guidance is None and guidance is not None:
                values.append(guidance)
            same = all(alike(rows_of(value, chunk.rows)) for value in values)
            self._same[chunk.key] = same
        return chunk.rows[:1] if same else chunk.rows

    def images(self, call: Evaluation, chunk: Chunk, rows: Sequence[int]) -> list[int]:
        """Which of the condition's images some rows of a chunk have.

        Raises:
            Omini2Error: there are several, and nobody knows which pictures these rows are.
        """
        count = len(self.latents(call))
        if count == 1:
            return [0] * len(rows)
        if chunk.pictures is None:
            raise Omini2Error(
                f"image: it holds {count} images, one for each picture of the batch, but another "
                "extension runs the model on pictures without saying on which; use one image, or "
                "take that extension's node off this model."
            )
        pictures = dict(zip(chunk.rows, chunk.pictures, strict=True))
        return [pictures[row] % count for row in rows]

    def tokens(self, call: Evaluation, images: Sequence[int]) -> Tensor:
        """(len(images), tokens, 64): the tokens of these images."""
        key = call.empty, call.device, call.dtype
        if key not in self._tokens:
            tokens = self.condition.select(pack(self.latents(call)))
            self._tokens[key] = sent(tokens, call.device, call.dtype)
        tokens = self._tokens[key]
        return torch.cat([tokens[i : i + 1] for i in images])

    def guidance_for(self, call: Evaluation, rows: list[int]) -> Tensor | None:
        """(len(rows),) guidance for these rows of an evaluation's batch."""
        if self.guidance is not None:
            return torch.full((len(rows),), self.guidance, device=call.device)
        return None if call.guidance is None else rows_of(call.guidance, rows)

    def time_for(self, call: Evaluation, rows: Sequence[int]) -> Tensor:
        """(len(rows),) the time that it is at for these rows of an evaluation's batch."""
        if self.at_step and call.time is not None:
            return rows_of(call.time, rows)
        return torch.zeros(len(rows), device=call.device)

    def positions(self, call: Evaluation, origin: tuple[float, float] | None = None) -> Tensor:
        """(tokens, 3) position ids (time, row, column) beside the picture of an evaluation.

        The model counts from the upper left of the part that it is given; what lies on the picture
        stays where it lies on it, what lies beside it stays beside the part.

        Args:
            origin: as in :class:`Chunk`.
        """
        time, rows, columns = call.axis_map
        positions = self.condition.positions(call.picture_hw, self.centred)
        if origin is not None and self.condition.placement.on_the_picture:
            positions = positions - torch.tensor(origin)
        ids = torch.empty(self.condition.token_count, 3)
        ids[:, 0] = time[1]
        ids[:, 1] = positions[:, 0] * rows[0] + rows[1]
        ids[:, 2] = positions[:, 1] * columns[0] + columns[1]
        return ids

    def content(self, call: Evaluation, chunk: Chunk, rows: Sequence[int]) -> str:
        """Names everything that this branch's K/V depend on, apart from the model.

        Reads the pooled text from the device, so it is for once in a run.
        """
        pooled, guidance = call.read
        if self.guidance is not None:
            guidance = torch.full((len(pooled),), self.guidance)
        latents = self.condition.select(pack(self.latents(call)))
        parts = (
            self.lora,
            latents,
            self.positions(call, chunk.origin),
            rows_of(pooled, rows),
            None if guidance is None else rows_of(guidance, rows),
            *self.images(call, chunk, rows),
        )
        return digest(parts)

    def rotations(self, model: Model, call: Evaluation, chunk: Chunk) -> Tensor:
        """RoPE of this branch's tokens, made once per picture size and part of it."""
        key = call.picture_hw, call.axis_map, chunk.origin
        if key not in self._rotations:
            ids = sent(self.positions(call, chunk.origin), call.device, torch.float32)
            self._rotations[key] = model.rope(ids[None])
        return self._rotations[key]


Due = tuple[Entry, Chunk, Sequence[int]]  # an entry, and the rows of its chunk that are computed
Part = tuple[BranchSource, Chunk, Sequence[int]]


@dataclass(frozen=True, eq=False)
class BranchJob(Job):
    """A branch's rows in a chunk, whose K/V are computed beforehand."""

    part: Part


def _walk(model: Model, call: Evaluation, jobs: Sequence[Job]) -> BranchWalk:
    return walk_of(model, call, [j.part for j in jobs if isinstance(j, BranchJob)])


def walk_of(model: Model, call: Evaluation, parts: Sequence[Part]) -> BranchWalk:
    """The embedded tokens of conditions that share a LoRA and a length."""
    linear = parts[0][0].linears.on(call.pooled)
    rows = [row for _, _, wanted in parts for row in wanted]
    tokens = torch.cat(
        [branch.tokens(call, branch.images(call, chunk, wanted)) for branch, chunk, wanted in parts]
    )
    guidances = [branch.guidance_for(call, list(wanted)) for branch, _, wanted in parts]
    given = [guidance for guidance in guidances if guidance is not None]
    guidance = torch.cat(given) if given else None
    time = torch.cat([branch.time_for(call, wanted) for branch, _, wanted in parts])
    vec = model.vector(linear, rows_of(call.pooled, rows), guidance, time)
    each = [(b.rotations(model, call, chunk), len(wanted)) for b, chunk, wanted in parts]
    rotations = each[0][0]
    if any(r is not rotations for r, _ in each):
        rotations = torch.cat([r.expand(n, *[-1] * (r.ndim - 1)) for r, n in each])
    return BranchWalk(
        model=model,
        x=model.embed(linear, tokens),
        vec=vec,
        rows=tuple(rows),
        linear=linear,
        rotate=lambda q, k: model.rotate(q, k, rotations),
    )


class BranchPass(Pass):
    """A branch in one evaluation, with what of it is computed beside the main branch."""

    def __init__(
        self,
        branch: BranchSource,
        model: Model,
        call: Evaluation,
        cache: RunCache,
        entries: Sequence[ChunkEntry],
        due: Sequence[Due],
        jobs: Sequence[Job] = (),
    ) -> None:
        super().__init__(
            entries, branch.bias, branch.stores(cache.policy), jobs, sequence=branch.sequence
        )
        self._branch = branch
        self._start = partial(walk_of, model, call)
        self._cache = cache
        self._due = due
        self._own: tuple[Tensor, Tensor] | None = None
        self._beside: Beside | None = None
        self._span = slice(0)
        for entry, _, _ in due:
            entry.restart()

    @property
    def computed(self) -> Sequence[Entry]:
        """The entries whose K/V are computed beside the main branch in this evaluation."""
        return [entry for entry, _, _ in self._due]

    @property
    def together(self) -> Hashable | None:
        """Passes that have the same compute beside the main branch as one batch; None: nothing."""
        if not self._due:
            return None
        branch = self._branch
        return (id(branch.linears), branch.token_count) if branch.joint else id(self)

    def start(self, together: Sequence[Pass]) -> None:
        """Begins what is computed beside the main branch, for all that do it as one batch."""
        passes = [each for each in together if isinstance(each, BranchPass)]
        beside = Beside(self._start([(p._branch, *part) for p in passes for part in p.parts]))
        for each in passes:
            each._beside = beside
            each._span = beside.add(sum(len(rows) for _, rows in each.parts))

    @property
    def parts(self) -> list[tuple[Chunk, Sequence[int]]]:
        """Chunks that are computed, and which of their rows."""
        return [(chunk, rows) for _, chunk, rows in self._due]

    def before(self, number: int, arrived: Mapping[int, KeysValues]) -> None:
        """The first half of a block: its K/V."""
        there = dict(arrived)
        if self._beside is not None:
            self._own = k, v = self._beside.keys_values(number, self._span)
            start = 0
            for entry, _, rows in self._due:
                span = slice(start, start + len(rows))
                if self.stores:
                    self._cache.store(entry, number, k[span], v[span])
                there[id(entry)] = KeysValues(k[span], v[span])
                start = span.stop
        self._gather(number, there)

    @property
    def query(self) -> Query | None:
        """A joint branch looks at the main branch as well."""
        if self._beside is None or self._own is None or not self._branch.joint:
            return None
        q = self._beside.asks(self._span)
        if q is None:
            return None
        rows = self._beside.walk.rows[self._span]
        return Query(rows, q, KeyGroup([(slice(None), KeysValues(*self._own))], self.bias))

    def answer(self, attended: Tensor) -> None:
        """What the query gave."""
        assert self._beside is not None
        self._beside.answer(self._span, attended)

    def after(self) -> None:
        """The second half of a block."""
        if self._beside is not None:
            self._beside.finish(self._branch.joint)
        self._own = None
        super().after()
