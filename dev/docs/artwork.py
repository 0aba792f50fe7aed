"""Draws the registry's icon and banner: `python -m dev.docs.artwork`.

A picture of tokens, most of them waiting, and a few condition tokens beside it that all look to.
"""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont

from dev.paths import ROOT

FOLDER = ROOT / "docs" / "images"
ICON, BANNER = (400, 400), (1260, 540)
FINE = 4  # drawn so many times larger, for smooth edges
NIGHT, TOKEN, INK, FAINT = "#14161f", "#2d3350", "#f4f2ec", "#9aa0bd"
CONDITION = "#ff9f43"
# The rows and columns of the picture that the condition has shaped, and how strongly.
SHAPED = {
    (0, 1): 0.35, (0, 2): 0.6, (1, 0): 0.35, (1, 1): 0.7, (1, 2): 1.0, (1, 3): 0.6,
    (2, 0): 0.6, (2, 1): 1.0, (2, 2): 0.7, (2, 3): 0.35, (3, 1): 0.6, (3, 2): 0.35,
}  # fmt: skip
TEAL = (56, 214, 192)


def draw_tokens(draw: ImageDraw.ImageDraw, x: float, y: float, side: float) -> None:
    """The picture's 4x4 tokens, three condition tokens to its left, and what joins them."""
    cell = side / 5.7
    gap = cell * 0.14
    left = x + 1.7 * cell  # of the picture
    top = y + (side - 4 * cell) / 2
    for row in range(3):
        from_y = top + (row + 1) * cell - gap / 2
        for target in range(4):
            to_y = top + (target + 0.5) * cell - gap / 2
            line = ((x + cell * 0.6, from_y), (left + cell * 0.3, to_y))
            draw.line(line, fill=_mixed((255, 159, 67), 0.45), width=round(cell * 0.035))
    for row in range(3):
        _token(draw, x, top + (row + 0.5) * cell, cell - gap, CONDITION)
    for row in range(4):
        for column in range(4):
            share = SHAPED.get((row, column), 0.0)
            colour = _mixed(TEAL, share) if share else TOKEN
            _token(draw, left + column * cell, top + row * cell, cell - gap, colour)


def _token(draw: ImageDraw.ImageDraw, x: float, y: float, side: float, colour: str) -> None:
    draw.rounded_rectangle((x, y, x + side, y + side), side * 0.2, fill=colour)


def _mixed(colour: tuple[int, int, int], share: float) -> str:
    """So much of a colour on the token's own."""
    ground = (45, 51, 80)
    parts = (round(share * c + (1 - share) * g) for c, g in zip(colour, ground, strict=True))
    return "#" + "".join(f"{part:02x}" for part in parts)


def icon() -> Image.Image:
    """A square with rounded corners."""
    side = ICON[0] * FINE
    image = Image.new("RGBA", (side, side))
    draw = ImageDraw.Draw(image)
    draw.rounded_rectangle((0, 0, side, side), side * 0.18, fill=NIGHT)
    draw_tokens(draw, side * 0.1, side * 0.1, side * 0.8)
    return image.resize(ICON, Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """The icon's drawing beside the name."""
    width, height = (side * FINE for side in BANNER)
    image = Image.new("RGB", (width, height), NIGHT)
    draw = ImageDraw.Draw(image)
    draw_tokens(draw, height * 0.16, height * 0.15, height * 0.7)
    x, lines = (
        height * 0.98,
        (
            ("OminiControl2", 92, INK, 0.25),
            ("for FLUX.1 in ComfyUI", 52, INK, 0.46),
            ("Image conditions as tokens, kept between steps,", 32, FAINT, 0.63),
            ("with your own loaders, samplers and LoRAs", 32, FAINT, 0.71),
        ),
    )
    for text, size, colour, y in lines:
        draw.text((x, height * y), text, colour, ImageFont.load_default(size * FINE))
    return image.resize(BANNER, Image.Resampling.LANCZOS)


def main() -> None:
    icon().save(FOLDER / "icon.png", optimize=True)
    banner().save(FOLDER / "banner.png", optimize=True)


if __name__ == "__main__":
    main()
