"""Pictures side by side on one sheet, to be judged at a glance."""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL, GAP, MARGIN, TEXT = 320, 20, 40, 270  # pixels
CAPTION, HEADER = 34, 70
PAPER, INK, FAINT, MAT = "#f7f7f5", "#1d1d1f", "#6b6b70", "#e4e4e0"


@dataclass
class Row:
    """One line of the sheet: what it is, and (pictures, caption) for each cell."""

    title: str
    lines: list[str]
    cells: list[tuple[list[Image.Image], str]]


def contact_sheet(rows: list[Row], title: str = "OminiControl2 in ComfyUI") -> Image.Image:
    """All rows below one another, with a title."""
    columns = max(len(row.cells) for row in rows)
    width = 2 * MARGIN + TEXT + columns * (CELL + GAP)
    height = MARGIN + HEADER + len(rows) * (CELL + CAPTION + GAP) + MARGIN - GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(34))
    for number, row in enumerate(rows):
        _draw_row(sheet, draw, row, MARGIN + HEADER + number * (CELL + CAPTION + GAP))
    return sheet


def _draw_row(sheet: Image.Image, draw: ImageDraw.ImageDraw, row: Row, y: int) -> None:
    cursor = y
    for size, colour, text in [(21, INK, row.title), *((16, FAINT, line) for line in row.lines)]:
        font = ImageFont.load_default(size)
        for line in _wrapped(draw, text, font):
            draw.text((MARGIN, cursor), line, colour, font)
            cursor += round(size * 1.35)
        cursor += 8 if colour == INK else 2
    for column, (images, caption) in enumerate(row.cells):
        x = MARGIN + TEXT + GAP + column * (CELL + GAP)
        sheet.paste(_cell(images), (x, y))
        draw.text((x, y + CELL + 6), caption, INK, ImageFont.load_default(17))


def _wrapped(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> list[str]:
    """The text in lines that fit the left column, broken at blanks and after hyphens."""
    lines = [""]
    for word in text.replace("-", "-\0").replace(" ", " \0").split("\0"):
        if lines[-1] and draw.textlength((lines[-1] + word).rstrip(), font) > TEXT:
            lines.append("")
        lines[-1] += word
    return [line.rstrip() for line in lines]


def _cell(images: list[Image.Image]) -> Image.Image:
    """One picture, or several in a grid, in a square."""
    cell = Image.new("RGB", (CELL, CELL), MAT)
    across = math.ceil(math.sqrt(len(images)))
    side = (CELL - (across - 1) * 6) // max(across, 1)
    down = math.ceil(len(images) / across) if images else 0
    top = (CELL - down * side - (down - 1) * 6) // 2
    for number, image in enumerate(images):
        small = ImageOps.contain(image, (side, side), Image.Resampling.LANCZOS)
        column, line = number % across, number // across
        x = column * (side + 6) + (side - small.width) // 2
        cell.paste(small, (x, top + line * (side + 6) + (side - small.height) // 2))
    return cell
