"""When K/V are computed again, step by step, and what a run's store counts."""

import pytest
import torch

from omini2_extension.omini2_core.cache.entry import Entry, Storage
from omini2_extension.omini2_core.cache.policy import (
    REUSE,
    CachePolicy,
    is_due,
)
from omini2_extension.omini2_core.cache.run_cache import RunCache
from omini2_extension.omini2_core.errors import Omini2Error


@pytest.mark.parametrize(
    ("reuse", "joint", "want"),
    [
        ("auto", True, 3),
        ("auto", False, None),
        ("once", True, None),
        ("once", False, None),
        ("every_n_steps", True, 3),
        ("every_n_steps", False, 3),
        ("off", True, 0),
        ("off", False, 0),
    ],
)
def test_steps_between_two_refreshes(reuse, joint, want) -> None:
    assert CachePolicy(reuse, refresh_every=3).interval(joint) == want


def test_a_policys_defaults_and_bounds() -> None:
    assert CachePolicy() == CachePolicy("off", 5, "model", "auto")
    assert REUSE == ("auto", "once", "every_n_steps", "off")
    assert CachePolicy(refresh_every=1).refresh_every == 1
    for options, said in (
        ({"reuse": "always"}, "reuse: always is not on offer; choose auto or once or"),
        ({"refresh_every": 0}, "refresh_every: 0 is out of bounds; use a value from 1 to 1000000"),
        ({"storage": "fp4"}, "storage: fp4 is not on offer; choose model or fp8"),
        ({"keep_on": "disk"}, "keep_on: disk is not on offer; choose auto or gpu or cpu"),
    ):
        with pytest.raises(Omini2Error, match=f"^{said}"):
            CachePolicy(**options)


def computed_at(steps, interval, start=0):
    """The steps of a run at which K/V are computed again, after ``start``."""
    entry, found = Entry(0), []
    entry.step = start
    for step in steps:
        if is_due(entry, interval, lambda: step):  # noqa: B023 - asked at once
            entry.step = step
            found.append(step)
    return found


def test_every_so_many_steps() -> None:
    assert computed_at(range(8), 3) == [3, 6]
    assert computed_at(range(4), 1) == [1, 2, 3]


def test_a_look_back_is_no_new_pass_but_a_new_schedule_is() -> None:
    assert computed_at([5, 4, 3, 2], 3, start=5) == []
    assert computed_at([5, 1], 3, start=5) == [1]
    assert computed_at([3, 4, 0, 1, 2, 3], 2, start=3) == [0, 2]


def test_whether_k_v_are_due() -> None:
    def never() -> int:
        pytest.fail("the step doesn't matter here, and reading it waits for the device")

    assert is_due(Entry(1), None, never)  # incomplete
    assert is_due(Entry(0), 0, never) and not is_due(Entry(0), None, never)


def test_a_run_has_one_entry_a_key() -> None:
    cache = RunCache(CachePolicy())
    assert cache.nbytes == cache.refreshes == 0
    one = cache.entry("one", 2)
    assert cache.entry("one", 2) is one
    assert one.count == 2
    other = cache.entry("other", 1)
    k, v = torch.randn(2, 1, 2, 3, 4)
    cache.store(one, 0, k, v)
    cache.store(other, 0, k, v)
    one.refreshes, other.refreshes = 2, 5
    assert cache.nbytes == 2 * 2 * k.nbytes
    assert cache.refreshes == 5
    assert cache.relieve(torch.device("cpu"))
    assert cache.nbytes == 2 * 2 * k.numel()
    cache.close()
    assert cache.nbytes == 0


@pytest.mark.parametrize(
    ("storage", "fp8", "then"),
    [
        (Storage(), True, Storage("fp8", "gpu")),
        (Storage(), False, Storage("model", "cpu")),
        (Storage("fp8", "gpu"), True, Storage("fp8", "cpu")),
        (Storage("model", "cpu"), True, None),
        (Storage("fp8", "cpu"), True, None),
    ],
)
def test_what_is_tried_when_memory_runs_out(storage, fp8, then) -> None:
    cache = RunCache(CachePolicy())
    cache.storage = storage
    assert cache.relieve(torch.device("cpu"), fp8) is (then is not None)
    assert cache.storage == (then or storage)
