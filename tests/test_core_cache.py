"""When K/V are computed again, step by step, and what a run's store counts."""

import pytest
import torch

from omini2_extension.omini2_core.cache import REUSE, CachePolicy, KVStore, too_old
from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.store import Entry, Keeping


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
    entry, found = Entry(1), []
    entry.step = start
    for step in steps:
        if too_old(entry, step, interval):
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


def test_a_store_holds_one_entry_a_key() -> None:
    store = KVStore()
    assert store.nbytes == store.refreshes == 0 and not list(store.entries)
    assert not store.rearrange(Keeping(), torch.device("cpu"))
    one = store.entry("one", 2)
    assert store.entry("one", 2) is one
    assert one.count == 2
    other = store.entry("other", 1)
    assert list(store.entries) == [one, other]
    k, v = torch.randn(2, 1, 2, 3, 4)
    one.keep(0, k, v, Keeping())
    other.keep(0, k, v, Keeping())
    one.refreshes, other.refreshes = 2, 5
    assert store.nbytes == 2 * 2 * k.nbytes
    assert store.refreshes == 5
    assert store.rearrange(Keeping("fp8"), torch.device("cpu"))
    assert store.nbytes == 2 * 2 * k.numel()
    store.clear()
    assert store.nbytes == 0 and not list(store.entries)
