"""The faults that mutation testing puts in: each is one change, and nothing that users read."""

import pytest

from dev.quality.mutants import mutants

SOURCE = '''
"""What it does."""
from typing import Any
Names = dict[str, int]
LIMIT = 3

@cache(size=7)
def clipped(x: "int", low: int = 0, names: Names = ()) -> "int":
    """More words."""
    if x < low or not x:
        raise Omini2Error(f"x: {x + 1} is too low")
    for a, b in zip(names[1:], names, strict=True):
        f(a, key=b)
    return min(x, LIMIT)
'''


@pytest.fixture
def path(tmp_path):
    (tmp_path / "module.py").write_text(SOURCE)
    return tmp_path / "module.py"


def test_each_is_one_change_of_what_is_computed(path) -> None:
    found = [f"{mutant.was} -> {mutant.now}" for mutant in mutants(path)]
    assert sorted(found) == sorted(
        [
            "3 -> 4",
            "0 -> 1",
            "x < low or not x -> not (x < low or not x)",
            "x < low or not x -> x < low and (not x)",
            "x < low -> x <= low",
            "not x -> x",
            "raise Omini2Error(f'x: {x + 1} is too low') -> pass",
            "1: -> :",
            "1 -> 2",
            "f(a, key=b) -> pass",
            "key=b -> nothing",
            "return min(x, LIMIT) -> return None",
            "min -> max",
        ]
    )


def run(code, **arguments):
    space = {"cache": lambda size: lambda function: function, "Omini2Error": ValueError}
    exec(code, space)
    return space["clipped"](**arguments)


def test_their_code_has_that_change_alone(path) -> None:
    made = {f"{mutant.was} -> {mutant.now}": mutant for mutant in mutants(path)}
    assert run(made["3 -> 4"].code, x=9) == 4
    assert run(made["min -> max"].code, x=9) == 9
    assert run(made["return min(x, LIMIT) -> return None"].code, x=9) is None
    with pytest.raises(ValueError, match="too low"):
        run(made["0 -> 1"].code, x=0)
    with pytest.raises(ValueError, match="too low"):
        run(made["0 -> 1"].code, x=0.5)


def test_they_know_their_lines(path) -> None:
    made = {f"{mutant.was} -> {mutant.now}": mutant for mutant in mutants(path)}
    assert not made["3 -> 4"].deferred and not made["0 -> 1"].deferred
    test = made["x < low -> x <= low"]
    assert test.deferred and test.lines == range(10, 11)
    assert made["key=b -> nothing"].lines == range(13, 14)
