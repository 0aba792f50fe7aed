"""The paper's experiments in small, on the demo model: `python -m benchmarks.study`.

Writes docs/study.md (only what lies between its markers, once it exists), its plots and all raw
numbers. Whatever is drawn and measured is kept in .cache/study, so a study that was stopped goes
on, and one whose LoRA has changed draws that LoRA's cells alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import classifier, host
from benchmarks.study import drift, examples, report
from benchmarks.study.cells import STEPS, Cell
from benchmarks.study.experiments import WATCHED, Experiment, edit_reuse, experiments
from benchmarks.study.measures import rounded
from benchmarks.study.work import BATCH, Places, done
from dev.paths import CACHE, ROOT

TEMPLATE = Path(__file__).with_name("template.md")


def main(arguments: list[str] | None = None) -> int:
    """Command line; 1 if a LoRA is missing."""
    options = _options(arguments)
    begun = time.monotonic()
    places = Places(options.model, options.loras, options.cache)
    chosen = [e for e in experiments(options.scenes) if not options.only or e.name in options.only]
    cells, references, limits = _plan(chosen)
    missing = _missing(cells, options.loras)
    drawable = [cell for cell in cells if not cell.loras & set(missing)]
    results = done(places, drawable, references, limits, options.scenes, options.workers)

    if options.workers:  # its threads and the host, which the workers had to themselves
        host.start("cpu")
    timing = None
    if not options.only or "timing" in options.only:
        timing = _timing(places, options, missing)
        missing = sorted({*missing, *timing.pop("missing")})
    model = classifier.load(places.classifier)
    facts = {
        "machine": host.machine(),
        "scenes": options.scenes,
        "steps": STEPS,
        "classifier_accuracy": classifier.accuracy(model),
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "missing": missing,
    }
    _write(options, chosen, results, timing, facts)
    if not options.only:  # or columns would be missing
        first, path = min(BATCH, options.scenes), options.docs / "images/study-examples.png"
        examples.sheet(places.store(), set(results), first, path)
    if set(examples.EDIT_COLUMNS.values()) <= set(results):
        first, path = min(BATCH, options.scenes), options.docs / "images/study-edits.png"
        examples.edit_sheet(places.store(), set(results), first, path)
    for name in missing:
        print(f"missing: {options.loras / name}.safetensors; its cells were not measured")
    return 1 if missing else 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    names = [e.name for e in experiments(1)] + ["timing"]
    parser = argparse.ArgumentParser("python -m benchmarks.study", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--scenes", type=int, default=200, help="held-out scenes in each cell")
    parser.add_argument("--only", nargs="+", choices=names, metavar="EXPERIMENT",
                        help=f"of {', '.join(names)}; other sections stay")  # fmt: skip
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1,
                        help="processes; 0 does it in this one")  # fmt: skip
    parser.add_argument("--model", type=Path, default=ROOT / "demo_model", metavar="FOLDER")
    parser.add_argument("--loras", type=Path, default=None, metavar="FOLDER")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", metavar="FOLDER")
    parser.add_argument("--cache", type=Path, default=CACHE / "study", metavar="FOLDER")
    parser.add_argument("--quick", action="store_true", help="tiny timings: does it work at all?")
    options = parser.parse_args(arguments)
    options.loras = options.loras or options.model / "loras"
    return options


def _plan(chosen: list[Experiment]) -> tuple[list[Cell], dict[Cell, Cell], dict[Cell, int]]:
    """All cells in the order of the experiments, each once; what they are compared with; and how
    many scenes those have that have fewer."""
    cells = list(dict.fromkeys(row.cell for e in chosen for row in e.rows))
    references = {row.cell: row.against for e in chosen for row in e.rows if row.against}
    limits = {cell: count for e in chosen for cell, count in e.limits.items()}
    return cells, references, limits


def _missing(cells: list[Cell], loras: Path) -> list[str]:
    needed = {lora for cell in cells for lora in cell.loras}
    return sorted(name for name in needed if not (loras / f"{name}.safetensors").is_file())


@torch.inference_mode()
def _timing(places: Places, options: argparse.Namespace, missing: list[str]) -> dict[str, Any]:
    from benchmarks.study import timing
    from benchmarks.study.experiments import EDGES
    from benchmarks.study.studio import Studio

    repeats = 1 if options.quick else 3
    absent = [EDGES] if not (places.loras / f"{EDGES}.safetensors").is_file() else []
    splits = []
    if not absent:
        counts = (0, 1, 2) if options.quick else timing.COUNTS
        studio = Studio(places.model, places.loras)
        splits += timing.demo_model(studio, repeats, counts)
    splits += timing.flux_shaped(options.quick, repeats)
    return timing.report(splits) | {"missing": absent}


def _write(
    options: argparse.Namespace,
    chosen: list[Experiment],
    results: report.Results,
    timing: dict[str, Any] | None,
    facts: dict[str, Any],
) -> None:
    page, numbers = options.docs / "study.md", options.cache / "study.json"
    document = (page if page.is_file() else TEMPLATE).read_text(encoding="utf-8")
    raw = json.loads(numbers.read_text()) if numbers.is_file() else {}
    raw.setdefault("cells", {})
    raw.setdefault("experiments", {})
    for experiment in chosen:
        found = report.figures(experiment, results)
        needed = {lora for row in experiment.rows for lora in row.cell.loras}
        missing = [name for name in facts["missing"] if name in needed]
        document = report.inserted(
            document, experiment.name, report.section(experiment, found, missing)
        )
        raw["experiments"][experiment.name] = found
        if experiment.plots:
            path = options.docs / "images" / f"study-{experiment.name}.png"
            report.plot(experiment, found, path)
    for cell, result in results.items():
        raw["cells"][cell.name] = {
            "cell": cell.described(),
            "values": rounded(
                {n: report.numbers(v) for n, v in result["values"].items()}
            ),
        }  # fmt: skip
    if WATCHED in results:
        document = report.inserted(document, "edit_drift", _drift(options, results))
    if timing is not None:
        document = report.inserted(document, "timing", report.timing_section(timing))
        raw["timing"] = timing
        report.plot_timing(timing, options.docs / "images/study-timing.png")
    raw["facts"] = facts | {"cells": len(raw["cells"])}
    if not options.only:  # they are of the whole page
        document = report.inserted(document, "facts", _facts(raw["facts"]))
    page.parent.mkdir(parents=True, exist_ok=True)
    numbers.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(document, encoding="utf-8")
    numbers.write_text(json.dumps(_plain(raw), separators=(",", ":")) + "\n", encoding="utf-8")


def _drift(options: argparse.Namespace, results: report.Results) -> str:
    """K/V by block and step; the plot sets them against the error of what reuses them."""
    store = Places(options.model, options.loras, options.cache).store()
    parts = []
    for first in range(0, options.scenes, BATCH):
        count = min(BATCH, options.scenes - first)
        parts.append(store.pictures(WATCHED, first, count, examples.not_drawn)["drifts"])
    drifts = np.concatenate(parts)
    reused = [row.cell for row in edit_reuse().rows if row.group == "joint" and row.x > 1]
    errors = [results[cell]["values"]["psnr_against"] for cell in reused]
    drift.plot(drifts, errors, options.docs / "images/study-edit_drift.png")
    return drift.section(drifts) + "\n\n![drift](images/study-edit_drift.png)"


def _facts(facts: dict[str, Any]) -> str:
    return (
        f"{facts['machine']}. {facts['scenes']} held-out scenes in each of {facts['cells']} cells, "
        f"{facts['steps']} steps each; this run took {facts['minutes']} minutes, what it found "
        "already drawn not counted. The classifier behind the FID-like distance gets everything "
        f"right (every colour, every shape, the background) in {facts['classifier_accuracy']:.0%} "
        "of 500 other held-out scenes."
    )


def _plain(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):
        return None if math.isnan(value) else float(f"{value:.6g}")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
