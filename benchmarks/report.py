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

from benchmarks import costs, references
from benchmarks.side_by_side import spread
from dev.markdown import marked, part_of, table
from dev.paths import ROOT

DOCS = ROOT / "docs"
OVER_PLAIN = ("once, over plain", "once, over plain, prefill included")
KEPT = "simulated", "found"  # parts of the page that `benchmarks.simulate` and people write


READING = """### How to read it

- *once, over plain*: a whole picture, prefill included, over the same picture without \
conditions. What is left at full size is attention over more keys, which reuse can't take away; \
fewer tokens can.
- *every step over once*: what the original does over what this does, on the same conditions.
- *over cached steps alone*: a second seed. 4 steps of a run that finds its K/V already there, \
over what 4 cached steps take (8 steps less 4). 1 is no prefill at all.
- *alone, over plain FLUX on*: prefill, over as many tokens in one forward pass of plain FLUX.
- Ratios that differ from 1 by two or three percent are noise as the spread shows it, below 1 as \
well as above."""


def table_of(results: dict[str, Any]) -> str:
    """The figures of `benchmarks.performance`."""
    head = (
        "figure", "steps", "by processor time", "by the clock", "FLOPs", "over the FLOPs",
        "GFLOP: run / base", "MB read a step: with / without", "K/V", "must reach", "reached",
    )  # fmt: skip
    rows = []
    for f in results["figures"]:
        clock, processor = statistics.median(f["clock"]), statistics.median(f["processor"])
        best = processor if processor > 0 else clock
        over = best / f["predicted"]
        rows.append([
            f["what"], f.get("steps", results["steps"]), spread(f["processor"], 3),
            spread(f["clock"], 3), f"{f['predicted']:.3f}", f"{over:.3f}",
            " / ".join(f"{flops / 1e9:.0f}" for flops in f["flops"]),
            " / ".join(f"{read / 1e6:.0f}" for read in f["step_bytes"]),
            f"{f['kv_bytes'] / 1e6:.1f} MB", goal(f), reached(f, best, over),
        ])  # fmt: skip
    return table(head, rows)


def goal(figure: dict[str, Any]) -> str:
    """What a figure must reach."""
    if figure["limit"] is not None:
        return f"at most {figure['limit']:g}"
    return figure["note"] or "-"


def reached(figure: dict[str, Any], value: float, over: float) -> str:
    """Whether it does."""
    right = {"full size": over <= 1.10, "every step": over >= 0.95}.get(
        figure["name"], figure["met"]
    )
    if figure["limit"] is not None:
        right = value <= figure["limit"]
    return "-" if right is None else "yes" if right else "**no**"


