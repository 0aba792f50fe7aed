"""Makes example_workflows/*.jpg for ComfyUI's template browser: `python -m dev.docs.thumbnails`.

With names of templates, only those that show a run of these are made anew. README's strip of
pictures comes out of the same runs.

Each is the picture of a real run of a demo model's template with its conditions in a corner. A
template for FLUX.1 has the run of the demo model's template that is most like it, and says so;
where there is none, it has a drawing.
"""

from __future__ import annotations

import asyncio
import sys

from PIL import Image, ImageDraw, ImageFont, ImageOps

from dev.docs.artwork import FAINT, FOLDER, INK, NIGHT, draw_tokens
from dev.docs.strip import SHOWN, strip
from dev.host.server import Server
from dev.paths import ROOT
from dev.workflows import demo

SIDE = 400  # pixels; the browser shows a square of 256
INSET, EDGE, RIM, MARGIN = 116, 3, 1, 10  # of the condition in the corner
FINE = 4  # drawings are made so many times larger, for smooth edges
QUALITY = 88
DEMO_MODEL = "-demo-model"
# Templates for FLUX.1 whose demo model's template has another name.
LIKE = {
    "edges": "try-it-without-a-checkpoint",
    "depth": "depth-compressed-demo-model",
    "subject-dev-image-guidance": "subject-demo-model",
    "subject-schnell": "subject-demo-model",
    "kontext-edit": "edit-demo-model",
    "spot-edit-kontext": "spot-edit-demo-model",
    "flux2-klein-two-references": "two-references-demo-model",
}
# Those whose picture leaves no corner free.
WHOLE = {"reuse-and-compact-tokens-compared-demo-model", "spot-edit-demo-model"}
# Models of templates that have a drawing, where it isn't FLUX.1-dev.
MODELS = {
    "kontext-compact-reference": "FLUX.1 Kontext",
    "flux2-klein-9b-kv": "FLUX.2 klein",
    "qwen-image-edit-2511": "Qwen-Image-Edit-2511",
    "krea2-edit-lora": "Krea 2",
    "masked-edit-kontext": "FLUX.1 Kontext",
    "spot-edit-qwen": "Qwen-Image-Edit",
}


def shown_run(name: str, runs: set[str]) -> str | None:
    """The template whose run a template's thumbnail shows; None where it gets a drawing."""
    likely = (name, name + DEMO_MODEL, LIKE.get(name))
    return next((each for each in likely if each in runs), None)


def of_run(result: demo.Result, note: str = "") -> Image.Image:
    """The picture with its conditions in the lower left corner, and a note in the upper one."""
    size = (SIDE, SIDE), Image.Resampling.LANCZOS
    wide = result.picture.width > 1.5 * result.picture.height  # two side by side
    image = (
        ImageOps.pad(result.picture, *size, NIGHT) if wide else ImageOps.fit(result.picture, *size)
    )
    x = MARGIN
    for condition in result.conditions if result.name not in WHOLE else []:
        inset = ImageOps.fit(condition, (INSET, INSET), Image.Resampling.LANCZOS)
        framed = ImageOps.expand(ImageOps.expand(inset, EDGE, INK), RIM, NIGHT)
        image.paste(framed, (x, SIDE - MARGIN - framed.height))
        x += framed.width + MARGIN
    if note:
        draw, font = ImageDraw.Draw(image, "RGBA"), ImageFont.load_default(19)
        width = draw.textlength(note, font)
        box = (MARGIN, MARGIN, MARGIN + width + 18, MARGIN + 32)
        draw.rounded_rectangle(box, 8, fill=(20, 22, 31, 205))
        draw.text((MARGIN + 9, MARGIN + 16), note, INK, font, anchor="lm")
    return image


def drawing(name: str) -> Image.Image:
    """The project's sign with the template's name, for what only a large model can draw."""
    side = SIDE * FINE
    image = Image.new("RGB", (side, side), NIGHT)
    draw = ImageDraw.Draw(image)
    draw_tokens(draw, side * 0.26, side * 0.1, side * 0.48)
    text = (demo.WORKFLOWS / f"{name}.json").read_text(encoding="utf-8")
    flux = "FLUX.1-schnell" if "flux1-schnell" in text else "FLUX.1-dev"
    words = (
        (name.replace("-", " "), 34, INK, 0.72),
        (MODELS.get(name, flux), 22, FAINT, 0.84),
    )
    for text, size, colour, y in words:
        font = ImageFont.load_default(size * FINE)
        room = side * 0.92
        if draw.textlength(text, font) > room:
            font = ImageFont.load_default(size * FINE * room / draw.textlength(text, font))
        draw.text((side / 2, side * y), text, colour, font, anchor="mm")
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def make_all(results: list[demo.Result]) -> dict[str, Image.Image]:
    """Template's name -> its thumbnail, for all of them."""
    runs = {result.name: result for result in results}
    images = {}
    for path in demo.chosen([], every=True):
        shown = shown_run(path.stem, set(runs))
        if shown is None:
            images[path.stem] = drawing(path.stem)
        else:
            note = "" if shown == path.stem else "drawn by the demo model"
            images[path.stem] = of_run(runs[shown], note)
    return images


def main() -> int:
    only = sys.argv[1:]
    output = ROOT / "demo_output"
    demo.prepare_input(output / "base")
    with Server(output / "base", output / "server.log") as server:
        results = asyncio.run(demo.run_all(server, demo.chosen(only), output, trains=True))
    failed = [result for result in results if result.error]
    for result in failed:
        print(f"thumbnails: {result.name} failed: {result.error}", file=sys.stderr)
    if failed:
        return 1
    runs = {result.name: result for result in results}
    for name, image in make_all(results).items():
        if not only or shown_run(name, set(runs)):
            image.save(demo.WORKFLOWS / f"{name}.jpg", quality=QUALITY, optimize=True)
    if only:
        return 0
    pairs = {
        caption: (runs[name].conditions[0], runs[name].picture) for caption, name in SHOWN.items()
    }
    strip(pairs).save(FOLDER / "strip.png", optimize=True)
    total = sum(path.stat().st_size for path in demo.WORKFLOWS.glob("*.jpg"))
    print(f"thumbnails: {total / 1e3:.0f} kB in {demo.WORKFLOWS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
