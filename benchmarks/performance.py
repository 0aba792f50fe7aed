"""What conditions cost beyond what they have to: `python -m benchmarks.performance`.

Each figure is a ratio of runs that alternate, A B A B ... A, each B over the mean of the A before
and after it. `--figure NAME` measures one of them. FLOPs and bytes beside the times are from
`benchmarks/costs.py`. `--json FILE` keeps everything for `python -m benchmarks.report FILE`.
"""

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks import costs, host
from benchmarks.costs import ConditionCost
from benchmarks.side_by_side import QUICK, RANK, SHAPE, SIDE, TEXT, Timing, alternate, keep, parser
from dev.paths import ROOT

GROWTH = 1, 2, 4, 8, 16


@dataclass
class Figure:
    """One measured ratio, or one count.

    Attributes:
        clock, processor: the ratio of each pair of runs, by the clock and by processor time.
        predicted: the same ratio of FLOPs, if the figure is held against it.
        flops: of the measured run; of the run that it is compared to.
        step_bytes: what a step has to read, with conditions and without.
        limit: what the ratio must not pass.
        met: whether it reaches what `note` says, where that isn't a matter of ratios.
    """

    name: str
    what: str
    clock: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    predicted: float | None = None
    flops: tuple[int, int] = (0, 0)
    step_bytes: tuple[int, int] = (0, 0)
    kv_bytes: int = 0
    limit: float | None = None
    met: bool | None = None
    note: str = ""


@dataclass(frozen=True)
class Bench:
    """The model and sizes that all figures share; side in tokens of the picture and a condition."""

    flux: Any
    shape: costs.Shape
    plain: Any
    side: int
    steps: int
    repeats: int

    def conditioned(
        self, count: int, side: int, attention: str = "independent", scale: float = 1.0
    ) -> Any:
        """The model with conditions, without a cache."""
        model = self.plain
        for _ in range(count):
            model = self.flux.with_condition(model, side, attention, scale)
        return model

    def once(self, count: int, side: int, scale: float = 1.0, storage: str = "model") -> Any:
        """The same with a cache that computes each condition once."""
        return self.flux.with_cache(
            self.conditioned(count, side, scale=scale), "once", 1, storage, "gpu"
        )

    def task(self, steps: int | None = None, side: int | None = None, text: int = TEXT) -> Any:
        """A run of the picture's size."""
        return self.flux.Task(self.shape, text, side or self.side, steps or self.steps)

    def flops(self, conditions: Sequence[ConditionCost], steps: int | None = None) -> int:
        """Of a run."""
        return costs.run(self.shape, TEXT, self.side**2, conditions, steps or self.steps)

    def sizes(self, tokens: int) -> dict[str, Any]:
        """Bytes for a figure."""
        width = self.flux.dtype().itemsize
        return {
            "step_bytes": (
                costs.step_bytes(self.shape, tokens, width, width),
                costs.step_bytes(self.shape, 0, width, width),
            ),
            "kv_bytes": costs.kv_bytes(self.shape, tokens, width),
        }

    def figure(
        self, name: str, what: str, base: Callable[[], Timing], measured: Callable[[], Timing],
        tokens: int, flops: tuple[int, int], **more: Any,
    ) -> Figure:  # fmt: skip
        """Measures one: each measured time over the mean of the base's before and after."""
        measured()  # warm-up
        base()
        _, [found] = alternate(base, [measured], self.repeats)
        return Figure(name, what, found.values(True), found.values(False), flops[0] / flops[1],
                      flops, **self.sizes(tokens), **more)  # fmt: skip


def once_costs(count: int, side: int) -> list[ConditionCost]:
    """Conditions computed once, for the cost model."""
    return [ConditionCost(side**2, False, None, RANK)] * count


# --- the figures ---------------------------------------------------------------------------------


def _over_plain(bench: Bench, name: str, what: str, count: int, side: int, **limits: Any) -> Figure:
    flops = bench.flops(once_costs(count, side)), bench.flops(())
    model, task = bench.once(count, side), bench.task()
    runs = lambda: task.timed(bench.plain), lambda: task.timed(model)
    return bench.figure(name, what, *runs, count * side**2, flops, **limits)


def one_token(bench: Bench) -> Figure:
    """The extension installed and one 1-token condition, cached, over plain FLUX."""
    return _over_plain(bench, "one token", "1 x 1 token, once, over plain", 1, 1, limit=1.02)


def compact(bench: Bench) -> Figure:
    """4 compact conditions over plain, prefill included."""
    side = bench.side // 4
    what = f"4 x {side**2} tokens, once, over plain, prefill included"
    return _over_plain(bench, "compact", what, 4, side, limit=1.04)


def full(bench: Bench) -> Figure:
    """4 full-size conditions: measured over what the FLOP count predicts."""
    what = f"4 x {bench.side**2} tokens, once, over plain"
    return _over_plain(bench, "full size", what, 4, bench.side, note="at most 1.10x of the FLOPs")


def every_step(bench: Bench) -> Figure:
    """What reuse gains over what the original does."""
    side, task, tokens = bench.side, bench.task(), bench.side**2
    flops = (
        bench.flops([ConditionCost(tokens, True, 1, RANK)] * 4),
        bench.flops(once_costs(4, side)),
    )
    original, ours = bench.conditioned(4, side, "joint"), bench.once(4, side)
    runs = lambda: task.timed(ours), lambda: task.timed(original)
    what, note = f"4 x {tokens} tokens: every step over once", "at least 95 % of the FLOP ratio"
    return bench.figure("every step", what, *runs, 4 * tokens, flops, note=note)


