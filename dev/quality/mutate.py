"""Mutation testing: puts faults into the core, one at a time, and counts those that tests notice.

    python -m dev.quality.mutate [--sample N] [--seed S] [MODULE ...]

A process that has imported the host, but not the extension, forks for each fault; the fork loads
the extension with it and runs those tests that reach the faulty line, the quickest files first,
until one fails. Which tests reach a line is measured beforehand, in a fork of its own.

It ends with 1 if fewer than 85 % of the faults are noticed.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType
from typing import Any

import hypothesis

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has only the thread that made it

from dev.load import ROOT, load_extension, load_host
from dev.quality.mutants import Mutant, mutants

CORE = ROOT / "omini2_core"
MODULES = ("condition", "compaction", "attention", "cache", "lora", "family")
# Not all that reach these modules, but those that say what the modules have to do.
TESTS = (
    "test_core_positions.py",
    "test_core_attention.py",
    "test_core_cache.py",
    "test_core_lora.py",
    "test_refusals.py",
)
LEAST = 0.85  # of the faults have to be noticed
PATIENCE = 60  # seconds of computing after which a fault that never ends counts as noticed
# pytest's own exit codes
NOTICED = 1
NOT_RUN = 4, 5  # it was called wrongly, or there was no test


@dataclass
class Reach:
    """Which tests run which lines.

    Attributes:
        tests: module and line -> ids of the tests that run it.
        seconds: id -> how long it took.
    """

    tests: dict[str, dict[int, list[str]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def files(self, mutant: Mutant) -> list[list[str]]:
        """The tests that reach a fault, by file, the quickest files first."""
        lines = self.tests[mutant.path.name]
        found = mutant.lines if mutant.deferred else lines
        ids = {test for line in found for test in lines.get(line, ())}
        files: dict[str, list[str]] = {}
        for test in sorted(ids, key=lambda test: self.seconds[test]):
            files.setdefault(test.partition("::")[0], []).append(test)
        return sorted(files.values(), key=lambda each: sum(self.seconds[test] for test in each))


def in_a_fork(work: Callable[[], int]) -> int:
    """Runs something silently in a process of its own; its status, -signal if it was ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            status = work()
        finally:
            os._exit(status)  # nothing of the parent's is ended by a child
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def pytest_run(tests: Sequence[str], *plugins: Any) -> int:
    import pytest

    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:timeout", "--rootdir", str(ROOT)]
    options += ["--hypothesis-profile", "mutation"]
    return int(pytest.main([*options, *tests], plugins=plugins))


class Recorder:
    """Notes which test runs which of the modules' lines."""

    def __init__(self, names: Sequence[str], file: Path) -> None:
        import coverage

        self._names, self._file = names, file
        include = [str(CORE / f"{name}.py") for name in names]
        self._coverage = coverage.Coverage(data_file=None, include=include, config_file=False)
        self._seconds: dict[str, float] = {}
        self._coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        self._coverage.stop()
        data = self._coverage.get_data()
        tests = {
            f"{name}.py": {
                line: [test for test in ids if test]
                for line, ids in data.contexts_by_lineno(str(CORE / f"{name}.py")).items()
            }
            for name in self._names
        }
        self._file.write_text(json.dumps({"tests": tests, "seconds": self._seconds}))


def measure(names: Sequence[str]) -> Reach:
    """Runs the tests once without a fault.

    Raises:
        SystemExit: they fail.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reach.json"
        paths = [str(ROOT / "tests" / name) for name in TESTS]
        if in_a_fork(lambda: pytest_run(paths, Recorder(names, file))):
            raise SystemExit("The tests fail without a fault too: run pytest to see why.")
        found = json.loads(file.read_text())
    tests = {
        name: {int(line): ids for line, ids in lines.items()}
        for name, lines in found["tests"].items()
    }
    return Reach(tests, found["seconds"])


@contextlib.contextmanager
def loaded_with(mutant: Mutant) -> Iterator[None]:
    """Importing the mutant's module gives the mutant."""
    get_code = SourceFileLoader.get_code

    def mutated(self: SourceFileLoader, name: str) -> CodeType | None:
        return mutant.code if Path(self.path) == mutant.path else get_code(self, name)

    SourceFileLoader.get_code = mutated  # type: ignore[method-assign]
    yield
    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


def noticed(mutant: Mutant, reach: Reach) -> bool:
    """Whether a test fails with this fault.

    Raises:
        RuntimeError: pytest didn't run the tests.
    """

    def run(tests: list[str]) -> int:
        resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
        with loaded_with(mutant):
            try:
                load_extension()
            except Exception:  # whatever it is, nobody could use the extension
                return NOTICED
        return pytest_run([f"{ROOT}/{test}" for test in tests])

    for tests in reach.files(mutant):
        status = in_a_fork(lambda tests=tests: run(tests))  # type: ignore[misc]
        if status in NOT_RUN:
            raise RuntimeError(f"pytest ended with {status} on {tests}")
        if status:
            return True
    return False


def warm_up() -> None:
    """Imports what every fork needs, and nothing of the extension."""
    load_host()
    for name in ("comfy.sample", "comfy_api.latest", "nodes", "pytest"):  # the host's nodes
        importlib.import_module(name)
    # A failing example is enough: it needn't be made smaller.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    ci = hypothesis.settings.get_profile("ci")
    hypothesis.settings.register_profile("mutation", ci, phases=phases)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", default=MODULES, metavar="MODULE")
    parser.add_argument("--sample", type=int, help="faults a module, at most; drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args()
    warm_up()
    reach = measure(options.modules)
    total = killed = 0
    for name in options.modules:
        every = list(mutants(CORE / f"{name}.py"))
        drawn = every
        if options.sample and options.sample < len(every):
            chosen = sorted(random.Random(options.seed).sample(range(len(every)), options.sample))
            drawn = [every[i] for i in chosen]
        start, found = time.monotonic(), 0
        for mutant in drawn:
            if noticed(mutant, reach):
                found += 1
            else:
                print(f"  not noticed: {mutant}", flush=True)
        seconds = time.monotonic() - start
        print(f"{name}: {found} of {len(drawn)} noticed, {len(every)} known, {seconds:.0f} s")
        total, killed = total + len(drawn), killed + found
    print(f"all: {killed} of {total} noticed, {killed / total:.1%}")
    return int(killed < LEAST * total)


if __name__ == "__main__":
    sys.exit(main())
