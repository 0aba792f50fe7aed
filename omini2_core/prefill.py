"""Independent conditions on their own: no text, no picture, one pass through the model for all.

An independent condition sees only itself, so its K/V can be computed before anything else. All
conditions go through a block before any goes through the next, so that weights that have to be
fetched are fetched once; those with the same LoRA and length are one batch.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import Tensor

from .backbone import Backbone
from .branch import double_block, last_keys_values, single_block
from .run_branch import Chunk, Evaluation, RunBranch, Stream


@dataclass(frozen=True, eq=False)
class Job:
    """One independent branch and chunk whose K/V are wanted.

    Attributes:
        rows: the rows of the chunk that are computed.
        keep: takes the number of a block and its K/V, (len(rows), heads, tokens, head_dim) each.
    """

    branch: RunBranch
    chunk: Chunk
    rows: range
    keep: Callable[[int, Tensor, Tensor], None]


def prefill(
    backbone: Backbone,
    call: Evaluation,
    jobs: Sequence[Job],
    after_block: Callable[[int], None] = lambda done: None,
) -> None:
    """Runs independent conditions through all blocks and hands over each block's K/V.

    Args:
        after_block: is told how many blocks are done.
    """
    batches: dict[Hashable, list[Job]] = defaultdict(list)
    for job in jobs:
        key = id(job.branch.linears), job.branch.condition.token_count
        batches[key].append(job)
    streams = [
        (Stream.start(backbone, call, [(j.branch, j.chunk, j.rows) for j in batch]), batch)
        for batch in batches.values()
    ]
    blocks = [("double", i, b, double_block) for i, b in enumerate(backbone.double_blocks)]
    blocks += [("single", i, b, single_block) for i, b in enumerate(backbone.single_blocks)]
    for number, (kind, index, block, half) in enumerate(blocks):
        path = f"{kind}_blocks.{index}"
        for stream, batch in streams:
            arguments = block, path, stream.linear, stream.x, stream.vec, stream.rotate
            if number == len(blocks) - 1:
                _hand_over(number, batch, *last_keys_values(*arguments, backbone.outputs))
                continue
            stream.half = half(*arguments)
            q, k, v = next(stream.half)
            _hand_over(number, batch, k, v)
            stream.finish(backbone.attend(q, k, v, None))
        after_block(number + 1)


def _hand_over(number: int, batch: Sequence[Job], k: Tensor, v: Tensor) -> None:
    start = 0
    for job in batch:
        rows = slice(start, start + len(job.rows))
        job.keep(number, k[rows], v[rows])
        start = rows.stop
