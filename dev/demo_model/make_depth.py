"""Makes the depth picture of the demo: `python -m dev.demo_model.make_depth`.

The host has no depth estimator, so the depth workflows start from a supplied picture: a drawn
scene of balls and a box in a room, its depth found by casting one ray a pixel. Near is white, as
in the pictures that depth LoRAs were trained on.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from dev.paths import ROOT

SIZE, OVERSAMPLING = 512, 3
FILE = ROOT / "demo_model" / "photos" / "room-depth.png"
BALLS = [  # centre and radius, in metres; the eye is at the origin and looks along z
    ((-0.9, -0.55, 4.0), 0.65),
    ((0.35, -0.8, 3.0), 0.4),
    ((1.5, -0.2, 5.6), 1.0),
]
BOX = ((-2.0, -1.2, 5.2), (-0.9, 0.7, 6.4))
FLOOR, BACK, LEFT, RIGHT, CEILING = -1.2, 8.0, -3.2, 3.2, 2.6


def depth() -> np.ndarray:
    """(SIZE * OVERSAMPLING) squared: distance along z of the first thing that each ray meets."""
    side = SIZE * OVERSAMPLING
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
    inverse = 1 / depth()
    inverse = inverse.reshape(SIZE, OVERSAMPLING, SIZE, OVERSAMPLING).mean((1, 3))
    grey = (inverse - inverse.min()) / (inverse.max() - inverse.min())
    Image.fromarray((grey * 255).round().astype(np.uint8)).save(FILE, optimize=True)


if __name__ == "__main__":
    main()
