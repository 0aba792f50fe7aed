"""EasyControl's own scheme against ours, `python -m benchmarks.easycontrol`.

Both compute a condition's K/V once. Their pipeline then still carries the condition's tokens
through every linear layer at every step (original `layers_cache.py`, `transformer_flux.py`); ours
leaves nothing of a condition in a step but the attention to its K/V. Theirs is run here on the
host's blocks, so that both sides have the same kernels: what differs is the work alone.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks import costs, host
from benchmarks.costs import Shape, attention_flops, linear_flops, lora_flops, vector_flops
from benchmarks.side_by_side import (
    QUICK,
    SHAPE,
    SIDE,
    TEXT,
    Measured,
    Timing,
    alternate,
    closing,
    parser,
    spread,
)
from dev.markdown import table as markdown_table

RANK = 128  # of the published files
WARM_UP_TOKENS = 32  # of the picture, in the pass in which their pipeline fills its cache
FLUX1_PICTURE, FLUX1_STEPS = 64 * 64, 25  # 1024x1024 pixels; steps as in their examples
LINEARS = {"transformer_blocks": ("q", "k", "v", "proj"), "single_transformer_blocks": "qkv"}


# --- FLOPs ---------------------------------------------------------------------------------------


def ours(
    shape: Shape, text: int, picture: int, tokens: Sequence[int], steps: int, rank: int = RANK
) -> int:
    """FLOPs of a run with EasyControl's LoRAs on our engine, each condition computed once."""
    conditions = [costs.ConditionCost(c, joint=False, every=None, rank=0) for c in tokens]
    loras = sum(lora(shape, c, rank) for c in tokens)
    return costs.run(shape, text, picture, conditions, steps) + loras


def lora(shape: Shape, tokens: int, rank: int) -> int:
    """The LoRA's products: q, k, v and output of double blocks, q, k, v of single ones.

    In the last block nobody needs q.
    """
    h = shape.hidden
    return (4 * shape.depth + 3 * shape.depth_single - 1) * lora_flops(tokens, h, h, rank)


def theirs(
    shape: Shape,
    text: int,
    picture: int,
    tokens: Sequence[int],
    steps: int,
    rank: int = RANK,
    warm_up: bool = True,
) -> int:
    """FLOPs of a run of their pipeline: a pass that fills the cache, then the steps."""
    step = their_step(shape, text, picture, tokens, rank)
    return steps * step + (their_warm_up(shape, text, tokens, rank) if warm_up else 0)


def their_step(shape: Shape, text: int, picture: int, tokens: Sequence[int], rank: int) -> int:
    """One step with K/V cached.

    Saved is the conditions' own attention and the LoRA on q, k, v. Their tokens stay in every
    linear layer, q, k and v included, whose results are dropped, and each condition's projection
    LoRA runs over picture and conditions, with zeros outside of its own tokens.
    """
    h, c = shape.hidden, sum(tokens)
    step = costs.plain_step(shape, text, picture) + costs.extra_attention(shape, text + picture, c)
    projections = shape.depth * len(tokens) * lora_flops(picture + c, h, h, rank)
    return step + carried(shape, c) + projections


def carried(shape: Shape, tokens: int) -> int:
    """Condition tokens through all linears, with one modulation for all conditions."""
    h, m = shape.hidden, shape.mlp
    modulation = shape.depth * linear_flops(1, h, 6 * h)
    modulation += shape.depth_single * linear_flops(1, h, 3 * h)
    blocks = shape.blocks * linear_flops(tokens, h, 4 * h + 2 * m)
    return vector_flops(shape) + linear_flops(tokens, costs.PATCH, h) + modulation + blocks


def their_warm_up(shape: Shape, text: int, tokens: Sequence[int], rank: int) -> int:
    """The pass that fills the cache: attention of everything to everything under a mask."""
    h, c, p = shape.hidden, sum(tokens), WARM_UP_TOKENS
    masked = attention_flops(shape, text + p + c, text + p + c) - attention_flops(
        shape, text + p, text + p
    )
    loras = (4 * shape.depth + 3 * shape.depth_single) * len(tokens)
    loras *= lora_flops(p + c, h, h, rank)
    return costs.plain_step(shape, text, p) + carried(shape, c) + shape.blocks * masked + loras


def their_kv_bytes(shape: Shape, tokens: int, bytes_per_number: int) -> int:
    """K, V and the attention's result, which their processors keep too."""
    return costs.kv_bytes(shape, tokens, bytes_per_number) * 3 // 2


# --- their scheme on the host's blocks -----------------------------------------------------------


