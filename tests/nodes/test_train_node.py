"""Omini2 Train LoRA, in the host: from a folder of pictures to a file that Apply takes."""

from pathlib import Path

import comfy.model_management
import comfy.utils
import pytest
import torch
from helpers.train_node import VALUES
from tiny import apply

from omini2_extension.nodes import ConditionEncode
from omini2_extension.nodes.demo_model import DemoModel
from omini2_extension.nodes.train_lora import TrainLora
from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.host.attach import get_setup
from omini2_extension.omini2_core.lora.file import read_safetensors
from omini2_extension.omini2_core.training import checkpoints, graph, inputs, shown
from omini2_extension.omini2_core.training.rising import LossRose


@pytest.fixture(scope="module")
def parts() -> tuple:
    return DemoModel.execute().args


def test_an_edit_lora_is_trained_too(parts, host_folders: Path) -> None:
    """With the pictures as their own references; what a reference can't be is refused."""
    name = train(parts, references="isolated", condition="grey", lora_name="edit")[0]
    tensors, metadata = read_safetensors(host_folders / "loras" / name)
    assert metadata["omini2.references"] == "isolated" and "omini2.family" not in metadata
    assert any("add_q_proj" in key for key in tensors)
    with pytest.raises(Omini2Error, match=r"^references: edit was begun with isolated"):
        train(parts, condition="grey", lora_name="edit")
    for changes, said in (
        ({"condition": "inpainting"}, "condition:"),
        ({"delta_cols": 4}, "delta_rows:"),
    ):
        with pytest.raises(Omini2Error, match=said):
            train(parts, references="joint", lora_name="other", **changes)


def train(parts: tuple, **changes) -> tuple:
    return TrainLora.execute(clip=parts[1], vae=parts[2], **{**VALUES, **changes}).args


def test_a_folder_of_pictures_becomes_a_lora_that_apply_takes(parts, host_folders: Path) -> None:
    name, curve, same = train(parts)
    assert same == name == "mine.safetensors" and curve.shape[-1] == 3
    tensors, metadata = read_safetensors(host_folders / "loras" / name)
    assert metadata["omini2.independent_condition"] == "true"
    assert metadata["omini2.condition_size"] == "32x32"
    assert any(value.abs().max() > 0 for key, value in tensors.items() if "lora_B" in key)
    grey = torch.rand(1, 64, 64, 1).expand(-1, -1, -1, 3)
    condition = ConditionEncode.execute(grey, parts[2], "aligned", 0, 0, 1.0)[0]
    assert len(get_setup(apply(parts[0], condition, name)).branches) == 1


@pytest.mark.parametrize("kind", inputs.CONDITIONS)
def test_every_kind_of_condition_trains(parts, host_folders: Path, kind: str) -> None:
    changes = {"condition_folder": "shapes"} if kind == "folder" else {}
    name, *_ = train(parts, condition=kind, steps=1, **changes)
    assert (host_folders / "loras" / name).is_file()


def test_cancelling_keeps_the_last_checkpoint(
    parts, host_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = comfy.utils.ProgressBar.update_absolute

    def press_cancel(bar, step: int, *rest) -> None:
        real(bar, step, *rest)
        if step == 5:
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", press_cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        train(parts, steps=50)
    kept = checkpoints.last_checkpoint(inputs.config_for({**VALUES, "steps": 50}))
    assert kept is not None and kept.step == 5
    assert not (host_folders / "loras" / "mine.safetensors").exists()
    train(parts, steps=6)
    assert (host_folders / "loras" / "mine.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": "../elsewhere"}, "images: there is no folder"),
        ({"images": "none"}, "images: there is no folder"),
        ({"condition": "folder"}, "condition_folder: there is no folder"),
        ({"condition": "sepia"}, "condition"),
        ({"lora_name": "../../evil"}, "lora_name:"),
        ({"lora_name": " "}, "lora_name:"),
        ({"base": "no.safetensors"}, "base: there is no"),
        ({"size": 100}, "target_size"),
    ],
)
def test_what_can_not_be_used_is_refused_by_its_name(parts, host_folders, changes, said) -> None:
    with pytest.raises(Omini2Error, match=said):
        train(parts, **changes)
    assert not (host_folders / "output").exists()


def test_a_lora_of_another_run_is_not_overwritten(parts, host_folders: Path) -> None:
    other = host_folders / "loras" / "mine.safetensors"
    other.write_bytes(b"somebody's")
    with pytest.raises(Omini2Error, match=r"lora_name: mine.* give another lora_name"):
        train(parts)
    assert other.read_bytes() == b"somebody's"


# --- going on ----------------------------------------------------------------------------------


def steps_of(host_folders: Path) -> str:
    _, metadata = read_safetensors(host_folders / "loras" / "mine.safetensors")
    return metadata["omini2.steps"]


