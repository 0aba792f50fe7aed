"""Held-out scenes and the condition images drawn from their truth."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from benchmarks import metrics
from dev.demo_model import scenes

SIDE = 256
TOKEN = 16
FIRST_SEED = 1_000_000  # no scene of training's, which never has a held-out combination
BLUR = 1.0, 10.0  # standard deviation in pixels, as the trainer draws it
GREY = (0.299, 0.587, 0.114)  # ITU-R 601
TASKS = ("picture", "edges", "depth", "deblurring", "colouring", "inpainting", "subject")


@dataclass(frozen=True, eq=False)
class Truth:
    """A held-out scene as drawn, with its hole for inpainting.

    Attributes:
        picture: (256, 256, 3), 0 to 1.
        hole: (256, 256) bool, in whole tokens.
    """

    seed: int
    scene: scenes.Scene
    drawn: scenes.Drawn
    hole: np.ndarray

    @property
    def picture(self) -> np.ndarray:
        """(256, 256, 3), 0 to 1."""
        return self.drawn.picture

    @property
    def silhouette(self) -> np.ndarray:
        """(256, 256) bool, all things."""
        return self.drawn.masks.max(0) > 0.5


def truth(index: int, things: int | None = None) -> Truth:
    """Held-out scene number `index`, of so many things if that is said."""
    seed = FIRST_SEED + index
    scene = scenes.random_scene(Random(seed), test=True, count=things)
    return Truth(seed, scene, scenes.draw(scene, SIDE), hole(scene, Random(seed)))


def hole(scene: scenes.Scene, random: Random) -> np.ndarray:
    """(256, 256) bool: a box or a blob of whole tokens over or near one of the things.

    In whole tokens, so that token integration and a painted-over picture hide the same.
    """
    thing, side = random.choice(scene.things), SIDE // TOKEN
    y, x = (c * side + random.uniform(-1.5, 1.5) for c in (thing.y, thing.x))
    rows, columns = np.mgrid[:side, :side] + 0.5
    if random.random() < 0.5:
        height, width = random.uniform(4, 9), random.uniform(4, 9)
        tokens = (abs(rows - y) < height / 2) & (abs(columns - x) < width / 2)
    else:
        tokens = np.zeros((side, side), bool)
        for _ in range(3):
            dy, dx, radius = random.uniform(-2, 2), random.uniform(-2, 2), random.uniform(2, 3.2)
            tokens |= np.hypot(rows - y - dy, columns - x - dx) < radius
    return np.kron(tokens, np.ones((TOKEN, TOKEN), bool))


def condition_images(task: str, truths: list[Truth], side: int = SIDE) -> Tensor:
    """What the pictures are conditioned on, (n, side, side, 3), 0 to 1.

    Args:
        side: of a subject's portrait; every other condition has the picture's size.
    """
    if task == "subject":
        portraits = [scenes.alone(t.scene.things[0]) for t in truths]
        return _stacked([scenes.draw(portrait, side).picture for portrait in portraits])
    pictures = _stacked([t.picture for t in truths])
    if task == "picture":
        return pictures
    if task == "edges":
        return _grey(metrics.edges(pictures).astype(np.float32))
    if task == "depth":
        return _grey(np.stack([t.drawn.depth for t in truths]))
    if task == "colouring":
        return _grey(pictures.numpy() @ np.asarray(GREY, np.float32))
    if task == "deblurring":
        return _stacked([_blurred(t) for t in truths])
    if task == "inpainting":
        holes = torch.from_numpy(np.stack([t.hole for t in truths]))
        return pictures * ~holes[..., None]
    raise ValueError(f"task: {task} is none of {', '.join(TASKS)}")


def _blurred(truth: Truth) -> np.ndarray:
    sigma = Random(truth.seed).uniform(*BLUR)
    return ndimage.gaussian_filter(truth.picture, (sigma, sigma, 0), mode="mirror", truncate=3.0)


def _grey(maps: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(maps, np.float32))[..., None].repeat(1, 1, 1, 3)


def _stacked(pictures: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pictures))