@contextmanager
def their_scheme(conditioned: Any, conditions: int, rank: int) -> Iterator[None]:
    """Runs a model with independent conditions as their pipeline does after its warm-up.

    The conditions go through the blocks at every step, the last one's second half included; what
    they attend to comes from the first step; a LoRA of theirs follows every output projection of
    the double blocks. The caller applies the conditions with strength 0 and without a cache.
    Numbers differ from theirs (random weights, one modulation a condition), work doesn't.
    """
    from omini2_extension.omini2_core.engine import run as engine_run
    from omini2_extension.omini2_core.engine.branch import BranchWalk
    from omini2_extension.omini2_core.host import kernels

    bank: list[Tensor] = []
    calls = iter(())
    attend, evaluation = kernels.attend, engine_run.Run.evaluation

    def from_bank(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        known = next(calls, None)
        if known is None:
            known = attend(q, k, v, mask)
            bank.append(known)
        return known

    def new_step(self: Any, call: Any) -> Any:
        nonlocal calls
        calls = iter(bank[:])
        return evaluation(self, call)

    def whole(self: Any, number: int) -> Any:
        """No block is the last one, which conditions leave half-way."""
        self._half = self.model.blocks[number].halves(self.linear, self.x, self.vec, self.rotate)
        self.q, *own = next(self._half)
        self._own = tuple(own)
        return self._own

    hooks = _projection_loras(conditioned, conditions, rank)
    try:
        with ExitStack() as patches:
            for owner, name, new in (
                (kernels, "attend", from_bank),
                (engine_run.Run, "evaluation", new_step),
                (BranchWalk, "keys_values", whole),
            ):
                patches.enter_context(mock.patch.object(owner, name, new))
            yield
    finally:
        for hook in hooks:
            hook.remove()


def _projection_loras(conditioned: Any, conditions: int, rank: int) -> list[Any]:
    flux = conditioned.model.diffusion_model
    down = torch.randn(rank, flux.hidden_size) * flux.hidden_size**-0.5
    up = torch.zeros(flux.hidden_size, rank)

    def projection_lora(_: nn.Module, __: Any, y: Tensor) -> Tensor:
        nonlocal down, up
        down, up = down.to(y), up.to(y)
        for _i in range(conditions):
            y = y + (y @ down.t()) @ up.t()
        return y

    return [b.img_attn.proj.register_forward_hook(projection_lora) for b in flux.double_blocks]


def easycontrol_lora(shape: Shape, rank: int) -> dict[str, Tensor]:
    """Random tensors under the key names of their files."""
    h, tensors = shape.hidden, {}
    for blocks, count in (
        ("transformer_blocks", shape.depth),
        ("single_transformer_blocks", shape.depth_single),
    ):
        for i in range(count):
            for linear in LINEARS[blocks]:
                key = f"{blocks}.{i}.attn.processor.{linear}_loras.0"
                tensors[f"{key}.down.weight"] = torch.randn(rank, h) * h**-0.5
                tensors[f"{key}.up.weight"] = torch.randn(h, rank) * 0.1
    return tensors


# --- the table -----------------------------------------------------------------------------------


def measure(
    table: Sequence[tuple[int, int]], shape: Shape, side: int, options: Any
) -> tuple[list[Timing], list[Measured]]:
    """Times of plain FLUX, and per row, (conditions, tokens along a side), of ours and theirs."""
    from benchmarks import flux

    task, warm_up = (flux.Task(shape, TEXT, side, steps) for steps in (options.steps, 1))
    with flux.lora_folder(shape, options.rank, easycontrol_lora(shape, options.rank)):
        plain = flux.model(shape)

        def conditioned(row: tuple[int, int], strength: float, reuse: str) -> Any:
            model, (count, size) = plain, row
            for _ in range(count):
                model = flux.with_condition(model, size, "auto", 1.0, flux.LORA, strength)
            return flux.with_cache(model, reuse, 1)

        def mine(of: Any, row: tuple[int, int]) -> Timing:
            return of.timed(conditioned(row, 1.0, "once"))

        def other(of: Any, row: tuple[int, int]) -> Timing:
            carrying = conditioned(row, 0.0, "off")
            with their_scheme(carrying, row[0], options.rank):
                return of.timed(carrying)

        runs = [(kind, row) for row in table for kind in (mine, other)]
        for kind, row in runs:
            kind(warm_up, row)
        timed = [lambda kind=kind, row=row: kind(task, row) for kind, row in runs]
        return alternate(lambda: task.timed(plain), timed, options.repeats)


def markdown(
    table: Sequence[tuple[int, int]], measured: Sequence[Measured], shape: Shape, picture: int,
    options: Any,
) -> str:  # fmt: skip
    """The table for the documentation; ratios to plain FLUX throughout."""
    from benchmarks import flux

    on_gpu = flux.device().type == "cuda"
    head = (
        "conditions", f"{'time by the clock' if on_gpu else 'processor time'}: theirs", "ours",
        "FLOPs: theirs", "ours", f"FLUX.1-dev, 1024x1024, {FLUX1_STEPS} steps, FLOPs: theirs",
        "ours", "kept: theirs", "ours",
    )  # fmt: skip
    rows = []
    for (count, side), mine, other in zip(table, measured[::2], measured[1::2], strict=True):
        tokens = [side**2] * count
        cells = [f"{count} x {side**2} tokens", *(spread(m.values(on_gpu)) for m in (other, mine))]
        for model, size, steps, rank, warm_up in (
            (shape, picture, options.steps, options.rank, False),  # what was measured
            (costs.FLUX1_DEV, FLUX1_PICTURE, FLUX1_STEPS, RANK, True),
        ):
            plain = costs.run(model, TEXT, size, (), steps)
            sizes = model, TEXT, size, tokens, steps, rank
            cells.append(f"{theirs(*sizes, warm_up=warm_up) / plain:.2f}")
            cells.append(f"{ours(*sizes) / plain:.2f}")
        for kept in (their_kv_bytes, costs.kv_bytes):
            cells.append(f"{kept(costs.FLUX1_DEV, sum(tokens), 2) / 1e6:.0f} MB")
        rows.append(cells)
    return markdown_table(head, rows)


def main() -> None:
    """Command line."""
    options = parser(__doc__, steps=8).parse_args()
    load = os.getloadavg()[0]
    host.start(options.device)
    shape, side = (QUICK, 16) if options.quick else (SHAPE, SIDE)
    options.rank = RANK * shape.hidden // costs.FLUX1_DEV.hidden
    table = [(count, s) for s in (side, side // 2) for count in (1, 2)]
    with torch.inference_mode():  # as the host executes nodes
        plain, measured = measure(table, shape, side, options)
    print(markdown(table, measured, shape, side**2, options))
    print(closing(options, load, plain))


if __name__ == "__main__":
    main()
