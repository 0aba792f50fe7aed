"""The page that the benchmarks write: what was measured, what was computed, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dev.markdown import marked, part_of
from dev.paths import ROOT


def figure(name: str, ratio: float, **changes: object) -> dict:
    return {
        "name": name, "what": f"{name} over plain", "clock": [ratio, ratio + 0.01],
        "processor": [ratio, ratio], "predicted": 1.0, "flops": [20e9, 10e9],
        "step_bytes": [3e6, 2e6], "kv_bytes": 1e6, "limit": None, "met": None, "note": "",
        **changes,
    }  # fmt: skip


@pytest.fixture
def measured(tmp_path) -> list[Path]:
    figures = [
        figure("one token", 1.01, limit=1.02),
        figure("compact", 1.07, limit=1.04),
        figure("full size", 1.2, note="at most 1.10x of the FLOPs"),
        figure("every step", 0.96, note="at least 95 % of the FLOP ratio"),
        *(figure(f"growth {n}", 1 + n / 100, kv_bytes=n * 1e6) for n in (1, 2, 4)),
    ]
    shape = {"hidden": 768, "depth": 2, "depth_single": 4}
    common = {"machine": "a machine", "repeats": 2, "load": [0.5, 1.5], "shape": shape}
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, steps, part in zip(paths, (28, 8), (figures[:4], figures[4:]), strict=True):
        path.write_text(json.dumps({**common, "steps": steps, "figures": part}), encoding="utf-8")
    return paths


def test_the_page(measured, tmp_path) -> None:
    before = f"# Older\n\n{marked('simulated', 'A table.')}\n"
    (tmp_path / "performance.md").write_text(before, encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "benchmarks.report",
        *map(str, measured),
        "--docs",
        str(tmp_path),
    ]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    page = (tmp_path / "performance.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    verdicts = {row.split("|")[1].strip(): row.split("|")[-2].strip() for row in rows}
    assert [row.split("|")[2].strip() for row in rows if "over plain |" in row] == (
        ["28"] * 4 + ["8"] * 3
    )
    assert verdicts["one token over plain"] == "yes"
    assert verdicts["compact over plain"] == "**no**"
    assert verdicts["full size over plain"] == "**no**"
    assert verdicts["every step over plain"] == "yes"
    assert "no GPU was at hand" in page
    assert (tmp_path / "images" / "performance-growth.png").stat().st_size > 1000
    # What others have written stays.
    assert part_of(page, "simulated") == "A table." and part_of(page, "found") == ""
