"""Tables, sentences and plots from what was measured; nothing in here is a result."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import intervals, metrics
from benchmarks.intervals import Interval
from benchmarks.study.experiments import Experiment, Row
from benchmarks.study.timing import MOST
from dev.markdown import row as _line

# measure -> (head of its column, decimals)
HEADS = {
    "f1": ("edge F1", 3),
    "offset": ("offset, px", 1),
    "centroid": ("middle of the things off by, px", 1),
    "psnr": ("PSNR, dB", 1),
    "ssim": ("SSIM", 3),
    "psnr_hole": ("PSNR in the hole, dB", 1),
    "ssim_hole": ("SSIM in the hole", 3),
    "f1_hole": ("edge F1 in the hole", 3),
    "right": ("prompt right", 3),
    "overlap": ("silhouette IoU", 3),
    "recall_kept": ("recall under kept tokens", 3),
    "recall_dropped": ("recall under dropped tokens", 3),
    "recall_thin": ("recall of thin parts", 3),
    "tokens": ("condition tokens", 0),
    "psnr_against": ("PSNR to its first row's pictures, dB", 1),
    "ssim_against": ("SSIM to its first row's pictures", 3),
    "edited": ("edit right, all else kept", 3),
    "asked": ("what was asked for is there", 3),
    "kept": ("PSNR of what was to stay, dB", 1),
    "moved": ("edges that were to stay moved by, px", 2),
    "share": ("rows computed", 2),
    "largest": ("largest difference of latents", 5),
    "fid": ("FID-like", 2),
}
Results = dict[Any, dict[str, Any]]


def estimate(result: dict[str, Any], measure: str) -> Interval | None:
    """A cell's figure with its interval; None if it isn't measured there."""
    if measure == "fid":
        return intervals.distance(result["features"], result["truth"], metrics.frechet)
    values = result["values"].get(measure)
    if values is None:
        return None
    numbers = [math.nan if v is None else v for v in values]
    if measure in ("right", "edited", "asked"):
        return intervals.share(numbers)
    if measure == "largest":  # a largest difference has no mean worth stating
        return Interval(max(numbers), math.nan, math.nan, len(numbers))
    return intervals.mean(numbers)


def figures(experiment: Experiment, results: Results) -> dict[str, Any]:
    """Every number of an experiment, for JSON and for the tables."""
    rows = []
    for row in experiment.rows:
        result = results.get(row.cell)
        shown = {m: estimate(result, m) for m in experiment.measures} if result else None
        rows.append({"labels": row.labels, "estimates": shown, "cell": row.cell.name})
    pairs = []
    for pair in experiment.pairs:
        if pair.one in results and pair.other in results:
            differences = {}
            for m in pair.measures:
                one, other = (
                    numbers(results[cell]["values"][m]) for cell in (pair.one, pair.other)
                )
                n = min(len(one), len(other))
                differences[m] = intervals.difference(one[:n], other[:n])
            pairs.append({"what": pair.what, "differences": differences})
    missing = sorted({row.cell.name for row in experiment.rows if row.cell not in results})
    return {"rows": rows, "pairs": pairs, "missing_cells": missing}


def numbers(values: Sequence[float | None]) -> list[float]:
    """NaN for what JSON has as null."""
    return [math.nan if v is None else v for v in values]


def section(experiment: Experiment, found: dict[str, Any], missing: Sequence[str]) -> str:
    """What goes between an experiment's markers."""
    lines = []
    if missing:
        names = ", ".join(f"{name}.safetensors" for name in missing)
        lines += [f"**Not complete: {names} missing.**", ""]
    heads = [*experiment.columns, *(HEADS[m][0] for m in experiment.measures)]
    lines += [_line(heads), _line(["---"] * len(heads))]
    for each in found["rows"]:
        if each["estimates"] is None:
            cells = ["not measured"] * len(experiment.measures)
        else:
            cells = [shown(m, each["estimates"][m]) for m in experiment.measures]
        lines.append(_line([*each["labels"], *cells]))
    if found["pairs"]:
        lines += ["", "The same scenes, one less the other:", ""]
        lines += [_line(["", "difference (95 % interval)"]), _line(["---", "---"])]
        for pair in found["pairs"]:
            said = [
                f"{HEADS[m][0]} {_signed(each, HEADS[m][1])}"
                for m, each in pair["differences"].items()
                if each.count
            ]
            lines.append(_line([pair["what"], "; ".join(said)]))
    if experiment.plots:
        lines += ["", f"![{experiment.name}](images/study-{experiment.name}.png)"]
    return "\n".join(lines)


def shown(measure: str, estimate: Interval | None) -> str:
    """A figure and its interval, as precise as the measure is."""
    if estimate is None or estimate.count == 0 or math.isnan(estimate.value):
        return "-"
    digits = HEADS[measure][1]
    if measure == "largest":
        return "0" if estimate.value == 0 else f"{estimate.value:.2g}"
    if math.isnan(estimate.low) or estimate.low == estimate.high:
        return f"{estimate.value:.{digits}f}"
    return (
        f"**{estimate.value:.{digits}f}** ({estimate.low:.{digits}f} to {estimate.high:.{digits}f})"
    )


def _signed(each: Interval, digits: int) -> str:
    if math.isnan(each.low):
        return f"{each.value:+.{digits}f}"
    return f"**{each.value:+.{digits}f}** ({each.low:+.{digits}f} to {each.high:+.{digits}f})"


