"""condition_scale by merged groups of keys, and who calls which kernel how often."""

from unittest import mock

import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from tiny import (
    apply,
    flux_config,
    make_model,
    pytorch_attention,
    random_condition,
    random_lora,
    relative_error,
    sample,
    with_cache,
)

from omini2_extension.omini2_core.cache.entry import KeysValues
from omini2_extension.omini2_core.engine import run as engine_run
from omini2_extension.omini2_core.engine.attention import (
    KeyGroup,
    join,
    joint_attention,
    main_attention,
)
from omini2_extension.omini2_core.host import kernels

HEADS, D = 3, 16
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(dtype)


def attend(q, k, v, mask):
    return attention_pytorch(q, k, v, HEADS, mask=mask, skip_reshape=True)


def condition(rows, tokens, bias, dtype):
    """K/V of a condition that serves all rows of a batch, or has its own for each."""
    shape = (rows, HEADS, tokens, D)
    keys_values = KeysValues(randn(*shape, dtype=dtype), randn(*shape, dtype=dtype))
    return KeyGroup([(slice(None), keys_values)], bias)


def dense(q, k, v, bias_of_keys):
    """Attention in 64 bits with a bias for each key."""
    q, k, v = (t.double() for t in (q, k, v))
    logits = q @ k.transpose(-1, -2) / D**0.5 + bias_of_keys.double()
    return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize(
    "biases", [[0.5], [0.0], [0.7, 0.7], [0.0, -1.2], [2.0, 0.0, -0.4, 2.0]], ids=str
)
def test_main_attention(dtype, merged, biases) -> None:
    q, k, v = (randn(2, HEADS, n, D, dtype=dtype) for n in (7, 7, 7))
    conditions = [condition(1 + i % 2, 2 + i, b, dtype) for i, b in enumerate(biases)]
    partial = kernels.partial_of(attention_pytorch, q, k, v) if merged else None
    got = main_attention(attend, partial, q, k, v, None, conditions)
    row = torch.cat([torch.zeros(7), *(torch.full((c.tokens,), c.bias) for c in conditions)])
    want = dense(q, *join(k, v, conditions), row)
    assert relative_error(got.double(), want) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("sizes", [[4], [4, 4, 4], [4, 2, 4, 1]], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
def test_joint_attention(dtype, merged, sizes, scaled) -> None:
    k, v = (randn(2, HEADS, 7, D, dtype=dtype) for _ in range(2))
    own = [condition(2, n, 0.9 - i if scaled else 0.0, dtype) for i, n in enumerate(sizes)]
    queries = [randn(2, HEADS, n, D, dtype=dtype) for n in sizes]
    partial = kernels.partial_of(attention_pytorch, queries[0], k, v) if merged else None
    results = joint_attention(attend, partial, queries, own, k, v)
    for q, each, got in zip(queries, own, results, strict=True):
        row = torch.cat([torch.full((7,), each.bias), torch.zeros(each.tokens)])
        want = dense(q, *join(k, v, [each]), row)
        assert relative_error(got.double(), want) < TOLERANCE[dtype]


def test_joint_conditions_share_calls_and_copies() -> None:
    """One call for all at the main branch, one per length at themselves; else one copy."""
    k, v = (randn(1, HEADS, 7, D) for _ in range(2))
    own = [condition(1, n, 0.0, torch.float32) for n in (4, 2, 4, 4)]
    queries = [randn(1, HEADS, c.tokens, D) for c in own]
    kernel = kernels.partial_of(attention_pytorch, queries[0], k, v)
    calls = []

    def counted(q, k, v):
        calls.append((tuple(q.shape[:3:2]), k.shape[2]))
        return kernel(q, k, v)

    joint_attention(attend, counted, queries, own, k, v)
    assert sorted(calls) == [((1, 2), 2), ((1, 14), 7), ((3, 4), 4)]
    storages = set()

    def without_sums(q, k, v, mask):
        storages.add(k.untyped_storage().data_ptr())
        return attend(q, k, v, mask)

    joint_attention(without_sums, None, queries, own, k, v)
    assert len(storages) == 1


def test_only_pytorchs_attention_tells_its_sums() -> None:
    from comfy.ldm.modules.attention import attention_sub_quad

    q = randn(1, HEADS, 4, D)
    assert kernels.partial_of(attention_pytorch, q, q, q) is not None
    assert kernels.partial_of(attention_pytorch.__wrapped__, q, q, q) is not None
    assert kernels.partial_of(attention_sub_quad.__wrapped__, q, q, q) is None
    assert kernels.partial_of(lambda *a, **k: q, q, q, q) is None


@pytest.fixture(scope="module")
def scaled():
    model, lora = make_model(flux_config(True)), random_lora("attention.safetensors")
    models = {}
    for attention in ("joint", "independent"):
        conditioned = model
        for seed, (h, w, scale) in enumerate([(3, 4, 1.5), (4, 3, 1.0), (2, 2, 0.4)]):
            conditioned = apply(
                conditioned, random_condition(h, w, seed), lora,
                attention=attention, condition_scale=scale,
            )  # fmt: skip
        models[attention] = with_cache(conditioned, "auto", 2)
    return models


@pytest.mark.parametrize("attention", ["joint", "independent"])
@pytest.mark.parametrize("batch", [1, 2])
def test_through_the_host_no_mask_is_made(scaled, attention, batch) -> None:
    """The same picture with kernels that tell their sums and with one that takes a bias."""
    want = sample(scaled[attention], batch=batch, cfg=2.0)
    masks, merges = [], []
    main = engine_run.main_attention

    def spy(attend, partial, *args):
        merges.append(partial is not None)

        def checked(q, k, v, mask):
            masks.append(mask)
            return attend(q, k, v, mask)

        return main(checked, partial, *args)

    with mock.patch.object(engine_run, "main_attention", spy), pytorch_attention():
        got = sample(scaled[attention], batch=batch, cfg=2.0)
    assert merges and all(merges) and not masks
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_an_override_still_sees_every_call_of_the_main_branch(scaled, attention) -> None:
    """An override gives no sums: it gets the bias, as one row for all queries.

    And once more before that, since some ignore masks.
    """
    calls = []

    def override(func, q, k, v, heads, **kwargs):
        calls.append((q.shape[2], k.shape[2], kwargs["mask"].stride(-2)))
        return func(q, k, v, heads, **kwargs)

    patched = scaled[attention].clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    with pytorch_attention():
        want = sample(scaled[attention])
        got = sample(patched)
    assert calls == [(41, 41 + 28, 0)] * (1 + 20)
    assert relative_error(got, want) < 1e-5


@pytest.mark.parametrize("boolean", [True, False])
@pytest.mark.parametrize("bias", [0.0, 0.8])
def test_a_mask_of_the_host_is_kept(boolean, bias) -> None:
    """Over the main branch's own keys, beside a bias for the condition's."""
    q, k, v = (randn(2, HEADS, 7, D) for _ in range(3))
    each = condition(1, 4, bias, torch.float32)
    seen = torch.rand(2, 1, 7, 7) > 0.3
    seen[..., 0] = True
    added = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
    partial = kernels.partial_of(attention_pytorch, q, k, v)
    got = main_attention(attend, partial, q, k, v, seen if boolean else added, [each])
    columns = torch.full((2, 1, 7, 4), bias)
    want = dense(q, *join(k, v, [each]), torch.cat((added, columns), -1))
    assert relative_error(got.double(), want) < TOLERANCE[torch.float32]
