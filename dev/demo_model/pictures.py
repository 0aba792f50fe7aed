"""Draws those of the demo's photos that are no photos: `python -m dev.demo_model.pictures`.

What the demo model knows is a drawn world, so its templates condition on scenes of it, and twelve
more with captions are there for a first training. The host
has no depth estimator, so those for FLUX.1 start from a supplied depth map: balls and a box in a
room, found by casting rays. Near is white, as in what depth LoRAs were trained on.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
from PIL import Image

from dev.demo_model.scenes import Scene, Thing, alone, draw, full_caption, random_scene
from dev.paths import ROOT

SIZE, OVERSAMPLING, RAYS = 512, 2, 3  # rays along a pixel's side
FOLDER = ROOT / "demo_model" / "photos"
TRAINING, TWELVE, SIDE = FOLDER.parent / "pictures", 12, 256

STAR = Thing("star", "yellow", "plain", "big", "at the top", 0.53, 0.26, 0.21, 0.3, 0.75, "white")
RING = Thing("ring", "pink", "plain", "big", "at the bottom", 0.47, 0.75, 0.18, 0.0, 0.5, "white")
SCENE = Scene((STAR, RING), "blue", (0.08, -0.06), "")
BALL = Thing(
    "circle", "orange", "striped", "big", "on the left", 0.3, 0.5, 0.22, 0.2, 0.6, "purple"
)

# Two pictures of one thing each, to be put into one.
LEFT_STAR = Thing(
    "star", "yellow", "plain", "big", "on the left", 0.27, 0.5, 0.21, 0.3, 0.6, "white"
)
RIGHT_SQUARE = Thing(
    "square", "orange", "plain", "big", "on the right", 0.73, 0.5, 0.21, 0.1, 0.6, "white"
)
TWO = {
    "star": Scene((LEFT_STAR,), "blue", (0.08, -0.06), ""),
    "square": Scene((RIGHT_SQUARE,), "black", (0.0, 0.0), ""),
}


def save(pixels: np.ndarray, path: Path, side: int = SIZE) -> None:
    """An image of side x side from one of any size, values 0 to 1."""
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    image.resize((side, side), Image.Resampling.BOX).save(path, quality=92)


def save_twelve() -> None:
    """Scenes with captions, to train on: two things each, of every shape and colour."""
    TRAINING.mkdir(exist_ok=True)
    for number in range(TWELVE):
        scene = random_scene(Random(number), count=2)
        name = f"scene-{number + 1:02d}"
        save(draw(scene, SIDE * OVERSAMPLING).picture, TRAINING / f"{name}.jpg", SIDE)
        (TRAINING / f"{name}.txt").write_text(full_caption(scene) + "\n", encoding="utf-8")


BALLS = [  # centre and radius, in metres; the eye is at the origin and looks along z
    ((-0.9, -0.55, 4.0), 0.65),
    ((0.35, -0.8, 3.0), 0.4),
    ((1.5, -0.2, 5.6), 1.0),
]
BOX = ((-2.0, -1.2, 5.2), (-0.9, 0.7, 6.4))
FLOOR, BACK, LEFT, RIGHT, CEILING = -1.2, 8.0, -3.2, 3.2, 2.6


def depth() -> np.ndarray:
    """(SIZE * RAYS) squared: distance along z of the first thing that each ray meets."""
    side = SIZE * RAYS
    across = (np.arange(side) + 0.5) / side * 2 - 1
    x, y = np.meshgrid(across * 0.62, -across * 0.62)
    ray = np.stack((x, y, np.ones_like(x)), -1)
    hits = [np.full_like(x, BACK)]
    with np.errstate(divide="ignore", invalid="ignore"):
        hits += [FLOOR / y, CEILING / y, LEFT / x, RIGHT / x]
        for centre, radius in BALLS:
            c = np.array(centre)
            a, b = (ray**2).sum(-1), ray @ c
            root = b**2 - a * (c @ c - radius**2)
            hits.append(np.where(root > 0, (b - np.sqrt(np.maximum(root, 0))) / a, np.inf))
        near, far = (np.array(corner) / ray for corner in BOX)
        enter = np.minimum(near, far).max(-1)
        leave = np.maximum(near, far).min(-1)
        hits.append(np.where(enter < leave, enter, np.inf))
    return np.min([np.where(hit > 0, hit, np.inf) for hit in hits], axis=0)


def main() -> None:
    drawn = draw(SCENE, SIZE * OVERSAMPLING)
    save(drawn.picture, FOLDER / "scene.jpg")
    save(drawn.depth, FOLDER / "scene-depth.png")
    save_twelve()
    save(draw(alone(BALL), SIZE * OVERSAMPLING).picture, FOLDER / "scene-thing.jpg")
    for name, scene in TWO.items():
        save(draw(scene, SIZE * OVERSAMPLING).picture, FOLDER / f"scene-{name}.jpg")
    inverse = (1 / depth()).reshape(SIZE, RAYS, SIZE, RAYS).mean((1, 3))
    grey = (inverse - inverse.min()) / (inverse.max() - inverse.min())
    room = Image.fromarray((grey * 255).round().astype(np.uint8))
    room.save(FOLDER / "room-depth.png", optimize=True)


if __name__ == "__main__":
    main()
