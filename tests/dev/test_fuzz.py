"""2,000 hostile inputs to every parser, and 500 whole workflows.

`make fuzz` gives each 100,000 and watches the memory.
"""

import importlib
import logging
from collections.abc import Iterator
from random import Random

import comfy.model_management
import folder_paths
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dev.quality.fuzz import workflows
from dev.quality.fuzz.parsers import PARSERS, REFUSED, USED, Finding, Parser
from omini2_extension.omini2_core.errors import Omini2Error

INPUTS = {"workflow": 250}  # each of which is a run of the host
OF_OTHERS = 1000
TAKEN = {"preset", "metadata"}  # which never refuse: what they can't use counts as not said


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    loras = list(folder_paths.get_folder_paths("loras"))
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)
    workflows.forget_lost_models()
    comfy.model_management.unload_all_models()
    folder_paths.folder_names_and_paths["loras"][0][:] = loras


@pytest.mark.parametrize("name", PARSERS)
def test_a_result_or_one_of_our_sentences(name: str) -> None:
    outcomes = set()
    for number in range(INPUTS.get(name, OF_OTHERS)):
        try:
            outcomes.add(PARSERS[name].run(Random(number)))
        except Finding as finding:
            pytest.fail(f"python -m dev.quality.fuzz {name} --first {number} --inputs 1: {finding}")
    # Inputs that are all refused, or all taken, test nothing else.
    assert outcomes == ({USED} if name in TAKEN else {USED, REFUSED})


@pytest.mark.parametrize("name", PARSERS)
def test_the_same_with_inputs_that_shrink(name: str) -> None:
    """Fewer, since every choice costs more, but the smallest one that fails is shown."""

    @settings(max_examples=100, suppress_health_check=list(HealthCheck))
    @given(st.randoms(use_true_random=False))
    def check(rng: Random) -> None:
        PARSERS[name].run(rng)

    check()


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        KeyError("x"),
        RecursionError(),
        Omini2Error("lora_name: \n."),
        Omini2Error("no full stop"),
        Omini2Error("x" * 5000 + "."),
    ],
    ids=repr,
)
def test_what_counts_as_a_finding(error: Exception) -> None:
    with pytest.raises(Finding):
        Parser("", lambda rng: error, _raise).run(Random(0))
    assert Parser("", lambda rng: Omini2Error("x: y."), _raise).run(Random(0)) == REFUSED


@pytest.mark.parametrize("place", ["comfy.sample.sample", "dev.quality.fuzz.workflows.encode"])
def test_an_error_that_comes_through_our_code_is_no_refusal(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, name = place.rsplit(".", 1)
    monkeypatch.setattr(importlib.import_module(module), name, lambda *a, **k: _raise(KeyError(1)))
    workflows._executor.cache_clear()  # which remembers what nodes gave
    try:
        with pytest.raises(RuntimeError, match="KeyError"):
            workflows.read(workflows.PROMPT)
    finally:
        workflows._executor.cache_clear()
