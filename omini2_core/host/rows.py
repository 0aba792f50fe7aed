"""Whose rows the model is handed: every row carries its name with it.

The host says which prompts are in a batch, and in which order, before a function of another
extension may have split it, put it in another order or repeated rows of it. So each prompt gets one
more tensor beside its text, which goes wherever the text goes: a row for each row of the batch,
with a number for the prompt (on its part of the picture) and the number of the picture.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import comfy.conds
import torch
from torch import Tensor

from ..engine.evaluation import Chunk
from ..errors import warn
from .parts import Cond, Part

TAG = "omini2_rows"
Named = tuple[Hashable, Sequence[int], Sequence[int]]  # a name, its rows and their pictures


class Rows:
    """Names the rows of one run's batches and reads the names off again."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}
        self._names: list[Hashable] = []
        self._tags: dict[tuple[int, int], comfy.conds.CONDRegular] = {}
        self._pictures = 0
        self._certain = False
        self._warned = False

    def name(
        self, conds: Sequence[list[Cond] | None], pictures: int, certain: bool
    ) -> list[list[Cond] | None]:
        """The same prompts, with names for their rows.

        Args:
            pictures: how many the sampler draws at once.
            certain: whether only the host itself is between here and the model, so that what it
                says of the rows may be believed without reading their names: that waits for the
                device.
        """
        self._pictures, self._certain = pictures, certain
        return [prompts and [self._named(cond) for cond in prompts] for prompts in conds]

    def _named(self, cond: Cond) -> Cond:
        name = cond["uuid"]
        if name not in self._numbers:
            self._numbers[name] = len(self._names)
            self._names.append(name)
        tagged = {**cond["model_conds"], TAG: self._tag(self._numbers[name], self._pictures)}
        return {**cond, "model_conds": tagged}

    def _tag(self, number: int, pictures: int) -> comfy.conds.CONDRegular:
        """The names of a prompt's rows; the host copies what it changes."""
        if (number, pictures) not in self._tags:
            rows = torch.tensor([(number, picture) for picture in range(pictures)])
            self._tags[number, pictures] = comfy.conds.CONDRegular(rows)
        return self._tags[number, pictures]

    def chunks(
        self, batch: int, options: Mapping[str, Any], tag: Tensor | None, sizes: Hashable
    ) -> tuple[Chunk, ...]:
        """The chunks of a batch that the model was handed.

        Args:
            options: the host's transformer options.
            tag: the rows' names, if they have come along.
            sizes: of what the model was handed and of the whole picture, which may grow around a
                part that doesn't.
        """
        given = options.get("uuids") or ()
        known = all(name in self._numbers for name in given)
        if self._certain and given and known and batch == len(given) * self._pictures:
            found: list[Named] = [
                (name, range(i * self._pictures, (i + 1) * self._pictures), range(self._pictures))
                for i, name in enumerate(given)
            ]
        elif tag is not None and len(tag) == batch:
            found = self._read(tag)
        else:
            self._warn()
            return (Chunk(None, range(batch), None),)
        return tuple(
            Chunk((name, sizes, tuple(pictures)), rows, pictures, _origin(name))
            for name, rows, pictures in found
        )

    def pictures(self, batch: int, tag: Tensor | None) -> list[int] | None:
        """Which of the sampler's pictures each row of a batch is; None where nobody knows."""
        if self._certain and self._pictures and batch % self._pictures == 0:
            return [row % self._pictures for row in range(batch)]
        if tag is not None and len(tag) == batch:
            return [int(picture) for _, picture in tag.tolist()]
        return None

    def _read(self, tag: Tensor) -> list[Named]:
        rows: dict[int, list[tuple[int, int]]] = {}
        for row, (number, picture) in enumerate(tag.tolist()):
            rows.setdefault(number, []).append((row, picture))
        return [
            (self._names[number], [row for row, _ in each], [picture for _, picture in each])
            for number, each in rows.items()
        ]

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warn(
                "model: another extension runs it without saying for which prompt, so conditions "
                "are computed anew each time; take that extension's node off this model if it "
                "should be faster."
            )


def _origin(name: Hashable) -> tuple[float, float] | None:
    return name.origin if isinstance(name, Part) else None
