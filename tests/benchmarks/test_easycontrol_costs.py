"""The cost model of EasyControl's scheme against the operations that PyTorch counts."""

import pytest
import torch
from tiny import (
    CONFIG,
    apply,
    flux_config,
    make_model,
    prompt,
    random_condition,
    random_easycontrol_lora,
    sample,
    with_cache,
)
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

from benchmarks import costs, easycontrol

TEXT, H, W, STEPS, RANK = 5, 4, 6, 5, 3


SHAPE = costs.Shape(
    CONFIG["hidden_size"],
    CONFIG["depth"],
    CONFIG["depth_single_blocks"],
    CONFIG["context_in_dim"],
    CONFIG["vec_in_dim"],
    CONFIG["mlp_ratio"],
)
SIZES = SHAPE, TEXT, H * W


def conditioned(sides, strength: float):
    model = make_model(flux_config(True))
    for seed, (h, w) in enumerate(sides):
        lora = random_easycontrol_lora(f"easycosts{seed}.safetensors", rank=RANK, seed=seed)
        model = apply(model, random_condition(h, w, seed), lora, strength=strength)
    return model


def counted(model) -> int:
    """FLOPs of a run through the stock KSampler's path, the attention's included."""
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(custom_mapping={on_cpu: sdpa_flop}, display=False) as counter:
        sample(model, H, W, steps=STEPS, positive=prompt(length=TEXT))
    return counter.get_total_flops()


@pytest.mark.parametrize("sides", [[(4, 6)], [(2, 3), (5, 1)]])
def test_ours(sides) -> None:
    tokens = [h * w for h, w in sides]
    got = counted(with_cache(conditioned(sides, 1.0)))
    assert got == easycontrol.ours(*SIZES, tokens, STEPS, RANK)


@pytest.mark.parametrize("sides", [[(4, 6)], [(2, 3), (5, 1)]])
def test_theirs(sides) -> None:
    """Their scheme as the benchmark runs it: the bank is filled in the first step, and each
    condition has a modulation of its own."""
    tokens = [h * w for h, w in sides]
    model = conditioned(sides, 0.0)
    with easycontrol.their_scheme(model, len(sides), RANK):
        got = counted(model)
    want = easycontrol.theirs(*SIZES, tokens, STEPS, RANK, warm_up=False)
    filling = sum(SHAPE.blocks * costs.attention_flops(SHAPE, c, c) for c in tokens)
    modulations = (len(sides) - 1) * STEPS * easycontrol.carried(SHAPE, 0)
    assert got == want + filling + modulations
    conditions = [costs.ConditionCost(c, joint=False, every=1, rank=0) for c in tokens]
    assert counted(model) == costs.run(*SIZES, conditions, STEPS)  # nothing of it is left behind


@pytest.mark.parametrize("tokens", [[256], [1024], [1024, 1024]])
def test_on_flux1_ours_is_less_and_grows_less(tokens) -> None:
    sizes = costs.FLUX1_DEV, 512, 64 * 64
    plain = costs.run(*sizes, (), 25)
    ours, theirs = easycontrol.ours(*sizes, tokens, 25), easycontrol.theirs(*sizes, tokens, 25)
    assert 1 < ours / plain < theirs / plain
    assert (ours - plain) < 0.5 * (theirs - plain)
