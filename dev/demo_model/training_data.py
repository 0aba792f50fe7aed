"""Drawn scenes as folders that the trainer reads: `python -m dev.demo_model.training_data`.

`pictures/` with a caption beside each, and `edges/`, `depth/` and `subject/` with the same stems.
The edges are what ComfyUI's Canny node finds, drawn here since its way takes half a second each.
`subject_pictures/` are the same pictures, but their captions leave the first thing to its portrait,
and `subject_single/` those of them that show nothing else. `edits/before/` and `edits/after/` are
pictures of the edit that the text beside the second asks for; in `bringing/` there is a second
picture, `other/`, to take a thing from.
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
FIRST_EDIT, FIRST_BRINGING = 3_000_000, 4_000_000


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
    _write_pictures(folder / "edits", f"{number:05d}", edit, side)


def write_bringing(folder: Path, number: int, side: int) -> None:
    """The files of one edit that takes two pictures."""
    edit = edits.random_bringing(Random(FIRST_BRINGING + number))
    _write_pictures(folder / "bringing", f"{number:05d}", edit, side)


def _write_pictures(folder: Path, stem: str, edit: edits.Edit, side: int) -> None:
    for name, scene in (("before", edit.before), ("other", edit.other), ("after", edit.after)):
        if scene is None:
            continue
        path = folder / name / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = scenes.draw(scene, side).picture
        Image.fromarray((picture * 255).round().astype(np.uint8)).save(path, compress_level=1)
    (folder / "after" / f"{stem}.txt").write_text(edit.instruction + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=768)
    parser.add_argument("--edits", type=int, default=4096)
    parser.add_argument("--bringing", type=int, default=1024)
    parser.add_argument("--side", type=int, default=SIDE)
    parser.add_argument("--output", type=Path, default=FOLDER)
    args = parser.parse_args()
    for i in range(args.count):
        write_scene(args.output, FIRST_SEED + i, f"{i:05d}", args.side)
    for i in range(args.edits):
        write_edit(args.output, i, args.side)
    for i in range(args.bringing):
        write_bringing(args.output, i, args.side)


if __name__ == "__main__":
    main()
