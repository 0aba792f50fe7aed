"""The experiments: which cells, what of them is shown, and which pairs are compared."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise

from benchmarks.study.cells import Cell, Use
from benchmarks.study.edits import EditCell, Spot

EDGES, JOINT, COMPACT, PRUNED = (
    "omini2_demo_edges",
    "omini2_demo_edges_joint",
    "omini2_demo_edges_compact",
    "omini2_demo_edges_pruned",
)
DEPTH, DEBLURRING, COLOURING = (
    f"omini2_demo_{task}" for task in ("depth", "deblurring", "colouring")
)
INTEGRATION, MASKED, SUBJECT = (
    f"omini2_demo_{task}" for task in ("inpainting", "inpainting_masked", "subject")
)
PLAIN = Cell()
RATIOS = (1.0, 0.5, 0.25, 0.125)
THRESHOLDS = (0.0, 0.2, 0.5, 0.8)
FLOATS_SHARE = 5  # one scene in so many is drawn in 32 bits too


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        labels: the first columns' texts.
        against: the cell whose pictures these should equal, where there is one.
        group, x: where its figures go in the plot; no group, no point.
    """

    labels: tuple[str, ...]
    cell: Cell | EditCell
    against: Cell | EditCell | None = None
    group: str = ""
    x: float = 0.0


@dataclass(frozen=True)
class Pair:
    """One cell less another, scene by scene."""

    what: str
    one: Cell | EditCell
    other: Cell | EditCell
    measures: tuple[str, ...] = ("f1",)


@dataclass(frozen=True)
class Experiment:
    """One section of the study.

    Attributes:
        columns: heads of the labels' columns.
        measures: what the table shows of each cell.
        plots: (measure, title) of each panel; x_label names the axis below.
    """

    name: str
    columns: tuple[str, ...]
    measures: tuple[str, ...]
    rows: tuple[Row, ...]
    pairs: tuple[Pair, ...] = ()
    plots: tuple[str, ...] = ()
    x_label: str = ""
    logarithmic: bool = False
    limits: dict[Cell | EditCell, int] = field(default_factory=dict)


def experiments(scenes: int) -> tuple[Experiment, ...]:
    """All of them, for so many scenes."""
    return (
        prompts(),
        scale(),
        position(),
        reuse(),
        compression(),
        pruning(),
        several(),
        floats(scenes),
        edit_reuse(),
        edit_compact(scenes),
        edit_spot(scenes),
    )


def edges(lora: str = EDGES, **options: object) -> Cell:
    """One edge condition."""
    return Cell((Use("edges", lora, **options),))  # type: ignore[arg-type]


def prompts() -> Experiment:
    """What the model makes of a prompt alone."""
    rows = [
        Row(("one to three things",), PLAIN),
        Row(("one thing",), Cell(things=1)),
        Row(("two things",), Cell(things=2)),
    ]
    return Experiment("prompts", ("scenes",), ("right", "overlap", "fid"), tuple(rows))


def scale() -> Experiment:
    """condition_scale; at 0 the condition takes no part, which is the plain model."""
    rows = [Row(("0",), PLAIN, group="edges", x=0)]
    for value in (0.25, 0.5, 1.0, 1.5, 2.0):
        rows.append(Row((f"{value:g}",), edges(scale=value), group="edges", x=value))
    pairs = [Pair(f"{b.labels[0]} less {a.labels[0]}", b.cell, a.cell) for a, b in pairwise(rows)]
    return Experiment(
        "scale",
        ("condition_scale",),
        ("f1", "offset", "right", "fid"),
        tuple(rows),
        tuple(pairs),
        ("f1", "right"),
        "condition_scale",
    )


def position() -> Experiment:
    """Position correcting."""
    rows, pairs = [], []
    for name, lora in (("full size", EDGES), ("mixed sizes", COMPACT)):
        rows.append(Row((name, "1", "-"), edges(lora)))
        for ratio in (0.5, 0.25):
            on, off = (edges(lora, compression=ratio, correcting=c) for c in (True, False))
            rows.append(Row((name, f"{ratio:g}", "on"), on, group=f"{name}, on", x=ratio))
            rows.append(Row((name, f"{ratio:g}", "off"), off, group=f"{name}, off", x=ratio))
            what = f"{name}, compression {ratio:g}: on less off"
            pairs.append(Pair(what, on, off, ("f1", "offset", "centroid")))
    return Experiment(
        "position",
        ("LoRA trained at", "compression", "position correcting"),
        ("f1", "offset", "centroid", "fid"),
        tuple(rows),
        tuple(pairs),
        ("f1", "offset"),
        "compression",
        logarithmic=True,
    )


