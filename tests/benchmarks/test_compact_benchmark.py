"""benchmarks/compact.py: its cost formula against what PyTorch counts, and its measurements."""

import pytest
import torch
from tiny import (
    CONFIG,
    apply,
    compact,
    flux_config,
    make_model,
    pixel_mask,
    prompt,
    random_condition,
    random_lora,
    sample,
    with_cache,
)
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks import compact as compact_tokens

TEXT, H, W, STEPS = 5, 4, 6, 7
WAYS = {"off": ("joint", 1), "every_n_steps": ("joint", 3), "once": ("independent", None)}


@pytest.mark.parametrize("reuse", WAYS)
@pytest.mark.parametrize("painted", [1, 9, H * W])
def test_flops_of_token_integration(reuse, painted) -> None:
    attention, every = WAYS[reuse]
    paint = torch.zeros(H * W, dtype=torch.bool)
    paint[:painted] = True
    known, *_ = compact(
        random_condition(H, W), token_integration=True, mask=pixel_mask(paint.view(H, W))
    )
    lora = random_lora("compact_costs.safetensors", rank=3)
    model = apply(make_model(flux_config(True)), known, lora, attention=attention)
    model = with_cache(model, reuse, refresh_every=3)
    # PyTorch counts its attention on GPUs, but not on CPUs, which a host can be set to.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formula = {on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(custom_mapping=formula, display=False) as counter:
        sample(model, H, W, steps=STEPS, positive=prompt(length=TEXT))

    costs = compact_tokens.costs
    shape = costs.Shape(CONFIG["hidden_size"], CONFIG["depth"], CONFIG["depth_single_blocks"],
                        CONFIG["context_in_dim"], CONFIG["vec_in_dim"])  # fmt: skip
    cost = costs.ConditionCost(H * W - painted, attention == "joint", every, rank=3)
    assert counter.get_total_flops() == compact_tokens.integration_flops(
        shape, TEXT, H * W, painted, cost, STEPS
    )


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("side", [16, 32])
def test_the_box_has_the_share_it_is_asked_for(share, side) -> None:
    mask = compact_tokens.box(share, side)
    assert mask.shape == (1, 16 * side, 16 * side)
    assert mask.mean() == share


def test_a_lost_line_and_a_lit_cell_are_counted() -> None:
    image = torch.zeros(1, 64, 64, 3)
    image[:, :, 20] = 1  # one line through the second column of tokens
    brightness, lost, lit, kept = compact_tokens.resampling(image, 0.5, "area")
    assert (brightness, lost, lit, kept) == pytest.approx((0.5, 0, 0, 0.5))
    assert compact_tokens.resampling(image, 0.5, "lanczos")[2] > 0
    assert compact_tokens.pruning(image, 1.0, 0.1) == pytest.approx((0.25, 0))
    assert compact_tokens.pruning(image, 0.5, 0.6) == pytest.approx((0, 1))
