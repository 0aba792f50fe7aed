"""What the inputs of Omini2 Train LoRA mean: the trainer's config, and back for what it refuses.

"auto" stands for what suits the base. The demo model is small and knows 256x256; for FLUX.1 it is
what the original's trainer does.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import folder_paths

from ..errors import Omini2Error, brief, require_choice, require_range
from .base import DEMO, DEMO_FILE
from .checkpoints import settings_of
from .choices import (
    AUTO,
    CONDITIONS,
    DEMO_BASE,
    DEMO_PICTURES,
    OPTIMIZERS,
    REFERENCES,
    bases,
    picture_folders,
)
from .config import TrainConfig, parse_config

NAME = re.compile(r"\w[\w .()+-]{0,99}")
PICTURES = DEMO_FILE.parent / "pictures"
NODE = "Omini2 Train LoRA"


@dataclass(frozen=True)
class _Defaults:
    """What "auto" means for a base.

    Attributes:
        rates: the learning rate by optimiser.
        sample_steps: of the pictures that are drawn while it trains.
        rest: keys of the config that the node has no input for.
    """

    size: int
    optimizer: str
    rates: dict[str, float]
    sample_steps: int
    rest: dict[str, Any] = field(default_factory=dict)


# Measured: docs/training.md, "What auto stands for".
FOR_DEMO = _Defaults(
    256,
    "adamw",
    {"adamw": 1e-3, "prodigy": 1.0},
    8,
    {"time_shift": 5.0, "gradient_checkpointing": False},
)
FOR_FLUX = _Defaults(512, "prodigy", {"adamw": 1e-4, "prodigy": 1.0}, 20)


def config_for(values: dict[str, Any]) -> TrainConfig:
    """The trainer's config of what the node's inputs say.

    Raises:
        Omini2Error: a folder, a file or a value that can't be used.
    """
    name = values["lora_name"].strip().removesuffix(".safetensors")
    if not NAME.fullmatch(name):
        raise Omini2Error(
            f"lora_name: {brief(values['lora_name'])} is no file name; use letters, digits, - "
            "and _."
        )
    defaults = FOR_DEMO if values["base"] == DEMO_BASE else FOR_FLUX
    kind, size = values["condition"], values["size"] or defaults.size
    require_range("size", size, 64)
    require_range("compression", values["compression"], 0, 1)
    require_choice("condition", kind, CONDITIONS)
    require_choice("attention", values["attention"], ("independent", "joint"))
    require_choice("optimizer", values["optimizer"], OPTIMIZERS)
    references = values.get("references", "off")
    require_choice("references", references, REFERENCES)
    condition: dict[str, Any] = {"name": name, "type": "resize" if kind == "inpainting" else kind}
    delta = [values["delta_rows"], values["delta_cols"]]
    if references != "off":
        _require_reference(kind, delta)
    else:
        condition["independent_condition"] = values["attention"] == "independent"
    if kind == "inpainting":
        condition["integration"] = True
    else:
        side = max(round(size * values["compression"] / 16), 1) * 16
        condition |= {"condition_size": side, "position_delta": delta}
    if kind == "folder":
        condition["folder"] = str(_folder("condition_folder", values["condition_folder"]))
    optimizer = defaults.optimizer if values["optimizer"] == AUTO else values["optimizer"]
    given = values["learning_rate"] if optimizer == "adamw" else 0
    return parse_config(
        {
            "base": DEMO if values["base"] == DEMO_BASE else str(_base(values["base"])),
            "output": str(Path(folder_paths.get_output_directory()) / "omini2_training" / name),
            "target_size": size,
            "data": {"folder": str(_folder("images", values["images"]))},
            "references": references,
            "conditions": [condition],
            "rank": values["rank"],
            "steps": values["steps"],
            "batch_size": values["batch_size"],
            "optimizer": {"type": optimizer, "lr": given or defaults.rates[optimizer]},
            "quantize": values["quantize"],
            "seed": values["seed"] % 2**32,
            "checkpoint_every": values["checkpoint_every"],
            "resume": values["resume"],
            "samples": {
                "every": values.get("sample_every", 0),
                "count": 2,
                "steps": defaults.sample_steps,
            },
            **defaults.rest,
        },
        NODE,
    )


def _require_reference(kind: str, delta: list[int]) -> None:
    """Refuses what a reference image can't be."""
    if kind == "inpainting":
        raise Omini2Error(
            "condition: inpainting has no reference image; choose folder, with the pictures as "
            "they were as condition_folder, or set references to off."
        )
    if any(delta):
        raise Omini2Error(
            "delta_rows: an editing model says itself where references lie; set delta_rows and "
            "delta_cols to 0, or references to off."
        )


def inputs_of(settings: dict[str, Any]) -> dict[str, Any]:
    """The node's inputs that stand for a run's settings, as far as it has them.

    Args:
        settings: what :func:`.checkpoints.settings_of` gives.
    """
    one = {key.removeprefix("conditions.0."): value for key, value in settings.items()}
    size = one["target_size"][0]
    inputs = {
        "references": one["references"],  # first, as attention has no meaning with it
        "base": DEMO_BASE if one["base"] == DEMO else Path(one["base"]).name,
        "images": _folder_name(one["data.folder"]),
        "condition": "inpainting" if one["integration"] else one["type"],
        "condition_folder": _folder_name(one["folder"]),
        "attention": "independent" if one["independent_condition"] else "joint",
        "size": size,
        "rank": one["rank"],
        "batch_size": one["batch_size"],
        "optimizer": one["optimizer.type"],
        "quantize": one["quantize"],
    }
    if one["condition_size"] is not None:
        inputs["compression"] = one["condition_size"][0][0] / size
        inputs["delta_rows"], inputs["delta_cols"] = map(round, one["position_delta"])
    return inputs


def first_difference(
    differences: dict[str, tuple[Any, Any]], config: TrainConfig
) -> tuple[str, Any, Any] | None:
    """The node's input in which a run differs from its checkpoint: its name, the run's, the node's.

    None where no input of the node says it.
    """
    now = settings_of(config)
    was = {**now, **{key: began for key, (began, _) in differences.items()}}
    before, asked = inputs_of(was), inputs_of(now)
    for name, value in asked.items():
        if before.get(name, value) != value:
            return name, before[name], value
    return None


def _folder_name(path: str | None) -> str:
    """As the node's lists have it."""
    if path is None:
        return "none"
    if Path(path) == PICTURES:
        return DEMO_PICTURES
    root = Path(folder_paths.get_input_directory())
    return Path(path).relative_to(root).as_posix() if Path(path).is_relative_to(root) else path


def _base(name: str) -> Path:
    path = folder_paths.get_full_path("diffusion_models", name) if name in bases() else None
    if path is None:
        raise Omini2Error(
            f"base: there is no {brief(name)} in ComfyUI's diffusion_models folder; put FLUX.1's "
            ".safetensors file there and press R to refresh the list."
        )
    return Path(path)


def _folder(key: str, name: str) -> Path:
    """A folder in ComfyUI's input folder; a workflow is untrusted and gets no other."""
    if key == "images" and name == DEMO_PICTURES:
        return PICTURES
    if name not in picture_folders():
        raise Omini2Error(
            f"{key}: there is no folder {brief(name)} in ComfyUI's input folder; put the pictures "
            "into one there and press R to refresh the list."
        )
    return Path(folder_paths.get_input_directory()) / name
