"""What Omini2 Reference says of a reference: beside its latent in the prompt, read in the run.

The latent is a stock one, in the host's own list. Settings go with it under a key of ours, which
every node that copies a prompt carries along, and each knows its latent as an object.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import node_helpers
import torch
from torch import Tensor

from ..errors import Omini2Error, require_kind, require_range

LATENTS = "reference_latents"  # the host's
KEY = "omini2_references"
MAX_STRENGTH = 1000


@dataclass(frozen=True, eq=False)
class ReferenceSettings:
    """How one reference takes part, as an *Omini2 Reference* node describes it.

    Attributes:
        latent: the reference, as it is in the prompt.
        placed: rows and columns of its latent before it was made smaller, which it keeps standing
            for; None where it lies as its own size says.
        keep: (rows, columns) bool of its tokens; those that take part, None for all.
        strength: text and picture look at it with log(strength) added to the logits.
        start_percent, end_percent: when it takes part, as a share of sampling.
    """

    latent: Tensor
    placed: tuple[int, int] | None = None
    keep: Tensor | None = None
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the latent whose place it takes."""
        return self.placed or (self.latent.shape[-2], self.latent.shape[-1])

    @property
    def moves_rows(self) -> bool:
        """Whether tokens are left out, or lie elsewhere than the model places them."""
        return self.placed is not None or self.keep is not None

    @property
    def always(self) -> bool:
        """Whether it takes part in every step."""
        return self.start_percent <= 0 and self.end_percent >= 1

    @property
    def acts(self) -> bool:
        """Whether it differs from a stock reference."""
        return self.moves_rows or self.strength != 1 or not self.always


def require_settings(strength: float, start_percent: float, end_percent: float) -> None:
    """Refuses numbers that no reference can have.

    Raises:
        Omini2Error: which one.
    """
    require_range("strength", strength, 0, MAX_STRENGTH)
    require_range("start_percent", start_percent, 0, 1)
    require_range("end_percent", end_percent, 0, 1)
    if start_percent >= end_percent:
        raise Omini2Error(
            f"start_percent: {start_percent} is not below end_percent ({end_percent}), so the "
            "reference would never take part; lower start_percent."
        )


def require_prompt(name: str, prompt: Any) -> None:
    """Refuses anything else than a prompt of the host's."""
    entries = prompt if isinstance(prompt, list) else [None]
    right = all(
        isinstance(each, list | tuple) and len(each) == 2 and isinstance(each[1], Mapping)
        for each in entries
    )
    require_kind(name, prompt, right, "prompt", "CLIP Text Encode")


def with_reference(prompt: list[Any], settings: ReferenceSettings) -> list[Any]:
    """A prompt with one more reference, behind those that are there."""
    more = {LATENTS: [settings.latent], KEY: [settings]}
    added: list[Any] = node_helpers.conditioning_set_values(prompt, more, append=True)
    return added


def zeroed(prompt: list[Any]) -> list[Any]:
    """A prompt without its words, as Conditioning Zero Out gives it."""
    return [
        [
            torch.zeros_like(text),
            {key: _zero(value) if key == "pooled_output" else value for key, value in said.items()},
        ]
        for text, said in prompt
    ]


def _zero(pooled: Tensor | None) -> Tensor | None:
    return None if pooled is None else torch.zeros_like(pooled)


@dataclass(frozen=True, eq=False)
class PromptReferences:
    """A prompt's references with what is said of each: None of stock ones.

    Attributes:
        method: how they are placed, if the prompt says it.
    """

    latents: Sequence[Tensor]
    settings: tuple[ReferenceSettings | None, ...]
    method: str | None = None

    @property
    def act(self) -> bool:
        """Whether anything is said of them that the model doesn't do by itself."""
        return any(each is not None and each.acts for each in self.settings)


def references_of(cond: Mapping[str, Any]) -> PromptReferences | None:
    """The references of a prompt as the sampler has it; None if there are none.

    Raises:
        Omini2Error: another node has changed a latent that settings go with.
    """
    latents = cond.get(LATENTS)
    if not latents:
        return None
    left = list(cond.get(KEY) or ())
    found: list[ReferenceSettings | None] = [_taken(left, latent) for latent in latents]
    for i, latent in enumerate(latents):  # a copy is as good
        found[i] = found[i] or _taken(left, latent, equal=True)
    if any(each.acts for each in left):
        raise Omini2Error(
            "image: another node has changed or taken out a reference of Omini2 Reference, so its "
            "settings can't go with it; connect Omini2 Reference behind that node."
        )
    return PromptReferences(latents, tuple(found), cond.get(f"{LATENTS}_method"))


def _taken(
    settings: list[ReferenceSettings], latent: Tensor, equal: bool = False
) -> ReferenceSettings | None:
    """Those of one latent, which are no other's then."""

    def own(each: ReferenceSettings) -> bool:
        other = each.latent
        same_size = equal and other.shape == latent.shape
        return other is latent or (same_size and torch.equal(other.to(latent), latent))

    for i, each in enumerate(settings):
        if own(each):
            return settings.pop(i)
    return None


def all_references(conds: Iterable[Mapping[str, Any]]) -> list[PromptReferences]:
    """The references of each prompt that has any."""
    found = map(references_of, conds)
    return [each for each in found if each is not None]
