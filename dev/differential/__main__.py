"""`python -m dev.differential [--graphs N] [--seed S] [--jobs J] [--only N] [--shrink]`.

Graph N of a seed is the same wherever the host is: `--seed S --only N` gives a finding again, and
--shrink looks for less that gives it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

from dev.differential.work import one, start


def main() -> int:
    """0, or 1 after a finding."""
    options = argparse.ArgumentParser(prog="python -m dev.differential", description=__doc__)
    options.add_argument("--graphs", type=int, default=1000)
    options.add_argument("--first", type=int, default=0, help="number of the first graph")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--jobs", type=int, default=1)
    options.add_argument("--only", type=int, nargs="+", help="these numbers")
    options.add_argument("--oracle", default="", help="only graphs of this one")
    options.add_argument("--shrink", action="store_true", help="make findings small")
    given = options.parse_args()
    numbers = given.only or list(range(given.first, given.first + given.graphs))

    print(f"seed {given.seed}", flush=True)
    began = time.monotonic()
    work = partial(one, given.seed, given.shrink, given.oracle)
    if given.jobs == 1:
        start()
        return report(map(work, numbers), given.seed, began)
    # Processes of their own find this package only where the host isn't loaded here.
    with ProcessPoolExecutor(given.jobs, get_context("spawn"), initializer=start) as pool:
        return report(pool.map(work, numbers, chunksize=8), given.seed, began)


def report(results: Any, seed: int, began: float) -> int:
    """Prints findings as they come, then what came of all graphs."""
    counts: Counter[tuple[str, str]] = Counter()
    sentences: Counter[tuple[str, str]] = Counter()
    for done, result in enumerate(filter(None, results), 1):
        number, name, what, kind, detail, program = result
        if done % 1000 == 0:
            print(f"{done} graphs, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        counts[name, what] += 1
        if what in ("refused", "said", "unfit"):
            sentences[what, f"{name}: {kind[:150]}"] += 1
        if what == "finding":
            print(f"--seed {seed} --only {number}: {name}: {kind}: {detail}\n    {program}",
                  flush=True)  # fmt: skip
    names = sorted({name for name, _ in counts})
    words = "equal", "refused", "said", "unfit", "finding"
    print(f"{'':12}" + "".join(f"{word:>9}" for word in words))
    for name in names:
        print(f"{name:12}" + "".join(f"{counts[name, word]:9}" for word in words))
    for (what, sentence), count in sorted(sentences.items()):
        print(f"{count:5} {what}: {sentence}")
    total = sum(counts.values())
    found = sum(n for (_, word), n in counts.items() if word == "finding")
    print(f"{total} graphs, {found} findings, {time.monotonic() - began:.0f} s")
    return int(found > 0)


if __name__ == "__main__":
    sys.exit(main())