def _one_over_other(
    bench: Bench, name: str, what: str, models: Sequence[Any], **more: Any
) -> Figure:
    """Two ways to do the same work on 4 full-size conditions, the second over the first."""
    task, flops = bench.task(), bench.flops(once_costs(4, bench.side))
    runs = (lambda model=model: task.timed(model) for model in models)
    what = f"4 x {bench.side**2} tokens, once: {what}"
    return bench.figure(name, what, *runs, 4 * bench.side**2, (flops, flops), **more)


def condition_scale(bench: Bench) -> Figure:
    """condition_scale 1.5 over 1, both cached."""
    models = [bench.once(4, bench.side, scale) for scale in (1.0, 1.5)]
    return _one_over_other(bench, "condition_scale", "scale 1.5 over 1", models, limit=1.10)


def fp8(bench: Bench) -> Figure:
    """K/V in fp8: bytes, velocities on the reference cases, and time over the model's format."""
    models = [bench.once(4, bench.side, storage=storage) for storage in ("model", "fp8")]
    sys.path.append(str(ROOT / "tests"))
    from helpers.original import fp8_errors

    error, ratio = fp8_errors()
    note = (f"velocity within {error:.4f} of bf16 on the reference cases (limit 0.02), bytes "
            f"{ratio:g} of bf16 (must be 0.5)")  # fmt: skip
    good = {"note": note, "met": error <= 0.02 and ratio == 0.5}
    return _one_over_other(bench, "fp8", "storage fp8 over model", models, **good)


def second_seed(bench: Bench) -> Figure:
    """A second seed of 4 steps over 4 cached steps: what 8 steps take longer than 4."""
    side, model = bench.side, bench.once(4, bench.side)
    short, long = bench.task(4), bench.task(8)
    extra = costs.extra_attention(bench.shape, TEXT + side**2, 4 * side**2)
    steps = 4 * (bench.flops((), 1) + extra)
    figure = Figure(
        "second seed", f"4 x {side**2} tokens, 4 steps, over 4 cached steps alone",
        predicted=1.0, flops=(steps, steps), limit=1.02, **bench.sizes(4 * side**2),
    )  # fmt: skip
    short.timed(model)
    for _ in range(bench.repeats):
        four, eight, again = (task.timed(model, second_seed=True) for task in (short, long, short))
        for name in ("clock", "processor"):
            both = (getattr(four, name) + getattr(again, name)) / 2
            getattr(figure, name).append(both / (getattr(eight, name) - both))
    return figure


def prefill(bench: Bench) -> Figure:
    """Prefill of 4 conditions (a first seed's step less a second's) over plain FLUX on as many
    tokens."""
    side, model, tokens = bench.side, bench.once(4, bench.side), 4 * bench.side**2
    task, plain = bench.task(1), bench.task(1, 2 * side, text=1)
    alone = costs.prefill(bench.shape, once_costs(4, side))
    forward = costs.run(bench.shape, 1, tokens, (), 1)

    def alone_timed() -> Timing:
        first, second = task.timed(model), task.timed(model, second_seed=True)
        return Timing(first.clock - second.clock, first.processor - second.processor)

    what = f"4 x {side**2} tokens alone, over plain FLUX on {tokens} tokens"
    runs = lambda: plain.timed(bench.plain), alone_timed
    return bench.figure("prefill", what, *runs, tokens, (alone, forward))


def growth(bench: Bench) -> list[Figure]:
    """1 to 16 compact conditions over plain."""
    side = bench.side // 4
    return [
        _over_plain(bench, f"growth {n}", f"{n} x {side**2} tokens, once, over plain", n, side)
        for n in GROWTH
    ]


FIGURES: dict[str, Callable[[Bench], Figure | list[Figure]]] = {
    "one-token": one_token,
    "compact": compact,
    "full": full,
    "every-step": every_step,
    "condition-scale": condition_scale,
    "second-seed": second_seed,
    "fp8": fp8,
    "prefill": prefill,
    "growth": growth,
}


def main() -> None:
    """Command line."""
    of = parser(__doc__, steps=28, repeats=5)
    of.add_argument("--figure", choices=FIGURES, action="append", help="only these")
    options, load = of.parse_args(), os.getloadavg()[0]
    host.start(options.device)
    from benchmarks import flux, report

    shape, side = (QUICK, SIDE // 4) if options.quick else (SHAPE, SIDE)
    figures: list[Figure] = []
    with torch.inference_mode(), flux.lora_folder(shape, RANK):  # as the host executes nodes
        bench = Bench(flux, shape, flux.model(shape), side, options.steps, options.repeats)
        for name in options.figure or FIGURES:
            print(f"measuring {name}", file=sys.stderr, flush=True)
            measured = FIGURES[name](bench)
            figures += measured if isinstance(measured, list) else [measured]
    results = {
        "machine": host.machine(),
        "load": [load, os.getloadavg()[0]],
        "steps": options.steps,
        "repeats": options.repeats,
        "shape": asdict(shape),
        "figures": [asdict(figure) for figure in figures],
    }
    keep(options.json, results)
    print(report.table_of(results))


if __name__ == "__main__":
    main()
