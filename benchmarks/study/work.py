"""Drawing and measuring, batch by batch, in as many processes as there are cores.

A batch of scenes goes through all cells before the next one starts, so what an interrupted study
leaves behind covers every cell, and images are encoded once.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks import classifier, host, metrics
from benchmarks.study.cells import Cell
from benchmarks.study.measures import against, largest_difference
from benchmarks.study.store import Store

BATCH = 20


@dataclass(frozen=True)
class Places:
    """Where things are, for another process too."""

    model: Path
    loras: Path
    cache: Path

    @property
    def classifier(self) -> Path:
        """The weights of the classifier."""
        return self.cache / "classifier.pt"

    def store(self) -> Store:
        """Of what is drawn and measured."""
        return Store(self.cache / "cells", self.model, self.loras)


@dataclass(frozen=True)
class Job:
    """A batch of scenes for some cells.

    Attributes:
        references: cell -> the cell that its pictures are compared with.
        limits: cell -> the number of scenes that it has, where that is less than all.
    """

    first: int
    count: int
    cells: tuple[Cell, ...]
    references: dict[Cell, Cell]
    limits: dict[Cell, int]


class Worker:
    """Does jobs. The model is loaded when the first picture has to be drawn."""

    def __init__(self, places: Places) -> None:
        self.places, self.store = places, places.store()
        self.classifier = classifier.load(places.classifier)
        self._studio: Any = None

    @property
    def studio(self) -> Any:
        """See :class:`benchmarks.study.studio.Studio`."""
        if self._studio is None:
            from benchmarks.study.studio import Studio

            self._studio = Studio(self.places.model, self.places.loras)
        return self._studio

    @torch.inference_mode()
    def do(self, job: Job) -> dict[Cell, dict[str, Any]]:
        """Every measure of every cell, and the classifier's features; those of the truth are
        under "truth"."""
        batches: dict[Any, Any] = {}
        truths: dict[Any, Any] = {}
        found: dict[Cell, dict[str, Any]] = {}

        def count_for(cell: Cell) -> int:
            return min(job.count, job.limits.get(cell, job.first + job.count) - job.first)

        def drawn(cell: Cell) -> Any:
            def draw() -> Any:
                from benchmarks.study.studio import Batch

                batch = batches.setdefault(
                    (cell.world, count_for(cell)), Batch(truths[cell.world][: count_for(cell)])
                )
                return self.studio.draw(cell, batch)

            return self.store.pictures(cell, job.first, count_for(cell), draw)

        for cell in job.cells:
            if count_for(cell) <= 0:
                continue
            if cell.world not in truths:
                truths[cell.world] = [cell.truth(job.first + i) for i in range(job.count)]
            some = truths[cell.world][: count_for(cell)]
            result = drawn(cell)
            values = self.store.values(
                cell,
                job.first,
                len(some),
                lambda cell=cell, result=result, some=some: cell.measure(some, result),
            )
            values["tokens"] = [float(n) for n in result["tokens"]]
            reference = job.references.get(cell)
            if reference is not None:
                other = drawn(reference)
                n = len(some)
                values |= against(result["pictures"], other["pictures"][:n])
                values["largest"] = largest_difference(result["latents"], other["latents"][:n])
            pictures = metrics.as_pictures(result["pictures"])
            found[cell] = {
                "values": values,
                "features": classifier.features(self.classifier, pictures),
                "truth": classifier.features(
                    self.classifier, torch.from_numpy(np.stack([t.picture for t in some]))
                ),
            }
        return found


_worker: Worker | None = None


def _start(places: Places, threads: int) -> None:
    global _worker
    host.start("cpu")
    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    _worker = Worker(places)


def _do(job: Job) -> dict[Cell, dict[str, Any]]:
    assert _worker is not None
    return _worker.do(job)


def done(
    places: Places,
    cells: Sequence[Cell],
    references: dict[Cell, Cell],
    limits: dict[Cell, int],
    scenes: int,
    workers: int,
) -> dict[Cell, dict[str, Any]]:
    """All cells over so many scenes; `workers` 0 does it in this process."""
    jobs = [
        Job(first, min(BATCH, scenes - first), tuple(cells), references, limits)
        for first in range(0, scenes, BATCH)
    ]
    classifier.load(places.classifier)  # trained once, before several want it
    parts: list[dict[Cell, dict[str, Any]]] = []
    with _pool(places, workers) as results:
        for part in tqdm(results(jobs), total=len(jobs), desc="batches of scenes"):
            parts.append(part)
    found: dict[Cell, dict[str, Any]] = {}
    for cell in cells:
        of = [part[cell] for part in parts if cell in part]
        names = of[0]["values"]
        found[cell] = {
            "values": {n: [v for each in of for v in each["values"][n]] for n in names},
            "features": np.concatenate([each["features"] for each in of]),
            "truth": np.concatenate([each["truth"] for each in of]),
        }
    return found


@contextmanager
def _pool(places: Places, workers: int) -> Iterator[Any]:
    if workers == 0:
        _start(places, torch.get_num_threads())
        yield lambda jobs: map(_do, jobs)
        return
    threads = max(1, (os.cpu_count() or 1) // workers)
    spawn = multiprocessing.get_context("spawn")  # torch's threads don't outlive a fork
    with ProcessPoolExecutor(workers, spawn, _start, (places, threads)) as pool:
        yield lambda jobs: pool.map(_do, jobs)
