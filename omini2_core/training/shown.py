"""What Omini2 Train LoRA draws while it trains: sample pictures and the loss curve."""

import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw

CURVE = 512, 256  # pixels
INK, PAPER, FAINT, LETTERS = (70, 130, 220), (24, 24, 28), (70, 70, 78), (200, 200, 200)


def draw_board(losses: Sequence[float], samples: Path | None) -> Image.Image:
    """The newest sample pictures, if there are any, above the loss curve.

    Args:
        samples: a sheet of :func:`.sample.write_sheet`.
    """
    curve = draw_curve(losses)
    if samples is None:
        return curve
    with Image.open(samples) as sheet:
        height = round(sheet.height * curve.width / sheet.width)
        small = sheet.convert("RGB").resize((curve.width, height), Image.Resampling.LANCZOS)
    board = Image.new("RGB", (curve.width, height + curve.height), PAPER)
    board.paste(small, (0, 0))
    board.paste(curve, (0, height))
    return board


def draw_curve(losses: Sequence[float], size: tuple[int, int] = CURVE) -> Image.Image:
    """A loss curve with its highest and lowest value written beside it."""
    width, height = size
    image = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(image)
    numbers = [x for x in losses if math.isfinite(x)]
    if len(numbers) < 2:
        pen.text((16, height // 2), "waiting for the first steps", fill=FAINT)
        return image
    low, high = min(numbers), max(numbers)
    left, top, right, bottom = 16, 28, width - 16, height - 28
    spread = high - low or 1.0
    for share in (0.0, 0.5, 1.0):
        y = top + share * (bottom - top)
        pen.line([(left, y), (right, y)], fill=FAINT)
    points = [
        (
            left + i / (len(numbers) - 1) * (right - left),
            bottom - (x - low) / spread * (bottom - top),
        )
        for i, x in enumerate(numbers)
    ]
    pen.line(points, fill=INK, width=2)
    pen.text((left, 8), f"loss {high:.4f}", fill=LETTERS)
    pen.text((left, bottom + 8), f"{low:.4f}", fill=LETTERS)
    pen.text((right, bottom + 8), f"step {len(numbers)}", fill=LETTERS, anchor="ra")
    return image
