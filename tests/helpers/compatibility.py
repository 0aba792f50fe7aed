"""Records what the tests of docs/compatibility.md's rows gave on this host.

A test marked `compatibility(area, name, verdict, note)` answers a row; a row can have many. At the
end of a run their outcomes are merged into `test_output/compatibility/<host version>.json`, from
which `python -m dev.docs.compatibility` writes the page.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

AREAS = ("Hosts", "Models", "Editing models", "Neighbours", "Faults")
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
    """The plugin; `folder` takes one file a host.

    With pytest-xdist tests are collected and run in its workers; what they find travels with their
    reports, and with what a worker says at its end, to the process that writes the file.
    """

    def __init__(self, folder: Path, host_version: str) -> None:
        self.file = folder / f"{host_version}.json"
        self.version = host_version
        self.collected: set[str] = set()
        self.whole_files: set[str] = set()
        self.results: dict[str, list[dict[str, Any]]] = {}

    @pytest.hookimpl(tryfirst=True)  # before -k and -m take tests out, and xdist names groups
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        self.collected = {item.nodeid for item in items if rows_of(item)}
        if not any("::" in argument for argument in config.args):
            self.whole_files = {file_of(item.nodeid) for item in items}
        for item in items:
            if rows := rows_of(item):
                answers = [item.nodeid, [asdict(row) for row in rows]]
                item.user_properties.append(("compatibility", answers))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = OUTCOMES.index(report.outcome)
        if report.passed and report.when != "call":
            outcome = 0  # nothing has been tested by setting up and tearing down
        for key, value in report.user_properties:
            if key == "compatibility":
                test, rows = value
                begun = [{**row, "outcome": OUTCOMES[0]} for row in rows]
                for result in self.results.setdefault(test, begun):
                    result["outcome"] = OUTCOMES[max(OUTCOMES.index(result["outcome"]), outcome)]

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """The end of one of xdist's workers, each of which has collected all tests."""
        found = getattr(node, "workeroutput", {})  # nothing of one that crashed
        self.collected.update(found.get("collected", ()))
        self.whole_files.update(found.get("whole_files", ()))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput["collected"] = sorted(self.collected)
            session.config.workeroutput["whole_files"] = sorted(self.whole_files)
        elif self.results:
            self._write(session.config.rootpath)

    def _write(self, root: Path) -> None:
        known = json.loads(self.file.read_text())["tests"] if self.file.exists() else {}
        # Tests that are no longer there say nothing any more.
        for test in list(known):
            gone = file_of(test) in self.whole_files and test not in self.collected
            if gone or not (root / file_of(test)).exists():
                del known[test]
        tests = dict(sorted({**known, **self.results}.items()))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps({"host": self.version, "tests": tests}, indent=1) + "\n")


def file_of(nodeid: str) -> str:
    """The file that a test is in."""
    return nodeid.partition("::")[0]
