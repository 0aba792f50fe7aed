"""Edits with a reference: cells, held-out edits, how they are drawn, and what is measured."""

from __future__ import annotations

import hashlib
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cached_property
from random import Random
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch

from benchmarks import metrics
from benchmarks.study.cells import STEPS
from benchmarks.study.conditions import SIDE
from benchmarks.study.drift import watched
from dev.demo_model import judge, scenes
from dev.demo_model.edits import KINDS, Edit, random_edit

if TYPE_CHECKING:
    from benchmarks.study.studio import Studio

FIRST_SEED = 5_000_000
KEPT = 20.0  # dB on what was to stay, from which on it counts as kept
STILL = 2.0  # pixels that it may have moved


@dataclass(frozen=True)
class Spot:
    """What Omini2 Spot Edit is set to; ``forced``: the true change as its mask."""

    select: str = "latent"
    threshold: float = 0.1
    fusion: str = "off"
    reset: str = "auto"
    forced: bool = False


@dataclass(frozen=True)
class EditCell:
    """Held-out edits under one setting.

    Attributes:
        lora: a file's name without `.safetensors`.
        references, reuse, every: the Condition Cache's.
        compression, correcting: Omini2 Reference's.
    """

    lora: str
    references: str = "joint"
    reuse: str = "off"
    every: int = 1
    compression: float = 1.0
    correcting: bool = True
    spot: Spot | None = None
    floats: str = "bfloat16"

    world = "edits"

    @property
    def watched(self) -> bool:
        """Whether K/V are kept at every step, to be compared."""
        return self.reuse == "every_n_steps" and self.every == 1

    @property
    def loras(self) -> set[str]:
        """The files it needs."""
        return {self.lora}

    @property
    def name(self) -> str:
        """Short and the same in every run."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    def described(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)

    def truth(self, index: int) -> EditTruth:
        """Held-out edit number `index`; the kinds take turns."""
        seed = FIRST_SEED + index
        return EditTruth(seed, random_edit(Random(seed), list(KINDS)[index % len(KINDS)], True))

    def measure(self, truths: list[EditTruth], drawn: Any) -> dict[str, list[float]]:
        """Every measure of a batch."""
        pictures = metrics.as_pictures(drawn["pictures"])
        return measure(truths, pictures) | {
            "share": [float(share) for share in drawn["shares"]],
            "tokens": [float(count) for count in drawn["tokens"]],
        }


@dataclass(frozen=True, eq=False)
class EditTruth:
    """A held-out edit as drawn."""

    seed: int
    edit: Edit

    @cached_property
    def before(self) -> np.ndarray:
        """(256, 256, 3), 0 to 1."""
        return scenes.draw(self.edit.before, SIDE).picture

    @cached_property
    def picture(self) -> np.ndarray:
        """(256, 256, 3), 0 to 1, as it should be."""
        return scenes.draw(self.edit.after, SIDE).picture

    @cached_property
    def unchanged(self) -> np.ndarray:
        """(256, 256) bool."""
        return judge.unchanged(self.edit, SIDE)

    @property
    def outlines(self) -> np.ndarray:
        """(256, 256) bool: where edges should be as they were. On another background too things
        keep their outlines, which lie where the picture does change."""
        return np.ones_like(self.unchanged) if self.edit.kind == "background" else self.unchanged


@dataclass
class DrawnEdits:
    """A batch of a cell.

    Attributes:
        pictures: (n, 256, 256, 3) bytes.
        latents: (n, 16, 32, 32) float32.
        tokens: (n,) of the reference.
        shares: (n,) of the rows that the model computed.
        drifts: (n, reuse, steps, blocks, 2), see :mod:`benchmarks.study.drift`; (n, 0) where
            nobody watched.
    """

    pictures: np.ndarray
    latents: np.ndarray
    tokens: np.ndarray
    shares: np.ndarray
    drifts: np.ndarray


def measure(truths: list[EditTruth], pictures: torch.Tensor) -> dict[str, list[float]]:
    """What is right of edited pictures, (n, 256, 256, 3) from 0 to 1.

    *asked*: what the instruction asks for is there. *kept*: PSNR to the true picture where nothing
    was to change. *moved*: by how many pixels the edges lie off that were to stay. *edited*:
    all of it right.
    """
    out: dict[str, list[float]] = {"asked": [], "moved": [], "edited": []}
    true = torch.from_numpy(np.stack([t.picture for t in truths]))
    where = torch.from_numpy(np.stack([t.unchanged for t in truths]))
    out["kept"] = metrics.psnr(pictures, true, where)
    found, wanted = metrics.edges(pictures), metrics.edges(true)
    for i, truth in enumerate(truths):
        asked = judge.asked_for(pictures[i].numpy(), truth.edit)
        moved = metrics.offset(found[i] & truth.outlines, wanted[i] & truth.outlines)
        still = math.isnan(moved) or moved <= STILL
        out["asked"].append(float(asked))
        out["moved"].append(moved)
        out["edited"].append(float(asked and out["kept"][i] >= KEPT and still))
    return out


def draw(studio: Studio, cell: EditCell, truths: list[EditTruth]) -> DrawnEdits:
    """A cell's pictures, the same noise for an edit in every cell; one by one with Spot Edit, whose
    pictures of a batch would share what is left out."""
    groups = [[truth] for truth in truths] if cell.spot is not None else [truths]
    parts = [_draw(studio, cell, group) for group in groups]
    names = ("pictures", "latents", "tokens", "shares", "drifts")
    return DrawnEdits(*(np.concatenate([getattr(p, name) for p in parts]) for name in names))


def _draw(studio: Studio, cell: EditCell, truths: list[EditTruth]) -> DrawnEdits:
    import comfy.sample
    from nodes import LoraLoaderModelOnly

    import omini2_extension.nodes as nodes
    from benchmarks.study.studio import noise_of
    from omini2_extension.omini2_core.host import sampling

    prompt = studio.prompt([truth.edit.instruction for truth in truths])
    model = studio.model(cell.floats)
    [model] = LoraLoaderModelOnly().load_lora_model_only(model, f"{cell.lora}.safetensors", 1.0)
    before = torch.from_numpy(np.stack([truth.before for truth in truths]))
    model, prompt, _ = nodes.Reference.execute(
        model, prompt, studio.vae, before, cell.compression, cell.correcting, 1.0, 0.0, 1.0
    ).args
    model = nodes.ConditionCache.execute(
        model, cell.reuse, cell.every, "model", "auto", cell.references
    )[0]
    latent = torch.zeros(len(truths), 16, SIDE // 8, SIDE // 8)
    if cell.spot is not None:
        spot, mask = cell.spot, None
        if spot.forced:
            mask = torch.from_numpy(~np.stack([t.unchanged for t in truths])).float()
        model = nodes.SpotEditNode.execute(
            model, "mask" if spot.forced else spot.select, spot.threshold, 4, spot.reset,
            spot.fusion, 0, None, mask,
        )[0]  # fmt: skip
    runs: list[Any] = []
    with (
        mock.patch.object(sampling, "report", lambda run, *more: runs.append(run.stats)),
        watched() if cell.watched else nullcontext() as watch,
    ):
        latents = comfy.sample.sample(
            model, noise_of(truths), STEPS, 1.0, "euler", "simple", prompt, prompt, latent,
            disable_pbar=True, seed=0,
        )  # fmt: skip
    pictures = studio.vae.decode(latents).float().clamp(0, 1)
    share = runs[0].spot.share if cell.spot is not None else 1.0
    side = round(SIDE * cell.compression / 16)
    return DrawnEdits(
        np.round(pictures.numpy() * 255).astype(np.uint8),
        latents.float().numpy(),
        np.full(len(truths), side**2),
        np.full(len(truths), share),
        np.zeros((len(truths), 0), np.float32) if watch is None else watch.found(),
    )
