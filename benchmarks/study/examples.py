"""A sheet of the study's own pictures: held-out scenes in rows, cells in columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.study.cells import Cell, Use
from benchmarks.study.conditions import condition_images, truth
from benchmarks.study.edits import EditCell, Spot
from benchmarks.study.experiments import (
    ALONE,
    COMPACT,
    EVERY_STEP,
    INTEGRATION,
    JOINT,
    PLAIN,
    edges,
)
from benchmarks.study.store import Store

SCENES, EDITS, SIZE, HEAD, FOOT = 6, 8, 112, 26, 16
COLUMNS: dict[str, Cell] = {
    "no condition": PLAIN,
    "edges": edges(),
    "0.5, full size": edges(compression=0.5),
    "0.5, mixed sizes": edges(COMPACT, compression=0.5),
    "0.5, uncorrected": edges(COMPACT, compression=0.5, correcting=False),
    "joint, once": Cell((Use("edges", JOINT, attention="joint"),), reuse="once"),
    "integration": Cell((Use("inpainting", INTEGRATION, integrate=True),)),
}

EDIT_COLUMNS: dict[str, EditCell] = {
    "every step": EVERY_STEP,
    "every 5": replace(EVERY_STEP, reuse="every_n_steps", every=5),
    "once": replace(EVERY_STEP, reuse="once"),
    "isolated, once": ALONE,
    "compression 0.5": replace(EVERY_STEP, compression=0.5),
    "Spot Edit": replace(EVERY_STEP, spot=Spot()),
}


def sheet(store: Store, cells: set[Any], first_batch: int, path: Path) -> None:
    """Writes the sheet of those columns that were drawn.

    Args:
        first_batch: the number of scenes in the store's first batch.
    """
    truths = [truth(i) for i in range(min(SCENES, first_batch))]
    columns: dict[str, Any] = {
        "scene": np.stack([np.round(t.picture * 255) for t in truths]),
        "its edges": np.round(condition_images("edges", truths).numpy() * 255),
    }
    _write(columns, COLUMNS, store, cells, first_batch, [""] * len(truths), path)


def edit_sheet(store: Store, cells: set[Any], first_batch: int, path: Path) -> None:
    """The same for edits, with what each asks for below it."""
    truths = [EVERY_STEP.truth(i) for i in range(min(EDITS, first_batch))]
    columns: dict[str, Any] = {
        "reference": np.stack([np.round(t.before * 255) for t in truths]),
        "as it should be": np.stack([np.round(t.picture * 255) for t in truths]),
    }
    said = [t.edit.instruction for t in truths]
    _write(columns, EDIT_COLUMNS, store, cells, first_batch, said, path)


def _write(
    columns: dict[str, Any],
    drawn_by: Mapping[str, Any],
    store: Store,
    cells: set[Any],
    first_batch: int,
    said: list[str],
    path: Path,
) -> None:
    for name, cell in drawn_by.items():
        if cell in cells:
            drawn = store.pictures(cell, 0, first_batch, not_drawn)
            columns[name] = drawn["pictures"][: len(said)]
    line = SIZE + (FOOT if any(said) else 0)
    out = Image.new("RGB", (SIZE * len(columns), HEAD + line * len(said)), "white")
    write = ImageDraw.Draw(out)
    for row, words in enumerate(said):
        write.text((4, HEAD + row * line + SIZE), words, fill="black")
    for column, (name, pictures) in enumerate(columns.items()):
        write.text((column * SIZE + 4, 7), name, fill="black")
        for row, picture in enumerate(pictures):
            small = Image.fromarray(picture.astype(np.uint8)).resize((SIZE - 2, SIZE - 2))
            out.paste(small, (column * SIZE, HEAD + row * line))
    path.parent.mkdir(parents=True, exist_ok=True)
    out.quantize(256).save(path, optimize=True)


def not_drawn() -> Any:
    """For pictures that have to be there already."""
    raise RuntimeError("the study's first batch has to be drawn before its sheet")
