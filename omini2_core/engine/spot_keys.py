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
from ..cache.run_cache import RunCache
from ..errors import Omini2Error
from .compiled import uncompiled
from .evaluation import Chunk, rows_of
from .references import Part, References, Seen
from .run import Kernels
from .spot import Plan
from .spot_scores import turned


@dataclass(frozen=True)
class Layout:
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
        self, parts: Sequence[Part], layout: Layout, only: Tensor | None = None
    ) -> Iterator[None]:
        """While the model runs with the references: K/V of the last ``held`` rows are kept.

        Args:
            parts: none, if nothing is to be kept.
            only: indices of those rows of picture and references that attention sees, if not all.
        """
        for part in parts:
            part.entry.restart()
        with self._seeing(_Writing(self, parts, layout, only)):
            yield

    @contextmanager
    def leaving_out(
        self, parts: Sequence[Part], layout: Layout, plan: Plan, sigma: float, device: torch.device
    ) -> Iterator[None]:
        """While the model runs on text and edited tokens only.

        Args:
            sigma: the noise level.
            device: where it computes.

        Raises:
            Omini2Error: only some of its blocks have come by.
        """
        seen = _LeavingOut(self, parts, layout, plan, sigma)
        if self.cache.storage.keep_on == "cpu" and layout.held:
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

    @property
    def fuses(self) -> bool:
        """Whether unedited tokens' K/V go over into the reference's."""
        return self.fusion != "off"

    def share(self, sigma: float) -> float:
        """How much of an unedited token's K/V is its own; the rest is the reference's."""
        return math.cos(math.pi / 2 * sigma) ** 2 if self.fuses else 1.0


class _Writing(Seen):
    def __init__(
        self, keys: SpotKeys, parts: Sequence[Part], layout: Layout, only: Tensor | None
    ) -> None:
        self._keys = keys
        self._parts = parts
        self._held = layout.held
        self._images = layout.picture + layout.reference
        self._only = only
        self.tokens = layout.reference

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
        if self._only is not None:
            text = k.shape[2] - self._images
            seen = torch.cat((torch.arange(text, device=k.device), text + self._only))
            k, v = k[:, :, seen], v[:, :, seen]
            mask = None if mask is None else mask[..., seen]
        return kernels.main(q, k, v, mask)


class _LeavingOut(Seen):
    tokens = 0  # the references aren't there

    def __init__(
        self, keys: SpotKeys, parts: Sequence[Part], layout: Layout, plan: Plan, sigma: float
    ) -> None:
        assert plan.rows is not None and plan.unedited is not None
        self._keys = keys
        self._parts = parts
        self._layout = layout
        self._rows = plan.rows
        self._others = plan.unedited.flatten().nonzero()[:, 0]
        self._share = keys.share(sigma)
        self.entries = list({id(part.entry): part.entry for part in parts}.values())

    def attend(
        self, number: int, kernels: Kernels, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Text and edited tokens see each other and what is kept."""
        there = self._keys.arrived(number, self.entries if self._layout.held else ())
        whole_picture = self._layout.held > self._layout.reference
        text = k.shape[2] - len(self._rows)
        start = text if whole_picture else k.shape[2]
        all_k, all_v = (_with_end(t, start, self._layout.held) for t in (k, v))
        if self._layout.held:
            for part in self._parts:
                kept = there.get(id(part.entry)) or part.entry.blocks[number]
                for rows, within in part.chunk.spans:
                    kept.rows(within).write(all_k[rows, :, start:], all_v[rows, :, start:])
        if whole_picture:
            self._blend(number, all_k[:, :, text:], all_v[:, :, text:])
            for whole, own in ((all_k, k), (all_v, v)):
                whole[:, :, text + self._rows] = own[:, :, text:]
            self._replace(number, self._rows, k[:, :, text:], v[:, :, text:])
        return kernels.main(q, all_k, all_v, self._mask(mask, text, all_k))

    def _blend(self, number: int, k: Tensor, v: Tensor) -> None:
        """Lets unedited tokens' K/V go over into those of the reference's same tokens."""
        n, own = self._layout.picture, self._share
        turn = self._keys.turn
        if own == 1.0 or turn is None or self._layout.reference < n:
            return
        those = self._others
        ref_k = turned(k[:, :, n + those], turn[:, :, those])
        blend_k = torch.lerp(ref_k, k[:, :, those], own)
        blend_v = torch.lerp(v[:, :, n + those], v[:, :, those], own)
        k[:, :, those], v[:, :, those] = blend_k, blend_v
        if self._keys.fusion == "recursive":
            self._replace(number, those, blend_k, blend_v)

    def _replace(self, number: int, which: Tensor, k: Tensor, v: Tensor) -> None:
        for part in self._parts:
            own = (rows_of(t, part.chunk.rows) for t in (k, v))
            part.entry.blocks[number].replace(which, *own)

    def _mask(self, mask: Tensor | None, text: int, keys: Tensor) -> Tensor | None:
        """The host's mask, whose columns are text and edited tokens; what is kept is seen."""
        if mask is None or mask.shape[-1] == keys.shape[2]:
            return mask
        seen = mask.dtype == torch.bool
        whole = mask.new_full((*mask.shape[:-1], keys.shape[2]), seen)
        whole[..., :text] = mask[..., :text]
        edited = self._rows if self._layout.held > self._layout.reference else None
        at = slice(text, mask.shape[-1]) if edited is None else text + edited
        whole[..., at] = mask[..., text:]
        return whole


def _with_end(t: Tensor, start: int, held: int) -> Tensor:
    """(batch, heads, n, d) -> a copy of the first ``start`` with room for ``held`` behind them."""
    longer = t.new_empty(*t.shape[:2], start + held, t.shape[3])
    longer[:, :, :start] = t[:, :, :start]
    return longer
