"""A sheet of the study's own pictures: held-out scenes in rows, cells in columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.study.cells import Cell, Use
from benchmarks.study.conditions import condition_images, truth
from benchmarks.study.experiments import COMPACT, INTEGRATION, JOINT, PLAIN, edges
from benchmarks.study.store import Store

SCENES, SIZE, HEAD = 6, 112, 26
COLUMNS: dict[str, Cell] = {
    "no condition": PLAIN,
    "edges": edges(),
    "0.5, full size": edges(compression=0.5),
    "0.5, mixed sizes": edges(COMPACT, compression=0.5),
    "0.5, uncorrected": edges(COMPACT, compression=0.5, correcting=False),
    "joint, once": Cell((Use("edges", JOINT, attention="joint"),), reuse="once"),
    "integration": Cell((Use("inpainting", INTEGRATION, integrate=True),)),
}


def sheet(store: Store, cells: set[Cell], first_batch: int, path: Path) -> None:
    """Writes the sheet of those columns that were drawn.

    Args:
        first_batch: the number of scenes in the store's first batch.
    """
    truths = [truth(i) for i in range(min(SCENES, first_batch))]
    columns: dict[str, Any] = {
        "scene": np.stack([np.round(t.picture * 255) for t in truths]),
        "its edges": np.round(condition_images("edges", truths).numpy() * 255),
    }
    for name, cell in COLUMNS.items():
        if cell in cells:
            drawn = store.pictures(cell, 0, first_batch, _not_drawn)
            columns[name] = drawn["pictures"][: len(truths)]
    out = Image.new("RGB", (SIZE * len(columns), HEAD + SIZE * len(truths)), "white")
    write = ImageDraw.Draw(out)
    for column, (name, pictures) in enumerate(columns.items()):
        write.text((column * SIZE + 4, 7), name, fill="black")
        for row, picture in enumerate(pictures):
            small = Image.fromarray(picture.astype(np.uint8)).resize((SIZE - 2, SIZE - 2))
            out.paste(small, (column * SIZE, HEAD + row * SIZE))
    path.parent.mkdir(parents=True, exist_ok=True)
    out.quantize(128).save(path, optimize=True)


def _not_drawn() -> Any:
    raise RuntimeError("the study's first batch has to be drawn before its sheet")
