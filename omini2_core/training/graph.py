"""The trainer as the node Omini2 Train LoRA runs it: inside ComfyUI, with its CLIP and VAE.

Pictures come from a folder in ComfyUI's input folder. Checkpoints, logs and samples go to
``output/omini2_training/NAME``, the finished LoRA to the loras folder.
"""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from ..errors import Omini2Error, brief, require_choice, require_range
from ..files import write_atomically
from .base import DEMO
from .checkpoints import last_checkpoint
from .choices import CONDITIONS, DEMO_BASE, bases, picture_folders
from .config import TrainConfig, parse_config
from .encoders import ComfyEncoders, Fingerprint
from .loop import train
from .progress import Progress

NAME = re.compile(r"\w[\w .()+-]{0,99}")
CURVE = 512, 256  # pixels
INK, PAPER, FAINT = (70, 130, 220), (24, 24, 28), (70, 70, 78)


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
    size, kind = values["size"], values["condition"]
    require_range("compression", values["compression"], 0, 1)
    require_choice("condition", kind, CONDITIONS)
    require_choice("attention", values["attention"], ("independent", "joint"))
    condition: dict[str, Any] = {
        "name": name,
        "type": "resize" if kind == "inpainting" else kind,
        "independent_condition": values["attention"] == "independent",
    }
    if kind == "inpainting":
        condition["integration"] = True
    else:
        condition["condition_size"] = max(round(size * values["compression"] / 16), 1) * 16
        condition["position_delta"] = [values["delta_rows"], values["delta_cols"]]
    if kind == "folder":
        condition["folder"] = str(_folder("condition_folder", values["condition_folder"]))
    optimizer: dict[str, Any] = {"type": values["optimizer"]}
    if values["optimizer"] == "adamw":
        optimizer["lr"] = values["learning_rate"]
    return parse_config(
        {
            "base": DEMO if values["base"] == DEMO_BASE else str(_base(values["base"])),
            "output": str(Path(folder_paths.get_output_directory()) / "omini2_training" / name),
            "target_size": size,
            "data": {"folder": str(_folder("images", values["images"]))},
            "conditions": [condition],
            "rank": values["rank"],
            "steps": values["steps"],
            "batch_size": values["batch_size"],
            "optimizer": optimizer,
            "quantize": values["quantize"],
            "seed": values["seed"] % 2**32,
            "checkpoint_every": values["checkpoint_every"],
            "resume": values["resume"],
        },
        "Omini2 Train LoRA",
    )


def lora_path(config: TrainConfig) -> Path:
    """Where the finished LoRA goes."""
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    return folder / f"{config.conditions[0].label}.safetensors"


def train_lora(
    config: TrainConfig,
    clip: Any,
    vae: Any,
    show: Callable[[Progress, Image.Image], None],
) -> tuple[str, Tensor]:
    """Trains the config's LoRA.

    Args:
        show: told after each step, with the loss curve so far.

    Returns:
        The LoRA's name in the loras folder, and the loss curve as an image (1, H, W, 3).

    Raises:
        Omini2Error: there is a LoRA of this name that isn't this run's.
        InterruptProcessingException: cancelled; the last checkpoint is kept.
    """
    path = lora_path(config)
    if path.exists() and not (config.resume and last_checkpoint(config)):
        raise Omini2Error(
            f"lora_name: there is a {path.name} in the loras folder already; choose another name, "
            "or delete that file first."
        )
    comfy.model_management.unload_all_models()
    losses: list[float] = []

    def report(progress: Progress) -> None:
        if progress.stage == "train":
            losses.append(progress.smoothed)
        show(progress, draw_curve(losses))

    # The host executes nodes in inference mode, whose tensors can't be trained on.
    with torch.inference_mode(False):
        encoders = ComfyEncoders(clip, vae, _fingerprint(clip, vae))
        result = train(config, encoders, report, comfy.model_management.processing_interrupted)
    comfy.model_management.throw_exception_if_processing_interrupted()
    [trained] = result.loras
    write_atomically(path, trained.read_bytes(), "lora_name")
    curve = np.asarray(draw_curve(losses), dtype=np.float32) / 255
    return path.name, torch.from_numpy(curve)[None]


def _fingerprint(clip: Any, vae: Any) -> Fingerprint:
    """Tells encoders apart by what they give for a probe: their files aren't known here."""
    probe = ComfyEncoders(clip, vae, Fingerprint("", ""))
    features, pooled = probe.encode_text(["a probe of 3 colours"])
    ramp = torch.linspace(0, 1, 64 * 64 * 3).view(1, 64, 64, 3)
    return Fingerprint(_digest(features, pooled), _digest(probe.encode_images(ramp)))


def _digest(*tensors: Tensor) -> str:
    content = hashlib.sha256()
    for tensor in tensors:
        content.update(tensor.float().contiguous().numpy().tobytes())
    return content.hexdigest()


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
    if name not in picture_folders():
        raise Omini2Error(
            f"{key}: there is no folder {brief(name)} in ComfyUI's input folder; put the pictures "
            "into one there and press R to refresh the list."
        )
    return Path(folder_paths.get_input_directory()) / name


def draw_curve(losses: Sequence[float], size: tuple[int, int] = CURVE) -> Image.Image:
    """A loss curve with its highest and lowest value written beside it."""
    width, height = size
    image = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(image)
    numbers = [x for x in losses if math.isfinite(x)]
    if len(numbers) < 2:
        pen.text((16, height // 2), "waiting for the first steps", fill=FAINT)
        return image
    low, high = min(numbers), max(numbers)
    left, top, right, bottom = 16, 28, width - 16, height - 28
    spread = high - low or 1.0
    for share in (0.0, 0.5, 1.0):
        y = top + share * (bottom - top)
        pen.line([(left, y), (right, y)], fill=FAINT)
    points = [
        (
            left + i / (len(numbers) - 1) * (right - left),
            bottom - (x - low) / spread * (bottom - top),
        )
        for i, x in enumerate(numbers)
    ]
    pen.line(points, fill=INK, width=2)
    pen.text((left, 8), f"loss {high:.4f}", fill=(200, 200, 200))
    pen.text((left, bottom + 8), f"{low:.4f}", fill=(200, 200, 200))
    pen.text((right, bottom + 8), f"step {len(numbers)}", fill=(200, 200, 200), anchor="ra")
    return image
