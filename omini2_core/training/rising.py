"""Whether a run's loss has risen: then the LoRA ruins what the base can draw.

The loss of a step says little, since it depends on the time and the picture that were drawn; so the
same few samples are looked at now and then, and held against what the base itself gave for them.
Some optimisers come back from a rise by themselves (Prodigy on the demo model does), so it is said
first, and only an error where it is still so at the next look.
"""

from collections.abc import Callable, Sequence
from statistics import fmean as mean

from ..errors import Omini2Error, warn

SAMPLES = 12  # batches that are looked at
FIRST, EVERY = 40, 100  # the step of the first look, and steps between the others
RATIO = 1.5


class LossRose(Omini2Error):
    """A loss that rose and stayed there.

    Attributes:
        before, now: means over the same samples, by the base and with the LoRA.
        step: at which that was found.
    """

    def __init__(self, before: float, now: float, step: int) -> None:
        self.before, self.now, self.step = before, now, step
        super().__init__(
            f"optimizer.lr: the loss has risen from {before:.3f} to {now:.3f} by step {step}; "
            "lower the learning rate or choose another optimizer, and set resume to false."
        )


class Watch:
    """Looks at a run as it goes on."""

    def __init__(self, look: Callable[[], Sequence[float]], after: int) -> None:
        """Made while the LoRA still does nothing.

        Args:
            look: the losses of the samples, as the model is.
            after: the first step at which they are to be compared.
        """
        self._look, self._after, self._said = look, after, False
        self._before = mean(look())

    def step(self, step: int) -> None:
        """After each step.

        Raises:
            LossRose: at two looks one after the other.
        """
        if step < self._after or (step % EVERY and step != FIRST):
            return
        now = mean(self._look())
        if now <= RATIO * self._before:
            self._said = False
        elif self._said:
            raise LossRose(self._before, now, step)
        else:
            self._said = True
            warn(
                f"The loss has risen from {self._before:.3f} to {now:.3f} by step {step}: the LoRA "
                f"ruins the picture so far. If it is still so {EVERY} steps on, training stops; a "
                "lower learning rate, or adamw instead of prodigy, helps."
            )
