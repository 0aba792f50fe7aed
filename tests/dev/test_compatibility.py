"""docs/compatibility.md: what is recorded, how the page says it, and that no row is missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from comfyui_version import __version__
from helpers.compatibility import AREAS, rows_of

from dev.docs import compatibility
from dev.paths import ROOT

TESTS = ROOT / "tests"
CONFTEST = f"""
import sys
from pathlib import Path

sys.path.insert(0, {str(TESTS)!r})
from helpers.compatibility import Recorder


def pytest_configure(config):
    config.addinivalue_line("markers", "compatibility: as in the project")
    config.pluginmanager.register(Recorder(Path("recorded"), "1.10.0"))
"""
FILE = """
import pytest

row = pytest.mark.compatibility


@row("Faults", "power cut", "works", note="once")
def test_a():
    pass


@pytest.mark.parametrize("n", [1, pytest.param(2, marks=row("Hosts", "two", "refused"))])
def test_b(n):
    assert n == 1


@row("Hosts", "later", "works")
def test_c():
    pytest.skip("not here")


@pytest.mark.xdist_group("alone")
@row("Faults", "power cut", "works", "and again")
@row("Models", "both", "works with a limit")
def test_d():
    pass


def test_of_nothing():
    pass
"""


def run(folder: Path, *arguments: str) -> dict[str, list[dict[str, str]]]:
    """What a run of pytest in this folder leaves in the file of its host."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, check=False, timeout=60
    )
    return json.loads((folder / "recorded" / "1.10.0.json").read_text())


def outcomes(recorded: dict) -> dict[str, list[str]]:
    return {
        test.partition("::")[2]: [result["outcome"] for result in results]
        for test, results in recorded["tests"].items()
    }


@pytest.mark.parametrize("side_by_side", [(), ("-p", "xdist", "-n", "2", "--dist", "loadgroup")])
def test_outcomes_are_recorded_and_merged(tmp_path, side_by_side) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(FILE)
    first = outcomes(run(tmp_path, *side_by_side))
    assert first == {
        "test_a": ["passed"],
        "test_b[2]": ["failed"],
        "test_c": ["skipped"],
        "test_d": ["passed", "passed"],
    }
    (tmp_path / "test_it.py").write_text(FILE.replace("n == 1", "n"))
    assert outcomes(run(tmp_path, "-k", "test_b")) == {**first, "test_b[2]": ["passed"]}
    (tmp_path / "test_it.py").write_text(FILE.replace("test_d", "test_e"))
    renamed = outcomes(run(tmp_path, *side_by_side, "test_it.py", "-k", "test_e"))
    assert "test_d" not in renamed and "test_e" in renamed


def host(version: str, **rows: str) -> dict:
    return {
        "host": version,
        "tests": {
            f"test_x.py::{name}": [
                {"area": "Faults", "name": name, "verdict": "works", "note": "", "outcome": outcome}
            ]
            for name, outcome in rows.items()
        },
    }


def test_a_verdict_stands_only_where_its_tests_passed() -> None:
    page = compatibility.page(
        [host("0.33.0", a="passed", b="failed"), host("0.3.75", a="skipped", c="passed")]
    )
    table = page[page.index("## Faults") :].splitlines()[4:]
    assert table == [
        "|  | 0.3.75 | 0.33.0 | note |",
        "| --- | --- | --- | --- |",
        "| a | not run | works |  |",
        "| b | not run | **failed** |  |",
        "| c | works | not run |  |",
    ]


def test_one_failure_is_enough() -> None:
    one, other = host("1.0", a="passed"), host("1.0", a="failed")
    one["tests"]["test_y.py::a"] = other["tests"]["test_x.py::a"]
    assert "| a | **failed** |" in compatibility.page([one])


def test_two_promises_for_one_row_are_refused() -> None:
    one, other = host("1.0", a="passed"), host("2.0", a="passed")
    other["tests"]["test_x.py::a"][0]["verdict"] = "refused"
    with pytest.raises(ValueError, match="a is also said to be works"):
        compatibility.page([one, other])


def test_areas_have_titles() -> None:
    assert tuple(compatibility.AREAS) == AREAS


def test_every_marked_test_is_on_the_page(request: pytest.FixtureRequest) -> None:
    """Of those in this run; in a run of all tests, nothing else may be on it."""
    page = compatibility.PAGE.read_text(encoding="utf-8")
    lines = {
        (area, line.split(" | ")[0].removeprefix("| ")): line
        for area in AREAS
        if f"## {area}\n" in page
        for line in page.split(f"## {area}\n")[1].split("\n## ")[0].splitlines()[5:]
    }
    names = set(lines)
    # What only another host has is no test here.
    hosts = next(line for line in page.splitlines() if line.startswith("|  | ")).split(" | ")
    here = hosts.index(__version__) if __version__ in hosts else -1
    run_here = {name for name, line in lines.items() if line.split(" | ")[here] != "not run"}
    marked = {(row.area, row.name) for item in request.session.items for row in rows_of(item)}
    assert marked <= names
    files = {item.path for item in request.session.items}
    if files >= set(TESTS.rglob("test_*.py")) and not request.config.option.keyword:
        assert run_here <= marked
