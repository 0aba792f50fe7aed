"""Who sees whom: joining the conditions' K/V to the main branch's, and ``condition_scale``.

Text and picture attend to everything. A condition attends to itself; if joint, to text and
picture as well; never to another condition (paper section 3.3), unless they are one sequence.

``condition_scale`` adds log(scale) to the logits between a condition and the main branch. That is
constant over a group of keys, so it needs no mask: attention over each group alone, merged by what
the softmax would have weighed the groups with (log-sum-exp), gives the same. Kernels that don't
tell their log-sum-exp get a mask that is one row, broadcast over the queries.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..cache.entry import KeysValues
from .evaluation import rows_of

# (q, k, v, mask) -> attended; q, k, v are (batch, heads, tokens, head_dim), attended is
# (batch, tokens, heads * head_dim).
Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
# (q, k, v) -> attended (batch, heads, tokens, head_dim) and the natural logarithm of the softmax's
# denominator (batch, heads, tokens), in 32 bits.
Partial = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
# What a Partial gives.
Weighed = tuple[Tensor, Tensor]


@dataclass
class KeyGroup:
    """One condition's K/V in one block, for every row of an evaluation's batch.

    Attributes:
        spans: rows of the batch and the K/V that they have; K/V of one row serve them all.
        bias: log(condition_scale), added to the logits between this condition and the main
            branch, in both directions.
    """

    spans: Sequence[tuple[slice, KeysValues]]
    bias: float = 0.0

    @property
    def tokens(self) -> int:
        """How many keys."""
        return self.spans[0][1].tokens

    def write(self, k: Tensor, v: Tensor) -> None:
        """Fills (batch, heads, tokens, head_dim) each."""
        for rows, keys_values in self.spans:
            keys_values.write(k[rows], v[rows])


def main_attention(
    attend: Attention,
    partial: Partial | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    conditions: Sequence[KeyGroup],
    apart: bool = False,
) -> Tensor:
    """Attention of text and picture over themselves and all conditions.

    Args:
        partial: the same kernel as ``attend``, if it tells its log-sum-exp.
        mask: the model's mask over the main branch's own keys, boolean or additive, if any.
        apart: for few queries beside many of the conditions' keys: these are attended to by
            themselves, which copies none of them.
    """
    merging = apart or any(c.bias for c in conditions)
    if partial is None or mask is not None or not (conditions and merging):
        mask = _extend_mask(mask, q, k.shape[2], conditions)
        return attend(q, *join(k, v, conditions), mask)
    groups: dict[float, list[KeyGroup]] = defaultdict(list)
    for condition in conditions:
        groups[condition.bias].append(condition)
    merged = partial(q, *join(k, v, [] if apart else groups.pop(0.0, [])))
    for bias, group in groups.items():
        out, lse = partial(q, *_alone(k, v, group))
        merged = merge(merged, (out, lse + bias))
    return _flat(merged[0])


def strength_attention(
    attend: Attention,
    partial: Partial | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    groups: Sequence[tuple[slice, float]],
) -> Tensor:
    """Attention of a sequence over itself, whose last rows are looked at more or less.

    Args:
        mask: over the whole sequence, boolean or additive, if any.
        groups: rows behind one another up to the sequence's end, counted from the first of them,
            and what is added to the logits of all rows before them; their own are as they are.
    """
    first = k.shape[2] - groups[-1][0].stop
    before, last = q[:, :, :first], q[:, :, first:]
    if mask is None:
        behind = KeysValues(k[:, :, first:], v[:, :, first:])
        conditions = [KeyGroup([(slice(None), behind.keys(at))], bias) for at, bias in groups]
        own = k[:, :, :first], v[:, :, :first]
        looking = main_attention(attend, partial, before, *own, None, conditions)
        return torch.cat((looking, attend(last, k, v, None)), 1)
    row = q.new_zeros(k.shape[2])
    for at, bias in groups:
        row[first + at.start : first + at.stop] = bias
    by_query = mask.shape[-2] > 1
    weighed = _additive(mask[..., :first, :] if by_query else mask, q)
    weighed = weighed + row.to(weighed.dtype)
    plain = mask[..., first:, :] if by_query else mask
    return torch.cat((attend(before, k, v, weighed), attend(last, k, v, plain)), 1)


def joint_attention(
    attend: Attention,
    partial: Partial | None,
    queries: Sequence[Tensor],
    own: Sequence[KeyGroup],
    k: Tensor,
    v: Tensor,
) -> list[Tensor]:
    """Attention of joint conditions over text and picture (k, v), and each over itself.

    With ``partial`` all conditions look at the main branch in one call, and at themselves in one
    call per length; nothing of the main branch is copied. Without, its K/V are copied once.
    """
    if partial is not None and (len(queries) > 1 or own[0].bias):
        groups = _alike(queries, own)
        out, lse = partial(torch.cat([queries[i] for group in groups for i in group], 2), k, v)
        attended: dict[int, Tensor] = {}
        start = 0
        for group in groups:
            n, tokens = len(group), queries[group[0]].shape[2]
            place = slice(start, start + n * tokens)
            start = place.stop
            main, total = (
                t[:, :, place].unflatten(2, (n, tokens)).movedim(2, 0) for t in (out, lse)
            )
            itself = _alone_together(partial, [queries[i] for i in group], [own[i] for i in group])
            merged, _ = merge((main, _raised(total, [own[i].bias for i in group])), itself)
            attended |= zip(group, _flat(merged), strict=True)
        return [attended[i] for i in range(len(own))]
    n = k.shape[2]
    joined_k, joined_v = (_with_room(t, max(c.tokens for c in own)) for t in (k, v))
    results = []
    for q, condition in zip(queries, own, strict=True):
        keys, values = (t[:, :, : n + condition.tokens] for t in (joined_k, joined_v))
        condition.write(keys[:, :, n:], values[:, :, n:])
        mask = None
        if condition.bias:
            row = q.new_zeros(n + condition.tokens)
            row[:n] = condition.bias
            mask = _per_key(row, q)
        results.append(attend(q, keys, values, mask))
    return results


def join(k: Tensor, v: Tensor, conditions: Sequence[KeyGroup]) -> tuple[Tensor, Tensor]:
    """The main branch's K/V with the conditions' behind them; as they are if there are none."""
    if not conditions:
        return k, v
    joined_k, joined_v = (_with_room(t, sum(c.tokens for c in conditions)) for t in (k, v))
    start = k.shape[2]
    for condition in conditions:
        place = slice(start, start + condition.tokens)
        condition.write(joined_k[:, :, place], joined_v[:, :, place])
        start = place.stop
    return joined_k, joined_v


def beside(
    own: KeyGroup, others: Sequence[KeyGroup], k: Tensor, v: Tensor, rows: Sequence[int]
) -> KeyGroup:
    """A condition's own K/V with those of the others in its sequence, for rows of the batch.

    Args:
        k, v: the main branch's, which only say batch and format.
    """
    if not others:
        return own
    theirs = (rows_of(t, rows) for t in join(k[:, :, :0], v[:, :, :0], others))
    all_k, all_v = (_with_room(t, own.tokens) for t in theirs)
    start = all_k.shape[2] - own.tokens
    own.write(all_k[:, :, start:], all_v[:, :, start:])
    return KeyGroup([(slice(None), KeysValues(all_k, all_v))], own.bias)


def merge(one: Weighed, other: Weighed) -> Weighed:
    """Attention over two groups of keys as one attention over both (online softmax).

    The second group's share is exp(lse2) / (exp(lse1) + exp(lse2)).
    """
    (a, lse_a), (b, lse_b) = one, other
    share = torch.sigmoid(lse_b - lse_a)[..., None].to(a.dtype)
    return torch.lerp(a, b, share), torch.logaddexp(lse_a, lse_b)


def honours_masks(attend: Attention, q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether an attention kernel looks at its mask: sage attention may not, and flash attention
    as others patch it in raises an error of its own.

    Tried on a few tokens of the first row, where a mask hides every key but one.
    """
    q, k, v = (t[:1, :, :128].contiguous() for t in (q, k, v))
    row = q.new_full((k.shape[2],), -1e4)
    row[0] = 0
    only = v[:, :, :1].transpose(1, 2).flatten(2)
    try:
        error = attend(q, k, v, _per_key(row, q)) - only
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError):
        return False  # what else is wrong with it shows without a mask
    return bool(error.norm() < 0.25 * only.expand_as(error).norm())


