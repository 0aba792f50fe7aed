"""Where a run can go on from: LoRAs in full precision, the optimiser's state and the step.

A checkpoint is written beside and then renamed, so that one that is there is whole.
"""

import hashlib
import io
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import Omini2Error, warn
from ..files import write_atomically
from ..lora.file import read_safetensors
from .config import TrainConfig
from .lora_file import adapters, save_tensors

# What may change between an interrupted run and the one that goes on.
FREE = {
    "output", "steps", "checkpoint_every", "keep_checkpoints", "samples", "cache", "threads",
    "resume", "gradient_checkpointing", "encoders", "optimizer", "max_grad_norm",
}  # fmt: skip


def run_identity(config: TrainConfig) -> str:
    """Says whether two configs are the same run; what may change isn't part of it."""
    fixed = config.model_dump(mode="json", exclude=FREE)
    fixed["optimizer"] = config.optimizer.type
    if fixed["references"] == "off":  # earlier runs didn't have it, nor main_lora
        del fixed["references"]
    for condition in fixed["conditions"]:
        if not condition["main_lora"]:
            del condition["main_lora"]
    return hashlib.sha256(json.dumps(fixed, sort_keys=True).encode()).hexdigest()[:16]


def save_checkpoint(
    config: TrainConfig, step: int, loras: list[dict[str, Tensor]], optimizer: dict[str, Any]
) -> Path:
    """Writes a checkpoint and removes the ones that are too old.

    Raises:
        Omini2Error: it can't be written; the ones before are as they were.
    """
    folder = _folder(config)
    partial, final = folder / f".step-{step:08d}.part", folder / f"step-{step:08d}"
    for left in folder.glob(".step-*.part"):  # by a run that was killed
        shutil.rmtree(left)
    buffer = io.BytesIO()
    torch.save(optimizer, buffer)
    state = json.dumps({"step": step, "identity": run_identity(config)})
    try:
        for index, tensors in enumerate(loras):
            save_tensors(partial / f"condition_{index}.safetensors", tensors, {})
        write_atomically(partial / "optimizer.pt", buffer.getvalue(), "output")
        write_atomically(partial / "state.json", state.encode(), "output")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)  # on a full disk above all
        raise
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    for old in _all(config)[: -config.keep_checkpoints]:
        shutil.rmtree(old)
    return final


def last_checkpoint(
    config: TrainConfig,
) -> tuple[int, list[dict[str, Tensor]], dict[str, Any]] | None:
    """The newest checkpoint that can be read: step, LoRAs and the optimiser's state.

    Raises:
        Omini2Error: it belongs to another run.
    """
    for path in reversed(_all(config)):
        try:
            state = json.loads((path / "state.json").read_text())
            loras = [
                read_safetensors(path / f"condition_{index}.safetensors")[0]
                for index in range(len(adapters(config)))
            ]
            optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        except Exception as error:  # whatever damaged files make json, safetensors, torch raise
            warn(f"output: the checkpoint {path} can't be read ({error}); an older one is used.")
            continue
        if state["identity"] != run_identity(config):
            raise Omini2Error(
                f"output: {path} belongs to a run with other settings; choose another output, or "
                "set resume to false to start over."
            )
        return state["step"], loras, optimizer
    return None


def remove_checkpoints(config: TrainConfig) -> None:
    """Starts over."""
    shutil.rmtree(_folder(config), ignore_errors=True)


def _folder(config: TrainConfig) -> Path:
    return config.output.expanduser() / "checkpoints"


def _all(config: TrainConfig) -> list[Path]:
    return sorted(_folder(config).glob("step-*"))
