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
from omini2_extension.omini2_core.training import graph


@pytest.fixture(scope="module")
def parts() -> tuple:
    return DemoModel.execute().args


def train(parts: tuple, **changes) -> tuple:
    return TrainLora.execute(clip=parts[1], vae=parts[2], **{**VALUES, **changes}).args


def test_a_folder_of_pictures_becomes_a_lora_that_apply_takes(parts, host_folders: Path) -> None:
    name, curve = train(parts)
    assert name == "mine.safetensors" and curve.shape[-1] == 3
    tensors, metadata = read_safetensors(host_folders / "loras" / name)
    assert metadata["omini2.independent_condition"] == "true"
    assert metadata["omini2.condition_size"] == "32x32"
    assert any(value.abs().max() > 0 for key, value in tensors.items() if "lora_B" in key)
    grey = torch.rand(1, 64, 64, 1).expand(-1, -1, -1, 3)
    condition = ConditionEncode.execute(grey, parts[2], "aligned", 0, 0, 1.0)[0]
    assert len(get_setup(apply(parts[0], condition, name)).branches) == 1


@pytest.mark.parametrize("kind", graph.CONDITIONS)
def test_every_kind_of_condition_trains(parts, host_folders: Path, kind: str) -> None:
    changes = {"condition_folder": "shapes"} if kind == "folder" else {}
    name, _ = train(parts, condition=kind, steps=1, **changes)
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
    kept = graph.last_checkpoint(graph.config_for({**VALUES, "steps": 50}))
    assert kept is not None and kept[0] == 5
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
    with pytest.raises(Omini2Error, match="lora_name: there is a mine"):
        train(parts)
    assert other.read_bytes() == b"somebody's"


def test_a_curve_is_drawn_from_any_numbers() -> None:
    falling = graph.draw_curve([3.0, 2.0, float("nan"), 1.0])
    flat = graph.draw_curve([1.0, 1.0])
    empty = graph.draw_curve([])
    assert falling.size == flat.size == empty.size == graph.CURVE
    assert falling.tobytes() != flat.tobytes() != empty.tobytes()
