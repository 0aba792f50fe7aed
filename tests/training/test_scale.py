"""Two processes train what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dev.paths import ROOT

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
from accelerate.utils import DistributedType
from helpers.training import KnownEncoders, config

from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.training.config import TrainConfig
from omini2_extension.omini2_core.training.loop import train
from omini2_extension.omini2_core.training.processes import require_usable

WORKER = ROOT / "tests" / "helpers" / "train_worker.py"
CONFIGS = ROOT / "omini2_core" / "training" / "accelerate"
OPTIONS = {
    "steps": 3,
    "checkpoint_every": 2,
    "conditions": [
        {"type": "grey", "independent_condition": True},
        {"type": "resize", "integration": True},
    ],
    "samples": {"every": 2, "count": 1, "steps": 2},
}
# Prodigy finds its step size only after many steps: this rate makes the first ones count.
OPTIMIZERS = {"ddp": {"type": "adamw", "lr": 1e-2}, "fsdp": {"type": "prodigy", "lr": 100}}


def launched(settings: TrainConfig, kind: str) -> list[float]:
    """The losses of two processes, started with one of the supplied configs of accelerate."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(CONFIGS / f"{kind}.yaml"), "--main_process_port", "0"]
    command += [str(WORKER), json.dumps(settings.model_dump(mode="json"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    *_, how, losses = done.stdout.splitlines()
    assert how == {"ddp": "DistributedType.MULTI_CPU", "fsdp": "DistributedType.FSDP"}[kind]
    return json.loads(losses)


def check(folder: Path, kind: str, *interrupted_at: int) -> None:
    """Two processes against one that accumulates two batches a step."""
    options = {**OPTIONS, "optimizer": OPTIMIZERS[kind]}
    alone = config(folder, output=str(folder / "one"), gradient_accumulation=2, **options)
    one = train(alone, KnownEncoders())
    together = config(folder, output=str(folder / kind), **options)
    for step in interrupted_at:
        launched(together.model_copy(update={"steps": step}), kind)
    assert launched(together, kind) == pytest.approx(one.losses, rel=1e-5)
    for path in one.loras:
        a, b = load_file(path), load_file(together.output / path.name)
        learnt = max(float(v.abs().max()) for k, v in a.items() if "lora_B" in k)
        assert learnt > 1e-3
        for key in a:  # sums in another order grow in what Prodigy divides by its own estimates
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=0.05 * learnt)
    [mine], [other] = ((s.output / "samples").iterdir() for s in (alone, together))
    drawn = [torch.from_numpy(np.asarray(Image.open(p)).astype(int)) for p in (mine, other)]
    torch.testing.assert_close(*drawn, rtol=0, atol=1)


@pytest.mark.timeout(600)
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """DDP over gloo: the same loss at each step, the same LoRAs and pictures."""
    check(tmp_path, "ddp")


@pytest.mark.timeout(600)
def test_a_base_shared_out_over_two_processes(tmp_path: Path) -> None:
    """FSDP over gloo, interrupted after two steps."""
    check(tmp_path, "fsdp", 2)


def test_processes_that_would_train_something_else_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")  # what a launcher says, and no GPU to share
    with pytest.raises(Omini2Error, match="2 processes were started"):
        train(settings, KnownEncoders())
    fsdp = mock.Mock(num_processes=2, distributed_type=DistributedType.FSDP, is_fsdp2=False)
    with pytest.raises(Omini2Error, match="fsdp_version"):
        require_usable(fsdp, settings)
    fsdp.is_fsdp2 = True
    require_usable(fsdp, settings)
    with pytest.raises(Omini2Error, match="quantize: FSDP"):
        require_usable(fsdp, settings.model_copy(update={"quantize": "int8"}))
