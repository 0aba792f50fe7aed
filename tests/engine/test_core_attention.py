"""Who sees whom, against attention written out in 64 bits, and which kernel is asked for what."""

import math

import pytest
import torch

from omini2_extension.omini2_core.cache.entry import KeysValues, Storage
from omini2_extension.omini2_core.engine.attention import (
    KeyGroup,
    honours_masks,
    join,
    joint_attention,
    log_scale,
    main_attention,
    merge,
)

HEADS, D = 3, 4


def randn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def scores(q, k):
    return q @ k.transpose(-1, -2) / D**0.5


def flat(out):
    return out.transpose(1, 2).flatten(2)


class Kernels:
    """Plain attention that remembers what it was called with."""

    def __init__(self) -> None:
        self.masks, self.keys, self.asked = [], [], []

    def attend(self, q, k, v, mask):
        self.masks.append(mask)
        self.keys.append(k)
        logits = scores(q, k)
        if mask is not None:
            # as PyTorch's own kernel, which takes a mask in the queries' format or booleans
            assert mask.dtype in (torch.bool, q.dtype)
            bias = torch.zeros_like(logits)
            logits = (
                bias.masked_fill(~mask, -math.inf) + logits if mask.dtype == torch.bool
                else logits + mask
            )  # fmt: skip
        return flat(logits.softmax(-1) @ v)

    def partial(self, q, k, v):
        self.asked.append((q.shape[0], q.shape[2], k.shape[2]))
        logits = scores(q, k)
        return logits.softmax(-1) @ v, logits.logsumexp(-1)


def own(tokens, bias=0.0, rows=2):
    """A condition with K/V for every row of the batch."""
    return KeyGroup(
        [(slice(None), KeysValues(randn(rows, HEADS, tokens, D), randn(rows, HEADS, tokens, D)))],
        bias,
    )


def split_rows(tokens, bias=0.0):
    """A condition whose two rows lie in two blocks, as a positive and a negative prompt's do."""
    blocks = [KeysValues(randn(1, HEADS, tokens, D), randn(1, HEADS, tokens, D)) for _ in range(2)]
    return KeyGroup([(slice(0, 1), blocks[0]), (slice(1, 2), blocks[1])], bias)


def keys_values(condition, rows=2):
    """K and V of a condition as attention has to see them."""
    k = torch.empty(rows, HEADS, condition.tokens, D, dtype=torch.float64)
    v = torch.empty_like(k)
    for span, block in condition.spans:
        factors = block.scales or (1, 1)
        k[span] = block.k.double() * factors[0]
        v[span] = block.v.double() * factors[1]
    return k, v


def expected(q, k, v, conditions, biases, mask=None):
    """Attention over (k, v) and the conditions, each with its bias on its keys."""
    every_k, every_v = zip((k, v), *map(keys_values, conditions), strict=True)
    logits = scores(q, torch.cat(every_k, 2))
    main = logits[..., : k.shape[2]]
    if mask is not None:
        main = main + mask if mask.dtype != torch.bool else main.masked_fill(~mask, -math.inf)
    parts, start = [main], k.shape[2]
    for condition, bias in zip(conditions, biases, strict=True):
        parts.append(logits[..., start : start + condition.tokens] + bias)
        start += condition.tokens
    return flat(torch.cat(parts, -1).softmax(-1) @ torch.cat(every_v, 2))


def close(got, want):
    return torch.allclose(got, want, atol=1e-9)


MIXES = {
    "plain": lambda: [own(3)],
    "none": lambda: [],
    "one row for all": lambda: [own(3, rows=1), own(2)],
    "two prompts": lambda: [split_rows(3), own(1)],
    "one scaled": lambda: [own(3, 0.7)],
    "two alike": lambda: [own(3, 0.7), own(2, 0.7, rows=1)],
    "mixed": lambda: [own(1), own(3, -0.5), split_rows(2, 0.7), own(2), own(4, -0.5)],
}


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("mix", MIXES)
def test_text_and_picture_see_everything(mix, sums) -> None:
    q, k, v = (randn(2, HEADS, 5, D) for _ in range(3))
    conditions, kernels = MIXES[mix](), Kernels()
    partial = kernels.partial if sums else None
    got = main_attention(kernels.attend, partial, q, k, v, None, conditions)
    biases = [condition.bias for condition in conditions]
    assert close(got, expected(q, k, v, conditions, biases))
    # One call for each group of one scale, and those that aren't scaled go with the main branch.
    groups = len({bias for bias in biases if bias})
    assert len(kernels.asked) == (1 + groups if sums and groups else 0)
    assert kernels.masks == [] if kernels.asked else len(kernels.masks) == 1
    if not groups:
        assert kernels.masks == [None]
    elif not sums:
        [mask] = kernels.masks
        keys = 5 + sum(condition.tokens for condition in conditions)
        assert mask.shape == (1, 1, 5, keys) and mask.stride(2) == 0  # one row for all queries


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize("mix", ["plain", "mixed"])
@pytest.mark.parametrize("kind", ["boolean", "additive", "additive for each head"])
def test_the_hosts_mask_stays(kind, mix, sums) -> None:
    q, k, v = (randn(2, HEADS, 5, D) for _ in range(3))
    mask = randn(2, HEADS, 5, 5) if "head" in kind else randn(5, 5)
    if kind == "boolean":
        mask = (mask > -0.5) | torch.eye(5, dtype=torch.bool)
    conditions, kernels = MIXES[mix](), Kernels()
    partial = kernels.partial if sums else None
    before = mask.clone()
    got = main_attention(kernels.attend, partial, q, k, v, mask, conditions)
    biases = [condition.bias for condition in conditions]
    assert close(got, expected(q, k, v, conditions, biases, mask))
    assert torch.equal(mask, before)
    assert not kernels.asked  # these kernels take no mask