def reuse() -> Experiment:
    """The Condition Cache with a joint and with an independent LoRA."""
    rows, pairs = [], []
    for name, lora, attention in (("joint", JOINT, "joint"), ("independent", EDGES, "independent")):
        base = Cell((Use("edges", lora, attention=attention),), reuse="off")
        cells = [(1, "every step", base)]
        for every in (2, 5, 10):
            cells.append((every, f"every {every}", replace(base, reuse="every_n_steps",
                                                           every=every)))  # fmt: skip
        cells.append((12, "once", replace(base, reuse="once")))
        for x, computed, cell in cells:
            rows.append(Row((name, computed), cell, base, name, x))
            if cell is not base:
                pairs.append(Pair(f"{name}: {computed} less every step", cell, base))
    return Experiment(
        "reuse",
        ("attention", "computed"),
        ("f1", "psnr_against", "ssim_against", "largest", "fid"),
        tuple(rows),
        tuple(pairs),
        ("f1", "ssim_against"),
        "steps between two computations (12: once)",
    )


def compression() -> Experiment:
    """Which ratio each task bears."""
    kinds = (
        ("edges (full size)", "edges", EDGES),
        ("edges (mixed sizes)", "edges", COMPACT),
        ("depth", "depth", DEPTH),
        ("deblurring", "deblurring", DEBLURRING),
        ("inpainting (painted over)", "inpainting", MASKED),
    )
    rows, pairs = [], []
    for name, task, lora in kinds:
        full = Cell((Use(task, lora),))
        for ratio in RATIOS:
            cell = Cell((Use(task, lora, compression=ratio),))
            rows.append(Row((name, f"{ratio:g}"), cell, group=name, x=ratio))
            if ratio < 1:
                pairs.append(Pair(f"{name}: {ratio:g} less 1", cell, full, _shown_of(task)))
    rows.append(
        Row(("inpainting (integration)", "-"), Cell((Use("inpainting", INTEGRATION,
                                                         integrate=True),)))
    )  # fmt: skip
    rows.append(Row(("no condition", "-"), PLAIN))
    return Experiment(
        "compression",
        ("condition", "compression"),
        ("tokens", "f1", "overlap", "ssim", "psnr", "ssim_hole", "psnr_hole", "f1_hole", "fid"),
        tuple(rows),
        tuple(pairs),
        ("f1", "overlap", "ssim", "psnr_hole"),
        "compression",
        logarithmic=True,
    )


def _shown_of(task: str) -> tuple[str, ...]:
    return {
        "edges": ("f1",),
        "depth": ("overlap", "ssim"),
        "deblurring": ("ssim", "psnr"),
        "inpainting": ("psnr_hole", "ssim_hole", "f1_hole"),
    }[task]


def pruning() -> Experiment:
    """Tokens kept against what is lost. Canny's edges are black or white, so at full size every
    threshold below 1 keeps the same; made smaller by area they are grey."""
    rows, pairs = [], []
    for name, lora in (("full size", EDGES), ("pruned", PRUNED)):
        full = edges(lora)
        rows.append(Row((name, "1", "off", "-"), full, group=f"{name}, 1", x=256))
        for grow in (0, 1):
            cell = edges(lora, threshold=0.1, grow=grow)
            rows.append(Row((name, "1", "0 to 0.9", str(grow)), cell, group=f"{name}, 1"))
            what = f"{name}, compression 1, grow {grow}: pruned less whole"
            pairs.append(Pair(what, cell, full, ("f1", "recall_thin")))
    whole = edges(COMPACT, compression=0.5)
    rows.append(Row(("mixed sizes", "0.5", "off", "-"), whole, group="mixed sizes, 0.5"))
    for threshold in THRESHOLDS:
        cell = edges(COMPACT, compression=0.5, threshold=threshold)
        labels = "mixed sizes", "0.5", f"{threshold:g}", "0"
        rows.append(Row(labels, cell, group="mixed sizes, 0.5, pruned"))
        what = f"mixed sizes, compression 0.5, threshold {threshold:g}: pruned less whole"
        pairs.append(Pair(what, cell, whole, ("f1", "recall_thin")))
    return Experiment(
        "pruning",
        ("LoRA trained at", "compression", "threshold", "grow"),
        ("tokens", "f1", "recall_kept", "recall_dropped", "recall_thin", "fid"),
        tuple(rows),
        tuple(pairs),
        ("f1", "recall_thin"),
        "tokens kept",
    )


def several() -> Experiment:
    """Conditions alone and together, with a prompt that doesn't say what the first thing is."""
    one = {
        "edges": Use("edges", EDGES),
        "depth": Use("depth", DEPTH),
        "colouring": Use("colouring", COLOURING),
        "subject": Use("subject", SUBJECT),
    }
    sets: list[tuple[str, ...]] = [(), *((name,) for name in one)]
    sets += [("edges", "depth"), ("edges", "subject"), tuple(one)]
    cells = {s: Cell(tuple(one[name] for name in s), subject_prompt=True) for s in sets}
    rows = [Row((" + ".join(s) or "none", str(len(s))), cell) for s, cell in cells.items()]
    pairs = [
        Pair(
            f"{' + '.join(s)} less {name} alone",
            cells[s],
            cells[(name,)],
            ("f1", "overlap", "right", "ssim"),
        )
        for s in sets
        if len(s) > 1
        for name in s
    ]
    return Experiment(
        "several",
        ("conditions", "number"),
        ("f1", "overlap", "right", "ssim", "psnr", "fid"),
        tuple(rows),
        tuple(pairs),
    )


