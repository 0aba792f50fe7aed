"""All tables: `python -m benchmarks.simulate [--json FILE]`, in minutes on two cores.

Work and memory are counted on one and two blocks of each kind; both are linear in the blocks, so
that gives the whole model's. What the host leaves on a card is found by loading the whole model
into it.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.simulate.card import CARDS
from benchmarks.simulate.cases import CASES, EDITORS_ON_CARDS, FP8, FULL, ON_CARDS, WORK
from benchmarks.simulate.tables import tables
from dev.paths import ROOT

AT_ONCE = 2
ENFORCED = {"12": ("plain", "4 independent"), "16": ("plain", "4 independent")}


def child(card: str, cases: Iterable[str], *options: str) -> list[dict[str, Any]]:
    """What one process tells, a dictionary a case."""
    command = [sys.executable, "-m", "benchmarks.simulate.child", card, *options, "--", *cases]
    found = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


def whole(one: Any, two: Any, blocks: int) -> Any:
    """From a count of one and two blocks to that of all."""
    if isinstance(one, dict):
        return {key: whole(one[key], two[key], blocks) for key in one if key in two}
    if isinstance(one, list) and one and isinstance(one[0], dict):
        return [whole(*pair, blocks) for pair in zip(one, two, strict=True)]
    if isinstance(one, int | float) and not isinstance(one, bool):
        return one + (blocks - 1) * (two - one)
    return one


def counted() -> dict[str, Any]:
    """Everything that the tables are made of."""
    cards = [*ON_CARDS, *(f"{name}{FP8}" for name in (*ON_CARDS, *EDITORS_ON_CARDS))]
    names = list(WORK)
    jobs: dict[str, tuple[Any, ...]] = {
        f"work {i}": ("80", names[i::AT_ONCE], "--depth", "1", "2") for i in range(AT_ONCE)
    }
    jobs |= {f"load {card}": (card, cards, "--load") for card in CARDS}
    jobs |= {
        f"enforced {card}": (card, [f"{name}{FP8}" for name in cases], "--enforced")
        for card, cases in ENFORCED.items()
    }
    with ThreadPoolExecutor(AT_ONCE) as pool:
        running = {name: pool.submit(child, *job) for name, job in jobs.items()}
        found = {name: each.result() for name, each in running.items()}
    runs = [run for i in range(AT_ONCE) for run in found.pop(f"work {i}")]
    one, two = ({run["case"]: run for run in runs if run["depth"] == depth} for depth in (1, 2))
    work = [whole(one[name], two[name], FULL[CASES[name].model]) for name in names]
    return {"work": work, **found}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="keep what was counted")
    options = parser.parse_args(arguments)
    results = counted()
    if options.json:
        options.json.write_text(json.dumps(results), encoding="utf-8")
    print(tables(results))


if __name__ == "__main__":
    main()
