"""On a GPU that isn't there, with FLUX.1's own widths and one block of each kind: nobody waits in a
cached step, devices and formats aren't mixed, as much is reserved as is needed, few kernels."""

import json
import subprocess
import sys
from typing import Any

import pytest

from benchmarks import costs
from benchmarks.simulate.cases import CASES, FULL, plain_of
from benchmarks.simulate.world import SIDE, TEXT
from dev.paths import ROOT
from omini2_extension.omini2_core.host.memory import BLOCK

BLOCKS = 3  # a double one and two single ones
TOO_MUCH = 1.25  # of what is needed
RUNS = (
    "plain", "1 independent", "4 independent", "8 independent", "1 joint", "4 joint", "8 joint",
    "4 independent, K/V in fp8", "4 independent, K/V on the CPU",
    "4 independent, K/V in fp8 on the CPU", "4 independent, scale 0.7", "token integration",
    "1 independent, image guidance", "Save Cache", "Load Cache", "Kontext, 1, plain", "Kontext, 1",
    "Kontext, Spot Edit",
)  # fmt: skip
CACHED = [
    name
    for name in RUNS
    if CASES[name].attention == "independent" and CASES[name].extra not in ("save", "spot")
]
Told = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def told() -> Told:
    """What a process with a pretended card of 80 GB tells of each run."""
    child = [sys.executable, "-m", "benchmarks.simulate.child", "80", "--depth", "1", "--"]
    found = subprocess.run([*child, *RUNS], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    lines = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


pytestmark = pytest.mark.xdist_group("simulate")


@pytest.mark.parametrize("name", RUNS)
def test_devices_and_formats_are_never_mixed(told: Told, name: str) -> None:
    run = told[name]
    assert run["error"] == "" and run["faults"] == []
    assert len(run["evaluations"]) == CASES[name].steps
    # What stays is what a second seed uses again.
    assert min(run["left"], abs(run["left"] - run["kept"])) < 2**20


def more(told: Told, name: str, what: str, which: int = -1) -> int:
    """How much more there is of something in a call of the model than in plain's."""
    there = told[plain_of(name)]["evaluations"][which][what]
    count: int = told[name]["evaluations"][which][what] - there
    return count


@pytest.mark.parametrize("name", CACHED)
def test_a_cached_step_never_waits(told: Told, name: str) -> None:
    assert more(told, name, "waits") <= 0, told[name]["evaluations"][-1]["waits_for"]


def test_a_joint_condition_is_asked_for_its_step(told: Told) -> None:
    """Which is one number a step, however many there are."""
    assert more(told, "1 joint", "waits") == more(told, "8 joint", "waits") == 1


def test_what_is_computed_waits_for_the_prompt_only(told: Told) -> None:
    """Pooled text and guidance, once: not for tokens, positions or a LoRA's weights."""
    assert more(told, "1 independent", "waits", 0) == more(told, "8 independent", "waits", 0) == 2


@pytest.mark.parametrize(
    "name",
    ["1 independent", "4 independent", "8 independent", "1 joint", "4 joint", "8 joint",
     "4 independent, K/V on the CPU", "Kontext, 1"],
)  # fmt: skip
def test_what_is_needed_is_reserved(told: Told, name: str) -> None:
    """Of the whole model: K/V of the blocks that aren't there come to both.

    Newer hosts work in less than they reserve for, which leaves more room than is counted here.
    """
    plain, run = told[plain_of(name)], told[name]
    here = run["kept"] if run["place"] == "gpu" else 0
    tokens = TEXT + (1 + CASES[name].references) * SIDE**2
    host_needs = max(plain["above"], BLOCK * tokens * costs.FLUX1_DEV.hidden * 2)
    others = (FULL["FLUX.1"] - 1) * here
    needed = others + max(run["above"] - host_needs, here)
    reserved = others + run["asked"] - plain["asked"]
    assert needed <= reserved <= TOO_MUCH * needed


@pytest.mark.parametrize(
    ("name", "each"),
    [
        ("1 independent", 2),  # K and V into their place
        ("8 independent", 2),
        ("8 joint", 2),
        ("4 independent, K/V in fp8", 4),  # and scaled
        ("4 independent, K/V on the CPU", 4),  # and fetched
        ("Kontext, 1", 2),
    ],
)
def test_a_cached_step_copies_k_and_v(told: Told, name: str, each: int) -> None:
    """Two kernels a block for the main branch's, so many for each condition; one format, once."""
    conditions = CASES[name].conditions or CASES[name].references
    assert more(told, name, "kernels") <= BLOCKS * (2 + each * conditions) + 1


def test_eight_joint_conditions_take_hardly_more_kernels_than_one(told: Told) -> None:
    """In each block: K and V stored, and put into their place. Beside the blocks, what is done
    once a run for each: tokens, positions."""
    cached = more(told, "8 joint", "kernels") - more(told, "1 joint", "kernels")
    computed = more(told, "8 joint", "kernels", 0) - more(told, "1 joint", "kernels", 0)
    assert computed <= 2 * cached + 7 * ONCE


ONCE = 50  # kernels of a condition's tokens and positions


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("4 independent", "finished"),  # K/V can still be stored in fewer bytes
        ("4 independent, K/V on the CPU", "ended with the sentence"),
    ],
)
def test_out_of_memory_at_an_allocation(name: str, ends: str) -> None:
    """Of those of a step, one in 150; `benchmarks.simulate.out_of_memory` takes all."""
    command = [sys.executable, "-m", "benchmarks.simulate.out_of_memory", "--every", "150"]
    found = subprocess.run(
        [*command, name], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    (line,) = (line for line in found.stdout.splitlines() if line.startswith("{"))
    told = json.loads(line)
    assert set(told["outcomes"]) == {ends}, told["elsewhere"]
