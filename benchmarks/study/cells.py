"""A cell of the study: under which conditions its pictures are drawn. Two alike are drawn once."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

STEPS = 12


@dataclass(frozen=True)
class Use:
    """One condition: a task's image, a LoRA, and what Compact Tokens and Apply LoRA do to it.

    Attributes:
        lora: a file's name without `.safetensors`.
        correcting: whether compressed tokens get the positions of what they stand for.
        threshold: `prune: empty` with this threshold; None prunes nothing.
        integrate: token integration of the known part of the picture.
    """

    task: str
    lora: str
    compression: float = 1.0
    correcting: bool = True
    threshold: float | None = None
    grow: int = 0
    scale: float = 1.0
    attention: str = "auto"
    integrate: bool = False


@dataclass(frozen=True)
class Cell:
    """Pictures of the held-out scenes.

    Attributes:
        subject_prompt: the prompt leaves out what the first thing looks like.
        reuse, every: the Condition Cache; "exact" is once for an independent condition, which
            changes nothing, and every step for a joint one.
        things: only scenes of so many things.
        floats: what the model computes in.
    """

    uses: tuple[Use, ...] = ()
    subject_prompt: bool = False
    reuse: str = "exact"
    every: int = 1
    things: int | None = None
    floats: str = "bfloat16"

    @property
    def alone(self) -> bool:
        """Whether its pictures can't share a batch: all of one would keep the same tokens."""
        return any(use.threshold is not None or use.integrate for use in self.uses)

    @property
    def shows_holes(self) -> bool:
        """Whether what is in the inpainting's hole is worth measuring: there, and without any
        condition for comparison."""
        return not self.uses or any(use.task == "inpainting" for use in self.uses)

    @property
    def loras(self) -> set[str]:
        """The files it needs."""
        return {use.lora for use in self.uses}

    @property
    def world(self) -> int | None:
        """What tells its scenes from other cells'."""
        return self.things

    def truth(self, index: int) -> Any:
        """Held-out scene number `index`."""
        from benchmarks.study.conditions import truth

        return truth(index, self.things)

    def measure(self, truths: list[Any], drawn: Any) -> dict[str, list[float]]:
        """Every measure of a batch."""
        from benchmarks.study.measures import measure

        return measure(truths, drawn["pictures"], drawn["kept"], self.shows_holes)

    @property
    def name(self) -> str:
        """Short and the same in every run."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def described(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)