def log_scale(condition_scale: float) -> float:
    """The logit bias of a condition_scale above 0; at 0 the condition is left out instead."""
    return math.log(condition_scale)


def _alone(k: Tensor, v: Tensor, conditions: Sequence[KeyGroup]) -> tuple[Tensor, Tensor]:
    """Conditions' K/V without the main branch's (k, v), which only say batch and format."""
    if len(conditions) == 1 and len(conditions[0].spans) == 1:
        kv = conditions[0].spans[0][1]
        if kv.scales is None and kv.k.shape[1] == k.shape[1]:
            rows = k.shape[0]
            return kv.k.expand(rows, -1, -1, -1), kv.v.expand(rows, -1, -1, -1)
    return join(k[:, :, :0], v[:, :, :0], conditions)


def _alike(queries: Sequence[Tensor], own: Sequence[KeyGroup]) -> list[list[int]]:
    """Which conditions can be worked on as one: those of the same lengths."""
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (q, condition) in enumerate(zip(queries, own, strict=True)):
        groups[q.shape[2], condition.tokens].append(i)
    return list(groups.values())


def _raised(totals: Tensor, biases: Sequence[float]) -> Tensor:
    """Each condition's (n, ...) log-sum-exp with its bias."""
    if len(set(biases)) == 1:
        return totals + biases[0] if biases[0] else totals
    return torch.stack([total + bias for total, bias in zip(totals, biases, strict=True)])