def test_queueing_again_goes_on_whatever_the_seed(parts, host_folders: Path, caplog) -> None:
    """The editor draws a new one after each run unless it is told otherwise."""
    train(parts, seed=4)
    train(parts, seed=4)
    assert steps_of(host_folders) == "3" and not caplog.text
    changes = {"seed": 77, "checkpoint_every": 1, "sample_every": 1, "learning_rate": 1e-4}
    train(parts, steps=5, **changes)
    assert steps_of(host_folders) == "5"
    assert "begun with 4 and goes on with it instead of 77" in caplog.text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 4}, "rank: mine was begun with 2 and can't go on with 4; set rank back to 2"),
        ({"attention": "joint"}, "attention: .* with independent and can't go on with joint"),
        ({"condition": "canny"}, "condition: .* with grey and can't go on with canny"),
        ({"size": 128}, "size: .* with 64 and can't go on with 128"),
        ({"compression": 1.0}, r"compression: .* with 0\.5 and can't go on with 1\.0"),
        ({"delta_cols": 4}, "delta_cols: .* with 0 and can't go on with 4"),
        ({"batch_size": 2}, "batch_size: .* with 1 and can't go on with 2"),
        ({"optimizer": "prodigy"}, "optimizer: .* with adamw and can't go on with prodigy"),
        ({"images": "the demo pictures"}, "images: .* with shapes and can't go on with the demo"),
    ],
)
def test_what_cannot_go_on_is_named_as_the_node_has_it(parts, host_folders, changes, said) -> None:
    config = inputs.config_for(VALUES)
    checkpoints.save_checkpoint(config, 3, [{"a": torch.zeros(1)}], {})
    with pytest.raises(Omini2Error, match=f"{said}.*lora_name") as error:
        train(parts, **changes)
    assert "output" not in str(error.value)


def test_what_the_node_has_no_input_for_is_named_as_it_is(parts, host_folders) -> None:
    config = inputs.config_for(VALUES).model_copy(update={"time_shift": 2.0})
    checkpoints.save_checkpoint(config, 3, [{"a": torch.zeros(1)}], {})
    with pytest.raises(Omini2Error, match=r"lora_name: .*time_shift 2\.0 instead of 5\.0"):
        train(parts)


def test_starting_anew_takes_another_name(parts, host_folders: Path) -> None:
    train(parts)
    with pytest.raises(Omini2Error, match=r"resume is off; turn resume on .* another lora_name"):
        train(parts, resume=False)
    train(parts, resume=False, lora_name="other")
    assert (host_folders / "loras" / "other.safetensors").is_file()


# --- what suits the base -----------------------------------------------------------------------


AUTO = {"size": 0, "optimizer": "auto", "learning_rate": 0.0, "compression": 1.0}


def test_auto_is_what_suits_the_base(host_folders: Path, monkeypatch) -> None:
    flux = host_folders / "flux1-dev.safetensors"
    flux.touch()
    monkeypatch.setattr(inputs, "_base", lambda name: flux)
    demo = inputs.config_for({**VALUES, **AUTO})
    real = inputs.config_for({**VALUES, **AUTO, "base": flux.name})
    assert demo.target_size == (256, 256) and real.target_size == (512, 512)
    assert (demo.optimizer.type, demo.optimizer.lr) == ("adamw", 1e-3)
    assert (real.optimizer.type, real.optimizer.lr) == ("prodigy", 1.0)
    # As the original's trainer has it.
    assert real.time_shift == 1
    chosen = {"size": 128, "optimizer": "adamw", "learning_rate": 0.5}
    for base in ("the demo model", flux.name):
        config = inputs.config_for({**VALUES, **AUTO, **chosen, "base": base})
        assert config.target_size == (128, 128) and config.optimizer.lr == 0.5


def test_the_demo_pictures_are_twelve_with_captions(host_folders: Path) -> None:
    config = inputs.config_for({**VALUES, "images": "the demo pictures"})
    found = sorted(config.data.folder.glob("*.jpg"))
    assert len(found) == 12 and sum(path.stat().st_size for path in found) < 200_000
    assert all(" on a " in path.with_suffix(".txt").read_text() for path in found)


# --- while it trains ---------------------------------------------------------------------------


def test_the_node_says_how_far_it_is_and_what_it_draws(parts, host_folders, monkeypatch) -> None:
    told, pictures = [], []
    monkeypatch.setattr(graph, "send", lambda event, data: told.append(data["figures"]))
    monkeypatch.setattr(graph, "SECONDS", 0.0)

    def show(bar, step: int, total: int, preview) -> None:
        pictures.append(preview[1].size)

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", show)
    train(parts, sample_every=2, seed=1)
    stages = [figures["stage"] for figures in told]
    assert stages == ["encode"] * 2 + ["train"] * 3 + ["done"]
    assert [f["step"] for f in told if f["stage"] == "train"] == [1, 2, 3]
    assert all(f["left"] >= 0 and f["steps"] == 3 for f in told if f["stage"] == "train")
    assert told[-1]["optimizer"] == "adamw" and told[-1]["size"] == [64, 64]
    # Two rows of picture and original; the smaller condition has no place of its own.
    width, height = shown.CURVE
    assert pictures == [shown.CURVE] + [(width, height + width)] * 2


def test_a_rising_loss_is_said_in_terms_of_the_node(parts, host_folders, monkeypatch) -> None:
    def rises(*_: object) -> None:
        raise LossRose(0.2, 0.5, 160)

    monkeypatch.setattr(graph, "train", rises)
    said = r"learning_rate: the loss has risen from 0\.200 to 0\.500 by step 160.* "
    for changes, way in (
        ({"learning_rate": 4e-3}, r"adamw and learning_rate to 0\.001, .* another lora_name"),
        ({"optimizer": "prodigy"}, r"set optimizer to adamw, .* another lora_name"),
    ):
        with pytest.raises(Omini2Error, match=said + way):
            train(parts, **changes)


def test_a_curve_is_drawn_from_any_numbers() -> None:
    falling = shown.draw_curve([3.0, 2.0, float("nan"), 1.0])
    flat = shown.draw_curve([1.0, 1.0])
    empty = shown.draw_curve([])
    assert falling.size == flat.size == empty.size == shown.CURVE
    assert falling.tobytes() != flat.tobytes() != empty.tobytes()
