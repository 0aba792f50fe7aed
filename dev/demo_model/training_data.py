"""Drawn scenes as folders that the trainer reads: `python -m dev.demo_model.training_data`.

`pictures/` with a caption beside each, and `edges/`, `depth/` and `subject/` with the same stems.
The edges are what ComfyUI's Canny node finds, drawn here since its way takes half a second each.
`subject_pictures/` are the same pictures, but their captions leave the first thing to its portrait,
and `subject_single/` those of them that show nothing else.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image

from benchmarks.metrics import edges
from dev.demo_model import scenes
from dev.paths import CACHE

FOLDER = CACHE / "demo-training" / "folders"
SIDE = 256
FIRST_SEED = 1_000_000  # none of the seeds that the transformer was trained on


def write_scene(folder: Path, seed: int, stem: str, side: int) -> None:
    """One scene's files."""
    scene = scenes.random_scene(Random(seed))
    drawn = scenes.draw(scene, side)
    portrait = scenes.draw(scenes.alone(scene.things[0]), side).picture
    for name, picture in (
        ("pictures", drawn.picture),
        ("subject_pictures", drawn.picture),
        ("edges", edges(torch.from_numpy(drawn.picture)[None])[0, ..., None].repeat(3, axis=2)),
        ("depth", np.repeat(drawn.depth[..., None], 3, axis=2)),
        ("subject", portrait),
    ):
        path = folder / name / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((picture * 255).round().astype(np.uint8)).save(path, compress_level=1)
    (folder / "pictures" / f"{stem}.txt").write_text(scene.caption + "\n")
    caption = scenes.subject_caption(scene)
    (folder / "subject_pictures" / f"{stem}.txt").write_text(caption + "\n")
    if len(scene.things) == 1:
        for ending in ("png", "txt"):
            copy = folder / "subject_single" / f"{stem}.{ending}"
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(folder / "subject_pictures" / copy.name, copy)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=768)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--output", type=Path, default=FOLDER)
    args = parser.parse_args()
    for i in range(args.count):
        write_scene(args.output, FIRST_SEED + i, f"{i:05d}", args.side)


if __name__ == "__main__":
    main()