def _alone_together(
    partial: Partial, queries: Sequence[Tensor], own: Sequence[KeyGroup]
) -> Weighed:
    """Each condition's attention to itself, all of the same lengths: (n, batch, heads, ...)."""
    keys_values = [_alone(q, q, [condition]) for q, condition in zip(queries, own, strict=True)]
    q, k, v = (
        tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        for tensors in (tuple(queries), *zip(*keys_values, strict=True))
    )
    out, lse = partial(q, k, v)
    n = len(queries)
    return out.unflatten(0, (n, -1)), lse.unflatten(0, (n, -1))


def _with_room(t: Tensor, tokens: int) -> Tensor:
    """(batch, heads, n, d) -> a copy (batch, heads, n + tokens, d) whose end is to be filled."""
    batch, heads, n, d = t.shape
    longer = t.new_empty(batch, heads, n + tokens, d)
    longer[:, :, :n] = t
    return longer


def _flat(attended: Tensor) -> Tensor:
    """(..., heads, tokens, head_dim) -> (..., tokens, heads * head_dim)."""
    return attended.transpose(-3, -2).flatten(-2)


def _extend_mask(
    mask: Tensor | None, q: Tensor, keys: int, conditions: Sequence[KeyGroup]
) -> Tensor | None:
    """A mask over the main branch's own ``keys``, none included, with the conditions behind it."""
    if mask is None and not any(c.bias for c in conditions):
        return None
    row = torch.cat([q.new_full((c.tokens,), c.bias) for c in conditions])
    if mask is None:
        main = q.new_zeros(keys)
        return _per_key(torch.cat((main, row)), q)
    mask = _additive(mask, q)
    columns = row.to(mask.dtype).expand(*mask.shape[:-1], -1)
    return torch.cat((mask, columns), dim=-1)


def _additive(mask: Tensor, q: Tensor) -> Tensor:
    """A boolean mask can't carry a bias; an additive one says the same."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, float("-inf"))


def _per_key(row: Tensor, q: Tensor) -> Tensor:
    """(keys,) -> (1, 1, queries, keys) without a copy: every attention backend takes that."""
    return row.expand(1, 1, q.shape[2], -1)
