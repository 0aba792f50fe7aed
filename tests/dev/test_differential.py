"""300 random graphs, each compared with its own oracle; `python -m dev.differential` runs more.

OMINI2_SOAK_SEED draws others.
"""

import os
import subprocess
import sys
from collections import Counter

import pytest
import torch

from dev.differential import check
from dev.differential.draw import WEIGHTS, drawn
from dev.differential.graph import Graph, Lora, Prompt, described, simpler
from dev.differential.run import is_sentence
from dev.paths import ROOT
from omini2_extension.omini2_core.cache.run_cache import RunCache
from omini2_extension.omini2_core.errors import Omini2Error

GRAPHS = 300
SEED = int(os.environ.get("OMINI2_SOAK_SEED", "0"))


@pytest.mark.parametrize("name", WEIGHTS)
def test_every_graph_gives_its_oracles_picture(name: str) -> None:
    print(f"seed {SEED}")
    graphs = {n: g for n in range(GRAPHS) for drew, g in [drawn(SEED, n)] if drew == name}
    if not graphs:
        pytest.skip("this host hasn't the nodes")
    found: Counter[str] = Counter()
    wrong = []
    for number, graph in graphs.items():
        outcome = check.judge(name, graph)
        found[outcome.what] += 1
        if outcome.what == check.FINDING:
            again = f"python -m dev.differential --seed {SEED} --only {number} --shrink"
            wrong.append(f"{again}: {outcome.kind}: {outcome.detail}")
    assert not wrong, "\n".join(wrong)
    # What is refused or excused tells nothing.
    assert found[check.EQUAL] >= len(graphs) / 3, found


def test_a_graph_is_the_same_everywhere() -> None:
    assert drawn(1, 5) == drawn(1, 5)
    assert len({described(drawn(1, n)[1]) for n in range(50)}) == 50


def test_a_graph_is_described_as_a_program() -> None:
    _, graph = drawn(2, 7)
    names = "Condition, Graph, Lora, Prompt, described"
    program = f"from dev.differential.graph import {names}; print(described({described(graph)}))"
    command = [sys.executable, "-c", program]
    again = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert again.strip() == described(graph)
    assert described(Graph()) == "Graph()" and not list(simpler(Graph()))


@pytest.fixture
def spoilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault: K/V that are kept are off by a hundredth."""
    store = RunCache.store

    def off(cache, entry, number, k, v):
        store(cache, entry, number, k * 1.01, v)

    monkeypatch.setattr(RunCache, "store", off)


def test_a_fault_is_found_and_made_small(spoilt: None) -> None:
    graph = Graph(
        rows=5, steps=3, reuse="once", positive=(Prompt(), Prompt(seed=10)), start="random"
    )
    outcome = check.judge("reuse", graph)
    assert (outcome.what, outcome.kind) == (check.FINDING, "differs")
    assert check.smallest("reuse", graph, outcome.kind) == Graph(reuse="once")


def test_graphs_that_may_differ_do(spoilt: None) -> None:
    """The oracles' pictures come from elsewhere than the fault."""
    for name, graph in {
        "rows": Graph(reuse="once", cfg=3.0, guider="cfg"),
        "pictures": Graph(reuse="once", batch=2),
        "by_hand": Graph(reuse="once", guider="cfg", cfg=3.0),
        "lora": Graph(reuse="once", loras=(Lora(layer="txt_in"),)),
    }.items():
        what = check.judge(name, graph).what
        assert what == (check.EQUAL if name == "lora" else check.FINDING), name


@pytest.mark.parametrize(
    ("error", "what", "kind"),
    [
        (Omini2Error("model: it can't; take it out."), check.REFUSED, ""),
        (Omini2Error("nothing: no such input; take it out."), check.FINDING, "bad sentence"),
        (Omini2Error("model: two lines\nof it."), check.FINDING, "bad sentence"),
        (KeyError("x"), check.FINDING, "traceback KeyError"),
    ],
)
def test_what_counts_as_a_finding(monkeypatch, error, what, kind) -> None:
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(RunCache, "store", fail)
    outcome = check.judge("reuse", Graph(reuse="once"))
    assert outcome.what == what and kind in outcome.kind
    assert is_sentence(str(error)) == (what == check.REFUSED)


def test_what_the_host_fails_at_is_no_finding(monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr(torch.nn.functional, "linear", fail)
    assert check.judge("reuse", Graph(reuse="once")).what == check.UNFIT
