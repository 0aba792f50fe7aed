"""One sampling run: carries every condition through the model's blocks beside text and picture.

Knows nothing of ComfyUI: ``host`` tells it of each evaluation, block and attention call.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .attention import Attention, KeysValues, joint_attention, main_attention
from .branch import Half, double_block, single_block
from .cache import CachePolicy, Entry, KVStore
from .condition import Condition, pack
from .errors import Omini2Error
from .lora import Deltas, Linears

AxisMap = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]


class Backbone(Protocol):
    """What the engine asks of the host's FLUX model."""

    @property
    def double_blocks(self) -> Any:
        """The model's double-stream blocks, in order."""

    @property
    def single_blocks(self) -> Any:
        """The model's single-stream blocks, in order."""

    def embed(self, linear: Linears, tokens: Tensor) -> Tensor:
        """(rows, tokens, 64) -> (rows, tokens, hidden)."""

    def vector(self, linear: Linears, pooled: Tensor, guidance: Tensor | None) -> Tensor:
        """The modulation vector at time 0: (rows, pooled), (rows,) or none -> (rows, hidden)."""

    def rope(self, ids: Tensor) -> Tensor:
        """(1, tokens, axes) position ids -> rotations."""

    def rotate(self, q: Tensor, k: Tensor, rotations: Tensor) -> tuple[Tensor, Tensor]:
        """RoPE on q and k."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """The host's selected attention."""


@dataclass(frozen=True)
class Chunk:
    """The rows of an evaluation's batch that one conditioning entry takes."""

    key: Hashable
    rows: range


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One call of the model.

    Attributes:
        pooled: (batch, pooled width) pooled text.
        picture_hw: the picture's size in tokens.
        axis_map: (scale, shift) on the time, row and column ids, as the host's RoPE options say.
        guidance: (batch,) as the conditioning gives it; None if it gives none.
    """

    chunks: tuple[Chunk, ...]
    pooled: Tensor
    picture_hw: tuple[int, int]
    sigma: float
    step: int
    axis_map: AxisMap = ((1, 0), (1, 0), (1, 0))
    empty: bool = False
    guidance: Tensor | None = None


@dataclass(eq=False)
class RunBranch:
    """One condition with its LoRA, ready for one run.

    Attributes:
        latent, empty: (n, 16, 2h, 2w) latents in the model's space, of the image and of black.
        deltas: the LoRA's deltas less whatever ordinary LoRAs added to the model's weights.
        bias: log(condition_scale).
        start_sigma, end_sigma: it takes part while start_sigma >= sigma >= end_sigma.
        guidance: what it gets in place of the picture's; None gives it the evaluation's own.
        centred: see ``Condition.positions``.
    """

    condition: Condition
    latent: Tensor
    empty: Tensor
    deltas: Deltas
    joint: bool
    bias: float
    start_sigma: float
    end_sigma: float
    guidance: float | None = 1.0
    centred: bool = True
    _linear: Linears | None = None
    _rotations: dict[Hashable, Tensor] = field(default_factory=dict)

    def linear(self, like: Tensor) -> Linears:
        """The model's linear layers as this branch sees them, on the device of ``like``."""
        if self._linear is None:
            self._linear = Linears(self.deltas, like.device, like.dtype)
        return self._linear

    def release(self) -> None:
        """Frees the LoRA on the device; the next :meth:`linear` puts it there again."""
        self._linear = None

    def latents(self, call: Evaluation) -> Tensor:
        """What an evaluation is conditioned on: the images, or black for image guidance."""
        return self.empty if call.empty else self.latent

    def same_rows(self, call: Evaluation, rows: range) -> bool:
        """Whether the branch comes out the same for these rows of an evaluation's batch."""
        if self.joint or len(self.latents(call)) > 1:
            return False
        values = [call.pooled]
        if self.guidance is None and call.guidance is not None:
            values.append(call.guidance)
        return all(_same(value[rows.start : rows.stop]) for value in values)

    def guidance_for(self, call: Evaluation, rows: list[int]) -> Tensor | None:
        """(len(rows),) guidance for these rows of an evaluation's batch."""
        if self.guidance is not None:
            return torch.full((len(rows),), self.guidance, device=call.pooled.device)
        return None if call.guidance is None else call.guidance[rows]

    def rotations(self, backbone: Backbone, call: Evaluation) -> Tensor:
        """RoPE of this branch's tokens, made once per picture size."""
        key = call.picture_hw, call.axis_map
        if key not in self._rotations:
            time, rows, columns = call.axis_map
            ids = torch.zeros(1, self.condition.token_count, 3)
            positions = self.condition.positions(call.picture_hw, self.centred)
            ids[0, :, 0] = time[1]
            ids[0, :, 1] = positions[:, 0] * rows[0] + rows[1]
            ids[0, :, 2] = positions[:, 1] * columns[0] + columns[1]
            self._rotations[key] = backbone.rope(ids.to(call.pooled.device))
        return self._rotations[key]


