"""The trainer as the node Omini2 Train LoRA runs it: inside ComfyUI, with its CLIP and VAE.

Pictures come from a folder in ComfyUI's input folder. Checkpoints, logs and samples go to
``output/omini2_training/NAME``, the finished LoRA to the loras folder.
"""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import Omini2Error, warn
from ..files import write_atomically
from ..host.report import send
from .checkpoints import Checkpoint, OtherRun, last_checkpoint
from .config import TrainConfig
from .encoders import ComfyEncoders, Fingerprint
from .inputs import first_difference
from .loop import train
from .progress import Progress
from .rising import LossRose
from .shown import draw_board, draw_curve

EVENT = "omini2.training"
SECONDS = 1.0  # between two of them


def lora_path(config: TrainConfig) -> Path:
    """Where the finished LoRA goes."""
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    return folder / f"{config.conditions[0].label}.safetensors"


def train_lora(
    config: TrainConfig,
    clip: Any,
    vae: Any,
    show: Callable[[Progress, Image.Image | None], None],
) -> tuple[str, Tensor, Image.Image]:
    """Trains the config's LoRA.

    Args:
        show: told after each step, once a second with sample pictures and the loss curve so far.

    Returns:
        The LoRA's name in the loras folder, the loss curve as an image (1, H, W, 3), and what was
        shown last.

    Raises:
        Omini2Error: there is a LoRA of this name that isn't this run's, or the loss rises.
        InterruptProcessingException: cancelled; the last checkpoint is kept.
    """
    path = lora_path(config)
    begun = _begun(config, path)
    asked = config.seed
    if begun is not None and begun.seed != asked:
        warn(
            f"seed: {path.name} was begun with {begun.seed} and goes on with it instead of "
            f"{asked}; give another lora_name to train with a seed of your own."
        )
        config = config.model_copy(update={"seed": begun.seed})
    comfy.model_management.unload_all_models()
    told = _Teller(config, asked, begun, show)
    # The host executes nodes in inference mode, whose tensors can't be trained on.
    with torch.inference_mode(False):
        encoders = ComfyEncoders(clip, vae, _fingerprint(clip, vae))
        stop = comfy.model_management.processing_interrupted
        try:
            result = train(config, encoders, told.progress, stop)
        except LossRose as error:
            raise Omini2Error(_rose(error, config)) from error
    comfy.model_management.throw_exception_if_processing_interrupted()
    [trained] = result.loras
    write_atomically(path, trained.read_bytes(), "lora_name")
    told.done(result.steps)
    curve = np.asarray(draw_curve(told.losses), dtype=np.float32) / 255
    return path.name, torch.from_numpy(curve)[None], told.board()


def _begun(config: TrainConfig, path: Path) -> Checkpoint | None:
    """What the run goes on from; refuses a name that is taken."""
    if path.exists() and not config.resume:
        raise Omini2Error(
            f"lora_name: {path.name} is in the loras folder already, and resume is off; turn "
            "resume on to train it further, or give another lora_name to start anew."
        )
    try:
        begun = last_checkpoint(config) if config.resume else None
    except OtherRun as error:
        raise Omini2Error(_other(error, config, path.stem)) from error
    if path.exists() and begun is None:
        raise Omini2Error(
            f"lora_name: {path.name} is in the loras folder already, but what it was trained from "
            f"isn't in {config.output}; give another lora_name, or take that file away."
        )
    return begun


def _other(error: OtherRun, config: TrainConfig, name: str) -> str:
    """Why a run can't go on, in terms of the node."""
    new = "give another lora_name for a new LoRA"
    if not error.differences:
        return (
            f"lora_name: {name} was begun by an earlier release with other settings, which it "
            f"didn't keep; set the inputs back to what they were, or {new}."
        )
    found = first_difference(error.differences, config)
    if found is None:
        key, (was, now) = next(iter(error.differences.items()))
        return (
            f"lora_name: {name} was begun by another release or outside of this node ({key} {was} "
            f"instead of {now}); {new}."
        )
    key, was, now = found
    return (
        f"{key}: {name} was begun with {was} and can't go on with {now}; set {key} back to {was}, "
        f"or {new}."
    )


def _rose(error: LossRose, config: TrainConfig) -> str:
    used = config.optimizer
    rate = used.learning_rate / 4
    way = f"set optimizer to adamw and learning_rate to {rate:g}"
    if used.type == "prodigy":
        way = "set optimizer to adamw"
    return (
        f"learning_rate: the loss has risen from {error.before:.3f} to {error.now:.3f} by step "
        f"{error.step}, which means a ruined picture, so training was stopped; {way}, and give "
        "another lora_name."
    )


class _Teller:
    """Keeps what a run says, and tells the node once a second: that is all that one can read."""

    def __init__(
        self,
        config: TrainConfig,
        asked: int,
        begun: Checkpoint | None,
        show: Callable[[Progress, Image.Image | None], None],
    ) -> None:
        self.losses: list[float] = []
        self._show, self._last = show, -SECONDS
        self._samples: Path | None = None
        width, height = config.target_size
        used = config.optimizer
        self._figures: dict[str, Any] = {
            "kind": "training",
            "steps": config.steps,
            "from": 0 if begun is None else begun.step,
            "size": [width, height],
            "optimizer": used.type,
            "rate": used.learning_rate,
            "seed": config.seed,
            "asked": asked,
        }

    def progress(self, progress: Progress) -> None:
        figures: dict[str, Any] = {"stage": progress.stage, "step": progress.step}
        if progress.stage == "train":
            self.losses.append(progress.smoothed)
            self._samples = progress.picture or self._samples
            figures |= self._losses | {"left": progress.seconds_left}
        now = time.monotonic()
        due = now - self._last >= SECONDS or progress.picture is not None
        if due:
            self._last = now
            self._tell(figures)
        self._show(progress, self.board() if due else None)

    def done(self, steps: int) -> None:
        self._tell({"stage": "done", "step": steps, **self._losses})

    def board(self) -> Image.Image:
        """Sample pictures and the loss curve."""
        return draw_board(self.losses, self._samples)

    @property
    def _losses(self) -> dict[str, float]:
        return {"start": self.losses[0], "loss": self.losses[-1]} if self.losses else {}

    def _tell(self, figures: dict[str, Any]) -> None:
        send(EVENT, {"figures": {**self._figures, **figures}})


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
