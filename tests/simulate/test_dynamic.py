"""ComfyUI's dynamic VRAM on a GPU that isn't there."""

import importlib.util
import json
import subprocess
import sys

import pytest

from benchmarks.simulate.card import CARDS
from benchmarks.simulate.device import Gpu
from benchmarks.simulate.dynamic import HEADROOM, PAGE, Pages
from dev.paths import ROOT

pytestmark = pytest.mark.xdist_group("simulate")


def test_what_is_taken_from_the_end_is_copied_at_every_use() -> None:
    gpu = Gpu(CARDS["12"])
    gpu.take(gpu.free - 3 * PAGE - HEADROOM)
    pages = Pages(gpu, 5 * PAGE)
    places = [pages.alloc(PAGE) for _ in range(5)]

    def used(number: int) -> list[int] | None:
        _, start, n = places[number]
        times = pages.fault(start, n)
        pages.unpin(start, n)
        return None if times is None else list(times)

    assert [used(i) for i in range(5)] == [[1], [1], [1], None, None]
    # Asking for the fourth has cost the third, which the library does as well.
    assert [used(i) for i in range(5)] == [[1], [1], None, None, None]
    assert pages.loaded_size() == 2 * PAGE and gpu.free == HEADROOM + PAGE
    gpu.take(2 * PAGE)  # something else
    pages.free_memory(HEADROOM - gpu.free)
    assert [used(i) for i in range(5)] == [[1], None, None, None, None]
    gpu.take(-2 * PAGE)
    assert used(1) is None  # until the model is prepared for another run
    pages.prioritize()
    assert [used(i) for i in range(4)] == [[1], [2], [2], None]


def test_what_is_in_use_stays() -> None:
    gpu = Gpu(CARDS["12"])
    pages = Pages(gpu, PAGE)
    _, start, n = pages.alloc(PAGE)
    pages.fault(start, n)
    assert pages.free_memory(PAGE) == 0 and pages.loaded_size() == PAGE
    pages.unpin(start, n)
    assert pages.loaded_size() == 0 and gpu.live == 0


@pytest.mark.skipif(not importlib.util.find_spec("comfy_aimdo"), reason="this host has none")
def test_conditions_beside_weights_that_come_and_go() -> None:
    names = "plain, fp8 weights", "4 independent, fp8 weights", "4 joint, fp8 weights"
    options = "12", "--dynamic", "--enforced", "--depth", "1"
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.simulate.child", *options, "--", *names],
        cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    plain, *runs = (json.loads(line) for line in found.stdout.splitlines() if line[0] == "{")
    assert len(runs) == 2 and plain["evaluations"][0]["to_device"] > plain["size"]
    for run in runs:
        assert run["error"] == "" and run["faults"] == []
        last, compared = (each["evaluations"][-1]["to_device"] for each in (run, plain))
        assert last <= compared + 2**20
