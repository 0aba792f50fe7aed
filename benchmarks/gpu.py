"""FLUX.1 at its true size on a GPU: `python -m benchmarks.gpu --json gpu.json`.

Random weights in 16 bits and fp8 inside the real host, so nothing has to be downloaded: speed and
memory depend on shapes alone. `--quick` runs the same on a tiny model, on any machine.
"""

import gc
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks import costs, host
from benchmarks.side_by_side import QUICK, RANK, TEXT, alternate, keep, parser

COUNTS = 1, 2, 4, 8
COMPRESSIONS = 1.0, 0.5, 0.25
PIXELS = 512, 1024
CONDITION = 32  # tokens along a condition's side at compression 1: 512 pixels


@dataclass
class Row:
    """One configuration.

    Attributes:
        seconds: per step, of each run.
        over_plain: each run over the plain ones before and after it.
        every_step_over: the original's way, every step at full size, over this row.
        predicted: FLOPs over plain's.
        peak: bytes of GPU memory.
        flop_share: FLOPs a second over what a large matrix product reaches.
    """

    weights: str
    picture: str
    conditions: int
    compression: float
    seconds: list[float] = field(default_factory=list)
    over_plain: list[float] = field(default_factory=list)
    every_step_over: list[float] = field(default_factory=list)
    predicted: float = 0.0
    peak: int = 0
    flop_share: float = 0.0


def flop_limit(dtype: torch.dtype, device: torch.device, n: int) -> float:
    """FLOPs a second of a product of two n x n matrices."""
    a = torch.randn(n, n, dtype=dtype, device=device)
    for _ in range(3):
        a @ a
    _finish(device)
    started = time.perf_counter()
    for _ in range(10):
        a @ a
    _finish(device)
    return 10 * 2 * n**3 / (time.perf_counter() - started)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure(flux: Any, shape: costs.Shape, options: Any) -> Iterator[Row]:
    """All rows; plain runs lie between those with cached conditions.

    Every step at full size is timed once for all compressions, since it takes so much longer.
    """
    device = flux.device()
    limit = flop_limit(flux.dtype(), device, 512 if options.quick else 8192)
    for name, dtype in (("16 bits", None), ("fp8", torch.float8_e4m3fn)):
        plain = every = None  # the last one's memory is needed for the next
        gc.collect()
        plain = flux.model(shape, dtype)
        for pixels in PIXELS[:1] if options.quick else PIXELS:
            side = pixels // 16 // (4 if options.quick else 1)
            task = flux.Task(shape, TEXT, side, options.steps)
            task.timed(plain)  # warm-up
            for count in COUNTS:
                unit = CONDITION // (4 if options.quick else 1)
                every = plain
                for _ in range(count):
                    every = flux.with_condition(every, unit, "joint")
                originals = [task.timed(every).clock for _ in range(options.repeats)]
                for compression in COMPRESSIONS:
                    row = Row(name, f"{pixels}x{pixels}", count, compression)
                    yield _fill(row, flux, shape, task, plain, unit, originals, limit, options)


def _fill(
    row: Row, flux: Any, shape: costs.Shape, task: Any, plain: Any, unit: int,
    originals: list[float], limit: float, options: Any,
) -> Row:  # fmt: skip
    side = round(unit * row.compression)
    model = plain
    for _ in range(row.conditions):
        model = flux.with_condition(model, side, "independent")
    model = flux.with_cache(model, "once", 1)
    on_gpu = flux.device().type == "cuda"
    task.timed(model)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    runs = [lambda: task.timed(model)]
    _, [found] = alternate(lambda: task.timed(plain), runs, len(originals))
    row.seconds = [time.clock / options.steps for time in found.times]
    row.over_plain = found.values(clock=True)
    pairs = zip(originals, found.times, strict=True)
    row.every_step_over = [original / time.clock for original, time in pairs]
    row.peak = torch.cuda.max_memory_allocated() if on_gpu else 0
    kinds = [costs.ConditionCost(side**2, False, None, RANK)] * row.conditions
    sizes = shape, TEXT, task.side**2
    row.predicted = costs.ratio(*sizes, kinds, options.steps)
    flops = costs.run(*sizes, kinds, options.steps)
    row.flop_share = flops / (min(row.seconds) * options.steps) / limit
    return row


def main() -> None:
    """Command line."""
    options = parser(__doc__, steps=28).parse_args()
    if not options.quick and not torch.cuda.is_available():
        raise SystemExit("benchmarks.gpu: PyTorch finds no CUDA device here; --quick tries it out.")
    host.start(options.device)
    from benchmarks import flux, report

    shape = QUICK if options.quick else costs.FLUX1_DEV
    with torch.inference_mode(), flux.lora_folder(shape, RANK):
        results: dict[str, Any] = {
            "machine": host.machine(), "steps": options.steps, "repeats": options.repeats,
            "rows": [],
        }  # fmt: skip
        for row in measure(flux, shape, options):
            results["rows"].append(asdict(row))
            keep(options.json, results)  # whatever stops the rest
    print(report.gpu_table(results))


if __name__ == "__main__":
    main()
