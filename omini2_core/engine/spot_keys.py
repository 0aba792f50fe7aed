"""K/V of what Spot Edit leaves out: tokens of the picture, and the references behind them.

A full step writes the K/V of all picture and reference tokens. Later steps compute text and edited
tokens only: these attend to themselves and to what is kept, and what is kept of an edited token is
its latest. Where a mask says from the first step on what is edited, nothing is ever known of the
other picture tokens; text and edited tokens see each other and the references.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.courier import Courier
from ..cache.entry import KeysValues
from ..cache.run_cache import RunCache
from ..errors import Omini2Error
from .compiled import uncompiled
from .evaluation import Chunk, rows_of
from .references import Part, References, Seen
from .run import Kernels
from .spot import Plan
from .spot_scores import turned


@dataclass(frozen=True)
class ImageRows:
    """The sequence behind the text.

    Attributes:
        picture: how many of the picture's tokens lie there in a full step.
        reference: how many of the references' do.
        held: how many have their K/V kept: both, or the references' only.
    """

    picture: int
    reference: int
    held: int


class SpotKeys(References):
    """The K/V of one run.

    Attributes:
        turn: (1, 1, picture, head_dim / 2, 2, 2), from the places of the first reference's tokens
            to those of the picture's; None until it is known.
    """

    def __init__(self, cache: RunCache, blocks: int, kv_heads: int, fusion: str) -> None:
        super().__init__(cache, blocks, kv_heads, isolated=False)
        self.turn: Tensor | None = None
        self.fusion = fusion

    @property
    def interval(self) -> int | None:
        """As long as the schedule has it; nothing is computed anew by a number of steps."""
        return None

    @uncompiled
    def parts(self, chunks: Sequence[Chunk]) -> list[Part]:
        """What is kept for each prompt."""
        parts = []
        for chunk in chunks:
            entry = self.cache.entry(("spot", chunk.key), self._blocks)
            entry.by_token = True
            parts.append(Part(entry, chunk, not entry.complete, chunk.rows))
        return parts

    @contextmanager
    def writing(
        self,
        parts: Sequence[Part],
        images: ImageRows,
        only: Tensor | None = None,
        steady: Sequence[Part] = (),
        left: "LeftOut | None" = None,
    ) -> Iterator[None]:
        """While the model runs with the references: K/V of the last ``held`` rows are kept.

        Args:
            parts: those whose K/V are to be kept.
            only: indices of those rows of picture and references that attention sees, if not all.
            steady: those that are as if tokens had been left out for them, so that the way in
                which the host puts prompts together makes no difference.
            left: what is left out for these.
        """
        for part in parts:
            part.entry.restart()
        with self._seeing(_Writing(self, parts, images, only, steady, left)):
            yield

    @contextmanager
    def leaving_out(
        self, parts: Sequence[Part], left: "LeftOut", device: torch.device
    ) -> Iterator[None]:
        """While the model runs on text and edited tokens only.

        Args:
            device: where it computes.

        Raises:
            Omini2Error: only some of its blocks have come by.
        """
        seen = _LeavingOut(self, parts, left)
        if self.cache.storage.keep_on == "cpu" and left.images.held:
            self._courier = self._courier or Courier(device)
            self._courier.send(0, seen.entries)
        self._reached = 0
        with self._seeing(seen):
            yield
        if self._reached not in (0, self._blocks):
            raise Omini2Error(
                "model: another extension skips blocks of the model or computes their attention "
                "past ComfyUI's, so Spot Edit can't leave tokens out; take it out of the graph, or "
                "Omini2 Spot Edit."
            )

    def left_out(self, images: ImageRows, plan: Plan, sigma: float) -> "LeftOut":
        """What a step leaves out.

        Args:
            sigma: the noise level.
        """
        assert plan.rows is not None and plan.unedited is not None
        others = plan.unedited.flatten().nonzero()[:, 0]
        own = math.cos(math.pi / 2 * sigma) ** 2 if self.fuses else 1.0
        return LeftOut(images, plan.rows, others, own)

    def stand_in(
        self,
        number: int,
        part: Part,
        kept: KeysValues,
        k: Tensor,
        v: Tensor,
        own: Sequence[Tensor],
        left: "LeftOut",
    ) -> None:
        """Puts what is kept of a block in the place of what is left out, for one prompt.

        Args:
            k, v: (batch, heads, held, head_dim), to be filled in the prompt's rows.
            own: K and V of the edited tokens as they are now, (batch, heads, edited, head_dim).
        """
        for rows, within in part.chunk.spans:
            kept.rows(within).write(k[rows], v[rows])
        if not left.whole_picture:
            return
        n, others = left.images.picture, left.others
        if left.own < 1 and self.turn is not None and left.images.reference >= n:
            for rows, _ in part.chunk.spans:
                ref_k = turned(k[rows, :, n + others], self.turn[:, :, others])
                k[rows, :, others] = torch.lerp(ref_k, k[rows, :, others], left.own)
                ref_v = v[rows, :, n + others]
                v[rows, :, others] = torch.lerp(ref_v, v[rows, :, others], left.own)
            if self.fusion == "recursive":
                blend = (rows_of(t, part.chunk.rows)[:, :, others] for t in (k, v))
                part.entry.blocks[number].replace(others, *blend)
        for t, now in zip((k, v), own, strict=True):
            for rows, _ in part.chunk.spans:
                t[rows, :, left.edited] = now[rows]
        now_k, now_v = (rows_of(t, part.chunk.rows) for t in own)
        part.entry.blocks[number].replace(left.edited, now_k, now_v)

    @property
    def fuses(self) -> bool:
        """Whether unedited tokens' K/V go over into the reference's."""
        return self.fusion != "off"


@dataclass(frozen=True, eq=False)
class LeftOut:
    """What a step leaves out of the model.

    Attributes:
        edited, others: indices of the picture's tokens.
        own: how much of the others' K/V is their own; the rest is the reference's.
    """

    images: ImageRows
    edited: Tensor
    others: Tensor
    own: float

    @property
    def whole_picture(self) -> bool:
        """Whether K/V are kept of the picture too, not of the references only."""
        return self.images.held > self.images.reference


class _Writing(Seen):
    def __init__(
        self,
        keys: SpotKeys,
        parts: Sequence[Part],
        images: ImageRows,
        only: Tensor | None,
        steady: Sequence[Part],
        left: LeftOut | None,
    ) -> None:
        self._keys = keys
        self._parts = parts
        self._steady = steady
        self._left = left
        self._held = images.held
        self._images = images.picture + images.reference
        self._only = only
        self.tokens = images.reference

    def attend(
        self, number: int, kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """The model's own attention, on those rows that count."""
        last = slice(k.shape[2] - self._held, None)
        for part in self._parts:
            own_k, own_v = (rows_of(t, part.chunk.rows)[:, :, last] for t in (k, v))
            self._keys.store(part.entry, number, own_k, own_v)
        if self._parts:
            self._keys.show(number + 1)
        if self._steady and self._left is not None:
            k, v = k.clone(), v.clone()
            ends = k[:, :, last], v[:, :, last]
            now = [t[:, :, self._left.edited].clone() for t in ends]
            for part in self._steady:
                kept = part.entry.blocks[number]
                self._keys.stand_in(number, part, kept, *ends, now, self._left)
        if self._only is not None:
            text = k.shape[2] - self._images
            seen = torch.cat((torch.arange(text, device=k.device), text + self._only))
            k, v = k[:, :, seen], v[:, :, seen]
            mask = None if mask is None else mask[..., seen]
        return kernels.main(q, k, v, mask)


