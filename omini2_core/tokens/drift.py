"""How far a result has moved against its reference: shift and zoom, by phase correlation.

Editing models move and zoom pictures a little although nobody asked them to. Squares of the picture
are compared one by one, each where it lies and a little around; shift and zoom are what fits their
moves best, without those that fit badly.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIDES = (128, 64)  # of the squares, in pixels: the larger find larger moves
CLEAR = 0.1  # height of the peak, of 1, below which nothing was found
FLAT = 1e-3  # a square whose colours differ by less shows nothing that could have moved
PLACES = 256  # at most
ENOUGH = 4  # squares, so that zoom can be told from shift


@dataclass(frozen=True)
class Drift:
    """Of a picture against another.

    Attributes:
        right, down: shift in pixels.
        zoom: 1 is none.
        places: in how many squares it was measured.
    """

    right: float
    down: float
    zoom: float
    places: int

    def at_edge(self, width: int, height: int) -> float:
        """Pixels by which the picture's outermost point has moved through zoom alone."""
        return abs(self.zoom - 1) * math.hypot(width, height) / 2


def drift(image: Tensor, reference: Tensor, unchanged: Tensor) -> Drift | None:
    """Shift and zoom of a picture.

    Args:
        image, reference: (H, W, 3).
        unchanged: (H, W) bool, what is to be looked at.

    Returns:
        None where too little is unchanged, or nothing in it can be recognised.
    """
    one, other = (t[..., :3].float().mean(-1) for t in (image, reference))
    for side in SIDES:
        moves = _moves(one, other, unchanged, side)
        if len(moves) >= ENOUGH:
            return _fit(moves, image.shape[0], image.shape[1])
    return None


# Row and column of a square's middle, how far it has moved down and right.
Move = tuple[float, float, float, float]


def _moves(image: Tensor, reference: Tensor, unchanged: Tensor, side: int) -> list[Move]:
    height, width = image.shape
    step = side // 2
    places = [
        (row, column)
        for row in range(0, height - side + 1, step)
        for column in range(0, width - side + 1, step)
        if bool(unchanged[row : row + side, column : column + side].all())
    ]
    places = places[:: max(1, math.ceil(len(places) / PLACES))]
    window = torch.hann_window(side, periodic=False, dtype=torch.float64, device=image.device)
    window = window[:, None] * window[None]
    found = []
    for row, column in places:
        there = reference[row : row + side, column : column + side].double()
        if there.std() < FLAT:
            continue
        coarse = _moved(image[row : row + side, column : column + side].double(), there, window)
        if coarse is None:
            continue
        # Once more around the place where it is now, so that both show the same.
        down, right = round(coarse[0]), round(coarse[1])
        top = min(max(row + down, 0), height - side)
        left = min(max(column + right, 0), width - side)
        fine = _moved(image[top : top + side, left : left + side].double(), there, window)
        if fine is None:
            continue
        middle = (side - 1) / 2
        found.append((row + middle, column + middle, top - row + fine[0], left - column + fine[1]))
    return found


def _moved(image: Tensor, reference: Tensor, window: Tensor) -> tuple[float, float] | None:
    """How far down and right a square has moved; None where nothing is recognised."""
    a, b = (torch.fft.fft2((t - t.mean()) * window) for t in (image, reference))
    cross = a * b.conj()
    peak = torch.fft.ifft2(cross / cross.abs().clamp_min(1e-12)).real
    best = int(peak.argmax())
    n = peak.shape[1]
    if peak.flatten()[best] < CLEAR:
        return None
    row, column = divmod(best, n)
    return _between(peak[:, column], row), _between(peak[row], column)


def _between(line: Tensor, at: int) -> float:
    """The place of a peak between the samples of a line that goes round, from its neighbours."""
    n = len(line)
    before, here, after = (float(line[(at + d) % n]) for d in (-1, 0, 1))
    # A phase correlation's peak is a sinc, which falls off to its neighbours as 1 / distance.
    side = 1 if after > before else -1
    neighbour = max(before, after, 0.0)
    offset = side * neighbour / (neighbour + here) if neighbour > 0 else 0.0
    return (at if at < n / 2 else at - n) + offset


def _fit(moves: Sequence[Move], height: int, width: int) -> Drift:
    """Shift and zoom around the picture's middle; what fits badly is left out step by step."""
    rows, columns, down, right = torch.tensor(moves, dtype=torch.float64).T
    rows, columns = rows - (height - 1) / 2, columns - (width - 1) / 2
    use = torch.ones(len(moves), dtype=torch.bool)
    for _ in range(5):
        shift_down, shift_right, zoom = _least_squares(rows, columns, down, right, use)
        off = torch.hypot(down - shift_down - zoom * rows, right - shift_right - zoom * columns)
        kept = off <= max(3 * float(off[use].median()), 0.05)
        if kept.sum() < ENOUGH or torch.equal(kept, use):
            break
        use = kept
    return Drift(shift_right, shift_down, 1 + zoom, int(use.sum()))


def _least_squares(
    rows: Tensor, columns: Tensor, down: Tensor, right: Tensor, use: Tensor
) -> tuple[float, float, float]:
    n = int(use.sum())
    one, none = torch.ones(n, dtype=rows.dtype), torch.zeros(n, dtype=rows.dtype)
    a = torch.cat(
        (
            torch.stack((one, none, rows[use]), 1),
            torch.stack((none, one, columns[use]), 1),
        )
    )
    b = torch.cat((down[use], right[use]))[:, None]
    shift_down, shift_right, zoom = torch.linalg.lstsq(a, b).solution[:, 0].tolist()
    return shift_down, shift_right, zoom
