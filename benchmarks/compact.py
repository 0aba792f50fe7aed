"""What fewer tokens save, and what chose the defaults: `python -m benchmarks.compact`.

Compression, pruning of real edge maps and token integration, each sampled through our nodes and
compared to plain FLUX at the same size. `--defaults` samples nothing: it measures what the defaults
of Compact Tokens were chosen by. `--pictures` draws the sheets of `docs/images`.
"""

import os
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from benchmarks import costs, host
from benchmarks.side_by_side import (
    QUICK,
    RANK,
    SHAPE,
    SIDE,
    TEXT,
    Measured,
    Timing,
    alternate,
    closing,
    keep,
    parser,
)
from dev.markdown import table
from dev.paths import ROOT
from dev.workflows import contact_sheet as sheets

TOKEN = 16  # pixels
PHOTOS = "cat", "coffee", "rocket"  # demo_model/photos names their package, authors and licences
CANNY = 0.1, 0.3
COMPRESSIONS = 1.0, 0.5, 0.25, 0.125
PRUNED_AT = 1.0, 0.5
PAINTED = 0.25, 0.5, 0.75, 1.0
# How a condition attends, the widgets of Condition Cache, and costs.ConditionCost's `every`.
WAYS = {
    "once": ("independent", ("once", 5), None),
    "every 5": ("joint", ("every_n_steps", 5), 5),
    "every step": ("joint", ("off", 5), 1),
}
RESAMPLINGS = "area", "lanczos"
THRESHOLDS = 0.02, 0.05, 0.1, 0.2, 0.3, 0.5
DARK = 0.1  # a cell of a resampled edge map below this counts as empty
WIDTH = 1280  # pixels of a sheet
HEAD = (
    "condition tokens", "computed", "s per step", "**plain = 1**", "min to max", "FLOPs", "K/V",
    "FLUX.1-dev: FLOPs", "K/V",
)  # fmt: skip


# --- through the nodes -------------------------------------------------------------------------


def photo(name: str, side: int = SIDE) -> Tensor:
    """Omini2 Demo Image and, if it isn't of side x side tokens, the host's Upscale Image."""
    import omini2_extension.nodes as nodes
    from omini2_extension.omini2_core.host.images import resize

    return resize(nodes.DemoImage.execute(photo=name)[0], TOKEN * side, TOKEN * side)


def edges(name: str, side: int = SIDE) -> Tensor:
    """The host's Canny on a photo."""
    from comfy_extras.nodes_canny import Canny

    return Canny.execute(photo(name, side), *CANNY)[0]


def compact(pixels: Tensor, **changed: Any) -> tuple[Any, Tensor]:
    """A condition after Compact Tokens with its defaults but for ``changed``, and what it draws."""
    import omini2_extension.nodes as nodes
    from benchmarks import flux

    inputs = nodes.CompactTokens.define_schema().inputs
    defaults = {i.id: i.default for i in inputs if getattr(i, "default", None) is not None}
    condition = flux.encoded(pixels, "aligned")
    return nodes.CompactTokens.execute(condition=condition, **{**defaults, **changed}).args[:2]


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
    """One condition, how it is computed, and what its runs gave."""

    kind: str
    name: str
    condition: Any = field(repr=False)
    computed: str
    measured: Measured = field(default_factory=Measured)

    @property
    def tokens(self) -> int:
        """The condition's tokens that take part."""
        return self.condition.token_count

    def flops(self, shape: costs.Shape, picture: int, steps: int) -> float:
        """FLOPs over those of plain FLUX."""
        attention, _, every = WAYS[self.computed]
        cost = costs.ConditionCost(self.tokens, attention == "joint", every, RANK)
        if self.condition.paint is None:
            return costs.ratio(shape, TEXT, picture, [cost], steps)
        painted = int(self.condition.paint.sum())
        ours = integration_flops(shape, TEXT, picture, painted, cost, steps)
        return ours / costs.run(shape, TEXT, picture, (), steps)

    def cells(self, shape: costs.Shape, picture: int, steps: int) -> list[object]:
        """Its line of the table."""
        from benchmarks import flux

        ratios, seconds = self.measured.values(clock=True), [t.clock for t in self.measured.times]
        cells = [self.name, self.tokens, self.computed, f"{statistics.median(seconds) / steps:.2f}"]
        cells += [f"**{statistics.median(ratios):.2f}**", f"{min(ratios):.2f} to {max(ratios):.2f}"]
        for of, width, digits in ((shape, flux.dtype().itemsize, 1), (costs.FLUX1_DEV, 2, 0)):
            kv = costs.kv_bytes(of, self.tokens, width) / 1e6
            cells += [f"{self.flops(of, picture, steps):.2f}", f"{kv:.{digits}f} MB"]
        return cells


def integration_flops(
    shape: costs.Shape, text: int, picture: int, painted: int, known: costs.ConditionCost,
    steps: int,
) -> int:  # fmt: skip
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
        whole, _ = compact(edges(PHOTOS[0], side), compression=compression)
        for computed in ("once", "every step"):
            yield Row("compression", f"{compression:g}", whole, computed)
    for name in PHOTOS:
        for compression in PRUNED_AT:
            pruned, _ = compact(edges(name, side), compression=compression, prune="empty")
            yield Row("pruning", f"{name}, compression {compression:g}", pruned, "every step")
    for share in PAINTED:
        known, _ = compact(photo(PHOTOS[0], side), token_integration=True, mask=box(share, side))
        for computed in ("once", "every 5") if known.token_count else ("once",):
            yield Row("integration", f"{share:.0%} painted", known, computed)