class _LeavingOut(Seen):
    tokens = 0  # the references aren't there

    def __init__(self, keys: SpotKeys, parts: Sequence[Part], left: LeftOut) -> None:
        self._keys = keys
        self._parts = parts
        self._left = left
        self.entries = list({id(part.entry): part.entry for part in parts}.values())

    def attend(
        self, number: int, kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Text and edited tokens see each other and what is kept."""
        left, held = self._left, self._left.images.held
        there = self._keys.arrived(number, self.entries if held else ())
        text = k.shape[2] - len(left.edited)
        start = text if left.whole_picture else k.shape[2]
        all_k, all_v = (_with_end(t, start, held) for t in (k, v))
        own = k[:, :, text:], v[:, :, text:]
        for part in self._parts:
            kept = there.get(id(part.entry)) or part.entry.blocks[number]
            ends = all_k[:, :, start:], all_v[:, :, start:]
            self._keys.stand_in(number, part, kept, *ends, own, left)
        return kernels.main(q, all_k, all_v, self._mask(mask, text, all_k))

    def _mask(self, mask: Tensor | None, text: int, keys: Tensor) -> Tensor | None:
        """The host's mask, whose columns are text and edited tokens; what is kept is seen."""
        if mask is None or mask.shape[-1] == keys.shape[2]:
            return mask
        seen = mask.dtype == torch.bool
        whole = mask.new_full((*mask.shape[:-1], keys.shape[2]), seen)
        whole[..., :text] = mask[..., :text]
        picture = text + self._left.edited
        at = picture if self._left.whole_picture else slice(text, mask.shape[-1])
        whole[..., at] = mask[..., text:]
        return whole


def _with_end(t: Tensor, start: int, held: int) -> Tensor:
    """(batch, heads, n, d) -> a copy of the first ``start`` with room for ``held`` behind them."""
    longer = t.new_empty(*t.shape[:2], start + held, t.shape[3])
    longer[:, :, :start] = t[:, :, :start]
    return longer
