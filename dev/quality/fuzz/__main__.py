"""Nightly: `python -m dev.quality.fuzz [PARSER ...] [--inputs N] [--first SEED]`.

Input number N of a parser is the same everywhere: `--first N --inputs 1` gives a finding again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

from dev import load

WARM = 0.2  # of the inputs, before memory counts
GROWTH = 32  # MiB that all the other inputs may add to the process


def main() -> int:
    """0, or 1 after a finding."""
    options = argparse.ArgumentParser(prog="python -m dev.quality.fuzz", description=__doc__)
    options.add_argument("parsers", nargs="*", help="all, unless named")
    options.add_argument("--inputs", type=int, default=100_000, help="of each parser")
    options.add_argument("--first", type=int, default=0, help="number of the first input")
    options.add_argument("--json", type=Path, help="a file for the figures")
    given = options.parse_args()

    load.load_host()
    load.load_extension()
    logging.disable(logging.ERROR)  # what inputs contradict, and what the host refuses
    import torch

    from dev.quality.fuzz.parsers import PARSERS

    torch.set_num_threads(1)
    unknown = set(given.parsers) - set(PARSERS)
    if unknown:
        options.error(f"there is no {', '.join(unknown)}; parsers are {', '.join(PARSERS)}")
    results = []
    with torch.inference_mode():
        for name in given.parsers or PARSERS:
            results.append(fuzz(PARSERS[name], given.first, given.inputs))
            print(json.dumps(results[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return int(any(result["findings"] or result["grew_mib"] > GROWTH for result in results))


def fuzz(parser: Any, first: int, count: int) -> dict[str, Any]:
    """Counts of what came out, seconds and MiB; each different finding is printed once."""
    from dev.quality.fuzz.parsers import Finding

    outcomes = {"used": 0, "refused": 0}
    findings: dict[str, int] = {}
    since, warm = time.process_time(), resident()
    for number in range(first, first + count):
        if number - first == int(count * WARM):
            warm = resident()
        try:
            outcomes[parser.run(Random(number))] += 1
        except Finding as finding:
            kind = str(finding)[:60]
            if kind not in findings:
                print(f"{parser.name} {number}: {finding}", file=sys.stderr, flush=True)
            findings[kind] = findings.get(kind, 0) + 1
    return {
        "parser": parser.name,
        "inputs": count,
        **outcomes,
        "findings": sum(findings.values()),
        "cpu_seconds": round(time.process_time() - since),
        "grew_mib": round(resident() - warm, 1),
    }


def resident() -> float:
    """MiB that this process holds; 0 where the system doesn't say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    sys.exit(main())