@dataclass(eq=False)
class _Pass:
    """One branch in one evaluation: its K/V per chunk, and its tokens if they are computed."""

    branch: RunBranch
    chunks: list[tuple[Entry, Chunk]]
    stream: "_Stream | None" = None
    now: KeysValues | None = None


@dataclass(eq=False)
class _Stream:
    """A branch's tokens on their way through the blocks, for the chunks that are due.

    ``rows`` are the rows of the evaluation's batch that it stands for; ``spans`` says which of
    its own rows belong to which entry.
    """

    x: Tensor
    vec: Tensor
    rows: list[int]
    spans: list[tuple[Entry, slice]]
    linear: Linears
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    half: Half | None = None
    q: Tensor | None = None
    own: KeysValues | None = None
    attended: Tensor | None = None


@dataclass
class RunStats:
    """What a run did, for the log, the node and the demo."""

    tokens: list[int]
    evaluations: int = 0
    branch_evaluations: int = 0
    branches_computed: int = 0
    kv_bytes: int = 0
    refreshes: int = 0

    @property
    def saved(self) -> float:
        """The share of the branches' work that reuse spared."""
        if not self.branch_evaluations:
            return 0.0
        return 1 - self.branches_computed / self.branch_evaluations


class Run:
    """The mutable state of one sampling run; made when it starts, closed when it ends."""

    def __init__(
        self, backbone: Backbone, branches: Sequence[RunBranch], policy: CachePolicy
    ) -> None:
        self.stats = RunStats([b.condition.token_count for b in branches])
        self._backbone = backbone
        self._branches = branches
        self._policy = policy
        self._store = KVStore()
        self._passes: list[_Pass] = []
        self._in_block = False

    def active(self, sigma: float) -> bool:
        """Whether any condition takes part at this noise level."""
        return any(b.start_sigma >= sigma >= b.end_sigma for b in self._branches)

    @contextmanager
    def evaluation(self, call: Evaluation) -> Iterator[None]:
        """Around one call of the model."""
        if not call.empty:
            self.stats.evaluations += 1
        try:
            self._passes = [
                self._begin(index, branch, call)
                for index, branch in enumerate(self._branches)
                if branch.start_sigma >= call.sigma >= branch.end_sigma
            ]
            yield
        finally:
            for each in self._passes:
                if self._policy.interval(each.branch.joint) is None:
                    # Rank 128 in every block of FLUX.1 is 300 MB that no later step needs.
                    each.branch.release()
            self._passes = []
            self.stats.kv_bytes = max(self.stats.kv_bytes, self._store.nbytes)
            self.stats.refreshes = max(self.stats.refreshes, self._store.refreshes)

    def close(self) -> None:
        """Frees everything the run holds."""
        self._passes = []
        self._store.clear()
        self._branches = []

    def block(self, kind: str, index: int, original: Callable[[], Any]) -> Any:
        """Runs one block of the model and, beside it, the branches' half of that block.

        Args:
            kind: "double" or "single".
            original: the model's own block, including whatever else is patched onto it.

        Returns:
            What ``original`` returned.
        """
        doubles, singles = self._backbone.double_blocks, self._backbone.single_blocks
        if kind == "double":
            number, module, half = index, doubles[index], double_block
        else:
            number, module, half = len(doubles) + index, singles[index], single_block
        last = number == len(doubles) + len(singles) - 1

        for each in self._passes:
            if each.stream is not None:
                s = each.stream
                path = f"{kind}_blocks.{index}"
                s.half = half(module, path, s.linear, s.x, s.vec, s.rotate)
                s.q, k, v = next(s.half)
                s.own = KeysValues(k, v, each.branch.bias)
                self._keep(number, s, k, v)
            each.now = self._gather(number, each)

        self._in_block = True
        try:
            out = original()
        finally:
            self._in_block = False

        for each in self._passes:
            if each.stream is not None:
                self._finish(each.branch, each.stream, last)
                if self._policy.interval(each.branch.joint) == 0:
                    for entry, _ in each.chunks:
                        entry.blocks.clear()
            each.now = None
        return out

    def attend(
        self,
        attend: Attention,
        own: Attention,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """The main branch's attention, with the conditions' K/V appended.

        Args:
            attend: the attention for text and picture (other extensions' override, if any).
            own: the host's attention for the branches' own queries.
        """
        if not self._in_block or not self._passes:
            return attend(q, k, v, mask)
        for each in self._passes:
            s = each.stream
            if s is not None and each.branch.joint and s.attended is None:
                assert s.q is not None and s.own is not None
                rows = slice(None) if len(s.rows) == q.shape[0] else s.rows
                s.attended = joint_attention(own, s.q, s.own, k[rows], v[rows])
        return main_attention(
            attend, q, k, v, mask, [each.now for each in self._passes if each.now]
        )

    def _begin(self, index: int, branch: RunBranch, call: Evaluation) -> _Pass:
        interval = self._policy.interval(branch.joint)
        blocks = len(self._backbone.double_blocks) + len(self._backbone.single_blocks)
        chunks = [
            (self._store.entry((index, call.empty, chunk.key)), chunk) for chunk in call.chunks
        ]
        due = [(entry, chunk) for entry, chunk in chunks if entry.due(call.step, interval, blocks)]
        self.stats.branch_evaluations += len(chunks)
        self.stats.branches_computed += len(due)
        return _Pass(branch, chunks, self._stream(branch, due, call) if due else None)

    def _stream(
        self, branch: RunBranch, due: list[tuple[Entry, Chunk]], call: Evaluation
    ) -> _Stream:
        latent = branch.latents(call)
        rows: list[int] = []
        images: list[int] = []
        spans = []
        for entry, chunk in due:
            entry.restart(call.step)
            wanted = chunk.rows
            if branch.same_rows(call, chunk.rows):
                # Nothing tells the pictures of this chunk apart: one row serves them all.
                wanted = chunk.rows[:1]
            spans.append((entry, slice(len(rows), len(rows) + len(wanted))))
            rows.extend(wanted)
            images.extend((row - chunk.rows.start) % len(latent) for row in wanted)
        linear = branch.linear(call.pooled)
        tokens = branch.condition.select(pack(latent))[images].to(call.pooled)
        rotations = branch.rotations(self._backbone, call)
        return _Stream(
            x=self._backbone.embed(linear, tokens),
            vec=self._backbone.vector(linear, call.pooled[rows], branch.guidance_for(call, rows)),
            rows=rows,
            spans=spans,
            linear=linear,
            rotate=lambda q, k: self._backbone.rotate(q, k, rotations),
        )

    def _keep(self, number: int, stream: _Stream, k: Tensor, v: Tensor) -> None:
        for entry, span in stream.spans:
            # v is a view of the whole qkv (and MLP) product, which must not stay alive with it.
            entry.blocks[number] = (
                k[span],
                v[span].clone(memory_format=torch.contiguous_format),
            )

    def _gather(self, number: int, each: _Pass) -> KeysValues:
        """One branch's K/V for every row of the evaluation's batch."""
        parts = [
            [t.expand(len(chunk.rows), -1, -1, -1) for t in entry.blocks[number]]
            for entry, chunk in each.chunks
        ]
        k, v = (torch.cat(ts) if len(ts) > 1 else ts[0] for ts in zip(*parts, strict=True))
        return KeysValues(k, v, each.branch.bias)

    def _finish(self, branch: RunBranch, stream: _Stream, last: bool) -> None:
        """The second half of a block for a branch; after the last one nobody looks any more."""
        half, own = stream.half, stream.own
        assert half is not None and own is not None and stream.q is not None
        if not last:
            attended = stream.attended
            if not branch.joint:
                attended = self._backbone.attend(stream.q, own.k, own.v, None)
            if attended is None:
                raise Omini2Error(
                    "attention: another extension skipped one of the model's blocks while a joint "
                    "condition needed it; set attention to independent or remove that extension."
                )
            try:
                half.send(attended)
            except StopIteration as done:
                stream.x = done.value
        half.close()
        stream.half = stream.q = stream.own = stream.attended = None


def _same(rows: Tensor) -> bool:
    return len(rows) == 1 or bool((rows == rows[:1]).all())
