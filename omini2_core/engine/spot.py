"""Spot Edit: tokens of an edit that agree with the reference are left out of the computation.

After a few full steps the denoised latent shows which tokens the edit leaves as they were. Those
keep their denoised value, so that any sampler brings them there, and at the end they are the
reference's (SpotEdit, arXiv 2512.22323). Which they are is chosen anew at every step but the full
ones. With a mask instead of a guess it is known from the first step on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import Omini2Error, brief, require_choice, require_range
from ..tokens.compact import grown

SELECT = ("perceptual", "latent", "cosine", "mask")
FUSION = ("off", "once", "recursive")
AUTO, NONE = "auto", "none"
AUTO_RESETS = (0.26, 0.44, 0.62)  # of the steps: the original's 13, 22 and 31 of 50
MAX_STEP = 1_000_000
# (batch, channels, ..., height, width) denoised -> (height, width) tokens: the higher, the further
# from the reference; of a batch, that of the picture that is furthest.
Scores = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SpotEdit:
    """What the node says.

    Attributes:
        select: how unedited tokens are told; by ``mask`` they are those outside of it.
        threshold: of the score below which a token is unedited; of cosine's likeness above which.
        full_steps: how many steps at the beginning compute all tokens.
        reset_steps: further such steps, counted from 0: auto, none or a list.
        fusion: whether unedited tokens' K/V go over into the reference's as noise falls, afresh at
            each step (once) or one upon the other (recursive).
        grow: tokens by which the edited side is widened.
    """

    select: str = "perceptual"
    threshold: float = 0.2
    full_steps: int = 4
    reset_steps: str = AUTO
    fusion: str = "off"
    grow: int = 0

    def __post_init__(self) -> None:
        require_choice("select", self.select, SELECT)
        require_range("threshold", self.threshold, -1e6, 1e6)
        require_range("full_steps", self.full_steps, 1, MAX_STEP)
        require_choice("fusion", self.fusion, FUSION)
        require_range("grow", self.grow, 0, 1024)
        self._resets(1)

    def full(self, steps: int) -> frozenset[int]:
        """Those of a run's steps that compute all tokens."""
        all_full = {*range(self.full_steps), *self._resets(steps)}
        return frozenset(step for step in all_full if step < steps)

    def _resets(self, steps: int) -> list[int]:
        said = str(self.reset_steps).strip().lower()
        if said == AUTO:
            return [round(share * steps) for share in AUTO_RESETS]
        if said == NONE:
            return []
        numbers = [word.strip() for word in said.split(",")]
        if not all(word.isdecimal() and len(word) < 8 for word in numbers):
            raise Omini2Error(
                f"reset_steps: {brief(self.reset_steps)} is no list of steps; use auto, none, or "
                "numbers counted from 0 with commas between them, as in 13, 22, 31."
            )
        return [int(word) for word in numbers]


@dataclass(frozen=True, eq=False)
class Plan:
    """What one step computes.

    Attributes:
        full: all tokens, those of the references included.
        keeps: K/V are written, since a later step leaves some out.
        unedited: (h, w) bool, the tokens that keep their denoised value; None if there are none.
        rows: (edited,) indices of the other picture tokens; None if they are all.
    """

    full: bool
    keeps: bool
    unedited: Tensor | None = None
    rows: Tensor | None = None

    @property
    def idle(self) -> bool:
        """Whether nothing of what the model would compute is of use."""
        return not self.full and self.rows is not None and not len(self.rows)


@dataclass
class SpotStats:
    """What a run left out.

    Attributes:
        hw: the picture's size in tokens.
        shares: of the rows of text, picture and references that each of the sampler's calls
            computed.
        edited: (h, w) bool, those that the last choice left to the edit; None if all.
    """

    hw: tuple[int, int]
    shares: list[float] = field(default_factory=list)
    edited: Tensor | None = None

    @property
    def share(self) -> float:
        """Of the rows that were computed."""
        return sum(self.shares) / len(self.shares) if self.shares else 1.0


