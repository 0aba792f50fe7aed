"""The strip of pictures at the top of README: what goes in, and below it what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

SIDE, GAP, CAPTION = 232, 12, 34  # pixels
PAPER, INK = "#ffffff", "#1d1d1f"
# Caption and the demo model's template that shows it.
SHOWN = {
    "edges": "try-it-without-a-checkpoint",
    "depth": "depth-compressed-demo-model",
    "blur": "deblurring-demo-model",
    "grey": "colouring-demo-model",
    "a part replaced": "inpainting-demo-model",
    "a thing": "subject-demo-model",
}


def strip(pairs: Mapping[str, Sequence[Image.Image]]) -> Image.Image:
    """Caption -> (condition, picture), side by side on one strip."""
    width = len(pairs) * (SIDE + GAP) + GAP
    sheet = Image.new("RGB", (width, CAPTION + 2 * (SIDE + GAP)), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(20)
    for column, (caption, images) in enumerate(pairs.items()):
        x = GAP + column * (SIDE + GAP)
        draw.text((x + SIDE / 2, CAPTION / 2), caption, INK, font, anchor="mm")
        for row, image in enumerate(images):
            fitted = ImageOps.fit(image, (SIDE, SIDE), Image.Resampling.LANCZOS)
            sheet.paste(fitted, (x, CAPTION + row * (SIDE + GAP)))
    return sheet