def floats(scenes: int) -> Experiment:
    """The study's own short cut: 16 bits instead of 32, on a part of the scenes."""
    sixteen = edges()
    wide = replace(sixteen, floats="float32")
    return Experiment(
        "floats",
        ("model computes in",),
        ("f1", "offset", "right", "psnr_against", "ssim_against"),
        (Row(("16 bits (bfloat16)",), sixteen), Row(("32 bits",), wide, sixteen)),
        (
            Pair(
                "32 bits less 16, same scenes", wide, sixteen, ("f1", "offset", "right", "overlap")
            ),
        ),
        limits={wide: max(scenes // FLOATS_SHARE, 2)},
    )


EDIT_JOINT, EDIT_ISOLATED = "omini2_demo_edit_joint", "omini2_demo_edit_isolated"
EVERY_STEP = EditCell(EDIT_JOINT)
WATCHED = replace(EVERY_STEP, reuse="every_n_steps", every=1)
ALONE = EditCell(EDIT_ISOLATED, "isolated", "once")
LATENT, COSINE = (0.02, 0.1, 0.5), (0.95, 0.9, 0.8)
OF_EDITS = ("edited", "asked", "kept", "moved")


def edit_reuse() -> Experiment:
    """Reference images computed every step, every few or once; and isolated ones."""
    rows = [
        Row(("joint", "every step"), EVERY_STEP, EVERY_STEP, "joint", 1),
        Row(("joint", "every step, kept"), WATCHED, EVERY_STEP),
    ]
    for every in (2, 5):
        cell = replace(EVERY_STEP, reuse="every_n_steps", every=every)
        rows.append(Row(("joint", f"every {every}"), cell, EVERY_STEP, "joint", every))
    rows.append(Row(("joint", "once"), replace(EVERY_STEP, reuse="once"), EVERY_STEP, "joint", 12))
    rows.append(Row(("isolated", "once"), ALONE, group="isolated", x=12))
    pairs = [Pair(f"{' '.join(r.labels)} less joint every step", r.cell, EVERY_STEP, OF_EDITS)
             for r in rows[2:]]  # fmt: skip
    return Experiment(
        "edit_reuse",
        ("references", "computed"),
        (*OF_EDITS, "psnr_against"),
        tuple(rows),
        tuple(pairs),
        ("edited", "kept"),
        "steps between two computations (12: once)",
    )


def edit_compact(scenes: int) -> Experiment:
    """References of fewer tokens, in their old place or where the model puts a small image."""
    rows, pairs = [], []
    for name, base in (("joint", EVERY_STEP), ("isolated", ALONE)):
        rows.append(Row((name, "1", "-"), base))
        for ratio in (0.5, 0.25):
            on, off = (replace(base, compression=ratio, correcting=c) for c in (True, False))
            rows += [Row((name, f"{ratio:g}", "on"), on), Row((name, f"{ratio:g}", "off"), off)]
            pairs.append(Pair(f"{name}, {ratio:g}: on less off", on, off, OF_EDITS))
    return Experiment(
        "edit_compact",
        ("references", "compression", "position correcting"),
        ("tokens", *OF_EDITS),
        tuple(rows),
        tuple(pairs),
        limits=_half(rows, scenes),
    )


def edit_spot(scenes: int) -> Experiment:
    """Spot Edit: how tokens are chosen, and what becomes of the K/V of those left out.

    Not perceptually: the demo model's VAE has no decoder of FLUX.1's kind.
    """
    settings = [
        *(Spot("latent", threshold) for threshold in LATENT),
        *(Spot("cosine", threshold) for threshold in COSINE),
        *(Spot(fusion=fusion) for fusion in ("once", "recursive")),
        Spot(reset="none"),
        Spot(forced=True),
    ]
    rows = [Row(("off", "-", "-", "-"), EVERY_STEP, EVERY_STEP)]
    for spot in settings:
        labels = (
            ("the true change", "-", "-", "-")
            if spot.forced
            else (spot.select, f"{spot.threshold:g}", spot.fusion, spot.reset)
        )
        rows.append(Row(labels, replace(EVERY_STEP, spot=spot), EVERY_STEP))
    pairs = [Pair(f"{', '.join(r.labels)} less off", r.cell, EVERY_STEP, OF_EDITS)
             for r in rows[1:]]  # fmt: skip
    return Experiment(
        "edit_spot",
        ("select", "threshold", "fusion", "reset_steps"),
        ("share", *OF_EDITS, "psnr_against"),
        tuple(rows),
        tuple(pairs),
        limits=_half(rows, scenes),
    )


def _half(rows: list[Row], scenes: int) -> dict[Cell | EditCell, int]:
    """Cells that have fewer scenes, for time: those of no other experiment."""
    shared = (EVERY_STEP, ALONE)
    return {row.cell: max(scenes // 2, 2) for row in rows if row.cell not in shared}
