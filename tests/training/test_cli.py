"""The command, the examples and the memory statement."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dev.paths import ROOT

pytest.importorskip("diffusers")
pytest.importorskip("peft")
from helpers.known import KnownEncoders
from helpers.training import config

from omini2_extension.omini2_core.flux1.numbers import SHAPE
from omini2_extension.omini2_core.training import memory
from omini2_extension.omini2_core.training.__main__ import main
from omini2_extension.omini2_core.training.config import parse_config
from omini2_extension.omini2_core.training.loop import train
from omini2_extension.omini2_core.training.lora_file import read_safetensors
from omini2_extension.omini2_core.training.progress import Bar, Progress

EXAMPLES = sorted((ROOT / "example_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_can_be_used(path: Path, tmp_path: Path, monkeypatch) -> None:
    """In the extension's folder, as soon as ComfyUI's files and some pictures are there."""
    values = yaml.safe_load(path.read_text())
    named = [values["base"], *values.get("encoders", {}).values(), values["data"]["folder"]]
    named += [c["folder"] for c in values["conditions"] if "folder" in c]
    comfyui = tmp_path / "ComfyUI"
    extension = comfyui / "custom_nodes" / "comfyui-omini2"
    for name in named:
        _, models, rest = name.partition("models/")
        place = comfyui / models / rest if models else extension / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.touch()
    monkeypatch.chdir(extension)
    assert parse_config(values).conditions


def test_the_command(tmp_path: Path, capsys) -> None:
    settings = config(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    assert main([str(path), "--check"]) == 0
    assert main([str(path), "--memory"]) == 0
    assert "computed, not measured" in capsys.readouterr().out
    assert main([str(path)]) == 1  # this base brings no encoders
    assert "encoders: " in capsys.readouterr().err
    path.write_text("base: demo\nstpes: 3\n")
    assert main([str(path)]) == 1
    assert "did you mean steps?" in capsys.readouterr().err


def test_ctrl_c_writes_what_was_trained(tmp_path: Path, capsys, monkeypatch) -> None:
    data = {"folder": str(ROOT / "demo_model" / "photos"), "caption": "a photo", "limit": 2}
    settings = config(tmp_path, base="demo", steps=50, data=data)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    show = Bar.show

    def press(bar: Bar, progress: Progress) -> None:
        show(bar, progress)
        if progress.stage == "train" and progress.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Bar, "show", press)
    before = signal.getsignal(signal.SIGINT)
    assert main([str(path)]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    said = capsys.readouterr()
    assert said.out.split() == [str(settings.output / "copy.safetensors")]
    assert "go on from the last checkpoint" in said.err
    assert read_safetensors(settings.output / "copy.safetensors")[1]["omini2.steps"] == "2"
    assert [p.name for p in (settings.output / "checkpoints").iterdir()] == ["step-00000002"]


def test_the_extension_starts_without_the_trainers_libraries() -> None:
    code = (
        "import runpy, sys; load = runpy.run_path('dev/load.py'); load['load_host'](); "
        "load['load_extension'](); import omini2_extension.nodes; "
        "print([m for m in ('diffusers', 'peft', 'accelerate') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr[-2000:]


def test_sizes_are_counted_right(tmp_path: Path) -> None:
    for kind in ("full", "small"):
        settings = config(tmp_path, steps=1, target_modules=kind, output=str(tmp_path / kind))
        [path] = train(settings, KnownEncoders()).loras
        trained = sum(t.numel() for t in read_safetensors(path)[0].values())
        assert memory.lora_parameters(settings, 64, (2, 2)) == trained
    assert memory.parameters(SHAPE) == pytest.approx(11.9e9, rel=0.01)
    base, _ = read_safetensors(Path(settings.base))
    weights = sum(t.numel() for t in base.values() if t.ndim == 2)
    assert memory.parameters(memory.shape_of(settings.base)) == weights


def test_memory_of_flux(tmp_path: Path) -> None:
    settings = config(tmp_path, mixed_precision="bf16", gradient_checkpointing=True)
    needed = {kind: memory.memory_of(settings, SHAPE, kind).total for kind in memory.BITS}
    assert 24e9 < needed["none"] < 30e9 and needed["nf4"] < 12e9 < needed["int8"] < 16e9
    open_blocks = settings.model_copy(update={"gradient_checkpointing": False})
    more = memory.memory_of(open_blocks, SHAPE, "none")
    assert more.activations > 5 * memory.memory_of(settings, SHAPE, "none").activations
