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
from omini2_extension.omini2_core.training.loop import Result, train

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


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> tuple[Path, Result]:
    """What one process trains that accumulates two batches a step."""
    folder = tmp_path_factory.mktemp("scale")
    settings = config(folder, output=str(folder / "one"), gradient_accumulation=2, **OPTIONS)
    with torch.inference_mode(False):
        return folder, train(settings, KnownEncoders())


def check(alone: Result, output: Path, losses: list[float]) -> None:
    assert losses == pytest.approx(alone.losses, rel=1e-5)
    for path in alone.loras:
        a, b = load_file(path), load_file(output / path.name)
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


@pytest.mark.timeout(600)
def test_two_processes_train_what_one_does(alone) -> None:
    """DDP over gloo: the same loss at each step, and the same LoRAs."""
    folder, one = alone
    together = config(folder, output=str(folder / "ddp"), **OPTIONS)
    check(one, together.output, launched(together))


@pytest.mark.timeout(600)
def test_a_base_shared_out_over_two_processes(alone) -> None:
    """FSDP over gloo, interrupted after two steps."""
    folder, one = alone
    fsdp = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_TRANSFORMER_CLS_TO_WRAP": "ConditionedDoubleBlock,ConditionedSingleBlock",
        "FSDP_RESHARD_AFTER_FORWARD": "true",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    }
    together = config(folder, output=str(folder / "fsdp"), **OPTIONS)
    launched(together.model_copy(update={"steps": 2}), **fsdp)
    check(one, together.output, launched(together, **fsdp))
