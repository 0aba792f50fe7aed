"""Beside what people have already: ControlNet, LoRAs, patches, skippers, torch.compile."""

import comfy.sd
import pytest
import torch
from helpers.controlnet import with_controlnet
from helpers.keys_values import kv_of
from tiny import (
    apply,
    flux_config,
    make_model,
    random_condition,
    recorded_runs,
    reference,
    relative_error,
    sample,
    with_cache,
)


@pytest.mark.compatibility("Neighbours", "ControlNet, XLabs' files", "works")
def test_controlnet(model, attention, lora) -> None:
    conditioned = apply(model, random_condition(), lora, attention=attention)
    plain, both = sample(conditioned), sample(conditioned, positive=with_controlnet())
    only_control = sample(model, positive=with_controlnet())
    assert relative_error(both, plain) > 1e-3
    assert relative_error(both, only_control) > 1e-3
    assert torch.equal(sample(conditioned, positive=with_controlnet(0.0)), plain)
    shut_out = apply(model, random_condition(), lora, condition_scale=0.0)
    assert torch.equal(sample(shut_out, positive=with_controlnet()), only_control)
    if attention == "independent":
        cached = with_cache(conditioned, "once")
        assert torch.equal(sample(cached, positive=with_controlnet()), both)


@pytest.mark.compatibility("Neighbours", "stack of ordinary LoRAs", "works")
@pytest.mark.parametrize("strength", [1.0, -0.7])
def test_stock_lora_leaves_the_condition_alone(strength) -> None:
    ref = reference("dev_like")
    model = ref.model()
    styled, _ = comfy.sd.load_lora_for_models(model, None, ref.under("lora.style."), strength, 0)
    lora = ref.lora_file("a")
    plain = apply(model, random_condition(), lora, attention="independent")
    both = apply(styled, random_condition(), lora, attention="independent")
    assert relative_error(kv_of(both), kv_of(plain)) < 1e-5
    assert relative_error(sample(both), sample(plain)) > 1e-3
    after, _ = comfy.sd.load_lora_for_models(plain, None, ref.under("lora.style."), strength, 0)
    assert torch.equal(sample(after), sample(both))


@pytest.mark.compatibility("Neighbours", "control LoRAs", "refused")
def test_a_control_lora_is_refused() -> None:
    ref = reference("dev_like")
    control = {
        "transformer.x_embedder.lora_A.weight": torch.zeros(2, 128),
        "transformer.x_embedder.lora_B.weight": torch.zeros(32, 2),
        "transformer.x_embedder.reshape_weight": torch.tensor([32, 128]),
    }
    model, _ = comfy.sd.load_lora_for_models(ref.model(), None, control, 1.0, 0)
    with pytest.raises(ValueError, match=r"model: a control LoRA .* take it out of the graph"):
        sample(apply(model, random_condition(), ref.lora_file("a")))


@pytest.mark.compatibility(
    "Neighbours",
    "ordinary LoRAs of other kinds (DoRA, LoHa, LoKr)",
    "works with a limit",
    "They change the conditions too; a warning says so.",
)
def test_other_kinds_of_lora_are_warned_about(caplog) -> None:
    ref = reference("dev_like")
    dora = ref.under("lora.style.")
    dora["transformer.x_embedder.dora_scale"] = torch.ones(32, 1)
    model, _ = comfy.sd.load_lora_for_models(ref.model(), None, dora, 1.0, 0)
    sample(apply(model, random_condition(), ref.lora_file("a")), steps=1)
    assert "a LoRA of type dora changes the conditions too" in caplog.text


@pytest.mark.compatibility("Neighbours", "merging models", "works")
def test_merged_models_stay_merged_for_the_condition(model, lora) -> None:
    """A model merge changes the base itself, so the condition sees it too."""
    other = make_model(flux_config(True), {
        k: v + 0.05 for k, v in model.model.diffusion_model.state_dict().items()
    })  # fmt: skip
    merged = model.clone()
    merged.add_patches(other.get_key_patches("diffusion_model."), 0.5, 0.5)
    before = kv_of(apply(model, random_condition(), lora))
    assert relative_error(kv_of(apply(merged, random_condition(), lora)), before) > 1e-3


