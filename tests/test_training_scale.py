"""Two processes train what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")
pytest.importorskip("diffusers")
pytest.importorskip("peft")
from training import KnownEncoders, config

from omini2_extension.omini2_core.training.config import TrainConfig
from omini2_extension.omini2_core.training.loop import train

WORKER = Path(__file__).parent / "train_worker.py"
OPTIONS = {
    "steps": 3,
    "checkpoint_every": 2,
    "conditions": [
        {"type": "grey", "independent_condition": True},
        {"type": "resize", "integration": True},
    ],
}


def launched(settings: TrainConfig, **environment: str) -> list[float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(WORKER), json.dumps(settings.model_dump(mode="json"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Over gloo: the loss of one process that accumulates, at each step, and the same LoRAs."""
    alone = config(tmp_path, output=str(tmp_path / "one"), gradient_accumulation=2, **OPTIONS)
    one = train(alone, KnownEncoders())
    together = config(tmp_path, output=str(tmp_path / "two"), **OPTIONS)
    assert launched(together) == pytest.approx(one.losses, rel=1e-5)
    for path in one.loras:
        a, b = load_file(path), load_file(together.output / path.name)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)
