"""What the benchmarks share: sizes, runs that alternate, their ratios, options.

Each measured run lies between two runs of what it is compared to, so that a machine that speeds up
or slows down on the way doesn't matter.
"""

import argparse
import json
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks import host
from benchmarks.costs import Shape

SHAPE = Shape(768, 2, 4, text_width=1024, pooled_width=192)  # a quarter of FLUX.1's widths
QUICK = Shape(256, 1, 2, text_width=64, pooled_width=32)
TEXT, SIDE, RANK = 512, 32, 4  # text tokens, tokens of a picture's side, of the LoRAs


@dataclass(frozen=True)
class Timing:
    """Seconds by the clock, and seconds that the processor's cores worked for this alone.

    The second doesn't mind other programs, but says nothing of a GPU and of cores left idle.
    """

    clock: float
    processor: float

    def over(self, before: "Timing", after: "Timing") -> "Timing":
        """Both as ratios to the mean of two other runs."""
        return Timing(
            2 * self.clock / (before.clock + after.clock),
            2 * self.processor / (before.processor + after.processor),
        )


@dataclass
class Measured:
    """The times of one kind of run, and their ratios to the runs before and after each."""

    times: list[Timing] = field(default_factory=list)
    ratios: list[Timing] = field(default_factory=list)

    def values(self, clock: bool) -> list[float]:
        """The ratios by the clock or by processor time."""
        return [each.clock if clock else each.processor for each in self.ratios]


Run = Callable[[], Timing]


def alternate(base: Run, runs: Sequence[Run], repeats: int) -> tuple[list[Timing], list[Measured]]:
    """base, one, base, other, base ...: the base's times, and what each run gave."""
    before, measured = [base()], [Measured() for _ in runs]
    for _ in range(repeats):
        for run, found in zip(tqdm(runs, leave=False), measured, strict=True):
            found.times.append(run())
            before.append(base())
            found.ratios.append(found.times[-1].over(before[-2], before[-1]))
    return before, measured


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median, and from where to where they lie."""
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"**{middle:.{digits}f}** ({low:.{digits}f} to {high:.{digits}f})"


def parser(doc: str, steps: int, repeats: int = 3) -> argparse.ArgumentParser:
    """The options of every benchmark; those that one doesn't know are another's."""
    found = argparse.ArgumentParser(description=doc.partition("\n")[0])
    found.add_argument("--repeats", type=int, default=repeats, help="runs of each configuration")
    found.add_argument("--steps", type=int, default=steps)
    found.add_argument("--quick", action="store_true", help="a tiny model: does it work at all?")
    found.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    found.add_argument("--json", type=Path, metavar="FILE", help="also write every figure here")
    return found


def keep(path: Path | None, results: dict[str, Any]) -> None:
    """Writes the results if a file was asked for."""
    if path:
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def closing(options: Any, load: float, plain: Sequence[Timing]) -> str:
    """Machine, settings and the plain runs, below a table."""
    per_step = [each.clock / options.steps for each in plain]
    return (
        f"\n{host.machine()}; load average {load:.1f} at the start, {os.getloadavg()[0]:.1f} at "
        f"the end. {options.steps} steps, medians of {options.repeats} interleaved runs; plain "
        f"FLUX {spread(per_step)} s per step."
    )
