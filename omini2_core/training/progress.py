"""The progress bar of a run in a terminal."""

from typing import Any

from tqdm import tqdm

from .loop import Progress


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
