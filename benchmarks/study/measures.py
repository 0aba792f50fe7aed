"""What is measured on each picture of a cell, scene by scene."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch

from benchmarks import metrics
from benchmarks.study.conditions import Truth
from dev.demo_model import judge

Measures = dict[str, list[float]]


def measure(
    truths: list[Truth], pictures: np.ndarray, kept: np.ndarray, holes_too: bool
) -> Measures:
    """Every measure of a batch; those of what is in the hole only with `holes_too`.

    Args:
        pictures: (n, 256, 256, 3) bytes.
        kept: (n, 16, 16) bool, where the condition has tokens.
    """
    drawn = metrics.as_pictures(pictures)
    true = torch.from_numpy(np.stack([t.picture for t in truths]))
    found = metrics.edges(drawn)
    wanted = [_wanted(t) for t in truths]
    out: Measures = {
        "f1": [metrics.edge_f1(f, w) for f, w in zip(found, wanted, strict=True)],
        "offset": [metrics.offset(f, w) for f, w in zip(found, wanted, strict=True)],
        "psnr": metrics.psnr(drawn, true),
        "ssim": metrics.ssim(drawn, true),
    }
    if holes_too:
        out |= _in_the_holes(truths, drawn, true, found)
    for name in ("right", "overlap", "centroid", "recall", "recall_kept", "recall_dropped",
                 "recall_thin"):  # fmt: skip
        out[name] = []
    for i, t in enumerate(truths):
        picture = drawn[i].numpy()
        shape = judge.silhouette(picture)
        tokens = np.kron(kept[i], np.ones((16, 16), bool))
        thin = metrics.thin_parts(t.drawn.masks)
        out["right"].append(float(judge.right(picture, t.scene)))
        out["overlap"].append(metrics.overlap(shape, t.silhouette))
        out["centroid"].append(metrics.centroid_distance(shape, t.silhouette))
        out["recall"].append(metrics.edge_recall(found[i], wanted[i]))
        out["recall_kept"].append(metrics.edge_recall(found[i], wanted[i] & tokens))
        out["recall_dropped"].append(metrics.edge_recall(found[i], wanted[i] & ~tokens))
        near = metrics.widened(thin, 2)
        out["recall_thin"].append(metrics.edge_recall(found[i], wanted[i] & near))
    return out


def _in_the_holes(
    truths: list[Truth], drawn: torch.Tensor, true: torch.Tensor, found: np.ndarray
) -> Measures:
    holes = torch.from_numpy(np.stack([t.hole for t in truths]))
    return {
        "psnr_hole": metrics.psnr(drawn, true, holes),
        "ssim_hole": metrics.ssim(drawn, true, holes),
        "f1_hole": [
            metrics.edge_f1(f & t.hole, _wanted(t) & t.hole)
            for f, t in zip(found, truths, strict=True)
        ],
    }


def against(one: np.ndarray, other: np.ndarray) -> Measures:
    """How far a batch's pictures (bytes) are from those of another cell of the same scenes."""
    a, b = metrics.as_pictures(one), metrics.as_pictures(other)
    return {"psnr_against": metrics.psnr(a, b), "ssim_against": metrics.ssim(a, b)}


def largest_difference(one: np.ndarray, other: np.ndarray) -> list[float]:
    """Of any number in two cells' latents (n, 16, 32, 32), one a picture."""
    return [float(value) for value in np.abs(one - other).max(axis=(1, 2, 3))]


def rounded(measures: Measures) -> dict[str, list[float | None]]:
    """For JSON: four significant digits, None for what means nothing."""
    return {
        name: [None if math.isnan(v) else float(f"{v:.4g}") for v in values]
        for name, values in measures.items()
    }


@cache
def _wanted(truth: Truth) -> np.ndarray:
    return metrics.edges(torch.from_numpy(truth.picture)[None])[0]
