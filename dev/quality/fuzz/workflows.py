"""Workflows from anywhere: missing, foreign and hostile values, through the host's own validation
and execution.

Our nodes stand between two of this file: a source of a tiny FLUX.1 with everything that goes with
it, and an end that draws one picture.
"""

from __future__ import annotations

import asyncio
import copy
import math
import os
import tempfile
import traceback
from functools import cache
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.sample
import execution
import folder_paths
import nodes as host_nodes
import torch
from comfy.model_patcher import ModelPatcher

from dev.paths import ROOT
from dev.quality.fuzz import inputs
from dev.quality.fuzz.model import CONFIG, ominicontrol_file, tiny_flux
from omini2_extension.nodes import NODES
from omini2_extension.omini2_core.errors import Omini2Error

LORA = "fuzzed.safetensors"
HOSTILE: list[Any] = [
    *inputs.TEXTS[:60], *inputs.NUMBERS, None, True, [], {}, [[]], ["1"], ["1", "x"], ["1", 99],
    ["1", -1], ["99", 0], ["1", 0, 0], [["1", 0]], {"__value__": 1}, {"__value__": ["2", 0]},
]  # fmt: skip
KINDS = ["", "KSampler", "Omini2ApplyLoRA", "Omini2LoadCache", "__class__", None, 3, {}]
PROMPT: dict[str, Any] = {
    "1": {"class_type": "FuzzSource", "inputs": {}},
    "2": {
        "class_type": "Omini2ConditionEncode",
        "inputs": {
            "image": ["1", 2], "vae": ["1", 1], "placement": "aligned", "delta_rows": 0,
            "delta_cols": 0, "position_scale": 1.0, "mask": ["1", 3], "resize": "off", "size": 64,
        },
    },
    "3": {
        "class_type": "Omini2CompactTokens",
        "inputs": {
            "condition": ["2", 0], "compression": 1.0, "position_correcting": True, "prune": "off",
            "threshold": 0.1, "grow": 0, "token_integration": False, "mask": ["1", 3],
            "shift_schedule": True,
        },
    },
    "4": {
        "class_type": "Omini2ApplyLoRA",
        "inputs": {
            "model": ["1", 0], "condition": ["3", 0], "lora_name": LORA, "strength": 1.0,
            "condition_scale": 1.0, "attention": "auto", "start_percent": 0.0, "end_percent": 1.0,
        },
    },
    "5": {
        "class_type": "Omini2ConditionCache",
        "inputs": {
            "model": ["4", 0], "reuse": "auto", "refresh_every": 5, "storage": "model",
            "keep_on": "auto",
        },
    },
    "6": {
        "class_type": "Omini2ImageGuidance",
        "inputs": {"model": ["5", 0], "image_guidance_scale": 1.0},
    },
    "7": {"class_type": "FuzzEnd", "inputs": {"model": ["6", 0]}},
}  # fmt: skip


def draw(rng: Random) -> Any:
    """A prompt in the format that the editor sends."""
    prompt = copy.deepcopy(PROMPT)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        number = rng.choice(sorted(set(prompt) - {"1", "7"}) or ["7"])
        node = prompt.get(number)
        if not isinstance(node, dict) or not isinstance(node.get("inputs"), dict):
            continue
        given, kind = node["inputs"], rng.random()
        name = rng.choice([*given, "x"])
        if kind < 0.5:
            given[name] = rng.choice(HOSTILE)
        elif kind < 0.65:
            given[name] = [rng.choice([*prompt]), rng.randrange(4)]
        elif kind < 0.8:
            given.pop(name, None)
        elif kind < 0.9:
            given[rng.choice(inputs.TEXTS[:60])] = rng.choice(HOSTILE)
        elif kind < 0.95:
            node["class_type"] = rng.choice(KINDS)
        else:
            prompt.pop(number)
    return prompt


