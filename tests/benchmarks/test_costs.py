"""The cost model against the operations that PyTorch counts while the real model runs."""

from typing import Any

import comfy.ldm.qwen_image.model as qwen
import pytest
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_patcher import ModelPatcher
from helpers.spot import spot_edit
from tiny import (
    CONFIG,
    apply,
    flux_config,
    make_model,
    pixel_mask,
    prompt,
    pytorch_attention,
    random_condition,
    random_lora,
    recorded_runs,
    sample,
    with_cache,
)
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks import costs, editing, references

TEXT, H, W, STEPS = 5, 4, 6, 7
EVERY = {"off": 1, "every_n_steps": 3, "once": None}


def shape(guidance: bool) -> Any:
    """The tiny models' sizes."""
    return costs.Shape(
        CONFIG["hidden_size"],
        CONFIG["depth"],
        CONFIG["depth_single_blocks"],
        CONFIG["context_in_dim"],
        CONFIG["vec_in_dim"],
        CONFIG["mlp_ratio"],
        guidance,
    )


def counted(model: ModelPatcher, **said: Any) -> int:
    """FLOPs of a run through the stock KSampler's path, the attention's included."""
    with counter() as counts:
        sample(model, H, W, steps=STEPS, positive=prompt(length=TEXT, **said))
    return counts.get_total_flops()


def counter() -> FlopCounterMode:
    # PyTorch counts its attention on GPUs and the products that ComfyUI's own attention is made
    # of, but not its own attention on CPUs, which a host can be set to.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formula = {on_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    return FlopCounterMode(custom_mapping=formula, display=False)


@pytest.mark.parametrize("guidance", [True, False])
def test_plain_flux(guidance) -> None:
    model = make_model(flux_config(guidance))
    assert counted(model) == costs.run(shape(guidance), TEXT, H * W, (), STEPS)


@pytest.mark.parametrize("attention", ["joint", "independent"])
@pytest.mark.parametrize("reuse", EVERY)
@pytest.mark.parametrize("sides", [[(4, 6)], [(2, 3), (5, 1)]])
def test_conditions(attention, reuse, sides) -> None:
    model = make_model(flux_config(True))
    conditions = []
    for seed, (h, w) in enumerate(sides):
        lora = random_lora(f"costs{seed}.safetensors", rank=3 + seed, seed=seed)
        model = apply(model, random_condition(h, w, seed), lora, attention=attention)
        conditions.append(
            costs.ConditionCost(h * w, attention == "joint", EVERY[reuse], rank=3 + seed)
        )
    model = with_cache(model, reuse, refresh_every=3)
    with recorded_runs() as runs:
        got = counted(model)
    assert got == costs.run(shape(True), TEXT, H * W, conditions, STEPS)
    if reuse != "off":
        tokens = sum(condition.tokens for condition in conditions)
        assert runs[0].kv_bytes == costs.kv_bytes(shape(True), tokens, 4)


EDITS = {
    "plain": (lambda model, mask: model, costs.EditCost(TEXT, H * W, STEPS)),
    "references kept": (
        lambda model, mask: with_cache(model, "every_n_steps", 3),
        costs.EditCost(TEXT, H * W, STEPS, full=3),
    ),
    "spot edit": (
        lambda model, mask: spot_edit(
            model, select="latent", threshold=1e6, full_steps=2, reset_steps="4", mask=mask
        ),
        costs.EditCost(TEXT, H * W, STEPS, full=3, edited=4),
    ),
}


@pytest.mark.parametrize("kind", EDITS)
def test_edits(kind) -> None:
    change, cost = EDITS[kind]
    edited = torch.zeros(H, W, dtype=torch.bool)
    edited[1, :4] = True
    model = change(make_model(flux_config(True)), pixel_mask(edited))
    latent = torch.randn(1, 16, 2 * H, 2 * W)
    assert counted(model, reference_latents=[latent]) == cost.flops(shape(True))


@pytest.mark.parametrize("guidance", [True, False])
def test_weights(guidance) -> None:
    flux = make_model(flux_config(guidance)).model.diffusion_model
    head = CONFIG["hidden_size"] // CONFIG["num_heads"]
    assert costs.weights(shape(guidance), head) == sum(p.numel() for p in flux.parameters())


def test_flux1_dev_has_12_billion() -> None:
    assert round(costs.weights(costs.FLUX1_DEV) / 1e9, 1) == 11.9


def test_a_step_reads_weights_and_k_v() -> None:
    dev = costs.FLUX1_DEV
    weights, kv = costs.weights(dev), costs.kv_bytes(dev, 64, 2)
    assert costs.step_bytes(dev, 64, 1, 2) == weights + kv


def test_a_token_of_flux1_takes_what_the_docs_say() -> None:
    assert costs.kv_bytes(costs.FLUX1_DEV, 1, 2) == 57 * 2 * 3072 * 2


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("FLUX.1", way) for way in references.WAYS),
        ("FLUX.2", "both"),
        ("Qwen", "every 5"),
        ("FLUX.1", references.SECOND),
    ],
)
def test_references(name, way, monkeypatch) -> None:
    # The host's other attention asks for free memory, of which the meta device has none.
    monkeypatch.setattr(qwen, "optimized_attention_masked", attention_pytorch)
    kind = editing.models(small=True)[name]
    bench = references.Bench(kind, 4)
    model = bench.cached(way)
    with pytorch_attention():
        if way == references.SECOND:
            bench.timed(model, way, 2, 2)
            bench.timed(bench.model, way, 2, 1)  # another MODEL in between
        with counter() as counts:
            bench.timed(model, way, 2, STEPS)
    with pytorch_attention():
        predicted = references.Counted(kind, references.TEXT, 4).run(way, 2, STEPS)
    assert counts.get_total_flops() == predicted
