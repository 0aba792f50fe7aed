"""Memory that runs out at every allocation: `python -m benchmarks.simulate.out_of_memory`.

On a pretended card of 12 GB, in the call of the model that computes K/V and in one that uses them
again. `--every N` takes one allocation in N.
"""

import argparse
import json
from collections import Counter
from collections.abc import Iterator

from benchmarks.simulate.card import CARDS
from benchmarks.simulate.cases import CASES, Builder, run
from benchmarks.simulate.world import Result, World

GRAPHS = "4 independent", "4 joint", "4 independent, K/V on the CPU", "Kontext, 1"
SENTENCE = "the device ran out of memory"
NOTHING = 1 << 20  # bytes that the host's own modules hold on to


def outcome(result: Result, kept: int) -> str:
    """How a run ended that ran out of memory once.

    Args:
        kept: bytes that the same run leaves for a second seed if nothing goes wrong.
    """
    if result.left > kept + NOTHING:
        return "leaks"
    if not result.error:
        return "finished" if any(SENTENCE in said for said in result.said) else "finished, unsaid"
    return "out of memory" if result.error.startswith("OutOfMemoryError") else result.error


def played(world: World, builder: Builder, name: str, every: int) -> Iterator[tuple[int, int, str]]:
    """Each call of the model and allocation in it, and how the run ended."""
    calm = run(world, builder, CASES[name])
    for call, tally in enumerate(calm.evaluations):
        for at in range(1, tally.allocations + 1, every):

            def before(number: int, call: int = call, at: int = at) -> None:
                world.gpu.fails_at = at if number == call else 0

            result = run(world, builder, CASES[name], before=before)
            yield call, at, outcome(result, max(calm.left, calm.kept))


def main() -> None:
    """Command line; a line of JSON a graph."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("graphs", nargs="*", default=GRAPHS)
    options = parser.parse_args()
    world = World(CARDS["12"])
    builder = Builder(world, 1)
    with builder.loras:
        for name in options.graphs:
            found = Counter(how for _, _, how in played(world, builder, name, options.every))
            print(json.dumps({"graph": name, "outcomes": found}), flush=True)


if __name__ == "__main__":
    main()
