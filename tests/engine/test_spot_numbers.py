"""What SpotEdit's own code computes, through the node and the host's sampling."""

from contextlib import nullcontext

import pytest
import torch
from helpers.spot import SpotCase, spot_file, unpacked
from tiny import pytorch_attention, relative_error

TOLERANCE = 2e-5
# Theirs grows what is left out, ours what is edited.
CASES = [name for name, case in spot_file().meta["cases"].items() if not case["dilation"]]


@pytest.mark.parametrize("attention", ["the host's", "PyTorch's"])
@pytest.mark.parametrize("name", CASES)
def test_every_step_is_the_originals(name: str, attention: str) -> None:
    """PyTorch's kernels tell their log-sum-exp, so what is kept is attended to apart."""
    case = SpotCase(name)
    with pytorch_attention() if attention == "PyTorch's" else nullcontext():
        got = case.sample(case.edited_model())
    tensors, sigmas = case.tensors, case.tensors["sigmas"]
    steps = case.meta["steps"]
    assert len(got.before) == steps
    after = [*got.before[1:], got.denoised[-1]]  # Euler's last step goes to what is denoised
    for step in range(steps):
        assert torch.equal(got.unedited[step].flatten(), tensors["unedited"][step])
        velocity = (got.before[step] - got.denoised[step]) / sigmas[step]
        for ours, name in ((velocity, "velocity"), (after[step], "x")):
            assert relative_error(ours[0], unpacked(tensors[name][step], case.hw)) < TOLERANCE
    assert relative_error(got.final[0], unpacked(tensors["final"], case.hw)) < TOLERANCE


def test_with_nothing_left_out_it_is_the_host_bit_for_bit() -> None:
    case = SpotCase("nothing_selected")
    got = case.sample(case.edited_model())
    plain = case.sample(spot_file().model())
    assert torch.equal(got.final, plain.final)
    assert relative_error(got.final[0], unpacked(case.tensors["plain_final"], case.hw)) < TOLERANCE
