"""One process of the simulation: cases on one card, a line of JSON each.

`python -m benchmarks.simulate.child CARD [--depth N ...] [--load] [--enforced] CASE...`
"""

import argparse
import json
import time
from typing import Any

from benchmarks.simulate.card import CARDS, Tally
from benchmarks.simulate.cases import CASES, Builder, run
from benchmarks.simulate.world import Result, World


def counts(tally: Tally) -> dict[str, Any]:
    """What is told of a call of the model."""
    return {
        "kernels": len(tally.kernels), "flops": tally.flops, "bytes": tally.bytes,
        "to_device": tally.to_device, "from_device": tally.from_device,
        "allocations": tally.allocations, "base": tally.base, "peak": tally.peak,
        "peak_at": tally.peak_at,
        "waits": len(tally.waits), "waits_for": [str(wait) for wait in tally.waits],
        "seconds": {name: card.seconds(tally.kernels) for name, card in CARDS.items()},
    }  # fmt: skip


def told(name: str, result: Result) -> dict[str, Any]:
    """What is told of a run."""
    values = dict(vars(result), case=name, above=result.above)
    return {**values, "evaluations": [counts(each) for each in result.evaluations]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("card", choices=CARDS)
    parser.add_argument("cases", nargs="+", metavar="CASE", help="; ".join(CASES))
    parser.add_argument(
        "--depth", type=int, nargs="+", default=[None], help="blocks of the model's first kind"
    )
    parser.add_argument("--load", action="store_true", help="only load the model")
    parser.add_argument("--enforced", action="store_true", help="the card runs out of memory")
    parser.add_argument("--dynamic", action="store_true", help="the host has dynamic VRAM")
    options = parser.parse_args()
    world = World(CARDS[options.card], options.dynamic)
    world.gpu.enforced = options.enforced
    for depth in options.depth:
        builder = Builder(world, depth)
        with builder.loras:
            for name in options.cases:
                started = time.process_time()
                result = run(world, builder, CASES[name], only_load=options.load)
                took = {"depth": depth, "took": time.process_time() - started}
                print(json.dumps(told(name, result) | took), flush=True)


if __name__ == "__main__":
    main()
