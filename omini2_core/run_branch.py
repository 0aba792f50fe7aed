"""One condition with its LoRA during one sampling run, and the evaluations it takes part in."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .backbone import Backbone
from .branch import Half
from .condition import Condition, pack
from .digest import digest
from .errors import Omini2Error, warn
from .lora import Linears, SharedLinears
from .saved import EMPTY, IMAGE, Saved
from .store import Entry

AxisMap = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]

NO_MAP: AxisMap = ((1, 0), (1, 0), (1, 0))


@dataclass(frozen=True)
class Chunk:
    """The rows of an evaluation's batch that one conditioning entry takes.

    Attributes:
        origin: row and column, in the picture's tokens, of the part of the picture that the entry
            is evaluated on (area conditioning, context windows); None for the whole picture.
    """

    key: Hashable
    rows: range
    origin: tuple[float, float] | None = None


class Moment:
    """Where in the schedule an evaluation is.

    The noise level is on the device, where the sampler computes it. Reading it waits for all work
    that is queued there, so it is read only when something depends on it, and then once.
    """

    def __init__(self, sigma: Tensor, schedule: list[float]) -> None:
        self._sigma = sigma
        self._schedule = schedule

    @cached_property
    def sigma(self) -> float:
        """The noise level."""
        return float(self._sigma)

    @cached_property
    def step(self) -> int:
        """The interval of the schedule."""
        return step_of(self.sigma, self._schedule)


def step_of(sigma: float, schedule: list[float]) -> int:
    """The interval of a falling schedule that a noise level lies in.

    A level on a boundary belongs to the interval that it opens, so a sampler's look-ahead to the
    end of its step counts as the next step's first evaluation.
    """
    opened = sum(boundary >= sigma * (1 - 1e-5) for boundary in schedule)
    return min(max(opened - 1, 0), max(len(schedule) - 2, 0))


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One call of the model.

    Attributes:
        pooled: (batch, pooled width) pooled text.
        picture_hw: the whole picture's size in tokens.
        axis_map: (scale, shift) on the time, row and column ids, as the host's RoPE options say.
        guidance: (batch,) as the conditioning gives it; None if it gives none.
    """

    chunks: tuple[Chunk, ...]
    pooled: Tensor
    picture_hw: tuple[int, int]
    moment: Moment
    axis_map: AxisMap = NO_MAP
    empty: bool = False
    guidance: Tensor | None = None


@dataclass(eq=False)
class RunBranch:
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
    centred: bool = True
    _tokens: dict[Hashable, Tensor] = field(default_factory=dict)
    _same: dict[Hashable, bool] = field(default_factory=dict)
    _rotations: dict[Hashable, Tensor] = field(default_factory=dict)

    @property
    def token_count(self) -> int:
        """The number of tokens that take part."""
        return self.condition.token_count

    def active(self, call: Evaluation) -> bool:
        """Whether it takes part at this noise level."""
        return _between(call, self.start_sigma, self.end_sigma)

    def release(self) -> None:
        """Frees the LoRA on the device until it is needed again."""
        self.linears.release()

    def latents(self, call: Evaluation) -> Tensor:
        """What an evaluation is conditioned on: the images, or black for image guidance."""
        return self.empty if call.empty else self.latent

    def rows_to_run(self, call: Evaluation, chunk: Chunk) -> range:
        """The rows of a chunk that K/V have to be computed for.

        One, where nothing tells the pictures of the chunk apart for this branch.
        """
        if self.joint or len(self.latents(call)) > 1:
            return chunk.rows
        key = chunk.key, len(chunk.rows)
        if key not in self._same:
            values = [call.pooled]
            if self.guidance is None and call.guidance is not None:
                values.append(call.guidance)
            self._same[key] = all(_same(rows_of(value, chunk.rows)) for value in values)
        return chunk.rows[:1] if self._same[key] else chunk.rows

    def tokens(self, call: Evaluation, images: list[int]) -> Tensor:
        """(len(images), tokens, 64): the tokens of these images, counted modulo their number."""
        like = call.pooled
        key = call.empty, like.device, like.dtype
        if key not in self._tokens:
            self._tokens[key] = self.condition.select(pack(self.latents(call))).to(like)
        tokens = self._tokens[key]
        return torch.cat([tokens[i : i + 1] for i in (i % len(tokens) for i in images)])

    def guidance_for(self, call: Evaluation, rows: list[int]) -> Tensor | None:
        """(len(rows),) guidance for these rows of an evaluation's batch."""
        if self.guidance is not None:
            return torch.full((len(rows),), self.guidance, device=call.pooled.device)
        return None if call.guidance is None else rows_of(call.guidance, rows)

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

    def content(self, call: Evaluation, chunk: Chunk, rows: range) -> str:
        """Names everything that this branch's K/V depend on, apart from the model.

        Reads the pooled text from the device, so it is for once in a run.
        """
        guidance = self.guidance_for(call, list(rows))
        latents = self.condition.select(pack(self.latents(call)))
        pooled = rows_of(call.pooled, rows)
        parts = (
            self.lora,
            latents,
            self.positions(call, chunk.origin),
            pooled,
            guidance,
            len(rows),
        )
        return digest(parts)

    def rotations(self, backbone: Backbone, call: Evaluation, chunk: Chunk) -> Tensor:
        """RoPE of this branch's tokens, made once per picture size and part of it."""
        key = call.picture_hw, call.axis_map, chunk.origin
        if key not in self._rotations:
            ids = self.positions(call, chunk.origin).to(call.pooled.device)
            self._rotations[key] = backbone.rope(ids[None])
        return self._rotations[key]