@pytest.mark.parametrize("sums", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: [own(3)],
        lambda: [own(3, 0.7)],
        lambda: [own(3, 0.7, rows=1)],
        lambda: [own(3), own(3)],
        lambda: [split_rows(3, 0.7), own(2), own(3, -0.5), own(1, 0.7), own(2)],
    ],
    ids=["alone", "scaled", "one row", "alike", "mixed"],
)
def test_a_joint_condition_sees_itself_and_the_main_branch(make, sums) -> None:
    k, v = (randn(2, HEADS, 5, D) for _ in range(2))
    conditions, kernels = make(), Kernels()
    queries = [randn(2, HEADS, condition.tokens, D) for condition in conditions]
    partial = kernels.partial if sums else None
    results = joint_attention(kernels.attend, partial, queries, conditions, k, v)
    assert len(results) == len(conditions)
    for q, condition, got in zip(queries, conditions, results, strict=True):
        # The bias is between this condition and the main branch; itself it sees as it is.
        mask = torch.full((5,), condition.bias, dtype=torch.float64)
        assert close(got, expected(q, k, v, [condition], [0.0], mask))
    if sums and (len(conditions) > 1 or conditions[0].bias):
        assert not kernels.masks
        lengths = {condition.tokens for condition in conditions}
        assert len(kernels.asked) == 1 + len(lengths)
        assert kernels.asked[0] == (2, sum(c.tokens for c in conditions), 5)
    else:
        assert [mask is None for mask in kernels.masks] == [not c.bias for c in conditions]
        # The main branch's K/V are copied once for all.
        assert len({keys.untyped_storage().data_ptr() for keys in kernels.keys}) == 1


def test_keys_in_fp8_are_scaled_back() -> None:
    """Also where a condition's K/V are attended to alone, without the main branch's."""
    k, v = randn(2, 1, HEADS, 3, D)
    block = KeysValues.room_for(k, Storage("fp8"))
    block.fill(k, v)
    condition = KeyGroup([(slice(None), block)], 0.7)
    q, main_k, main_v = (randn(2, HEADS, 5, D) for _ in range(3))
    kernels = Kernels()
    got = main_attention(kernels.attend, kernels.partial, q, main_k, main_v, None, [condition])
    assert close(got, expected(q, main_k, main_v, [condition], [0.7]))


def test_joining_copies_only_if_there_is_something_to_join() -> None:
    k, v = (randn(2, HEADS, 5, D) for _ in range(2))
    assert join(k, v, []) == (k, v)
    one, other = own(3), split_rows(2)
    joined_k, joined_v = join(k, v, [one, other])
    (one_k, one_v), (other_k, other_v) = keys_values(one), keys_values(other)
    assert torch.equal(joined_k, torch.cat((k, one_k, other_k), 2))
    assert torch.equal(joined_v, torch.cat((v, one_v, other_v), 2))


def test_merging_two_groups_of_keys_is_attention_over_both() -> None:
    q, k, v = (randn(2, HEADS, 5, D) for _ in range(3))
    kernel = Kernels().partial
    merged, lse = merge(kernel(q, k[:, :, :2], v[:, :, :2]), kernel(q, k[:, :, 2:], v[:, :, 2:]))
    want, total = kernel(q, k, v)
    assert close(merged, want) and close(lse, total)


def test_scale_is_a_bias_of_the_logits() -> None:
    assert KeyGroup([]).bias == 0.0
    assert log_scale(1.0) == 0.0
    assert log_scale(math.e) == pytest.approx(1.0)


# --- attention of others -----------------------------------------------------------------------


def probed(attend, dtype=torch.float32):
    """What is found of a kernel, and the q, k, v and mask that it was tried with."""
    seen = []

    def kernel(q, k, v, mask):
        seen.append((q, k, v, mask))
        return attend(q, k, v, mask)

    torch.manual_seed(0)
    q, k, v = (torch.randn(2, HEADS, 150, D, dtype=dtype) for _ in range(3))
    found = honours_masks(kernel, q, k, v)
    return found, seen, (q, k, v)


def plain(q, k, v, mask):
    return Kernels().attend(q, k, v, mask)


def test_a_kernel_is_tried_with_all_keys_hidden_but_the_first() -> None:
    found, ((*taken, mask),), given = probed(plain)
    assert found is True
    for small, whole in zip(taken, given, strict=True):
        assert torch.equal(small, whole[:1, :, :128]) and small.is_contiguous()
    row = torch.full((128,), -1e4)  # what float16 can hold
    row[0] = 0
    assert mask.shape == (1, 1, 128, 128) and (mask == row).all()


@pytest.mark.parametrize(("error", "found"), [(0.2, True), (0.3, False)])
def test_a_kernel_in_few_bits_may_err_by_a_quarter(error, found) -> None:
    """Relative, by norm: as 8-bit attention errs, and far from what ignoring the mask does."""

    def coarse(q, k, v, mask):
        out = plain(q, k, v, mask)
        noise = torch.randn_like(out)
        return out + error * noise * out.norm() / noise.norm()

    assert probed(coarse)[0] is found


def test_a_kernel_that_ignores_masks_or_fails_at_them() -> None:
    assert probed(lambda q, k, v, mask: plain(q, k, v, None))[0] is False
    for error in (RuntimeError, ValueError, TypeError, AssertionError):

        def fails(q, k, v, mask, error=error):
            raise error("no masks")

        assert probed(fails)[0] is False

    def full(q, k, v, mask):
        raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        probed(full)
