"""K/V that depend on nothing else: computed before the model's first block, in one pass for all.

All walks go through a block before any goes through the next, so that weights that have to be
fetched are fetched once; what can go together is one batch.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

from torch import Tensor

from .source import Job


def prefill(
    jobs: Sequence[Job], blocks: int, after_block: Callable[[int], None] = lambda done: None
) -> None:
    """Takes jobs through all blocks and hands over each block's K/V.

    Args:
        blocks: how many the model has.
        after_block: is told how many are done.
    """
    batches: dict[object, list[Job]] = defaultdict(list)
    for job in jobs:
        batches[job.together].append(job)
    walks = [(batch[0].start(batch), batch) for batch in batches.values()]
    for number in range(blocks):
        for walk, batch in walks:
            _hand_over(number, batch, *walk.keys_values(number))
            walk.finish_alone()
        after_block(number + 1)


def _hand_over(number: int, batch: Sequence[Job], k: Tensor, v: Tensor) -> None:
    start = 0
    for job in batch:
        rows = slice(start, start + job.rows)
        job.store(number, k[rows], v[rows])
        start = rows.stop
