"""What the original code computes, through the nodes and the host's own sampling path."""

import pytest
from helpers.original import CASES, TOLERANCE, build, packed
from tiny import record, reference, relative_error, with_cache


@pytest.mark.compatibility("Hosts", "The numbers of the original code", "works", "")
@pytest.mark.parametrize(("file", "name", "mode"), CASES)
def test_velocity_is_the_originals(file: str, name: str, mode: str) -> None:
    ref = reference(file)
    case = ref.case(name)
    model = build(ref, case)
    if mode == "cached_once":
        model = with_cache(model, "once")
    error = relative_error(packed(record(model, case)), case.tensors[f"pred_{mode}"])
    assert error < TOLERANCE
