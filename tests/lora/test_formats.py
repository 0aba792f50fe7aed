"""Number formats and weight streaming: the branch goes through the model's own modules."""

import comfy.model_management
import comfy.ops
import comfy.sd
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from tiny import (
    apply,
    flux_config,
    make_model,
    prompt,
    random_condition,
    reference,
    relative_error,
    sample,
    with_cache,
)

FORMATS = {  # weights, computation
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp8 e4m3": (torch.float8_e4m3fn, torch.bfloat16),
    "fp8 e5m2": (torch.float8_e5m2, torch.bfloat16),
}


def row(name: str) -> pytest.MarkDecorator:
    return pytest.mark.compatibility("Models", name, "works", "")


def conditioned(model: ModelPatcher, lora: str, attention: str) -> ModelPatcher:
    condition = random_condition(4, 4, placement="fit")
    return with_cache(apply(model, condition, lora, attention=attention), "auto", 2)


@pytest.mark.parametrize("attention", ["joint", "independent"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=row(name)) for name in FORMATS])
def test_formats(attention, name) -> None:
    """With conditions, a format costs no more accuracy than the model alone loses to it."""
    weights_dtype, compute_dtype = FORMATS[name]
    ref = reference("dev_like")
    base, lora = ref.model(), ref.lora_file("a")
    weights = base.model.diffusion_model.state_dict()
    if compute_dtype is not None:  # what is compared is the computation, not the stored weights
        rounded = {k: v.to(weights_dtype).float() for k, v in weights.items()}
        base = make_model(flux_config(True), rounded)
    model = make_model(flux_config(True), weights, weights_dtype, compute_dtype)
    assert model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight.dtype == weights_dtype
    positive = prompt(0, guidance=4.0)  # the host rounds 3.5 * 1000 to bf16, which moves pictures
    plain = sample(base, positive=positive)
    want = sample(conditioned(base, lora, attention), positive=positive)
    tolerance = 2 * relative_error(sample(model, positive=positive), plain)
    got = sample(conditioned(model, lora, attention), positive=positive)
    error = relative_error(got, want)
    assert 0 < error < tolerance < relative_error(want, plain)


@row("Weights that stay on the CPU and are streamed")
@pytest.mark.parametrize("attention", ["joint", "independent"])
@pytest.mark.parametrize("with_style", [False, True])
def test_low_vram_weight_streaming(lora, attention, with_style, monkeypatch) -> None:
    """Weights that stay behind and are cast, and patched by LoRAs, as they are used."""
    ref = reference("dev_like")
    model = ref.model()
    if with_style:
        model, _ = comfy.sd.load_lora_for_models(model, None, ref.under("lora.style."), 1.0, 0)
    model = conditioned(model, lora, attention)
    want = sample(model, steps=2)

    streamed = []
    load = ModelPatcher.load

    def low_vram(patcher, device_to=None, lowvram_model_memory=0, *args, **kwargs):
        kwargs["full_load"] = False
        load(patcher, device_to, 20000, *args[:1], **kwargs)
        streamed.append(patcher.model.model_lowvram)

    monkeypatch.setattr(ModelPatcher, "load", low_vram)
    comfy.model_management.unload_all_models()
    got = sample(model, steps=2)
    assert streamed == [True]
    assert relative_error(got, want) < 1e-5
    comfy.model_management.unload_all_models()
