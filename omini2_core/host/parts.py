"""Parts of a picture that the host evaluates one by one: areas of prompts, context windows.

The host names what it evaluates by the prompt alone, and gives the copy of an area that it makes
for the negative prompt the positive one's name. K/V of a condition that lies on the picture differ
from part to part, so parts get names of their own here, which also tell where they are.
"""

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

from ..errors import Omini2Error

Cond = dict[str, Any]
Size = TypeVar("Size", bound=tuple[int, ...])
ROWS, COLUMNS = 2, 3  # dimensions of a latent


class Part(NamedTuple):
    """Names a prompt on a part of the picture.

    Attributes:
        prompt: the host's own name.
        which: 0 for the positive prompt, 1 for the negative one.
        area: height, width, row and column in the window, in latent pixels, if there is one.
        window: the first row and column of the context window, in latent pixels.
        pictures: those of the batch that are in the window, if it takes them apart.
    """

    prompt: Hashable
    which: int
    area: tuple[int, ...] | None
    window: tuple[int, int]
    pictures: tuple[int, ...] | None

    @property
    def origin(self) -> tuple[float, float]:
        """Row and column of the part in tokens."""
        row, column = self.area[-2:] if self.area is not None else (0, 0)
        return (row + self.window[0]) / 2, (column + self.window[1]) / 2


def name_parts(conds: Sequence[list[Cond] | None], context_window: Any) -> list[list[Cond] | None]:
    """The same prompts, those on parts of the picture under names of their own.

    Args:
        context_window: the host's, None where it evaluates the picture as a whole.
    """
    window, pictures = _place(context_window)

    def named(cond: Cond, which: int) -> Cond:
        area = cond.get("area")
        if area is None and context_window is None:
            return cond
        area = None if area is None else tuple(area)
        return {**cond, "uuid": Part(cond["uuid"], which, area, window, pictures)}

    return [
        prompts and [named(cond, which) for cond in prompts] for which, prompts in enumerate(conds)
    ]


def grown(size: Size, picture: Size) -> Size:
    """The picture's size by now: some samplers make it larger; a smaller one is a tile of it."""
    larger = all(n >= m for n, m in zip(size, picture, strict=True))
    return size if larger else picture


def _place(window: Any) -> tuple[tuple[int, int], tuple[int, ...] | None]:
    """Where a context window begins, and which pictures are in it."""
    if window is None:
        return (0, 0), None
    taken = tuple(window.index_list)
    before = getattr(window, "causal_anchor_index", None)  # newer hosts put one in front
    if before is not None and before >= 0:
        taken = (before, *taken)
    if window.dim not in (ROWS, COLUMNS):
        return (0, 0), taken
    if taken != tuple(range(taken[0], taken[0] + len(taken))):
        raise Omini2Error(
            "model: its context windows take rows or columns that don't lie side by side, so "
            "conditions have no place in them; set context_schedule to standard_static."
        )
    return ((taken[0], 0) if window.dim == ROWS else (0, taken[0])), None
