"""Draws the scenes among the demo pictures: `python -m dev.demo_model.make_scenes`.

What the demo model knows is this drawn world, so its templates condition on pictures of it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from dev.demo_model.scenes import Scene, Thing, alone, draw
from dev.paths import ROOT

SIZE, OVERSAMPLING = 512, 2
FOLDER = ROOT / "demo_model" / "photos"

STAR = Thing("star", "yellow", "plain", "big", "at the top", 0.53, 0.26, 0.21, 0.3, 0.75, "white")
RING = Thing("ring", "pink", "plain", "big", "at the bottom", 0.47, 0.75, 0.18, 0.0, 0.5, "white")
SCENE = Scene((STAR, RING), "blue", (0.08, -0.06), "")
BALL = Thing(
    "circle", "orange", "striped", "big", "on the left", 0.3, 0.5, 0.22, 0.2, 0.6, "purple"
)


def save(pixels: np.ndarray, path: Path) -> None:
    """An image of SIZE x SIZE from one of any size, values 0 to 1."""
    image = Image.fromarray((pixels * 255).round().astype(np.uint8))
    image.resize((SIZE, SIZE), Image.Resampling.BOX).save(path, quality=92)


def main() -> None:
    drawn = draw(SCENE, SIZE * OVERSAMPLING)
    save(drawn.picture, FOLDER / "scene.jpg")
    save(drawn.depth, FOLDER / "scene-depth.png")
    save(draw(alone(BALL), SIZE * OVERSAMPLING).picture, FOLDER / "scene-thing.jpg")


if __name__ == "__main__":
    main()
