"""Whether a server's memory stayed flat, as a number, a plot and a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from scipy import stats

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WARM_UP = 3  # passes over all recipes: every graph has run then, and its K/V are kept
MB = 1e6
BOUND = 1.0  # MB in 100 runs: 10,000 pictures then take less than one of FLUX.1's LoRAs
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Slope:
    """Growth of memory, in MB per 100 runs.

    Attributes:
        low, high: its confidence interval.
        points: how many means it was fitted to.
    """

    value: float
    low: float
    high: float
    points: int

    @property
    def flat(self) -> bool:
        """No growth, or none that could matter."""
        return self.low <= 0 <= self.high or self.high < BOUND


def slope(rss: Sequence[int], per_pass: int) -> Slope:
    """Fits a line to what a server held after each run, in bytes, once it is warm.

    Each point is the mean over a pass: all passes hold the same graphs, in different orders, so
    their means can be compared, and are far enough apart to be independent.

    Raises:
        ValueError: fewer than three whole passes after the warm-up.
    """
    passes = len(rss) // per_pass
    means = [float(np.mean(rss[i * per_pass : (i + 1) * per_pass])) for i in range(passes)]
    warm = np.array(means[WARM_UP:]) / MB
    if len(warm) < 3:
        raise ValueError(
            f"{len(rss)} runs are {passes} passes of {per_pass}; a slope takes {WARM_UP + 3}."
        )
    runs = (np.arange(len(warm)) * per_pass) / 100
    fit = stats.linregress(runs, warm)
    margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(warm) - 2) * fit.stderr)
    return Slope(float(fit.slope), float(fit.slope) - margin, float(fit.slope) + margin, len(warm))


def slope_apart(rss: Sequence[int], without: Sequence[int], per_pass: int) -> Slope:
    """How much faster one server grew than another over the same runs, pass by pass."""
    return slope([a - b for a, b in zip(rss, without, strict=True)], per_pass)


def plot(results: dict[str, Any], path: Path) -> None:
    """Memory after each run, with the warm-up and what was cancelled marked."""
    rss = np.array(results["rss"]) / MB
    runs = np.arange(1, len(rss) + 1)
    figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
    axes.plot(runs, rss, color="#3f6fb5", linewidth=1, label="after each run")
    without = np.array(results["rss_without"]) / MB
    axes.plot(runs, without, color="#999999", linewidth=1, label="the same without conditions")
    cancelled = [i for i, job in enumerate(results["jobs"]) if job["cancelled"]]
    axes.plot(runs[cancelled], rss[cancelled], "x", color="#c0504d", label="cancelled runs")
    warm = WARM_UP * results["recipes"]
    axes.axvspan(0, warm, color="#dddddd", label="warm-up")
    axes.set(xlabel="run", ylabel="resident memory of the server, MB", xlim=(0, len(rss)))
    axes.set_ylim(0, rss.max() * 1.1)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def page(results: dict[str, Any], image: str) -> str:
    """docs/soak.md."""
    grown, without, added = (
        Slope(**results[name]) for name in ("slope", "slope_without", "slope_of_conditions")
    )
    jobs, wrong = results["jobs"], results["different"]
    cancelled = sum(job["cancelled"] for job in jobs)
    drawn = len(jobs) - cancelled
    differ = "every one is equal" if not wrong else f"**{len(wrong)} differ: runs {wrong}**"
    return "\n".join(
        [
            "# Soak",
            "",
            "One real server, one run after another, each with other settings than the one before: "
            f"`{results['command']}`.",
            "",
            f"- **{len(jobs)} runs** of {results['recipes']} graphs, drawn at random (seed "
            f"{results['seed']}): sizes, one or two conditions (edges, depth, subject, compact, "
            "pruned, token integration), LoRAs, attention, cache settings, image guidance, a "
            f"negative prompt, noise seeds. {cancelled} runs were cancelled on the way.",
            f"- **Memory** of the server's process after the warm-up ({WARM_UP} passes over all "
            f"graphs): {grown.value:+.2f} MB per 100 runs, 95 % confidence interval "
            f"{grown.low:+.2f} to {grown.high:+.2f} ({grown.points} means of one pass each). It "
            f"counts as flat where the interval holds 0 or stays below {BOUND:g}: "
            f"**{'flat' if grown.flat else 'not flat'}**. ComfyUI's own history of what was "
            "queued is cleared after each run.",
            f"- **The same runs without the conditions**, in a server of their own: "
            f"{without.value:+.2f} MB per 100 runs ({without.low:+.2f} to {without.high:+.2f}). "
            f"What the conditions add to that: {added.value:+.2f} ({added.low:+.2f} to "
            f"{added.high:+.2f}), **{'flat' if added.flat else 'not flat'}**.",
            f"- **Pictures**: {drawn} were drawn to the end and compared, pixel by pixel, with the "
            f"same run elsewhere: {results['fresh']} different runs each in a server of its own "
            f"that had drawn nothing before, the other {results['others']} in one other server in "
            f"the opposite order. Of all {drawn}, {differ}.",
            "",
            f"![Memory after each run]({image})",
            "",
            f"{results['machine']}; {results['minutes']:.0f} minutes for the runs.",
            "",
        ]
    )
