"""A small classifier of scenes, whose features tell how far two sets of pictures are apart.

It says which colours and which shapes a picture shows and what the background is. Trained from
nothing on drawn scenes at 64x64; nothing that training draws is among the study's scenes.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dev.demo_model import scenes

SIDE, FEATURES = 64, 32
COLOURS, SHAPES, GROUNDS = (list(d) for d in (scenes.COLOURS, scenes.SHAPES, scenes.BACKGROUNDS))
FIRST_TEST_SEED = 5_000_000  # training takes seeds from 0 on


class Classifier(nn.Module):
    """(n, 3, 64, 64) -> logits (n, colours + shapes + backgrounds)."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for n_in, n_out in ((3, 24), (24, 48), (48, 64), (64, 64)):
            layers += [nn.Conv2d(n_in, n_out, 3, 2, 1), nn.GroupNorm(8, n_out), nn.SiLU()]
        flat = 64 * (SIDE // 16) ** 2
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(flat, FEATURES), nn.SiLU())
        self.head = nn.Linear(FEATURES, len(COLOURS) + len(SHAPES) + len(GROUNDS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x - 0.5))


def drawn(first: int, count: int, test: bool) -> tuple[Tensor, Tensor]:
    """Pictures (count, 3, 64, 64) and what they show, (count, labels) of 0 and 1."""
    pictures, labels = [], []
    for seed in range(first, first + count):
        scene = scenes.random_scene(Random(seed), test=test)
        pictures.append(scenes.draw(scene, SIDE).picture)
        row = [c in {t.colour for t in scene.things} for c in COLOURS]
        row += [s in {t.shape for t in scene.things} for s in SHAPES]
        row += [g == scene.background for g in GROUNDS]
        labels.append(row)
    return (
        torch.from_numpy(np.stack(pictures)).movedim(-1, 1).contiguous(),
        torch.tensor(labels, dtype=torch.float32),
    )


def train(count: int = 8000, epochs: int = 12, seed: int = 0) -> Classifier:
    """On `count` drawn scenes, `epochs` times each; the same seed gives the same classifier."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    pictures, labels = drawn(0, count, test=False)
    with torch.inference_mode(False):
        model = Classifier()
        steps = epochs * (count // 64 or 1)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        for _ in range(steps):
            rows = torch.randint(count, (min(64, count),))
            loss = F.binary_cross_entropy_with_logits(
                model(pictures[rows].clone()), labels[rows].clone()
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    torch.set_rng_state(state)
    return model.eval()


@torch.inference_mode()
def accuracy(model: Classifier, count: int = 500) -> float:
    """The share of held-out scenes of which every colour, every shape and the background is right.

    The background is the likeliest one; colours and shapes are those said to be likelier than not.
    """
    pictures, labels = drawn(FIRST_TEST_SEED, count, test=True)
    things = len(COLOURS) + len(SHAPES)
    said = model(pictures)
    right = ((said[:, :things] > 0) == (labels[:, :things] > 0.5)).all(1)
    right &= said[:, things:].argmax(1) == labels[:, things:].argmax(1)
    return float(right.float().mean())


@torch.inference_mode()
def features(model: Classifier, pictures: Tensor) -> np.ndarray:
    """(n, height, width, 3) from 0 to 1 -> (n, FEATURES): what its last hidden layer says."""
    small = F.interpolate(pictures.movedim(-1, 1), (SIDE, SIDE), mode="area")
    return model.body(small - 0.5).double().numpy()


def load(path: Path, count: int = 8000, epochs: int = 12) -> Classifier:
    """From a file, trained and written first if it isn't there."""
    model = Classifier()
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(train(count, epochs).state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()
