"""A loss that rises ends a run; one that only jumps about, or falls, doesn't."""

import csv
import random
from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
from helpers.training import KnownEncoders, config

from dev.paths import ROOT
from omini2_extension.omini2_core.training.loop import train
from omini2_extension.omini2_core.training.rising import LossRose, risen

REAL = sorted((ROOT / "demo_model" / "training").glob("*.csv"))


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_real_runs_that_went_well_are_left_alone(path: Path) -> None:
    """Those of the demo model's LoRAs, those that fade a condition in among them."""
    with path.open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert all(risen(losses[:end]) is None for end in range(len(losses) + 1))


@pytest.mark.parametrize("seed", range(20))
def test_noise_is_no_rise(seed: int) -> None:
    """As wide as a step's loss at batch 1, over a long run that learns nothing."""
    draw = random.Random(seed).lognormvariate
    losses = [draw(0, 0.6) for _ in range(3000)]
    assert all(risen(losses[:end]) is None for end in range(0, 3000, 7))


@pytest.mark.parametrize("seed", range(20))
def test_a_loss_that_doubles_is_seen_within_a_hundred_steps(seed: int) -> None:
    draw = random.Random(seed).lognormvariate
    losses = [draw(0, 0.3) * (1 if step < 20 else 2) for step in range(100)]
    start, now = risen(losses)
    assert 1.7 < now / start < 2.4


def test_a_run_that_diverges_is_stopped(tmp_path: Path) -> None:
    options = {"steps": 500, "optimizer": {"type": "adamw", "lr": 3.0}, "max_grad_norm": 1e9}
    with pytest.raises(
        LossRose, match="the loss has risen from .* lower the learning rate"
    ) as error:
        train(config(tmp_path, **options), KnownEncoders())
    assert 40 <= error.value.step < 200
    assert not list((tmp_path / "out").glob("*.safetensors"))
