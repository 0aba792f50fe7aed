"""What Spot Edit saves: `python -m benchmarks.spot_edit`.

Whole runs of 28 steps on a FLUX-shaped model with one reference of the picture's size, and so many
tokens forced to be edited: against plain, and against reuse of the reference alone. Runs alternate;
FLOPs are from `benchmarks/costs.py`, times are the processor's.
"""

import os

import torch

from benchmarks import host
from benchmarks.costs import EditCost
from benchmarks.side_by_side import (
    QUICK,
    SHAPE,
    SIDE,
    alternate,
    closing,
    keep,
    parser,
    spread,
)

SHARES = 10, 25, 50, 75  # per cent of the picture's tokens
FULL = 6  # of 28 steps: 4, and those after 13 and 22 steps, as SpotEdit has it
EVERY = 5  # steps between two computations of the reference alone: as many full ones
TO_TEXT = 8  # tokens of the picture to one of text, as FLUX.1 has at 1024x1024
LEAST = 0.95  # of what the FLOPs promise


def main() -> None:
    """Command line."""
    of = parser(__doc__, steps=28, repeats=3)
    of.add_argument("--side", type=int, default=SIDE, help="tokens along the picture's side")
    of.add_argument("--share", type=int, action="append", help="per cent edited; only these")
    options, load = of.parse_args(), os.getloadavg()[0]
    host.start(options.device)
    from benchmarks import flux

    shape, side = (QUICK, SIDE // 4) if options.quick else (SHAPE, options.side)
    n, rows = side**2, []
    text = n // TO_TEXT
    with torch.inference_mode():
        plain = flux.model(shape)
        task = flux.Task(shape, text, side, options.steps, edits=True)
        reused = flux.with_cache(plain, "every_n_steps", EVERY)
        cost = EditCost(text, n, options.steps).flops(shape)
        kept = EditCost(text, n, options.steps, FULL).flops(shape)
        shares = options.share or SHARES
        models = {s: flux.spot_edited(plain, round(n * s / 100), side) for s in shares}
        runs = [lambda m=m: task.timed(m) for m in (reused, *models.values())]
        for run in runs:
            run()  # warm-up
        base, found = alternate(lambda: task.timed(plain), runs, options.repeats)
        reuse = found[0].values(False)
        rows.append(("reference reused", kept, cost / kept, [1 / each for each in reuse], []))
        for share, each in zip(shares, found[1:], strict=True):
            flops = EditCost(text, n, options.steps, FULL, round(n * share / 100)).flops(shape)
            over = each.values(False)
            beside = [r / s for r, s in zip(reuse, over, strict=True)]
            rows.append((f"{share} % edited", flops, cost / flops, [1 / s for s in over], beside))
    print("| | faster than plain | FLOPs | of that | faster than reuse alone | FLOPs | of that |")
    print("|---|---|---|---|---|---|---|")
    for name, flops, predicted, measured, beside in rows:
        line = (
            f"| {name} | {spread(measured)} | {predicted:.2f} | {_reached(measured, predicted)} |"
        )
        if beside:
            line += f" {spread(beside)} | {kept / flops:.2f} | {_reached(beside, kept / flops)} |"
        print(line if beside else f"{line} - | - | - |")
    print(closing(options, load, base))
    keep(
        options.json,
        {"machine": host.machine(), "least": LEAST, "rows": [list(row) for row in rows]},
    )


def _reached(measured: list[float], predicted: float) -> str:
    middle = sorted(measured)[len(measured) // 2]
    return f"{middle / predicted:.2f}"


if __name__ == "__main__":
    main()
