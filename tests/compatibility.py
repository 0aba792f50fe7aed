"""Records what the tests of docs/compatibility.md's rows gave on this host.

A test marked `compatibility(area, name, verdict, note)` answers a row; a row can have many. At the
end of a run their outcomes are merged into `test_output/compatibility/<host version>.json`, from
which `python -m dev.docs.compatibility` writes the page.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

AREAS = ("Hosts", "Models", "Neighbours", "Faults")
VERDICTS = ("works", "works with a limit", "refused")
OUTCOMES = ("skipped", "passed", "failed")  # each counts for more than those before it


@dataclass(frozen=True)
class Row:
    """What a marked test answers."""

    area: str
    name: str
    verdict: str
    note: str = ""

    def __post_init__(self) -> None:
        assert self.area in AREAS, f"{self.area} is none of {AREAS}"
        assert self.verdict in VERDICTS, f"{self.verdict} is none of {VERDICTS}"


def rows_of(item: pytest.Item) -> list[Row]:
    """The rows that a test answers."""
    return [Row(*mark.args, **mark.kwargs) for mark in item.iter_markers("compatibility")]


class Recorder:
    """The plugin; `folder` takes one file a host."""

    def __init__(self, folder: Path, host_version: str) -> None:
        self.file = folder / f"{host_version}.json"
        self.version = host_version
        self.collected: set[str] = set()
        self.whole_files: set[str] = set()
        self.results: dict[str, list[dict[str, Any]]] = {}

    @pytest.hookimpl(tryfirst=True)  # before -k and -m take tests out
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        self.collected = {item.nodeid for item in items if rows_of(item)}
        if not any("::" in argument for argument in config.args):
            self.whole_files = {file_of(item.nodeid) for item in items}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Iterator[None]:
        report = yield
        outcome = OUTCOMES.index(report.outcome)
        if report.passed and report.when != "call":
            outcome = 0  # nothing has been tested by setting up and tearing down
        for number, row in enumerate(rows_of(item)):
            results = self.results.setdefault(item.nodeid, [])
            if number == len(results):
                results.append({**asdict(row), "outcome": OUTCOMES[0]})
            before = OUTCOMES.index(results[number]["outcome"])
            results[number]["outcome"] = OUTCOMES[max(before, outcome)]
        return report

    def pytest_sessionfinish(self) -> None:
        if not self.results:
            return
        known = json.loads(self.file.read_text())["tests"] if self.file.exists() else {}
        # Tests that are no longer there say nothing any more.
        for test in list(known):
            if file_of(test) in self.whole_files and test not in self.collected:
                del known[test]
        tests = dict(sorted({**known, **self.results}.items()))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"host": self.version, "tests": tests}, indent=1) + "\n")


def file_of(nodeid: str) -> str:
    """The file that a test is in."""
    return nodeid.partition("::")[0]
