"""What has been drawn and measured, on disk, so that an interrupted study goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# What a picture depends on beside its cell, and what a measured value depends on beside that.
DRAWING = (
    HERE / "conditions.py",
    HERE / "studio.py",
    HERE / "cells.py",
    HERE / "edits.py",
    ROOT / "dev/demo_model/scenes.py",
    ROOT / "dev/demo_model/edits.py",
)
MEASURING = (
    HERE / "measures.py",
    HERE / "edits.py",
    ROOT / "benchmarks/metrics.py",
    ROOT / "dev/demo_model/judge.py",
)


def digest(files: Iterable[Path]) -> str:
    """Of what files hold."""
    found = hashlib.sha256()
    for path in files:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


class Store:
    """Files under one folder, named after all that they depend on."""

    def __init__(self, folder: Path, model_folder: Path, loras: Path) -> None:
        self.folder, self.loras = folder, loras
        weights = sorted(model_folder.glob("*.safetensors"))
        self._drawing = digest([*DRAWING, *weights])
        self._measuring = digest(MEASURING)
        self._digests: dict[str, str] = {}

    def pictures(self, cell: Any, first: int, count: int, draw: Callable[[], Any]) -> Any:
        """A batch of a cell as drawn, by `draw` if it isn't here yet."""
        path = self._path(cell, first, count, ".npz")
        if not path.is_file():
            _written(path, lambda to: np.savez_compressed(to, **vars(draw())))
        with np.load(path) as file:
            return {name: file[name] for name in file.files}

    def values(self, cell: Any, first: int, count: int, measure: Callable[[], Any]) -> Any:
        """A batch of a cell as measured."""
        path = self._path(cell, first, count, f".{self._measuring}.json")
        if not path.is_file():
            text = json.dumps(measure())
            _written(path, lambda to: to.write(text.encode()))
        return json.loads(path.read_text())

    def _path(self, cell: Any, first: int, count: int, ending: str) -> Path:
        for lora in cell.loras:
            if lora not in self._digests:
                self._digests[lora] = digest([self.loras / f"{lora}.safetensors"])
        of = "-".join([self._drawing, *(self._digests[lora] for lora in sorted(cell.loras))])
        folder = self.folder / f"{cell.name}-{hashlib.sha256(of.encode()).hexdigest()[:12]}"
        return folder / f"{first}-{count}{ending}"


def _written(path: Path, write: Callable[[Any], Any]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.part")
    with unfinished.open("wb") as file:
        write(file)
    unfinished.replace(path)
