"""How far references' K/V move while a picture is drawn, by block and step, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from benchmarks.study.cells import STEPS
from dev.markdown import row

KEPT_FOR = (2, 5, STEPS)  # steps that K/V are used; the last is "once"


class Watch:
    """K/V of the references at every step against those that reuse would have in their place.

    A relative distance: the norm of the difference over that of the older ones.
    """

    def __init__(self) -> None:
        self.steps: dict[int, int] = {}  # block -> how many were seen
        self._older: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._found: dict[tuple[int, int, int], list[np.ndarray]] = {}

    def see(self, block: int, kv: tuple[Tensor, Tensor]) -> None:
        """K and V of a block in the next step, (rows, heads, tokens, head_dim) each."""
        step = self.steps.get(block, 0)
        self.steps[block] = step + 1
        for i, steps in enumerate(KEPT_FOR):
            if step % steps == 0:
                self._older[i, block] = kv[0].clone(), kv[1].clone()
            older = self._older[i, block]
            far = [
                ((new - old).float().flatten(1).norm(dim=1) / old.float().flatten(1).norm(dim=1))
                for new, old in zip(kv, older, strict=True)
            ]
            self._found[i, step, block] = [each.numpy() for each in far]

    def found(self) -> np.ndarray:
        """(rows, reuse as in KEPT_FOR, steps, blocks, K and V)."""
        steps, blocks = max(self.steps.values()), len(self.steps)
        values = [
            [[self._found[i, s, b] for b in range(blocks)] for s in range(steps)]
            for i in range(len(KEPT_FOR))
        ]
        return np.moveaxis(np.array(values, np.float32), -1, 0)


@contextmanager
def watched() -> Iterator[Watch]:
    """While a picture is drawn with K/V computed at every step."""
    from omini2_extension.omini2_core.engine.references import References

    watch, store = Watch(), References.store

    def seen(self: References, entry: Any, number: int, k: Tensor, v: Tensor) -> None:
        watch.see(number, (k, v))
        store(self, entry, number, k, v)

    with mock.patch.object(References, "store", seen):
        yield watch


def section(drifts: np.ndarray) -> str:
    """A table: K/V of each block at each step against the first step's.

    Args:
        drifts: (scenes, reuse, steps, blocks, K and V).
    """
    once = drifts[:, -1].mean(axis=(0, 3))
    steps, blocks = once.shape
    head = ["step", *(f"block {b}" for b in range(blocks)), "mean"]
    lines = [row(head), row(["---"] * len(head))]
    for step in range(1, steps):
        of = once[step]
        lines.append(row([str(step), *(f"{each:.3f}" for each in of), f"{of.mean():.3f}"]))
    return "\n".join(lines)


def plot(drifts: np.ndarray, errors: Sequence[Sequence[float]], path: Path) -> None:
    """By step and block, and each scene's error over its mean drift.

    Args:
        errors: of each reuse in KEPT_FOR, by scene: PSNR to the pictures without reuse, in dB.
    """
    from benchmarks.study.report import pyplot, save

    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3))
    once = drifts[:, -1].mean(axis=(0, 3))
    for block in range(once.shape[1]):
        left.plot(range(len(once)), once[:, block], marker="o", markersize=3, label=f"{block}")
    left.set_xlabel("step")
    left.set_ylabel("K/V, distance from the first step's")
    left.legend(title="block", fontsize=7, title_fontsize=7)
    for i, steps in enumerate(KEPT_FOR):
        name = "once" if steps == STEPS else f"every {steps}"
        right.plot(drifts[:, i].mean(axis=(1, 2, 3)), errors[i], ".", markersize=3, label=name)
    right.set_xlabel("K/V, mean distance from those used instead")
    right.set_ylabel("PSNR to the pictures without reuse, dB")
    right.legend(title="computed", fontsize=7, title_fontsize=7)
    for panel in (left, right):
        panel.grid(alpha=0.3)
    save(plt, figure, path)
