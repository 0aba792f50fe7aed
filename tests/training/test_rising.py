"""A loss that rises above the base's own is said, and ends the run where it stays there."""

from pathlib import Path

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")
from helpers.training import config

from dev.paths import ROOT
from omini2_extension.omini2_core.training import loop, rising
from omini2_extension.omini2_core.training.loop import train
from omini2_extension.omini2_core.training.rising import LossRose, Watch


def test_it_is_said_first_and_ends_the_run_where_it_stays(caplog) -> None:
    losses = [1.0, 3.0]
    watch = Watch(lambda: losses, after=0)

    def go_on(loss: float, *steps: int) -> None:
        losses[:] = [loss, loss]
        for step in steps:
            watch.step(step)

    go_on(4, *range(1, 41))  # and comes back by itself
    assert caplog.text.count("The loss has risen from 2.000 to 4.000 by step 40") == 1
    go_on(2.9, *range(41, 400))
    go_on(3.1, *range(400, 500))
    assert "from 2.000 to 3.100 by step 400" in caplog.text
    with pytest.raises(LossRose, match=r"from 2\.000 to 3\.100 by step 500"):
        go_on(3.1, 500)


def test_a_condition_that_still_fades_in_is_left_alone(caplog) -> None:
    losses = [1.0]
    watch = Watch(lambda: losses, after=250)
    losses[:] = [9.0]
    for step in range(1, 300):
        watch.step(step)
    assert not caplog.text
    watch.step(300)
    assert "by step 300" in caplog.text


def test_a_run_that_diverges_is_stopped_and_another_is_not(tmp_path, monkeypatch, caplog) -> None:
    """The demo model itself, with a learning rate that no LoRA survives."""
    for module, name in ((rising, "FIRST"), (rising, "EVERY"), (loop, "FIRST")):
        monkeypatch.setattr(module, name, 5)  # so that it doesn't take a minute
    monkeypatch.setattr(loop, "SAMPLES", 4)
    options = {
        "base": "demo",
        "target_size": 128,
        "data": {"folder": str(ROOT / "demo_model" / "pictures")},
        "conditions": [{"type": "blur", "independent_condition": True}],
        "steps": 10,
        "batch_size": 1,
        "cache": str(tmp_path / "cache"),
    }

    def run(rate: float) -> Path:
        output = tmp_path / f"{rate}"
        adamw = {"type": "adamw", "lr": rate}
        train(config(tmp_path, **options, output=str(output), optimizer=adamw))
        return output

    gentle = run(1e-3)
    assert (gentle / "blur.safetensors").is_file() and not caplog.text
    with pytest.raises(LossRose, match="by step 10; lower the learning rate"):
        run(0.3)
    assert not list((tmp_path / "0.3").glob("*.safetensors"))
