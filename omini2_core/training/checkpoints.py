"""Where a run can go on from: LoRAs in full precision, the optimiser's state and the step.

A checkpoint is written beside and then renamed, so that one that is there is whole.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Checkpoint:
    """Where a run can go on from.

    Attributes:
        loras: the tensors of each condition's LoRA, in full precision.
        optimizer: its state.
        seed: the run's own, which it keeps.
    """

    step: int
    loras: list[dict[str, Tensor]]
    optimizer: dict[str, Any]
    seed: int


class OtherRun(Omini2Error):
    """A checkpoint of a run with other settings.

    Attributes:
        differences: a config's key -> what the run was begun with and what is asked for now; empty
            for a checkpoint of release 0.1.0, which didn't keep its settings.
    """

    def __init__(self, output: Path, differences: dict[str, tuple[Any, Any]]) -> None:
        self.differences = differences
        if differences:
            key, (was, now) = next(iter(differences.items()))
            what = f"a run with {key} {was} instead of {now}; set it back"
        else:
            what = "a run with other settings; set them back"
        super().__init__(
            f"output: {output} holds {what}, choose another output, or set resume to false to "
            "start over."
        )


def settings_of(config: TrainConfig) -> dict[str, Any]:
    """What a run keeps from its first step to its last, by dotted keys: ``conditions.0.type``."""
    fixed = config.model_dump(mode="json", exclude=FREE)
    fixed["optimizer"] = {"type": config.optimizer.type}
    return {"conditions": len(config.conditions), **dict(_flat(fixed, ""))}


def _flat(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}".lstrip("."))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        yield from _flat({str(i): inner for i, inner in enumerate(value)}, key)
    else:
        yield key, value


def _identity(config: TrainConfig) -> str:
    """What release 0.1.0 told runs apart by."""
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
    state = json.dumps({"step": step, "settings": settings_of(config)})
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


def last_checkpoint(config: TrainConfig) -> Checkpoint | None:
    """The newest checkpoint that can be read.

    Raises:
        OtherRun: it belongs to a run with other settings; another seed doesn't make it one.
    """
    for path in reversed(_all(config)):
        try:
            state = json.loads((path / "state.json").read_text())
            seed = _own_seed(state, config)
            loras = [
                read_safetensors(path / f"condition_{index}.safetensors")[0]
                for index in range(len(adapters(config)))
            ]
            optimizer = torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True)
        except OtherRun:
            raise
        except Exception as error:  # whatever damaged files make json, safetensors, torch raise
            warn(f"output: the checkpoint {path} can't be read ({error}); an older one is used.")
            continue
        return Checkpoint(state["step"], loras, optimizer, seed)
    return None


def _own_seed(state: dict[str, Any], config: TrainConfig) -> int:
    """The seed of the run that a checkpoint is from; refuses one of another run."""
    kept = state.get("settings")
    if kept is None:
        if state["identity"] != _identity(config):
            raise OtherRun(config.output, {})
        return config.seed
    now = settings_of(config)
    # By what it kept: later releases may know more settings.
    differences = {
        key: (was, now.get(key))
        for key, was in kept.items()
        if key != "seed" and was != now.get(key)
    }
    if differences:
        raise OtherRun(config.output, differences)
    return int(kept["seed"])


def remove_checkpoints(config: TrainConfig) -> None:
    """Starts over."""
    shutil.rmtree(_folder(config), ignore_errors=True)


def _folder(config: TrainConfig) -> Path:
    return config.output.expanduser() / "checkpoints"


def _all(config: TrainConfig) -> list[Path]:
    return sorted(_folder(config).glob("step-*"))