def timing_section(timing: dict[str, Any]) -> str:
    """Measured shares and the counted ones for FLUX.1-dev."""
    lines = []
    for model in dict.fromkeys(s["model"] for s in timing["measured"]):
        of = [s for s in timing["measured"] if s["model"] == model]
        lines += [
            f"**{model}**, measured; times are over those of the same model's linear layers "
            "without conditions.",
            "",
            _line(["computed", "conditions", "attention", "linear layers", "other",
                   "attention / linear"]),
            _line(["---"] * 6),
        ]  # fmt: skip
        for computed in dict.fromkeys(s["computed"] for s in of):
            some = [s for s in of if s["computed"] == computed]
            unit = some[0]["linear"] or math.nan
            for s in some:
                parts = [f"{s[part] / unit:.2f}" for part in ("attention", "linear", "other")]
                share = s["attention"] / s["linear"] if s["linear"] else math.nan
                lines.append(_line([computed, str(s["conditions"]), *parts, f"**{share:.2f}**"]))
        lines.append("")
        for computed in dict.fromkeys(s["computed"] for s in of):
            lines.append(_measured_overtaking([s for s in of if s["computed"] == computed]))
        lines.append("")
    lines += [
        "**FLUX.1-dev**, counted by `benchmarks/costs.py`, 512 text tokens: the share of a steady "
        "step's FLOPs that is attention.",
        "",
        _line(["picture", "each condition", "computed", "0", "1", "2", "4", "8",
               "attention is more than half with"]),
        _line(["---"] * 9),
    ]  # fmt: skip
    for each in timing["counted"]:
        count = each["overtakes_at"]
        lines.append(
            _line([each["picture"], each["condition"], each["computed"],
                   *(f"{share:.0%}" for share in each["attention_share"].values()),
                   f"not up to {MOST}" if count is None else f"{count} conditions"])
        )  # fmt: skip
    return "\n".join([*lines, "", "![timing](images/study-timing.png)"])


def _measured_overtaking(splits: Sequence[dict[str, Any]]) -> str:
    first = next((s["conditions"] for s in splits if s["attention"] > s["linear"]), None)
    if first is None:
        said = f"isn't above that of the linear layers with up to {splits[-1]['conditions']}"
    else:
        said = f"is first above that of the linear layers with {first}"
    return f"- Computed {splits[0]['computed']}: attention's time {said} condition(s)."


def inserted(document: str, name: str, text: str) -> str:
    """The document with what lies between a section's two markers replaced.

    Raises:
        ValueError: it has no such markers.
    """
    begin, end = f"<!-- study:{name} -->", f"<!-- /study:{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    if not pattern.search(document):
        raise ValueError(f"docs/study.md: the markers of {name} are missing")
    return pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", document)


def plot(experiment: Experiment, found: dict[str, Any], path: Path) -> None:
    """One panel a measure: lines of the groups over x, with intervals."""
    plt = pyplot()
    figure, panels = plt.subplots(
        1, len(experiment.plots), figsize=(3.8 * len(experiment.plots), 3), squeeze=False
    )
    for panel, measure in zip(panels[0], experiment.plots, strict=True):
        groups = dict.fromkeys(row.group for row in experiment.rows if row.group)
        for number, group in enumerate(groups):
            points = []
            for row, given in zip(experiment.rows, found["rows"], strict=True):
                each = given["estimates"] and given["estimates"][measure]
                if row.group == group and each and each.count and not math.isnan(each.value):
                    points.append((_x(experiment, row, given), *each[:3]))
            if points:
                x, y, low, high = zip(*sorted(points), strict=True)
                errors = [
                    [max(a - b, 0) if b == b else 0 for a, b in zip(y, low, strict=True)],
                    [max(b - a, 0) if b == b else 0 for a, b in zip(y, high, strict=True)],
                ]
                look = {"color": f"C{number}", "marker": "o", "markersize": 3, "capsize": 2}
                panel.errorbar(x, y, errors, label=group, **look)
        panel.set_xlabel(experiment.x_label)
        panel.set_ylabel(HEADS[measure][0])
        if experiment.logarithmic:
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=7)
    save(plt, figure, path)


def _x(experiment: Experiment, row: Row, given: dict[str, Any]) -> float:
    if experiment.name == "pruning":
        return float(given["estimates"]["tokens"].value)
    return row.x


def plot_timing(timing: dict[str, Any], path: Path) -> None:
    """Attention over linear layers by number of conditions."""
    plt = pyplot()
    figure, panel = plt.subplots(figsize=(5, 3))
    series: dict[str, list[tuple[int, float]]] = {}
    for s in timing["measured"]:
        if s["linear"]:
            name = f"{s['model']}, {s['computed']}"
            series.setdefault(name, []).append((s["conditions"], s["attention"] / s["linear"]))
    for name, points in series.items():
        panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    panel.axhline(1, color="grey", linewidth=0.8)
    panel.set_xlabel("conditions")
    panel.set_ylabel("attention / linear layers, time")
    panel.legend(fontsize=7)
    panel.grid(alpha=0.3)
    save(plt, figure, path)


def pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"figure.constrained_layout.use": True, "font.size": 8})
    return plt


def save(plt: Any, figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90, metadata={"Software": None})
    plt.close(figure)
