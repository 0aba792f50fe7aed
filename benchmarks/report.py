"""docs/performance.md from what was measured: `python -m benchmarks.report FILE [FILE ...]`.

Takes the JSON files of `benchmarks.performance` and `benchmarks.gpu`. Writes the tables, the plots
(docs/images/performance-*.png) and what is computed; no figure comes from anywhere else.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import costs

DOCS = Path(__file__).resolve().parents[1] / "docs"
CARDS = 8, 12, 16, 24  # GB
WEIGHTS = {"fp8": 1, "16 bits": 2}  # bytes a number
WORKING = 2.5e9  # bytes that FLUX.1 works in at 1024x1024, beside weights and K/V: an assumption
CHOICES = (("model", 2, "gpu"), ("fp8", 1, "gpu"), ("model", 2, "cpu"))


def spread(values: Sequence[float]) -> str:
    """The median, and from where to where they lie."""
    return f"**{statistics.median(values):.3f}** ({min(values):.3f} to {max(values):.3f})"


def table(results: dict[str, Any]) -> str:
    """The figures of `benchmarks.performance`."""
    lines = [
        "| figure | by processor time | by the clock | FLOPs | over the FLOPs | GFLOP: run / base "
        "| MB read a step: with / without | K/V | must reach | reached |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for f in results["figures"]:
        clock, processor = statistics.median(f["clock"]), statistics.median(f["processor"])
        best = processor if processor > 0 else clock
        over = best / f["predicted"]
        lines.append(
            f"| {f['what']} | {spread(f['processor'])} | {spread(f['clock'])} "
            f"| {f['predicted']:.3f} | {over:.3f} "
            f"| {f['flops'][0] / 1e9:.0f} / {f['flops'][1] / 1e9:.0f} "
            f"| {f['step_bytes'][0] / 1e6:.0f} / {f['step_bytes'][1] / 1e6:.0f} "
            f"| {f['kv_bytes'] / 1e6:.1f} MB | {goal(f)} | {reached(f, best, over)} |"
        )
    return "\n".join(lines)


def goal(figure: dict[str, Any]) -> str:
    """What a figure must reach."""
    if figure["limit"] is not None:
        return f"at most {figure['limit']:g}"
    return figure["note"] or "-"


def reached(figure: dict[str, Any], value: float, over: float) -> str:
    """Whether it does."""
    right = {
        "full size": over <= 1.10,
        "every step": over >= 0.95,
    }.get(figure["name"], figure["met"])
    if figure["limit"] is not None:
        right = value <= figure["limit"]
    return "-" if right is None else "yes" if right else "**no**"


def growth(results: dict[str, Any]) -> list[tuple[int, float, float]]:
    """(conditions, time over plain, K/V in MB) of the growth figures."""
    return [
        (int(f["name"].split()[1]), statistics.median(f["processor"]), f["kv_bytes"] / 1e6)
        for f in results["figures"]
        if f["name"].startswith("growth")
    ]


def plots(results: dict[str, Any], folder: Path) -> list[str]:
    """Cost against the number of conditions; the files' names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from benchmarks.performance import line

    points = growth(results)
    if len(points) < 2:
        return []
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    counts = [n for n, _, _ in points]
    for axes, index, label in ((left, 1, "time over plain FLUX"), (right, 2, "K/V in MB")):
        values = [point[index] for point in points]
        slope, start, r2 = line([(float(n), float(v)) for n, v in zip(counts, values, strict=True)])
        axes.plot(counts, values, "o", color="#2a6f97")
        fit = [start + slope * n for n in counts]
        axes.plot(counts, fit, color="#bc4749", label=f"{start:.3g} + {slope:.3g} n, R² {r2:.4f}")
        axes.set(xlabel="conditions", ylabel=label)
        axes.legend()
        axes.grid(alpha=0.3)
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "performance-growth.png", dpi=110)
    pyplot.close(figure)
    return ["performance-growth.png"]


