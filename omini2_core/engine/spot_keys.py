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
from .attention import KeyGroup, join, main_attention
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

    def now(
        self,
        number: int,
        part: Part,
        kept: KeysValues,
        own: Sequence[Tensor],
        left: "LeftOut",
    ) -> KeysValues:
        """What one prompt has of a block behind the text, with the edited tokens as they are now.

        Args:
            kept: what is kept of it, where the model computes; in the model's format it is brought
                up to date itself, so that nothing is copied.
            own: K and V of the edited tokens, (batch, heads, edited, head_dim).
        """
        if not left.whole_picture:
            return kept
        latest = part.entry.blocks[number]
        edited = [rows_of(t, part.chunk.rows) for t in own]
        blends = left.own < 1 and self.turn is not None
        blends &= left.images.reference >= left.images.picture
        if blends or kept.scales is not None:
            kept = kept.decoded(own[0].dtype)
        if blends:
            blend = self._blend(kept, left)
            kept.replace(left.others, *blend)
            if self.fusion == "recursive":
                latest.replace(left.others, *blend)
        for keys_values in {id(each): each for each in (kept, latest)}.values():
            keys_values.replace(left.edited, *edited)
        return kept

    def _blend(self, kept: KeysValues, left: "LeftOut") -> list[Tensor]:
        """K and V of unedited tokens, some way on to the reference's."""
        assert self.turn is not None
        n, others = left.images.picture, left.others
        reference = (
            turned(kept.k[:, :, n + others], self.turn[:, :, others]),
            kept.v[:, :, n + others],
        )
        return [
            torch.lerp(theirs, t[:, :, others], left.own)
            for theirs, t in zip(reference, (kept.k, kept.v), strict=True)
        ]

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
            whole = self._left.whole_picture
            own = [t[:, :, self._left.edited] for t in ends] if whole else ()
            for part in self._steady:
                kept = self._keys.now(number, part, part.entry.blocks[number], own, self._left)
                for rows, within in part.chunk.spans:
                    kept.rows(within).write(*(t[rows] for t in ends))
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
        left = self._left
        there = self._keys.arrived(number, self.entries)
        text = k.shape[2] - len(left.edited)
        own = k[:, :, text:], v[:, :, text:]
        spans = []
        for part in self._parts:
            kept = there.get(id(part.entry)) or part.entry.blocks[number]
            kept = self._keys.now(number, part, kept, own, left)
            spans += [(rows, kept.rows(within)) for rows, within in part.chunk.spans]
        behind = [KeyGroup(spans)] if spans else []
        if left.whole_picture:
            k, v = k[:, :, :text], v[:, :, :text]
        if mask is not None:
            k, v = join(k, v, behind)
            return kernels.main(q, k, v, self._mask(mask, text, k))
        return main_attention(kernels.main, kernels.main_partial, q, k, v, None, behind, apart=True)

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
