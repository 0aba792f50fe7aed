"""Drawn scenes as folders that the trainer reads: `python -m dev.demo_model.training_data`.

`pictures/` with a caption beside each, and `edges/`, `depth/` and `subject/` with the same stems.
The edges are what ComfyUI's Canny node finds, drawn here since its way takes half a second each.
`subject_pictures/` are the same pictures, but their captions leave the first thing to its portrait,
and `subject_single/` those of them that show nothing else. `edits/before/` and `edits/after/` are
pictures of the edit that the text beside the second asks for.
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
from dev.demo_model import edits, scenes
from dev.paths import CACHE

FOLDER = CACHE / "demo-training" / "folders"
SIDE = 256
FIRST_SEED = 1_000_000  # none of the seeds that the transformer was trained on
FIRST_EDIT = 3_000_000


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


def write_edit(folder: Path, number: int, side: int) -> None:
    """One edit's files; the kinds take turns."""
    kind = list(edits.KINDS)[number % len(edits.KINDS)]
    edit = edits.random_edit(Random(FIRST_EDIT + number), kind)
    for name, scene in (("before", edit.before), ("after", edit.after)):
        path = folder / "edits" / name / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = scenes.draw(scene, side).picture
        Image.fromarray((picture * 255).round().astype(np.uint8)).save(path, compress_level=1)
    path.with_suffix(".txt").write_text(edit.instruction + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=768)
    parser.add_argument("--edits", type=int, default=1024)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--output", type=Path, default=FOLDER)
    args = parser.parse_args()
    for i in range(args.count):
        write_scene(args.output, FIRST_SEED + i, f"{i:05d}", args.side)
    for i in range(args.edits):
        write_edit(args.output, i, args.side)


if __name__ == "__main__":
    main()