class SpotState:
    """Which tokens each step of one run computes, and what the others are denoised to.

    Attributes:
        plan: of the step that is under way; None between the sampler's calls.
        denoised: (batch, channels, ..., height, width), what the sampler was given last.
        tokens: of the picture.
        last: (h, w) bool, the latest choice of unedited tokens that wasn't empty.
        stats: for the node and the log.
    """

    def __init__(
        self,
        edit: SpotEdit,
        steps: int,
        known: Tensor,
        given: Tensor,
        side: int,
        scores: Scores | None = None,
        mask: Tensor | None = None,
        multiple: int = 1,
    ) -> None:
        """Args:
        steps: of the schedule.
        known: (batch, channels, ..., height, width) each picture's reference's latent, in the
            model's space.
        given: the same as the VAE gave it.
        side: latent pixels along a token's side.
        scores: tells how far tokens are from the reference; None if the mask says it.
        mask: (h, w) bool, tokens that are always computed.
        multiple: the number of computed tokens is a multiple of it.
        """
        self.plan: Plan | None = None
        self.denoised: Tensor | None = None
        self.last: Tensor | None = None
        hw = math.ceil(known.shape[-2] / side), math.ceil(known.shape[-1] / side)
        self.stats = SpotStats(hw)
        self.tokens = hw[0] * hw[1]
        self._edit = edit
        self._steps = steps
        self._full = edit.full(steps)
        self._known = known
        self._given = given
        self._side = side
        self._scores = scores
        self._mask = None if mask is None else grown(mask, edit.grow).to(known.device)
        self._multiple = multiple
        self._step: int | None = None
        self._chosen = Plan(True, False)

    @property
    def by_mask(self) -> bool:
        """Whether a mask says which tokens are unedited, from the first step on."""
        return self._edit.select == "mask"

    @property
    def saves(self) -> bool:
        """Whether any step of the schedule may leave tokens out."""
        return len(self._full) < self._steps

    def begin(self, step: int) -> Plan:
        """The sampler calls the model, maybe more than once a step: the choice is the first's."""
        if step != self._step:
            self._step = step
            self._chosen = self._choose(step)
            if self._chosen.unedited is not None:
                self.last = self._chosen.unedited
                self.stats.edited = ~self.last
        self.plan = self._chosen
        return self.plan

    def _choose(self, step: int) -> Plan:
        full = step in self._full
        keeps = step + 1 < self._steps and step + 1 not in self._full
        unedited = None
        if self.by_mask:
            assert self._mask is not None
            unedited = None if self._mask.all() else ~self._mask
            keeps &= unedited is not None
        elif not full and self.denoised is not None:
            unedited = self._unedited(self.denoised)
        full |= unedited is None
        keeps &= full
        if unedited is None:
            return Plan(full, keeps)
        return Plan(full, keeps, unedited, (~unedited).flatten().nonzero()[:, 0])

    def _unedited(self, denoised: Tensor) -> Tensor | None:
        """The choice by how far tokens are from the reference; None if all are edited."""
        assert self._scores is not None
        scores = self._scores(denoised)
        limit = -self._edit.threshold if self._edit.select == "cosine" else self._edit.threshold
        edited = grown(scores >= limit, self._edit.grow)
        if self._mask is not None:
            edited = edited | self._mask
        count = int(edited.sum())
        more = min(math.ceil(count / self._multiple) * self._multiple, edited.numel()) - count
        if more:
            others = scores.masked_fill(edited, -torch.inf).flatten()
            edited.view(-1)[others.topk(more).indices] = True
        return None if edited.all() else ~edited

    def frozen(self, out: Tensor, of: Callable[[Tensor], Tensor] = lambda kept: kept) -> Tensor:
        """``out`` (batch, channels, ..., height, width) but for the unedited tokens.

        Args:
            of: makes what they are to be out of what they were denoised to.
        """
        plan = self.plan
        if plan is None or plan.unedited is None:
            return out
        kept = self._known if self.by_mask else self.denoised
        assert kept is not None
        return torch.where(self._pixels(plan.unedited, out), of(kept).to(out), out)

    def end(self, denoised: Tensor) -> None:
        """The sampler is given this."""
        self.denoised = denoised.clone()

    def finished(self, latent: Tensor) -> Tensor:
        """What the sampler gave, with the reference's own latent where tokens were left as it."""
        if self.last is None:
            return latent
        return torch.where(self._pixels(self.last, latent), self._given.to(latent), latent)

    def _pixels(self, tokens: Tensor, latent: Tensor) -> Tensor:
        """(h, w) tokens -> (height, width) of a latent, on its device."""
        height, width = latent.shape[-2:]
        whole = tokens.repeat_interleave(self._side, 0).repeat_interleave(self._side, 1)
        return whole[:height, :width].to(latent.device)
