"""Whether a run's loss rises: then the LoRA ruins what the base can draw, and it won't get better.

One step's loss says little, since it depends on the time and the picture that were drawn. So the
mean of the latest is held against the best that a stretch of steps has had, and has to be far above
it in both senses: as a ratio, and in standard errors.
"""

import math
from collections.abc import Sequence

from ..errors import Omini2Error

STRETCH, LATEST = 20, 5  # steps in a stretch; stretches that count as the latest, at most
RATIO, ERRORS = 1.5, 5.0


class LossRose(Omini2Error):
    """A loss that rose.

    Attributes:
        best, now: means over the best stretch and the latest steps.
        step: how many there were.
    """

    def __init__(self, best: float, now: float, step: int) -> None:
        self.best, self.now, self.step = best, now, step
        super().__init__(
            f"optimizer.lr: the loss has risen from {best:.3f} to {now:.3f} in {step} steps; lower "
            "the learning rate or choose another optimizer, and set resume to false."
        )


def risen(losses: Sequence[float]) -> tuple[float, float] | None:
    """Means of the best stretch and of the latest steps if the loss rose; asked at every step.

    Args:
        losses: of all steps that are to be compared. It answers where a stretch ends.
    """
    count, over = divmod(len(losses), STRETCH)
    if over or count < 3:
        return None
    stretches = [losses[i * STRETCH : (i + 1) * STRETCH] for i in range(count)]
    number = min(LATEST, count - 1)
    best, error = min(_mean(stretch) for stretch in stretches[:-number])
    now, now_error = _mean([loss for stretch in stretches[-number:] for loss in stretch])
    sure = now - best > ERRORS * math.hypot(error, now_error)
    return (best, now) if now > RATIO * best and sure else None


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))
