"""All tables: `python -m benchmarks.simulate [--json FILE]`, in minutes on two cores.

Work and memory are counted with two and three blocks of each kind; both are linear in the blocks,
so that gives the whole model's. What the host leaves on a card is found by loading the whole model
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
DEPTHS = 2, 3
ENFORCED = {"12": ("plain", "4 independent"), "16": ("plain", "4 independent")}


def child(card: str, cases: Iterable[str], *options: str) -> list[dict[str, Any]]:
    """What one process tells, a dictionary a case."""
    command = [sys.executable, "-m", "benchmarks.simulate.child", card, *options, "--", *cases]
    found = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]


def whole(few: Any, more: Any, blocks: int) -> Any:
    """From what was counted with DEPTHS blocks to that of all."""
    if isinstance(few, dict):
        return {key: whole(few[key], more[key], blocks) for key in few}
    if isinstance(few, list) and few and isinstance(few[0], dict):
        return [whole(*pair, blocks) for pair in zip(few, more, strict=True)]
    if isinstance(few, int | float):
        return few + (blocks - DEPTHS[0]) * (more - few)
    return few


def counted() -> dict[str, Any]:
    """Everything that the tables are made of."""
    cards = [*ON_CARDS, *(f"{name}{FP8}" for name in (*ON_CARDS, *EDITORS_ON_CARDS))]
    names = list(WORK)
    jobs: dict[str, tuple[Any, ...]] = {
        f"work {i}": ("80", names[i::AT_ONCE], "--depth", *map(str, DEPTHS)) for i in range(AT_ONCE)
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
    few, more = ({run["case"]: run for run in runs if run["depth"] == depth} for depth in DEPTHS)
    work = [whole(few[name], more[name], FULL[CASES[name].model]) for name in names]
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
