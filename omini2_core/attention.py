"""Who sees whom: joining the branches' K/V to the main branch's, and ``condition_scale``.

Text and picture attend to everything. A condition attends to itself; if joint, to text and
picture as well; never to another condition (paper section 3.3).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# (q, k, v, mask) -> attended; q, k, v are (batch, heads, tokens, head_dim), attended is
# (batch, tokens, heads * head_dim).
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass
class KeysValues:
    """One condition's keys (after RoPE) and values, (batch, heads, tokens, head_dim) each.

    ``bias`` = log(condition_scale) is added to the logits between this condition and the main
    branch, in both directions.
    """

    k: Tensor
    v: Tensor
    bias: float = 0.0


def main_attention(
    attend: Attention,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    conditions: Sequence[KeysValues],
) -> Tensor:
    """Attention of text and picture over themselves and all conditions.

    Args:
        mask: the host's mask over the main branch's own keys, boolean or additive, if any.
    """
    joined = [c.k for c in conditions], [c.v for c in conditions]
    lengths = [c.k.shape[2] for c in conditions]
    mask = _extend_mask(mask, q, lengths, [c.bias for c in conditions])
    return attend(q, torch.cat((k, *joined[0]), 2), torch.cat((v, *joined[1]), 2), mask)


def joint_attention(attend: Attention, q: Tensor, own: KeysValues, k: Tensor, v: Tensor) -> Tensor:
    """Attention of a joint condition over text, picture (k, v) and itself."""
    mask = None
    if own.bias:
        row = q.new_zeros(k.shape[2] + own.k.shape[2])
        row[: k.shape[2]] = own.bias
        mask = _per_key(row, q)
    return attend(q, torch.cat((k, own.k), 2), torch.cat((v, own.v), 2), mask)


def log_scale(condition_scale: float) -> float:
    """The logit bias of a condition_scale above 0; at 0 the condition is left out instead."""
    return math.log(condition_scale)


def _extend_mask(
    mask: Tensor | None, q: Tensor, lengths: Sequence[int], biases: Sequence[float]
) -> Tensor | None:
    if mask is None and not any(biases):
        return None
    row = torch.cat([q.new_full((n,), b) for n, b in zip(lengths, biases, strict=True)])
    if mask is None:
        main = q.new_zeros(q.shape[2])
        return _per_key(torch.cat((main, row)), q)
    if mask.dtype == torch.bool:
        # A boolean mask can't carry a bias; an additive one says the same.
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))
    columns = row.to(mask.dtype).expand(*mask.shape[:-1], -1)
    return torch.cat((mask, columns), dim=-1)


def _per_key(row: Tensor, q: Tensor) -> Tensor:
    """(keys,) -> (1, 1, queries, keys) without a copy: every attention backend takes that."""
    return row.expand(1, 1, q.shape[2], -1)
