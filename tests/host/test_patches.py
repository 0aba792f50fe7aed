"""What is patched onto a model: taken off a condition exactly, or said, or none of its business."""

import comfy.sd
import pytest
import torch
from comfy_extras.nodes_model_merging import ModelMergeSimple
from helpers.keys_values import kv_of
from helpers.saved import independent
from tiny import apply, flux_config, make_model, prompt, random_condition, relative_error, sample

from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.host import saved
from omini2_extension.omini2_core.host.patches import judge

QKV, KEY_NORM = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_attn.norm.key_norm"
LAST = "single_blocks.2.linear1"  # 3 x 32 outputs for q, k and v, then the MLP's
LATENT = {"samples": torch.zeros(1, 16, 12, 12)}
bypass = pytest.mark.skipif(
    not hasattr(comfy.sd, "load_bypass_lora_for_models"), reason="this host has no bypass LoRAs"
)


def randn(*shape: int) -> torch.Tensor:
    return 0.2 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def lora_of(layer: str, out: int, features: int = 32) -> dict[str, torch.Tensor]:
    key = f"diffusion_model.{layer}"
    return {
        f"{key}.lora_down.weight": randn(2, features),
        f"{key}.lora_up.weight": randn(out, 2),
    }


def lokr_of(layer: str, out: int) -> dict[str, torch.Tensor]:
    key = f"diffusion_model.{layer}"
    return {f"{key}.lokr_w1": randn(2, 2), f"{key}.lokr_w2": randn(out // 2, 16)}


def loaded(model, file, load=comfy.sd.load_lora_for_models):
    styled, _ = load(model, None, dict(file), 1.0, 0)
    return styled


def norm_key(model) -> str:
    """Hosts call the same weight differently."""
    norm = model.model.diffusion_model.get_submodule(KEY_NORM)
    return f"diffusion_model.{KEY_NORM}" + ("" if hasattr(norm, "weight") else ".scale")


def with_hooks(model, file):
    import comfy.hooks

    hooks = comfy.hooks.create_hook_lora(dict(file), 1.0, 0.0)
    keys = comfy.lora.load_lora(dict(file), comfy.lora.model_lora_keys_unet(model.model, {}))
    clone = model.clone()
    clone.hook_patches = {
        hooks.hooks[0].hook_ref: {key: [(1.0, v, 1.0)] for key, v in keys.items()}
    }
    return clone


# file -> what the warning calls it
STAY = {
    "a full difference": (lambda m: {f"diffusion_model.{QKV}.diff": randn(96, 32)}, "diff"),
    "a bias": (lambda m: {f"diffusion_model.{QKV}.diff_b": randn(96)}, "on a bias or a norm"),
    "a norm": (lambda m: {f"{norm_key(m)}.set_weight": randn(16)}, "on a bias or a norm"),
    "other weights": (lambda m: {f"diffusion_model.{QKV}.set_weight": randn(96, 32)}, "set"),
    "LoKr": (lambda m: lokr_of(QKV, 96), "lokr"),
    "a time embedder's LoKr": (lambda m: lokr_of("vector_in.out_layer", 32), "lokr"),
    "LoKr on the last block's keys": (lambda m: lokr_of(LAST, 224), "lokr"),
}


@pytest.mark.compatibility(
    "Neighbours",
    "LoRA files with full differences, biases and norms",
    "works with a limit",
    "They change the conditions too; a warning says so.",
)
@pytest.mark.parametrize("kind", STAY)
def test_what_changes_a_condition_is_said(model, lora, kind, caplog) -> None:
    make, name = STAY[kind]
    styled = loaded(model, make(model))
    assert styled.patches
    conditioned = independent(styled, lora)
    change = relative_error(kv_of(conditioned), kv_of(independent(model, lora)))
    assert change > 1e-4
    assert f"{name}" in caplog.text and "changes the conditions too" in caplog.text
    with pytest.raises(Omini2Error, match=r"^model: its weights are merged or patched"):
        saved.compute(conditioned, prompt(0), LATENT, "")


UNTOUCHED = {
    "LoKr on text layers": lambda: lokr_of("double_blocks.0.txt_attn.qkv", 96),
    "LoRA on the last layer": lambda: lora_of("final_layer.linear", 64),
    "LoRA on its modulation": lambda: lora_of("final_layer.adaLN_modulation.1", 64),
    "biases of text layers": lambda: {"diffusion_model.txt_in.diff_b": randn(32)},
    "LoKr on the last block's output": lambda: (
        lokr_of("single_blocks.2.linear2", 32)
        | {"diffusion_model.single_blocks.2.linear2.lokr_w2": randn(16, 80)}
    ),
}


@pytest.mark.parametrize("kind", UNTOUCHED)
@pytest.mark.parametrize("load", [loaded, with_hooks])
def test_what_no_condition_passes_is_nobodys_business(model, lora, kind, load, caplog) -> None:
    styled = load(model, UNTOUCHED[kind]())
    assert styled.patches or styled.hook_patches
    patched = judge(styled)
    assert patched.tellable and not patched.stays and not patched.taken_off
    if load is loaded:
        conditioned = independent(styled, lora)
        assert torch.equal(kv_of(conditioned), kv_of(independent(model, lora)))
        saved.compute(conditioned, prompt(0), LATENT, "")
        assert not caplog.records


def test_hooks_on_a_conditions_layers_are_said(model) -> None:
    assert judge(with_hooks(model, lora_of(QKV, 96))).stays == {"hook"}


def test_wrapped_weights_are_said_by_their_layer(model) -> None:
    clone = model.clone()
    clone.add_weight_wrapper("diffusion_model.txt_in.weight", lambda w: w)
    assert judge(clone).tellable
    clone.add_weight_wrapper(f"diffusion_model.{QKV}.weight", lambda w: w)
    assert judge(clone).stays == {"weight wrapper"}


@pytest.mark.compatibility("Neighbours", "LoRAs of a model that is merged in", "works")
@pytest.mark.parametrize("ratio", [0.3, 0.8])
@pytest.mark.parametrize("styled_first", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_a_lora_that_came_through_a_merge_is_taken_off(
    model, lora, ratio, styled_first, before
) -> None:
    """Either model may have it; the merge of both without it is what the condition sees."""
    other = make_model(flux_config(True), {
        k: v + 0.05 for k, v in model.model.diffusion_model.state_dict().items()
    })  # fmt: skip
    file = lora_of(QKV, 96) | lora_of(LAST, 224)

    def merged(one, two):
        return ModelMergeSimple().merge(*((one, two) if styled_first else (two, one)), ratio)[0]

    want = kv_of(independent(merged(model, other), lora))
    styled = loaded(model, file)
    both = merged(styled, other)
    if not before:
        both = loaded(both, file)  # once more, on top
    assert relative_error(kv_of(independent(both, lora)), want) < 1e-5
    assert relative_error(sample(both), sample(merged(model, other))) > 1e-3


def test_weights_that_are_set_afterwards_take_a_lora_away(model, lora) -> None:
    """Taking off what isn't there any more would put its opposite on."""
    new = {f"diffusion_model.{QKV}.set_weight": randn(96, 32)}
    want = kv_of(independent(loaded(model, new), lora))
    both = loaded(loaded(model, lora_of(QKV, 96)), new)
    assert relative_error(kv_of(independent(both, lora)), want) < 1e-5


@bypass
@pytest.mark.compatibility("Neighbours", "Load LoRA (Bypass)", "works")
@pytest.mark.parametrize("file", [lora_of(QKV, 96) | lora_of(LAST, 224), lokr_of(QKV, 96)])
def test_bypass_loras_are_taken_off(model, lora, file, caplog) -> None:
    """Whatever kind they are, and several of them; a file's K/V are those without."""
    clean = make_model(flux_config(True))
    want = kv_of(independent(clean, lora))
    base = sample(clean)
    styled = loaded(clean, file, comfy.sd.load_bypass_lora_for_models)
    conditioned = independent(styled, lora)
    assert relative_error(sample(styled), base) > 1e-3
    assert relative_error(kv_of(conditioned), want) < 1e-5
    assert "changes the conditions too" not in caplog.text
    entry = saved.compute(conditioned, prompt(0), LATENT, "").entries["image"]
    kept = torch.cat([t.flatten() for kv in entry.blocks.values() for t in (kv.k, kv.v)])
    assert relative_error(kept, want) < 1e-5


def test_a_layer_with_a_forward_of_anothers_is_said(lora, caplog) -> None:
    model = make_model(flux_config(True))
    layer = model.model.diffusion_model.get_submodule(QKV)
    own = layer.forward
    layer.forward = lambda x: 1.1 * own(x)
    conditioned = independent(model, lora)
    sample(conditioned, steps=1)
    assert "with another forward changes the conditions too" in caplog.text
    with pytest.raises(Omini2Error, match=r"^model: its weights are merged or patched"):
        saved.compute(conditioned, prompt(0), LATENT, "")


def test_joint_conditions_too(model, lora) -> None:
    file = lora_of(LAST, 224)
    joint = apply(model, random_condition(), lora, attention="joint", condition_scale=1.0)
    styled = apply(loaded(model, file), random_condition(), lora, attention="joint")
    assert relative_error(sample(styled), sample(joint)) > 1e-4  # the picture has it
    assert judge(loaded(model, file)).taken_off[LAST][0].up.shape == (224, 2)