def measure(rows: Sequence[Row], shape: costs.Shape, side: int, options: Any) -> list[Timing]:
    """Fills the rows; returns the plain runs' times."""
    from benchmarks import flux  # needs the host, which main() has started

    task, warm_up = (flux.Task(shape, TEXT, side, steps) for steps in (options.steps, 1))
    with flux.lora_folder(shape, RANK):
        plain = flux.model(shape)
        models = []
        for row in rows:
            attention, cache, _ = WAYS[row.computed]
            models.append(flux.with_cache(flux.applied(plain, row.condition, attention), *cache))
        for each in (plain, *models):
            warm_up.timed(each)
        runs = [lambda model=model: task.timed(model) for model in models]
        times, measured = alternate(lambda: task.timed(plain), runs, options.repeats)
    for row, found in zip(rows, measured, strict=True):
        row.measured = found
    return times


def print_measured(options: Any, load: float) -> None:
    """One table for each kind of row, the machine, and the same as JSON."""
    shape, side = (QUICK, SIDE // 2) if options.quick else (SHAPE, SIDE)
    rows, sizes = list(all_rows(side)), (shape, side**2, options.steps)
    plain = measure(rows, shape, side, options)
    for kind in dict.fromkeys(row.kind for row in rows):
        print(table((kind, *HEAD), [row.cells(*sizes) for row in rows if row.kind == kind]) + "\n")
    print(closing(options, load, plain))
    figures = [dict(zip(("name", *HEAD), map(str, row.cells(*sizes)), strict=True)) for row in rows]
    keep(options.json, {"machine": host.machine(), "rows": figures})


# --- what chose the defaults -------------------------------------------------------------------


def print_defaults() -> None:
    """Resampling, threshold and grow, each on the three edge maps."""
    maps, three = [edges(name) for name in PHOTOS], COMPRESSIONS[:3]

    def cells(*of_maps: Sequence[float]) -> list[str]:
        columns = zip(*of_maps, strict=True)
        return [", ".join(f"{100 * figure:.1f}" for figure in figures) for figures in columns]

    head = ("brightness of edge cells", "edge cells lost", "empty cells lit",
            "tokens kept by pruning")  # fmt: skip
    lines = [
        [f"{c:g}", method, *cells(*(resampling(image, c, method) for image in maps))]
        for c in COMPRESSIONS[1:]
        for method in RESAMPLINGS
    ]
    print(table(("compression", "resampling", *head), lines), end="\n\n")
    lines = [
        [f"{t:g}", *cells(*([x for c in three for x in pruning(image, c, t)] for image in maps))]
        for t in THRESHOLDS
    ]
    head = [f"{c:g}: {what}" for c in three for what in ("kept", "missed")]
    print(table(("threshold", *head), lines), end="\n\n")
    lines = [
        [grow, *cells(*([pruning(image, c, DARK, grow)[0] for c in three] for image in maps))]
        for grow in range(3)
    ]
    print(table(("grow", *(f"{c:g}: kept" for c in three)), lines))
    print(f"\nIn each cell: {', '.join(PHOTOS)}; 512x512, Canny {CANNY[0]:g} / {CANNY[1]:g}.")


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


def draw_pictures() -> None:
    """The two sheets of the docs, with a palette: a third of the bytes, and hardly a difference."""
    for name, rows, title in (
        ("compact-pruning", pruning_sheet(), "prune: empty"),
        ("compact-integration", integration_sheet(), "token_integration"),
    ):
        sheet = sheets.contact_sheet(list(rows), title)
        sheet.thumbnail((WIDTH, WIDTH), Image.Resampling.LANCZOS)
        palette = sheet.quantize(256, kmeans=2)
        dithered = sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG)
        dithered.save(ROOT / "docs" / "images" / f"{name}.png", optimize=True)


def pruning_sheet() -> Iterator[sheets.Row]:
    """Photo, edges and kept tokens at both compressions."""
    note = "Tinted tokens show nothing but the background: they are dropped."
    for name in PHOTOS:
        image = edges(name)
        cells = [([_pil(photo(name))], "photo"), ([_pil(image)], "edges")]
        lines = [note]
        for compression in PRUNED_AT:
            condition, drawn = compact(image, compression=compression, prune="empty")
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
        known, drawn = compact(image, token_integration=True, mask=mask)
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


# --- command line ------------------------------------------------------------------------------


def main() -> None:
    """Command line."""
    of = parser(__doc__, steps=10)
    of.add_argument("--defaults", action="store_true", help="only what chose the defaults")
    of.add_argument("--pictures", action="store_true", help="only draw the docs' pictures")
    options, load = of.parse_args(), os.getloadavg()[0]
    host.start(options.device)
    with torch.inference_mode():  # as the host executes nodes
        if options.defaults:
            print_defaults()
        if options.pictures:
            draw_pictures()
        if not options.defaults and not options.pictures:
            print_measured(options, load)


if __name__ == "__main__":
    main()
