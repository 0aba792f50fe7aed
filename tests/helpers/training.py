"""A world small enough to train in seconds: a tiny base, flat pictures and known encoders."""

from pathlib import Path
from typing import Any

from helpers.known import KnownEncoders, latents_of
from PIL import Image
from safetensors.torch import save_file
from tiny import flux_config, make_model

from omini2_extension.omini2_core.training.config import TrainConfig, parse_config

__all__ = ["BASE", "KnownEncoders", "config", "latents_of", "write_base", "write_pictures"]

BASE = {"hidden_size": 64, "num_heads": 2, "axes_dim": [4, 14, 14], "depth_single_blocks": 2}
COLOURS = ((255, 40, 40), (40, 255, 40), (40, 40, 255), (255, 255, 40))


def write_base(path: Path, guidance: bool = True) -> Path:
    """A single file as ComfyUI's users have it, of a tiny FLUX."""
    model = make_model(flux_config(guidance, **BASE)).model.diffusion_model
    weights = {k: v.clone().contiguous() for k, v in model.state_dict().items()}
    # What leaves an untrained model has a fixed length; let it be long enough for the pictures.
    weights["final_layer.linear.weight"].mul_(3)
    weights["final_layer.adaLN_modulation.1.weight"].zero_()
    weights["final_layer.adaLN_modulation.1.bias"].zero_()
    save_file(weights, path)
    return path


def write_pictures(folder: Path, count: int = 4, size: int = 64) -> Path:
    """Pictures of one colour each with captions beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        image = Image.new("RGB", (size, size), COLOURS[i % 4])
        image.save(folder / f"scene{i}.png")
        (folder / f"scene{i}.txt").write_text(f"scene {i}")
    return folder


def config(tmp_path: Path, **changes: Any) -> TrainConfig:
    """A config for a run of a few seconds; the base and pictures are made if missing."""
    base, pictures = tmp_path / "base.safetensors", tmp_path / "pictures"
    if not base.exists():
        write_base(base)
        write_pictures(pictures)
    values = {
        "base": str(base),
        "output": str(tmp_path / "out"),
        "target_size": 64,
        "data": {"folder": str(pictures)},
        "conditions": [{"type": "resize", "name": "copy"}],
        "steps": 4,
        "batch_size": 2,
        "mixed_precision": "no",
        "gradient_checkpointing": False,
        "optimizer": {"type": "adamw", "lr": 1e-2},
        "checkpoint_every": 1000,
        "threads": 1,
    }
    return parse_config({**values, **changes})
