"""What a run says about itself while it goes on, and the bar that shows it in a terminal."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm


@dataclass(frozen=True)
class Progress:
    """What a run says about itself after each step.

    Attributes:
        stage: "encode" (step counts samples; steps is 0) or "train".
        loss: of this step, and smoothed.
        seconds_left: to the last step.
        memory_bytes: the most that was taken on the GPU, or by the process now.
        picture: a sheet of sample pictures that was just drawn.
    """

    stage: str
    step: int
    steps: int
    loss: float = math.nan
    smoothed: float = math.nan
    steps_per_second: float = math.nan
    seconds_left: float = math.nan
    memory_bytes: int = 0
    picture: Path | None = None


class Bar:
    """Loss, speed, memory and time left, on one line."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._stage = ""

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, progress: Progress) -> None:
        """What ``train`` reports."""
        if progress.stage != self._stage:
            self.__exit__()
            self._stage = progress.stage
            self._bar = tqdm(
                desc=progress.stage,
                total=progress.steps or None,
                initial=max(progress.step - 1, 0),
                unit="step" if progress.steps else "picture",
                dynamic_ncols=True,
            )
        if progress.stage == "train":
            self._bar.set_postfix_str(
                f"loss {progress.smoothed:.4f}, {progress.memory_bytes / 1e9:.1f} GB", refresh=False
            )
        self._bar.update(progress.step - self._bar.n)
