"""One condition whose K/V come from a file, during one run."""

from collections.abc import Hashable
from dataclasses import dataclass, field

from ..cache.entry import Entry
from ..cache.file import EMPTY, IMAGE, Saved
from ..cache.policy import CachePolicy
from ..cache.run_cache import RunCache
from ..errors import Omini2Error, warn
from .evaluation import NO_MAP, Chunk, Evaluation, rows_of
from .model import Model
from .source import Pass


@dataclass(eq=False)
class SavedSource:
    """A condition whose K/V were computed before, in one run.

    Attributes:
        bias, start_sigma, end_sigma: as :class:`.branch.BranchSource`.
    """

    saved: Saved
    bias: float
    start_sigma: float
    end_sigma: float
    _checked: set[Hashable] = field(default_factory=set)

    @property
    def token_count(self) -> int:
        """The number of tokens that take part."""
        return self.saved.tokens

    def active(self, call: Evaluation) -> bool:
        """Whether it takes part at this noise level."""
        return call.between(self.start_sigma, self.end_sigma)

    def stores(self, policy: CachePolicy) -> bool:
        """Always: there is nothing to compute them from."""
        return True

    def begin(self, model: Model, call: Evaluation, cache: RunCache) -> Pass:
        """Brings the K/V to where this run stores its own, at their first evaluation."""
        entries = []
        for chunk in call.chunks:
            given = self.entry(call, chunk)
            entry = cache.entry((id(self), call.empty), given.count)
            if not entry.complete:
                entry.adopt(Entry(given.count, dict(given.blocks), set(given.filled)))
                entry.rearrange(cache.storage, call.device)
            entries.append((entry, chunk))
        return Pass(entries, self.bias)

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
        require_picture(saved.picture_hw, call.picture_hw)
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
        saved = self.saved.pooled.to(pooled)
        same = saved.shape[1:] == pooled.shape[1:] and bool((saved == pooled).all())
        if self.saved.guidance is not None and call.guidance is not None:
            guidance = rows_of(call.guidance, chunk.rows)
            same = same and bool((guidance == self.saved.guidance).all())
        if not same:
            warn(
                "cache_name: the K/V were computed with another prompt or guidance, so the picture "
                "isn't the one that the condition itself would give; save it with this prompt."
            )


def require_picture(fitted: tuple[int, int] | None, hw: tuple[int, int]) -> None:
    """Refuses a picture of ``hw`` tokens for K/V that are fitted to another; None fits all.

    Raises:
        Omini2Error: they are.
    """
    if fitted is not None and fitted != hw:
        h, w = fitted
        raise Omini2Error(
            f"cache_name: the condition was fitted to a picture of {16 * w}x{16 * h}; sample "
            "at this size, or save it with another placement than fit."
        )