@dataclass(eq=False)
class RunSaved:
    """A condition whose K/V were computed before, in one run.

    Attributes:
        bias, start_sigma, end_sigma: as :class:`RunBranch`.
    """

    saved: Saved
    bias: float
    start_sigma: float
    end_sigma: float
    joint: bool = False
    _checked: set[Hashable] = field(default_factory=set)

    @property
    def token_count(self) -> int:
        """The number of tokens that take part."""
        return self.saved.tokens

    def active(self, call: Evaluation) -> bool:
        """Whether it takes part at this noise level."""
        return _between(call, self.start_sigma, self.end_sigma)

    def release(self) -> None:
        """There is no LoRA."""

    def entry(self, call: Evaluation, chunk: Chunk) -> Entry:
        """Its K/V for an evaluation.

        Raises:
            Omini2Error: they don't go with this picture, or there are none of a black image.
        """
        saved, kind = self.saved, EMPTY if call.empty else IMAGE
        if chunk.origin is not None:
            raise Omini2Error(
                "cache_name: area conditioning and context windows move positions, which saved K/V "
                "can't follow; leave them out, or compute the condition with Apply Omini2 LoRA."
            )
        if kind not in saved.entries:
            raise Omini2Error(
                "cache_name: the file holds no K/V of a black image, which image guidance needs; "
                "save it from a model that has passed Omini2 Image Guidance."
            )
        if saved.picture_hw is not None and saved.picture_hw != call.picture_hw:
            h, w = saved.picture_hw
            raise Omini2Error(
                f"cache_name: the condition was fitted to a picture of {16 * w}x{16 * h}; sample "
                "at this size, or save it with another placement than fit."
            )
        if call.axis_map != NO_MAP:
            raise Omini2Error(
                "cache_name: the model's RoPE options move positions, which saved K/V can't "
                "follow; take the node that sets them out of the graph."
            )
        if chunk.key not in self._checked:
            self._checked.add(chunk.key)
            self._compare_prompt(call, chunk)
        return saved.entries[kind]

    def _compare_prompt(self, call: Evaluation, chunk: Chunk) -> None:
        pooled = rows_of(call.pooled, chunk.rows)
        kept = self.saved.pooled.to(pooled)
        same = kept.shape[1:] == pooled.shape[1:] and bool((kept == pooled).all())
        if self.saved.guidance is not None and call.guidance is not None:
            guidance = rows_of(call.guidance, chunk.rows)
            same = same and bool((guidance == self.saved.guidance).all())
        if not same:
            warn(
                "cache_name: the K/V were computed with another prompt or guidance, so the picture "
                "isn't the one that the condition itself would give; save it with this prompt."
            )


def _between(call: Evaluation, start_sigma: float, end_sigma: float) -> bool:
    if start_sigma == float("inf") and end_sigma == -float("inf"):
        return True
    return start_sigma >= call.moment.sigma >= end_sigma


@dataclass(eq=False)
class Stream:
    """Tokens of one or more conditions of one length on their way through the blocks.

    ``rows`` are the rows of the evaluation's batch that its own rows stand for.
    """

    x: Tensor
    vec: Tensor
    rows: list[int]
    linear: Linears
    rotate: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    half: Half | None = None
    q: Tensor | None = None

    @classmethod
    def start(
        cls, backbone: Backbone, call: Evaluation, jobs: list[tuple[RunBranch, Chunk, range]]
    ) -> "Stream":
        """The embedded tokens of conditions that share a LoRA and a length.

        Args:
            jobs: each branch with a chunk and those of its rows that are computed.
        """
        branch = jobs[0][0]
        linear = branch.linears.on(call.pooled)
        rows = [row for _, _, wanted in jobs for row in wanted]
        tokens = torch.cat(
            [
                b.tokens(call, [row - chunk.rows.start for row in wanted])
                for b, chunk, wanted in jobs
            ]
        )
        guidances = [b.guidance_for(call, list(wanted)) for b, _, wanted in jobs]
        given = [guidance for guidance in guidances if guidance is not None]
        vec = backbone.vector(
            linear, rows_of(call.pooled, rows), torch.cat(given) if given else None
        )
        each = [(b.rotations(backbone, call, chunk), len(wanted)) for b, chunk, wanted in jobs]
        rotations = each[0][0]
        if any(r is not rotations for r, _ in each):
            rotations = torch.cat([r.expand(n, *[-1] * (r.ndim - 1)) for r, n in each])
        return cls(
            x=backbone.embed(linear, tokens),
            vec=vec,
            rows=rows,
            linear=linear,
            rotate=lambda q, k: backbone.rotate(q, k, rotations),
        )

    def finish(self, attended: Tensor) -> None:
        """The second half of a block."""
        assert self.half is not None
        try:
            self.half.send(attended)
        except StopIteration as done:
            self.x = done.value
        self.drop()

    def drop(self) -> None:
        """Gives up a block after its first half."""
        if self.half is not None:
            self.half.close()
        self.half = self.q = None


def rows_of(t: Tensor, rows: range | list[int]) -> Tensor:
    """Some rows of a tensor, without a copy where they lie side by side."""
    first, n = rows[0], len(rows)
    if list(rows) == list(range(first, first + n)):
        return t[first : first + n]
    return t[torch.tensor(rows, device=t.device)]


def _same(rows: Tensor) -> bool:
    return len(rows) == 1 or bool((rows == rows[:1]).all())
