"""What fewer tokens save, and what chose the defaults: `python -m benchmarks.compact`.

Compression, pruning of real edge maps and token integration, each sampled through our nodes and
compared to plain FLUX at the same size. Rows lie between two plain runs and are compared to their
mean, so that a machine that speeds up or slows down on the way doesn't matter. `--defaults` samples
nothing: it measures what the defaults of Compact Tokens were chosen by. `--pictures` draws the
sheets of `docs/images`.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from benchmarks import costs, host
from dev.workflows import contact_sheet as sheets

SHAPE = costs.Shape(768, 2, 4, text_width=1024, pooled_width=192)  # a quarter of FLUX.1's widths
QUICK = costs.Shape(256, 1, 2, text_width=64, pooled_width=32)
TEXT, SIDE, STEPS, RANK, REFRESH = 512, 32, 10, 4, 5
TOKEN = 16  # pixels

PHOTOS = "cat", "coffee", "rocket"  # demo_model/photos names their package, authors and licences
CANNY = 0.1, 0.3
COMPRESSIONS = 1.0, 0.5, 0.25, 0.125
PRUNED_AT = 1.0, 0.5
PAINTED = 0.25, 0.5, 0.75, 1.0

RESAMPLINGS = "area", "lanczos"
THRESHOLDS = 0.02, 0.05, 0.1, 0.2, 0.3, 0.5
DARK = 0.1  # a cell of a resampled edge map below this counts as empty
WIDTH = 1280  # pixels of a sheet
IMAGES = Path(__file__).resolve().parents[1] / "docs" / "images"


@dataclass(frozen=True)
class Way:
    """How a condition attends and when it is computed; see ``costs.ConditionCost``."""

    attention: str
    reuse: str
    every: int | None


WAYS = {
    "once": Way("independent", "once", None),
    "every 5": Way("joint", "every_n_steps", REFRESH),
    "every step": Way("joint", "off", 1),
}


# --- through the nodes -------------------------------------------------------------------------


class Vae:
    """Stands in for FLUX's VAE: encoding isn't part of what is measured."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Random latents of the right size."""
        n, height, width, _ = pixels.shape
        return torch.randn(n, 16, height // 8, width // 8)


def photo(name: str, side: int = SIDE) -> Tensor:
    """Omini2 Demo Image and, if it isn't of side x side tokens, the host's Upscale Image."""
    import omini2_extension.nodes as nodes
    from omini2_extension.omini2_core.host.images import resize

    pixels = nodes.DemoImage.execute(photo=name)[0]
    return resize(pixels, TOKEN * side, TOKEN * side)


def edges(name: str, side: int = SIDE) -> Tensor:
    """The host's Canny on a photo."""
    from comfy_extras.nodes_canny import Canny

    return Canny.execute(photo(name, side), *CANNY)[0]


def encoded(pixels: Tensor) -> Any:
    """Omini2 Condition Encode."""
    import omini2_extension.nodes as nodes

    return nodes.ConditionEncode.execute(
        image=pixels,
        vae=Vae(),
        placement="aligned",
        delta_rows=0,
        delta_cols=0,
        position_scale=1.0,
    )[0]


def compact(condition: Any, **changed: Any) -> tuple[Any, Tensor]:
    """Compact Tokens with its defaults but for ``changed``: the condition, and what it draws."""
    import omini2_extension.nodes as nodes

    inputs = nodes.CompactTokens.define_schema().inputs
    defaults = {i.id: i.default for i in inputs if getattr(i, "default", None) is not None}
    return nodes.CompactTokens.execute(condition=condition, **{**defaults, **changed}).args[:2]


def conditioned(model: Any, condition: Any, way: Way) -> Any:
    """Apply Omini2 LoRA and Condition Cache."""
    import omini2_extension.nodes as nodes
    from benchmarks import flux

    model = nodes.ApplyLora.execute(
        model=model,
        condition=condition,
        lora_name=flux.LORA,
        strength=1.0,
        condition_scale=1.0,
        attention=way.attention,
        start_percent=0.0,
        end_percent=1.0,
    )[0]
    return flux.with_cache(model, way.reuse, way.every or REFRESH)


def box(share: float, side: int) -> Tensor:
    """A mask, (1, 16*side, 16*side), of a centred box of whole tokens with this share of them.

    Half as high as the picture and half as wide for 25 %; else as high as the picture.
    """
    h = side // 2 if share <= 0.25 else side
    w = round(share * side**2 / h)
    top, left = (side - h) // 2, (side - w) // 2
    tokens = torch.zeros(side, side)
    tokens[top : top + h, left : left + w] = 1
    return tokens.repeat_interleave(TOKEN, 0).repeat_interleave(TOKEN, 1)[None]


# --- what is measured --------------------------------------------------------------------------


@dataclass
class Row:
    """One condition, how it is computed, and its measured ratios to plain FLUX."""

    kind: str
    name: str
    condition: Any = field(repr=False)
    computed: str
    ratios: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """The condition's tokens that take part."""
        return self.condition.token_count

    def kv_bytes(self, shape: costs.Shape, bytes_per_number: int) -> int:
        """K and V, whether or not they are kept for the next step."""
        return costs.kv_bytes(shape, self.tokens, bytes_per_number)

    def flops(self, shape: costs.Shape, picture: int, steps: int) -> float:
        """FLOPs over those of plain FLUX."""
        way = WAYS[self.computed]
        cost = costs.ConditionCost(self.tokens, way.attention == "joint", way.every, RANK)
        if self.condition.paint is None:
            return costs.ratio(shape, TEXT, picture, [cost], steps)
        painted = int(self.condition.paint.sum())
        ours = integration_flops(shape, TEXT, picture, painted, cost, steps)
        return ours / costs.run(shape, TEXT, picture, (), steps)

    def figures(self, shape: costs.Shape, picture: int, steps: int) -> dict[str, Any]:
        """Everything in the table, for --json."""
        return {
            "kind": self.kind,
            "name": self.name,
            "computed": self.computed,
            "tokens": self.tokens,
            "flops": self.flops(shape, picture, steps),
            "flux1_flops": self.flops(costs.FLUX1_DEV, picture, steps),
            "flux1_kv_bytes": self.kv_bytes(costs.FLUX1_DEV, 2),
            "ratios": self.ratios,
            "seconds": self.seconds,
        }


def integration_flops(
    shape: costs.Shape,
    text: int,
    picture: int,
    painted: int,
    known: costs.ConditionCost,
    steps: int,
) -> int:
    """FLOPs of a run with token integration.

    The blocks hold ``painted`` of the ``picture`` tokens, and the known ones are a condition. The
    host's first and last linear still take the whole picture: 64 x h each. With nothing known it
    is plain sampling.
    """
    if painted == picture:
        return costs.run(shape, text, picture, (), steps)
    ends = 2 * 2 * (picture - painted) * costs.PATCH * shape.hidden
    return costs.run(shape, text, painted, [known], steps) + steps * ends


def all_rows(side: int) -> Iterator[Row]:
    """Compression and pruning of edges, integration of a photo."""
    for compression in COMPRESSIONS:
        whole, _ = compact(encoded(edges(PHOTOS[0], side)), compression=compression)
        for computed in ("once", "every step"):
            yield Row("compression", f"{compression:g}", whole, computed)
    for name in PHOTOS:
        for compression in PRUNED_AT:
            condition = encoded(edges(name, side))
            pruned, _ = compact(condition, compression=compression, prune="empty")
            yield Row("pruning", f"{name}, compression {compression:g}", pruned, "every step")
    for share in PAINTED:
        known, _ = compact(
            encoded(photo(PHOTOS[0], side)), token_integration=True, mask=box(share, side)
        )
        for computed in ("once", "every 5") if known.token_count else ("once",):
            yield Row("integration", f"{share:.0%} painted", known, computed)


def measure(table: Sequence[Row], shape: costs.Shape, side: int, options: Any) -> list[float]:
    """Fills the rows' ratios; returns the plain runs' seconds."""
    from benchmarks import flux  # needs the host, which main() has started

    task = flux.Task(shape, TEXT, side, options.steps)
    warm_up = flux.Task(shape, TEXT, side, 1)
    with flux.lora_folder(shape, RANK):
        plain_model = flux.model(shape)
        models = [conditioned(plain_model, row.condition, WAYS[row.computed]) for row in table]
        for each in (plain_model, *models):
            warm_up.seconds(each)
        plain = [task.seconds(plain_model)]
        for _ in range(options.repeats):
            for first in tqdm(range(0, len(table), 2), "compact"):
                pair = table[first : first + 2]
                for row, each in zip(pair, models[first:], strict=False):
                    row.seconds.append(task.seconds(each))
                plain.append(task.seconds(plain_model))
                for row in pair:
                    row.ratios.append(row.seconds[-1] / statistics.mean(plain[-2:]))
    return plain


def markdown(table: Sequence[Row], shape: costs.Shape, picture: int, steps: int) -> str:
    """One table for each kind of row."""
    parts = []
    for kind in dict.fromkeys(row.kind for row in table):
        lines = [
            f"| {kind} | condition tokens | computed | s per step | **plain = 1** | min to max "
            "| FLOPs | K/V | FLUX.1-dev: FLOPs | K/V |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *(_line(row, shape, picture, steps) for row in table if row.kind == kind),
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _line(row: Row, shape: costs.Shape, picture: int, steps: int) -> str:
    from benchmarks import flux

    return (
        f"| {row.name} | {row.tokens} | {row.computed} "
        f"| {statistics.median(row.seconds) / steps:.2f} | **{statistics.median(row.ratios):.2f}** "
        f"| {min(row.ratios):.2f} to {max(row.ratios):.2f} "
        f"| {row.flops(shape, picture, steps):.2f} "
        f"| {row.kv_bytes(shape, flux.dtype().itemsize) / 1e6:.1f} MB "
        f"| {row.flops(costs.FLUX1_DEV, picture, steps):.2f} "
        f"| {row.kv_bytes(costs.FLUX1_DEV, 2) / 1e6:.0f} MB |"
    )


# --- what chose the defaults -------------------------------------------------------------------


def print_defaults() -> None:
    """Resampling, threshold and grow, each on the three edge maps."""
    maps = [edges(name) for name in PHOTOS]
    print("| compression | resampling | brightness of edge cells | edge cells lost "
          "| empty cells lit | tokens kept by pruning |\n|---|---|---|---|---|---|")  # fmt: skip
    for compression in COMPRESSIONS[1:]:
        for method in RESAMPLINGS:
            columns = [resampling(image, compression, method) for image in maps]
            print(f"| {compression:g} | {method} |", " | ".join(_each(columns)), "|")
    print("\n| threshold | compression 1: kept | missed | 0.5: kept | missed | 0.25: kept "
          "| missed |\n|---|---|---|---|---|---|---|")  # fmt: skip
    for threshold in THRESHOLDS:
        columns = [
            [share for c in COMPRESSIONS[:3] for share in pruning(image, c, threshold)]
            for image in maps
        ]
        print(f"| {threshold:g} |", " | ".join(_each(columns)), "|")
    print("\n| grow | compression 1: kept | 0.5: kept | 0.25: kept |\n|---|---|---|---|")
    for grow in range(3):
        columns = [[pruning(image, c, DARK, grow)[0] for c in COMPRESSIONS[:3]] for image in maps]
        print(f"| {grow} |", " | ".join(_each(columns)), "|")
    print(f"\nIn each cell: {', '.join(PHOTOS)}; 512x512, Canny {CANNY[0]:g} / {CANNY[1]:g}.")


def _each(columns: Sequence[Sequence[float]]) -> list[str]:
    """Per column of the table, the figure of each edge map; shares in percent."""
    return [
        ", ".join(f"{100 * figure:.1f}" for figure in figures)
        for figures in zip(*columns, strict=True)
    ]


def resampling(image: Tensor, compression: float, method: str) -> list[float]:
    """How an edge map survives resampling.

    A cell is a pixel of the small map; it is an edge cell if the part of the edge map that it
    stands for holds an edge.

    Returns:
        the mean brightness of edge cells, the share of edge cells that are dark, the share of
        empty cells that aren't, and the share of tokens that pruning keeps.
    """
    small = resized(image, compression, method)
    cells = small.shape[1], small.shape[2]
    is_edge = F.adaptive_max_pool2d(image.amax(-1), cells)[0] > 0
    brightness = small[0].amax(-1)
    bright = brightness > DARK
    return [
        float(brightness[is_edge].mean()),
        float((~bright[is_edge]).float().mean()),
        float(bright[~is_edge].float().mean()),
        float(kept(small, DARK).float().mean()),
    ]


def pruning(
    image: Tensor, compression: float, threshold: float, grow: int = 0
) -> tuple[float, float]:
    """The share of tokens kept, and of the tokens with edges the share that is dropped.

    Whether a token has an edge is read from the edge map before it was made smaller.
    """
    small = resized(image, compression, RESAMPLINGS[0])
    keep = kept(small, threshold, grow)
    has_edge = F.adaptive_max_pool2d(image.amax(-1), keep.shape)[0] > 0
    return float(keep.float().mean()), float((~keep[has_edge]).float().mean())


def kept(pixels: Tensor, threshold: float, grow: int = 0) -> Tensor:
    """The tokens that ``prune: empty`` keeps."""
    from omini2_extension.omini2_core.tokens.compact import tokens_with_content

    return tokens_with_content(pixels, threshold, grow)


def resized(image: Tensor, compression: float, method: str) -> Tensor:
    """(1, H, W, 3) made smaller by the host."""
    import comfy.utils

    height, width = (round(side * compression) for side in image.shape[1:3])
    small = comfy.utils.common_upscale(image.movedim(-1, 1), width, height, method, "disabled")
    return small.movedim(1, -1).clamp(0, 1)


# --- pictures ----------------------------------------------------------------------------------


def draw_pictures(folder: Path) -> None:
    """The two sheets of the docs."""
    folder.mkdir(parents=True, exist_ok=True)
    _save(sheets.contact_sheet(list(pruning_sheet()), "prune: empty"), folder / "compact-pruning")
    _save(
        sheets.contact_sheet(list(integration_sheet()), "token_integration"),
        folder / "compact-integration",
    )


def pruning_sheet() -> Iterator[sheets.Row]:
    """Photo, edges and kept tokens at both compressions."""
    note = "Tinted tokens show nothing but the background: they are dropped."
    for name in PHOTOS:
        image = edges(name)
        cells = [([_pil(photo(name))], "photo"), ([_pil(image)], "edges")]
        lines = [note]
        for compression in PRUNED_AT:
            condition, drawn = compact(encoded(image), compression=compression, prune="empty")
            kept_tokens, tokens = condition.token_count, condition.keep.numel()
            cells.append(([_pil(drawn)], f"compression {compression:g}: {kept_tokens} tokens"))
            lines.append(
                f"compression {compression:g}: {kept_tokens} of {tokens} tokens, "
                f"{kept_tokens / tokens:.0%}"
            )
        yield sheets.Row(name, lines, cells)


def integration_sheet() -> Iterator[sheets.Row]:
    """Photo, what is to be painted, and the known tokens."""
    for name, title in (("cat", "a box"), ("coffee", "a brush"), ("rocket", "outpainting")):
        mask = _brush(name)
        shade = mask[..., None].expand(-1, -1, -1, 3)
        image = photo(name)
        if title == "outpainting":  # as the host's Pad Image for Outpainting fills it
            image = torch.where(shade > 0, 0.5, image)
        known, drawn = compact(encoded(image), token_integration=True, mask=mask)
        painted, tokens = int(known.paint.sum()), known.paint.numel()
        lines = [
            f"{painted} of {tokens} tokens ({painted / tokens:.0%}) are painted.",
            f"{known.token_count} are known: they are the condition.",
        ]
        cells = [
            ([_pil(image)], "photo"),
            ([_pil(shade)], "mask"),
            ([_pil(drawn)], "tokens; the tinted ones are painted"),
        ]
        yield sheets.Row(title, lines, cells)


def _brush(name: str) -> Tensor:
    """A mask such as a user would make, (1, 512, 512)."""
    size, border = TOKEN * SIDE, TOKEN * SIDE // 4
    if name == "cat":
        return box(0.25, SIDE)
    canvas = Image.new("1", (size, size), name == "rocket")
    draw = ImageDraw.Draw(canvas)
    if name == "coffee":
        draw.ellipse((90, 12, 404, 280), fill=1)
    else:
        draw.rectangle((border, 0, size - border - 1, size), fill=0)
    return torch.from_numpy(np.array(canvas, dtype=np.float32))[None]


def _pil(pixels: Tensor) -> Image.Image:
    """(1, H, W, 3) -> a picture of at least 512 pixels, its pixels kept sharp."""
    levels = (pixels[0].clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(levels.cpu().numpy())
    times = max(1, TOKEN * SIDE // picture.width)
    return picture.resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)


def _save(sheet: Image.Image, path: Path) -> None:
    """With a palette: a third of the bytes, and hardly a difference to the eye."""
    sheet.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
    palette = sheet.quantize(256, kmeans=2)
    dithered = sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
    dithered.save(path.with_suffix(".png"), optimize=True)


# --- command line ------------------------------------------------------------------------------


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each configuration")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it work at all?")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure here")
    parser.add_argument("--defaults", action="store_true", help="only what chose the defaults")
    parser.add_argument("--pictures", action="store_true", help="only draw the docs' pictures")
    options = parser.parse_args()

    load = os.getloadavg()[0]
    host.start(options.device)
    with torch.inference_mode():  # as the host executes nodes
        if options.defaults:
            print_defaults()
        if options.pictures:
            draw_pictures(IMAGES)
        if not options.defaults and not options.pictures:
            print_measured(options, load)


def print_measured(options: Any, load: float) -> None:
    """The tables, the machine, and the same as JSON."""
    shape, side = (QUICK, SIDE // 2) if options.quick else (SHAPE, SIDE)
    table = list(all_rows(side))
    plain = measure(table, shape, side, options)
    steps = options.steps
    print(markdown(table, shape, side**2, steps))
    print(
        f"\n{host.machine()}; load average {load:.1f} at the start, {os.getloadavg()[0]:.1f} at "
        f"the end. {steps} steps, medians of {options.repeats} interleaved runs; plain FLUX "
        f"{statistics.median(plain) / steps:.2f} s per step ({min(plain) / steps:.2f} to "
        f"{max(plain) / steps:.2f})."
    )
    if options.json:
        rows = [row.figures(shape, side**2, steps) for row in table]
        figures = {"machine": host.machine(), "plain": plain, "rows": rows}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