@pytest.mark.compatibility("Neighbours", "attention overrides of other nodes", "works")
def test_existing_attention_override(model, attention, lora) -> None:
    shapes = []

    def override(func, q, k, v, heads, **kwargs):
        shapes.append((q.shape[2], k.shape[2]))
        return func(q, k, v, heads, **kwargs)

    want = sample(apply(model, random_condition(), lora, attention=attention))
    for before in (True, False):
        shapes.clear()
        patched = model.clone() if before else apply(
            model, random_condition(), lora, attention=attention
        )  # fmt: skip
        patched.model_options["transformer_options"]["optimized_attention_override"] = override
        if before:
            patched = apply(patched, random_condition(), lora, attention=attention)
        assert torch.equal(sample(patched), want)
        assert shapes == [(41, 77)] * 20


@pytest.mark.compatibility("Neighbours", "block patches of other nodes", "works")
@pytest.mark.parametrize("kind", ["double_block", "single_block"])
def test_existing_block_replacement(model, attention, lora, kind) -> None:
    calls = []

    def replacement(args, extra):
        calls.append(1)
        out = extra["original_block"](args)
        out["img"] = out["img"] * 1.1
        return out

    want = sample(apply(model, random_condition(), lora, attention=attention))
    patched = model.clone()
    patched.set_model_patch_replace(replacement, "dit", kind, 1)
    plain = sample(patched)
    calls.clear()
    before = sample(apply(patched, random_condition(), lora, attention=attention))
    assert len(calls) == 4
    after = apply(model, random_condition(), lora, attention=attention)
    after.set_model_patch_replace(replacement, "dit", kind, 1)
    assert torch.equal(sample(after), before)
    assert relative_error(before, want) > 1e-4
    assert relative_error(before, plain) > 1e-4


@pytest.mark.compatibility(
    "Neighbours",
    "block patches that skip blocks",
    "works with a limit",
    "Joint conditions are refused.",
)
def test_a_skipped_block_is_named_when_a_joint_condition_needs_it(model, lora) -> None:
    def skip(args, extra):
        return {"img": args["img"], "txt": args["txt"]}

    patched = model.clone()
    patched.set_model_patch_replace(skip, "dit", "double_block", 1)
    sample(apply(patched, random_condition(), lora, attention="independent"))
    with pytest.raises(ValueError, match="skipped one of the model's blocks"):
        sample(apply(patched, random_condition(), lora, attention="joint"))


@pytest.mark.compatibility("Neighbours", "EasyCache", "works")
def test_easycache(model, attention, lora) -> None:
    from comfy_extras.nodes_easycache import EasyCacheNode

    conditioned = apply(model, random_condition(), lora, attention=attention)
    want = sample(conditioned, steps=8)
    never = EasyCacheNode.execute(conditioned, 0.0, 0.15, 0.95, False)[0]
    assert torch.equal(sample(never, steps=8), want)
    with recorded_runs() as runs:
        for order in (0, 1):
            if order:
                eager = EasyCacheNode.execute(model, 3.0, 0.15, 0.95, False)[0]
                eager = apply(eager, random_condition(), lora, attention=attention)
            else:
                eager = EasyCacheNode.execute(conditioned, 3.0, 0.15, 0.95, False)[0]
            sample(with_cache(eager, "every_n_steps", 2), steps=8)
    for run in runs:
        assert 2 < run.evaluations < 8
        assert 1 < run.refreshes <= 4


@pytest.mark.compatibility("Neighbours", "torch.compile", "works")
@pytest.mark.parametrize(
    ("attention", "backend"),
    # Joint conditions have both: blocks with a branch beside them and blocks without. Code comes
    # out of what "eager" has traced.
    [("independent", "eager"), ("joint", "inductor")],
)
def test_torch_compile(model, attention, lora, backend) -> None:
    torch.compiler.reset()  # code of other tests asks for options that these runs lack
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    conditioned = with_cache(apply(model, random_condition(), lora, attention=attention), "auto", 2)
    want = sample(conditioned)
    compiled = TorchCompileModel.execute(conditioned, backend)[0]
    assert relative_error(sample(compiled), want) < 1e-4


@pytest.mark.compatibility("Neighbours", "RoPE options", "works")
def test_rope_options_move_the_condition_with_the_picture(model, lora) -> None:
    """An aligned condition stays aligned when the picture's positions are stretched."""
    conditioned = apply(model, random_condition(), lora, attention="independent")
    moved = conditioned.clone()
    moved.set_model_rope_options(1.0, 0.0, 1.0, 0.0, 1.0, 0.0)
    assert torch.equal(sample(moved), sample(conditioned))
    moved.set_model_rope_options(0.5, 3.0, 2.0, 1.0, 1.0, 0.0)
    scaled = apply(model, random_condition(), lora, attention="independent")
    keys = kv_of(moved)
    assert relative_error(keys, kv_of(scaled)) > 1e-3
