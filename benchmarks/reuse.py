"""What reuse saves: sampling with conditions over plain FLUX, `python -m benchmarks.reuse`.

Plain runs lie between those with conditions, and each of these is compared to the plain ones before
and after it, so that a machine that speeds up or slows down on the way doesn't matter.
"""

import argparse
import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import costs, host

SHAPE = costs.Shape(768, 2, 4, text_width=1024, pooled_width=192)  # a quarter of FLUX.1's widths
QUICK = costs.Shape(256, 1, 2, text_width=64, pooled_width=32)
TEXT, SIDE, STEPS, RANK, REFRESH = 512, 32, 28, 4, 5
REUSE = {"every step": ("off", 1), "every 5": ("every_n_steps", REFRESH), "once": ("once", None)}


@dataclass
class Row:
    """One configuration and its measured times.

    Attributes:
        seconds: clock and processor seconds of each run.
        ratios: the same over plain FLUX.
    """

    conditions: int
    side: int
    computed: str
    attention: str
    seconds: list[Any] = field(default_factory=list)
    ratios: list[Any] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Tokens of one condition."""
        return self.side**2

    @property
    def counted(self) -> list[costs.ConditionCost]:
        """The conditions for the cost model."""
        joint, every = self.attention == "joint", REUSE[self.computed][1]
        return [costs.ConditionCost(self.tokens, joint, every, RANK)] * self.conditions

    def kv_megabytes(self, shape: costs.Shape, bytes_per_number: int) -> float:
        """What is kept between steps; nothing if every step computes it anew."""
        if self.computed == "every step":
            return 0.0
        return costs.kv_bytes(shape, self.conditions * self.tokens, bytes_per_number) / 1e6


def rows(side: int, compact: int) -> list[Row]:
    """Published LoRAs are joint, which every step and every 5 steps are meant for; once is meant
    for independent ones, for which it is exact."""
    kinds = [
        (side, "every step", "joint"),
        (side, "every 5", "joint"),
        (side, "once", "independent"),
        (compact, "once", "independent"),
    ]
    return [Row(count, *kind) for kind in kinds for count in (1, 2, 4)]


def measure(table: Sequence[Row], shape: costs.Shape, side: int, options: Any) -> list[Any]:
    """Fills the rows' times; returns the plain runs' times at the full number of steps.

    With "every step" all steps cost the same, so a quarter of them gives the same ratio.
    """
    from benchmarks import flux  # needs the host, which main() has started

    full = flux.Task(shape, TEXT, side, options.steps)
    quarter = flux.Task(shape, TEXT, side, max(1, options.steps // 4))
    with flux.lora_folder(shape, RANK):
        plain = flux.model(shape)
        models = {id(row): _conditioned(flux, plain, row) for row in table}
        for model in (plain, *models.values()):
            flux.Task(shape, TEXT, side, 1).timed(model)  # warm-up
        done = tqdm(total=options.repeats * len(table), desc="reuse")
        seconds = []
        for _ in range(options.repeats):
            for task, steady in ((quarter, True), (full, False)):
                some = [row for row in table if (row.computed == "every step") == steady]
                times = _interleave(task, plain, [(row, models[id(row)]) for row in some], done)
                seconds += [] if steady else times
    return seconds


def _interleave(task: Any, plain: Any, rows_and_models: Sequence[Any], done: Any) -> list[Any]:
    """plain, row, row, plain, row, row, plain ...; returns the plain runs' times."""
    plains = [task.timed(plain)]
    for first in range(0, len(rows_and_models), 2):
        pair = rows_and_models[first : first + 2]
        for row, model in pair:
            row.seconds.append(task.timed(model))
            done.update()
        plains.append(task.timed(plain))
        for row, _ in pair:
            row.ratios.append(row.seconds[-1].over((plains[-2], plains[-1])))
    return plains


def _conditioned(flux: Any, model: Any, row: Row) -> Any:
    for _ in range(row.conditions):
        model = flux.with_condition(model, row.side, row.attention)
    reuse, every = REUSE[row.computed]
    return flux.with_cache(model, reuse, every or REFRESH)


def markdown(table: Sequence[Row], shape: costs.Shape, picture: int, steps: int) -> str:
    """The table for README."""
    from benchmarks import flux

    width = flux.dtype().itemsize
    on_gpu = flux.device().type == "cuda"
    lines = [
        "| conditions | computed | attention | processor time, plain = 1 | time by the clock "
        "| FLOPs | K/V | FLUX.1-dev: FLOPs | K/V |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in table:
        processor = "-" if on_gpu else _median([each.processor for each in row.ratios])
        clock = _median([each.clock for each in row.ratios])
        flops = costs.ratio(shape, TEXT, picture, row.counted, steps)
        flux1 = costs.ratio(costs.FLUX1_DEV, TEXT, picture, row.counted, steps)
        lines.append(
            f"| {row.conditions} x {row.tokens} tokens | {row.computed} | {row.attention} "
            f"| {processor} | {clock} | {flops:.2f} | {row.kv_megabytes(shape, width):.0f} MB "
            f"| {flux1:.2f} | {row.kv_megabytes(costs.FLUX1_DEV, 2):.0f} MB |"
        )
    return "\n".join(lines)


def _median(ratios: Sequence[float]) -> str:
    """The median, and from where to where they lie."""
    return f"**{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=3, help="runs of each configuration")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--quick", action="store_true", help="a tiny model: does it work at all?")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every figure here")
    options = parser.parse_args()

    load = os.getloadavg()[0]
    host.start(options.device)
    shape, side = (QUICK, SIDE // 2) if options.quick else (SHAPE, SIDE)
    table = rows(side, side // 4)
    with torch.inference_mode():  # as the host executes nodes
        plain = measure(table, shape, side, options)

    print(markdown(table, shape, side**2, options.steps))
    print(
        f"\n{host.machine()}; load average {load:.1f} at the start, "
        f"{os.getloadavg()[0]:.1f} at the end. {options.steps} steps, medians (least to most) of "
        f"{options.repeats} interleaved runs; plain FLUX "
        f"{statistics.median(each.clock for each in plain):.1f} s by the clock, "
        f"{statistics.median(each.processor for each in plain):.1f} s of processor time."
    )
    if options.json:
        figures = {
            "machine": host.machine(),
            "plain": [asdict(each) for each in plain],
            "rows": [asdict(row) for row in table],
        }
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
