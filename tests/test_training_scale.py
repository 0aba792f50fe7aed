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


def test_a_base_shared_out_over_two_processes(tmp_path: Path) -> None:
    """FSDP: the same losses, and its checkpoints go on in one process and the other way round."""
    settings = config(tmp_path, output=str(tmp_path / "one"), gradient_accumulation=2, **OPTIONS)
    one = train(settings, KnownEncoders())
    together = config(tmp_path, output=str(tmp_path / "two"), **OPTIONS)
    fsdp = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "ConditionedDoubleBlock,ConditionedSingleBlock",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }
    assert launched(together, **fsdp) == pytest.approx(one.losses, rel=1e-5)
    longer = together.model_copy(update={"steps": 4})
    assert len(launched(longer, **fsdp)) == 4