def joined(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Several results of `benchmarks.performance`, measured one after the other, as one."""
    figures = [
        {**figure, "steps": results["steps"]}
        for results in measured
        for figure in results["figures"]
    ]
    pairs = [len(figure["clock"]) for figure in figures]
    return {
        **measured[-1],
        "figures": figures,
        "pairs": f"{min(pairs)} to {max(pairs)} pairs of runs a figure",
        "load": [measured[0]["load"][0], measured[-1]["load"][1]],
    }


def plots(results: dict[str, Any], folder: Path) -> list[tuple[str, str]]:
    """Cost against the number of conditions, and measured and counted cost against that of their
    tokens: (file's name, what it shows)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []

    def save(figure: Any, name: str, shows: str) -> None:
        figure.savefig(folder / name, dpi=110)
        pyplot.close(figure)
        drawn.append((name, shows))

    points = [
        (int(f["name"].split()[1]), statistics.median(f["processor"]), f["kv_bytes"] / 1e6)
        for f in results["figures"]
        if f["name"].startswith("growth")
    ]
    if len(points) > 1:
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
        counts, *columns = (list(map(float, column)) for column in zip(*points, strict=True))
        labels = "time over plain FLUX", "K/V in MB"
        for axes, values, label in zip(panels, columns, labels, strict=True):
            slope, start = statistics.linear_regression(counts, values)
            r2 = statistics.correlation(counts, values) ** 2
            axes.plot(counts, values, "o", color="#2a6f97")
            fit, said = [start + slope * n for n in counts], f"{start:.3g} + {slope:.3g} n"
            axes.plot(counts, fit, color="#bc4749", label=f"{said}, R² {r2:.4f}")
            axes.set(xlabel="conditions", ylabel=label)
            axes.legend()
            axes.grid(alpha=0.3)
        save(figure, "performance-growth.png", "Time and bytes against conditions")
    found = [f for f in results["figures"] if f["what"].endswith(OVER_PLAIN)]
    if len(found) > 1:
        per_token = max(f["kv_bytes"] for f in found) / max(tokens_of(f) for f in found)
        found.sort(key=lambda f: f["kv_bytes"])
        tokens = [f["kv_bytes"] / per_token for f in found]
        counted = [f["predicted"] for f in found]
        measured = [statistics.median(f["processor"]) for f in found]
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        axes.plot(tokens, counted, "_", color="#bc4749", ms=14, label="FLOPs")
        axes.plot(tokens, measured, "o", color="#2a6f97", label="measured")
        axes.set(xlabel="condition tokens, computed once", ylabel="time over plain FLUX",
                 xscale="log")  # fmt: skip
        axes.legend()
        axes.grid(alpha=0.3)
        save(figure, "performance-tokens.png", "Time against tokens")
    return drawn


def tokens_of(figure: dict[str, Any]) -> int:
    """Condition tokens of a figure, from what it says it is: "4 x 64 tokens, ..."."""
    count, _, tokens, *_ = figure["what"].split()
    return int(count) * int(tokens)


def counted() -> str:
    """What conditions cost on FLUX.1-dev, counted."""
    ways = (("joint, every step", True, 1), ("joint, every 5", True, 5),
            ("independent, once", False, None))  # fmt: skip
    rows = []
    for tokens, count in ((t, n) for t in (1024, 256, 64) for n in (1, 2, 4)):
        kinds = [[costs.ConditionCost(tokens, *way)] * count for _, *way in ways]
        ratios = (costs.ratio(costs.FLUX1_DEV, 512, 1024, kind, 28) for kind in kinds)
        rows.append([f"{count} x {tokens} tokens", *(f"{ratio:.2f}" for ratio in ratios)])
    return table(("conditions", *(name for name, *_ in ways)), rows)


def gpu_table(results: dict[str, Any]) -> str:
    """The figures of `benchmarks.gpu`."""
    head = ("weights", "picture", "conditions", "compression", "s/step", "over plain",
            "every step over it", "over the FLOPs", "peak memory",
            "share of the FLOP limit")  # fmt: skip
    rows = [
        [
            *(row["weights"], row["picture"], row["conditions"], f"{row['compression']:g}"),
            f"{statistics.median(row['seconds']):.3f}", spread(row["over_plain"], 3),
            spread(row["every_step_over"], 3),
            f"{statistics.median(row['over_plain']) / row['predicted']:.3f}",
            f"{row['peak'] / 1e9:.1f} GB", f"{row['flop_share']:.0%}",
        ]
        for row in results["rows"]
    ]  # fmt: skip
    return table(head, rows)


def document(measured: Sequence[dict[str, Any]], images: Path, page: str) -> str:
    """The whole page.

    Args:
        page: as it was, with the parts that others write.
    """
    parts = [
        "# Performance",
        "Every ratio is of runs that alternate on the same machine: the median, and in brackets "
        "from where to where they lie. *FLOPs* is the same ratio of counted operations, *over the "
        "FLOPs* the measured ratio divided by it: 1 is a cost that nothing but arithmetic makes. "
        "Counts come from `benchmarks/costs.py`, which `tests/benchmarks/test_costs.py` holds to "
        "the operations that PyTorch counts. Where other programs ran on the same cores, processor "
        "time is the column to trust.",
    ]
    editing = [results for results in measured if "references" in results]
    measured = [results for results in measured if results not in editing]
    on_cpu = [results for results in measured if "rows" not in results]
    if on_cpu:
        results = joined(on_cpu)
        shape = results["shape"]
        parts += [
            "## On a FLUX-shaped model",
            f"Random weights, hidden {shape['hidden']}, {shape['depth']} double and "
            f"{shape['depth_single']} single blocks, 512 text tokens, a picture of 1024 tokens "
            "(512x512 pixels), driven through the nodes and the stock sampler's path: "
            "`.venv/bin/python -m benchmarks.performance --json FILE`.",
            table_of(results),
            f"{results['machine']}; {results['pairs']}; load average {results['load'][0]:.1f} at "
            f"the start, {results['load'][1]:.1f} at the end.",
            *(f"*{f['what']}*: {f['note']}." for f in results["figures"] if f["note"]),
            *(f"![{shows}](images/{name})" for name, shows in plots(results, images)),
            READING,
        ]
    for results in measured:
        if "rows" in results:
            parts += [
                "## On a GPU",
                gpu_table(results),
                f"{results['machine']}; {results['steps']} steps, {results['repeats']} pairs.",
            ]
    if len(on_cpu) == len(measured):
        parts += [
            "## On a GPU",
            "Nothing was measured: no GPU was at hand. One command measures it: "
            "`.venv/bin/python -m benchmarks.gpu --json gpu.json`.",
        ]
    if editing:
        parts.append(references.section(editing))
    parts += [
        "## On FLUX.1-dev, counted",
        "FLOPs over those of plain FLUX.1-dev: 512x512 pixels, 512 text tokens, 28 steps. A wider "
        "model spends a smaller share of its work in attention, so conditions cost less there. A "
        "condition costs its own way through the model each time that it is computed, which reuse "
        "takes away, and longer attention at every step, which only fewer tokens do.",
        counted(),
        *(marked(name, part_of(page, name)) for name in KEPT),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder to write to")
    options = parser.parse_args()
    measured = [json.loads(path.read_text(encoding="utf-8")) for path in options.files]
    path = options.docs / "performance.md"
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    path.write_text(document(measured, options.docs / "images", page), encoding="utf-8")


if __name__ == "__main__":
    main()