def read(prompt: Any) -> None:
    """As the server does with what is posted to it.

    Raises:
        Omini2Error: the host refuses it, or one of our nodes does.
        Exception: whatever else one of our nodes raised.
    """
    executor = _executor()
    if _loras().name not in folder_paths.get_folder_paths("loras"):
        folder_paths.add_model_folder_path("loras", _loras().name)
        folder_paths.filename_list_cache.pop("loras", None)
    try:
        valid, _, outputs, _ = asyncio.run(execution.validate_prompt("fuzz", prompt, None))
        if not valid:
            raise Omini2Error("The host refuses it.")
        executor.execute(prompt, "fuzz", {}, outputs)
    except Omini2Error:
        raise
    except Exception as error:
        if _is_ours(traceback.format_exc()):
            raise
        raise Omini2Error(f"The host can't read it: {type(error).__name__}.") from error
    finally:
        forget_lost_models()
    for event, said in executor.status_messages:
        if event == "execution_error":
            _raise(said)


def _raise(said: dict[str, Any]) -> None:
    if said["exception_type"].endswith("Omini2Error"):
        raise Omini2Error(said["exception_message"].strip())
    if said["exception_type"].startswith("graph."):  # a cycle, say
        raise Omini2Error("The host can't order it.")
    if not _is_ours("".join(said["traceback"]), __file__):  # a link that 0.33.0 trips over
        raise Omini2Error("The host can't run it.")
    raise RuntimeError(f"{said['exception_type']}: {said['exception_message']}")


def forget_lost_models() -> None:
    """A failed run's frames take patched models with them, of which the host's list keeps an entry
    for as long as the weights live, and collects all garbage for it in every run from then on."""
    loaded = comfy.model_management.current_loaded_models
    loaded[:] = [model for model in loaded if not model.is_dead()]


def _is_ours(trace: str, *others: str) -> bool:
    """Whether an error came through our code, or through these files."""
    ours = [str(ROOT / folder) + os.sep for folder in ("omini2_core", "nodes", "web")]
    return any(path in trace for path in (*ours, *others))


@cache
def _executor() -> Any:
    """The host's, which knows our nodes and the two of this file."""
    for node in NODES:
        host_nodes.NODE_CLASS_MAPPINGS[node.define_schema().node_id] = node
    host_nodes.NODE_CLASS_MAPPINGS.update(FuzzSource=Source, FuzzEnd=End)
    server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda *a: None)
    return execution.PromptExecutor(server, cache_args={"lru": 0, "ram": 0.0, "ram_inactive": 0.0})


@cache
def _loras() -> Any:
    """A folder with a LoRA that fits, which goes when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="omini2_fuzz")
    (Path(folder.name) / LORA).write_bytes(ominicontrol_file())
    return folder


class Source:
    """A tiny FLUX.1, a VAE, an image and a mask."""

    RETURN_TYPES = ("MODEL", "VAE", "IMAGE", "MASK")
    FUNCTION = "give"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {}}

    def give(self) -> tuple[Any, ...]:
        mask = torch.zeros(1, 32, 32)
        mask[:, :16] = 1
        return tiny_flux(), SimpleNamespace(encode=encode), torch.rand(1, 32, 32, 3), mask


def encode(pixels: torch.Tensor) -> torch.Tensor:
    """In the place of FLUX's VAE: 16 channels, an eighth of the size."""
    means = pixels.movedim(-1, 1).unfold(2, 8, 8).unfold(3, 8, 8).mean((-1, -2))
    return means.repeat(1, 6, 1, 1)[:, :16]


class End:
    """One step of a picture of 2x2 tokens, which has to be finite."""

    RETURN_TYPES = ()
    FUNCTION = "draw"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("MODEL",)}}

    def draw(self, model: ModelPatcher) -> dict[str, Any]:
        text, pooled = (
            torch.zeros(1, 3, CONFIG["context_in_dim"]),
            torch.zeros(1, CONFIG["vec_in_dim"]),
        )
        prompt = [[text, {"pooled_output": pooled, "guidance": 3.5}]]
        latent = torch.zeros(1, 16, 4, 4)
        noise = comfy.sample.prepare_noise(latent, 0)
        picture = comfy.sample.sample(
            model, noise, 1, 1.0, "euler", "simple", prompt, prompt, latent, disable_pbar=True
        )  # fmt: skip
        if not math.isfinite(float(picture.abs().sum())):
            raise RuntimeError("a picture that isn't finite")
        return {}
