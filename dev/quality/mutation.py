"""Mutation testing with cosmic-ray: `python -m dev.quality.mutation [--sample N] [MODULE ...]`.

cosmic-ray says which faults there are and writes the module with one of them. A process that has
imported the host, but not the extension, forks for each; the fork loads the extension with the
fault and runs the quick tests of the core, a file at a time, until one fails.

It ends with 1 if fewer than 85 % of the faults are noticed.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import random
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import ndiff
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType

import hypothesis
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has only the thread that made it

from dev.load import ROOT, load_extension, load_host

CORE = ROOT / "omini2_core"
# Module -> the tests that say what it has to do, those that notice most of its faults first.
TESTS = {
    "tokens/condition": ("core_positions", "core_cache", "core_lora"),
    "tokens/compact": ("core_positions",),
    "engine/attention": ("core_attention",),
    "cache/policy": ("core_cache",),
    "cache/run_cache": ("core_cache", "store", "kept"),
    "lora/deltas": ("core_lora",),
    "lora/file": ("core_lora",),
    "lora/names": ("core_positions", "core_lora"),
    "lora/family": ("core_lora", "core_positions"),
}
LAST = "test_refusals.py"
# `is` for `==` and the like change nothing for numbers, short strings and None.
SAME = ("_Eq_Is", "_NotEq_IsNot", "_Is_Eq", "_IsNot_NotEq")
LEAST = 0.85  # of the faults have to be noticed
PATIENCE = 60  # seconds of computing after which a fault that never ends counts as noticed
NOTICED, NOT_RUN = 1, (4, 5)  # pytest's own exit codes
WARM = ("comfy.sample", "comfy_api.latest", "nodes", "pytest")  # what every fork needs


@dataclass(frozen=True)
class Fault:
    """One of an operator's changes to a module, as cosmic-ray counts them."""

    path: Path
    operator: str
    occurrence: int

    @property
    def source(self) -> str:
        """The whole module with the fault."""
        operator = plugins.get_operator(self.operator)()
        return mutate_code(self.path.read_text(encoding="utf-8"), operator, self.occurrence)

    def __str__(self) -> str:
        before = self.path.read_text(encoding="utf-8").splitlines()
        changed = [line for line in ndiff(before, self.source.splitlines()) if line[0] in "-+"]
        return f"{self.path.relative_to(CORE)}: " + " ".join(
            f"{line[0]} {line[1:].strip()}" for line in changed
        )


def faults(path: Path) -> Iterator[Fault]:
    """Those of all operators without options, but for what computes nothing."""
    source = path.read_text(encoding="utf-8")
    tree, annotated = get_ast(source), list(_annotations(ast.parse(source)))
    for name in plugins.operator_names():
        kind = plugins.get_operator(name)
        if kind.arguments() or name.endswith(SAME):
            continue
        places = (p for node in ast_nodes(tree) for p in kind().mutation_positions(node))
        for occurrence, (start, _) in enumerate(places):
            if not any(first <= start < last for first, last in annotated):
                yield Fault(path, name, occurrence)


def _annotations(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """(line, column) where each begins and ends; a type alias is one too."""
    for node in ast.walk(tree):
        found = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript | ast.BinOp):
            found.append(node.value if ast.unparse(node.targets[0])[0].isupper() else None)
        for each in found:
            if isinstance(each, ast.expr):
                yield (each.lineno, each.col_offset), (each.end_lineno, each.end_col_offset)


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


def tests_with(file: Path, path: Path, source: str) -> int:
    """pytest's exit code on a file of tests, the module at `path` having this source."""
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
    get_code = SourceFileLoader.get_code

    def changed(self: SourceFileLoader, name: str) -> CodeType | None:
        return compile(source, path, "exec") if Path(self.path) == path else get_code(self, name)

    SourceFileLoader.get_code = changed  # type: ignore[method-assign]
    try:
        load_extension()
    except Exception:  # whatever it is, nobody could use the extension
        return NOTICED
    # A failing example is enough: it needn't be made smaller.
    phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
    ci = hypothesis.settings.get_profile("ci")
    hypothesis.settings.register_profile("mutation", ci, phases=phases)
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:timeout", "--rootdir", str(ROOT)]
    return int(pytest.main([*options, "--hypothesis-profile", "mutation", str(file)]))


def noticed(path: Path, source: str, files: Sequence[Path]) -> bool:
    """Whether a test fails with this source.

    Raises:
        RuntimeError: pytest didn't run the tests.
    """
    for file in files:
        status = in_a_fork(lambda file=file: tests_with(file, path, source))  # type: ignore[misc]
        if status in NOT_RUN:
            raise RuntimeError(f"pytest ended with {status} on {file}")
        if status:
            return True
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", nargs="*", choices=[[], *TESTS], metavar="MODULE")
    parser.add_argument("--sample", type=int, help="faults a module, at most; drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    options = parser.parse_args()
    load_host()
    for name in WARM:
        importlib.import_module(name)
    total = killed = 0
    for name in options.modules or TESTS:
        path, start, found = CORE / f"{name}.py", time.monotonic(), 0
        wanted = [*(f"test_{each}.py" for each in TESTS[name]), LAST]
        files = [next((ROOT / "tests").rglob(each)) for each in wanted]
        if noticed(path, path.read_text(encoding="utf-8"), files):
            raise SystemExit("The tests fail without a fault too: run pytest to see why.")
        every = list(faults(path))
        drawn = every
        if options.sample and options.sample < len(every):
            drawn = random.Random(options.seed).sample(every, options.sample)
        for fault in drawn:
            if noticed(path, fault.source, files):
                found += 1
            else:
                print(f"  not noticed: {fault}", flush=True)
        seconds = time.monotonic() - start
        print(f"{name}: {found} of {len(drawn)} noticed, {len(every)} known, {seconds:.0f} s")
        total, killed = total + len(drawn), killed + found
    print(f"all: {killed} of {total} noticed, {killed / total:.1%}")
    return int(killed < LEAST * total)


if __name__ == "__main__":
    sys.exit(main())
