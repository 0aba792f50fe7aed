"""Memory that runs out at every allocation: `python -m benchmarks.simulate.out_of_memory`.

On a pretended card of 12 GB, from a run's last call of the model to its end: of a run of one step,
which computes K/V, and of one that uses them again. At each allocation the process forks, and the
child goes on without that memory. `--every N` takes one allocation in N.
"""

import argparse
import gc
import json
import os
from collections import Counter
from dataclasses import replace

from benchmarks.simulate.card import CARDS
from benchmarks.simulate.cases import CASES, Builder, Case, run
from benchmarks.simulate.device import place
from benchmarks.simulate.world import Result, World

GRAPHS = (
    "4 independent", "4 independent, K/V on the CPU", "Kontext, 1", "Save Cache", "4 joint",
    "token integration", "Kontext, Spot Edit",
)  # fmt: skip
GOES_ON = "the device ran out of memory, so"
ENDS = "the device ran out of memory; "
NOTHING = 1 << 20  # bytes that the host's own modules hold on to


def outcome(result: Result, kept: int) -> str:
    """How a run ended that ran out of memory once.

    Args:
        kept: bytes that the same run leaves for a second seed if nothing goes wrong.
    """
    if result.left > kept + NOTHING:
        return "leaks"
    if not result.error:
        return "finished" if any(GOES_ON in said for said in result.said) else "finished, unsaid"
    ours = result.error.startswith("OutOfMemoryError") and ENDS in result.error
    return "ended with the sentence" if ours else result.error


class Player:
    """Has a run's allocations fail, each in a process of its own.

    Attributes:
        outcomes: how many ended in which way.
        elsewhere: where those failed that ended in no way that is meant.
    """

    def __init__(self, world: World, every: int) -> None:
        self._world, self._every = world, every
        self._count, self._kept, self._out = 0, 0, -1
        self.outcomes: Counter[str] = Counter()
        self.elsewhere: Counter[str] = Counter()

    def play(self, builder: Builder, case: Case) -> None:
        """A run whose last call is without memory at one place or another."""
        calm = run(self._world, builder, case)
        self._kept = max(calm.left, calm.kept)
        last = len(calm.evaluations) - 1

        def before(call: int) -> None:
            if call == last and self._out < 0:
                self._world.gpu.runs_out = self._without

        gc.freeze()  # what is there by now stays, and need not be looked through in every child
        result = run(self._world, builder, case, before=before)
        self._world.gpu.runs_out = lambda: False
        if self._out >= 0:  # a child
            os.write(self._out, outcome(result, self._kept).encode())
            os._exit(0)

    def _without(self) -> bool:
        """The process goes on with this memory, and a child without."""
        self._count += 1
        if self._count % self._every:
            return False
        told, out = os.pipe()
        child = os.fork()
        if not child:
            os.close(told)
            self._out = out
            self._world.gpu.runs_out = lambda: False
            return True
        os.close(out)
        with os.fdopen(told) as answer:
            ended = answer.read() or "killed"
        os.waitpid(child, 0)
        self.outcomes[ended] += 1
        if ended not in ("finished", "ended with the sentence"):
            self.elsewhere[f"{ended} at {place()}"] += 1
        return False


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
            found = Player(world, options.every)
            for steps in sorted({1, CASES[name].steps}):
                found.play(builder, replace(CASES[name], steps=steps))
            told = {"graph": name, "outcomes": found.outcomes, "elsewhere": found.elsewhere}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