def cards() -> str:
    """Which setting fits FLUX.1-dev and four conditions of 1024 tokens, computed."""
    lines = [
        "| card | weights | K/V kept as | K/V, 4 x 1024 tokens | 4 x 256 tokens "
        "| all in all, 4 x 1024 | fits |",
        "|---|---|---|---|---|---|---|",
    ]
    for card in CARDS:
        for name, weight_bytes in WEIGHTS.items():
            weights = costs.weights(costs.FLUX1_DEV) * weight_bytes
            for storage, number, place in CHOICES:
                large, small = (costs.kv_bytes(costs.FLUX1_DEV, 4 * t, number) for t in (1024, 256))
                # Off the device, those of two blocks are there at a time.
                there = large if place == "gpu" else 2 * large // costs.FLUX1_DEV.blocks
                total = weights + there + WORKING
                lines.append(
                    f"| {card} GB | {name} | {storage}, {place} | {large / 1e9:.2f} GB "
                    f"| {small / 1e9:.2f} GB | {total / 1e9:.1f} GB "
                    f"| {'yes' if total <= card * 1e9 else 'weights streamed'} |"
                )
    return "\n".join(lines)


def gpu_table(results: dict[str, Any]) -> str:
    """The figures of `benchmarks.gpu`."""
    lines = [
        "| weights | picture | conditions | compression | s/step | over plain | every step over it "
        "| over the FLOPs | peak memory | share of the FLOP limit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in results["rows"]:
        lines.append(
            f"| {row['weights']} | {row['picture']} | {row['conditions']} | {row['compression']:g} "
            f"| {statistics.median(row['seconds']):.3f} | {spread(row['over_plain'])} "
            f"| {spread(row['every_step_over'])} "
            f"| {statistics.median(row['over_plain']) / row['predicted']:.3f} "
            f"| {row['peak'] / 1e9:.1f} GB | {row['flop_share']:.0%} |"
        )
    return "\n".join(lines)


def document(measured: Sequence[dict[str, Any]], images: Path) -> str:
    """The whole page."""
    parts = [
        "# Performance",
        "Every ratio is of runs that alternate on the same machine: the median, and in brackets "
        "from where to where they lie. *FLOPs* is the same ratio of counted operations, *over the "
        "FLOPs* the measured ratio divided by it: 1 is a cost that nothing but arithmetic makes. "
        "Counts come from `benchmarks/costs.py`, which `tests/test_costs.py` holds to the "
        "operations that PyTorch counts. Where other programs ran on the same cores, processor "
        "time is the column to trust.",
    ]
    for results in measured:
        gpu = "rows" in results
        parts.append("## On a GPU" if gpu else "## On a FLUX-shaped model")
        parts.append(gpu_table(results) if gpu else table(results))
        parts.append(f"{results['machine']}; {results['steps']} steps, {results['repeats']} pairs.")
        if not gpu:
            parts += [
                f"![Time and bytes against conditions](images/{n})" for n in plots(results, images)
            ]
            parts += [f"*{f['what']}*: {f['note']}." for f in results["figures"] if f["note"]]
    if not any("rows" in results for results in measured):
        parts += [
            "## On a GPU",
            "Nothing was measured: no GPU was at hand. One command measures it: "
            "`.venv/bin/python -m benchmarks.gpu --json gpu.json`.",
        ]
    parts += [
        "## Which setting for which card",
        "Computed, not measured: FLUX.1-dev's weights, the K/V of four conditions and, as an "
        f"assumption, {WORKING / 1e9:g} GB to work in. Where the sum is more than the card has, "
        "ComfyUI streams a part of the weights at every step; `keep_on: auto` then keeps K/V off "
        "the card as well. Compact conditions come first: compression 0.5 divides K/V by four, "
        "`fp8` by two. A negative prompt or image guidance doubles them.",
        cards(),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write to")
    options = parser.parse_args()
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    page = document(measured, options.docs / "images")
    (options.docs / "performance.md").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
