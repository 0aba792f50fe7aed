"""Token integration: only the tokens to paint are denoised, the known ones come out known."""

from unittest import mock

import comfy.controlnet
import comfy.latent_formats
import comfy.sample
import comfy.samplers
import pytest
import torch
from helpers.controlnet import with_controlnet
from helpers.original import TOLERANCE, packed
from helpers.patterns import box, image_condition, integrated, token_pattern
from helpers.refusals import refused, sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    apply,
    compact,
    encode,
    flux_config,
    make_model,
    prompt,
    random_condition,
    record,
    recorded_runs,
    reference,
    relative_error,
    sample,
    with_cache,
)

CASES = [
    (file, name, mode)
    for file in ("dev_like", "schnell_like")
    for name, meta in reference(file).meta["cases"].items()
    for mode in ("every_step", "cached_once")
    if meta.get("integrate")
]


def known_part(latent: torch.Tensor, paint: torch.Tensor) -> torch.Tensor:
    known = ~paint.repeat_interleave(2, 0).repeat_interleave(2, 1)
    return latent[..., known]


@pytest.mark.parametrize(("file", "name", "mode"), CASES)
def test_velocity_is_the_originals(file, name, mode) -> None:
    ref = reference(file)
    case = ref.case(name)
    (cond,) = case.meta["conds"]
    keep = case.tensors["cond0.keep"]
    condition = integrated(encode(case.tensors["cond0.latent"]), ~keep)
    attention = "independent" if case.meta.get("independent") else "joint"
    model = apply(ref.model(), condition, ref.lora_file(cond["lora"]), attention=attention)
    if mode == "cached_once":
        model = with_cache(model, "once")
    painted = packed(record(model, case))[:, :, ~keep.flatten()]
    want = case.tensors[f"pred_{mode}"]
    assert painted.shape == want.shape
    assert relative_error(painted, want) < TOLERANCE


@pytest.mark.parametrize("sampler", comfy.samplers.SAMPLER_NAMES)
def test_the_known_region_is_known_to_the_bit(model, lora, sampler) -> None:
    condition = random_condition()
    paint = box()
    conditioned = with_cache(apply(model, integrated(condition, paint), lora), "auto", 3)
    steps = 3 if sampler.startswith("dpm_adaptive") else 4
    out = sample(conditioned, steps=steps, sampler=sampler, cfg=1.0)
    assert torch.equal(known_part(out, paint), known_part(condition.latent, paint))
    assert torch.isfinite(out).all()


def test_previews_show_the_known_region(model, lora) -> None:
    condition = random_condition()
    paint = box()
    previews = []
    sample(
        apply(model, integrated(condition, paint), lora),
        callback=lambda step, x0, x, total: previews.append(x0.clone()),
    )
    known = comfy.latent_formats.Flux().process_in(condition.latent)
    for preview in previews:
        assert preview.shape == known.shape
        assert torch.equal(known_part(preview, paint), known_part(known, paint))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["one", "checkerboard", "random", "full"]),
    st.sampled_from(["joint", "independent"]),
    st.integers(1, 3),
    st.sampled_from(["off", "once"]),
)
def test_any_size_mask_and_batch(model, lora, h, w, kind, attention, batch, reuse) -> None:
    paint = token_pattern(kind, h, w, seed=h * w)
    if not paint.any():
        return
    condition = random_condition(h, w)
    conditioned = apply(model, integrated(condition, paint), lora, attention=attention)
    out = sample(with_cache(conditioned, reuse), h, w, batch=batch, steps=2, cfg=2.0)
    for picture in out:
        assert torch.equal(known_part(picture, paint), known_part(condition.latent[0], paint))


def test_painting_everything_is_plain_sampling(model, lora) -> None:
    paint = torch.ones(6, 6, dtype=torch.bool)
    for attention in ("joint", "independent"):
        conditioned = apply(model, integrated(random_condition(), paint), lora, attention=attention)
        assert torch.equal(sample(conditioned), sample(model))


def test_only_the_painted_tokens_are_in_the_picture_branch(model, lora) -> None:
    shapes = set()

    def override(func, q, k, v, heads, **kwargs):
        shapes.add((q.shape[2], k.shape[2]))
        return func(q, k, v, heads, **kwargs)

    conditioned = apply(model, integrated(random_condition(), box()), lora)
    conditioned.model_options["transformer_options"]["optimized_attention_override"] = override
    with recorded_runs() as runs:
        sample(conditioned)
    assert shapes == {(5 + 9, 5 + 36)}
    assert runs[0].tokens == [27]


def test_the_painted_region_sees_the_known_one(model, lora) -> None:
    paint = box()
    outs = [
        sample(apply(model, integrated(random_condition(seed=seed), paint), lora), steps=2)
        for seed in (1, 2)
    ]
    assert relative_error(known_part(outs[0], ~paint), known_part(outs[1], ~paint)) > 1e-3


@pytest.mark.compatibility("Neighbours", "ControlNet with token integration", "works")
@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_with_controlnet(model, lora, attention) -> None:
    paint = box()
    condition = random_condition()
    conditioned = apply(model, integrated(condition, paint), lora, attention=attention)
    plain = sample(conditioned)
    out = sample(conditioned, positive=with_controlnet())
    assert relative_error(known_part(out, ~paint), known_part(plain, ~paint)) > 1e-3
    assert torch.equal(known_part(out, paint), known_part(condition.latent, paint))


def test_controlnet_residuals_reach_their_own_tokens(model, lora) -> None:
    """Residuals on known tokens only must not move a painted one."""
    paint = box()
    conditioned = apply(model, integrated(random_condition(), paint), lora)
    plain = sample(conditioned)

    def residuals(where):
        class Control(comfy.controlnet.ControlBase):
            def get_control(self, x, *args):
                rows = torch.where(where.flatten(), 3.0, 0.0)[None, :, None]
                add = rows.expand(x.shape[0], -1, 32).clone()
                return {"input": [add, add], "output": [add, None, add]}

        return prompt(0, control=Control(), control_apply_to_uncond=True)

    assert torch.equal(sample(conditioned, positive=residuals(~paint)), plain)
    assert not torch.equal(sample(conditioned, positive=residuals(paint)), plain)


def test_with_another_condition_beside_it(model, lora) -> None:
    paint = box()
    condition = random_condition()
    inpainting = apply(model, integrated(condition, paint), lora)
    both = apply(inpainting, random_condition(4, 4, 5, placement="right"), lora)
    out = sample(both)
    assert relative_error(known_part(out, ~paint), known_part(sample(inpainting), ~paint)) > 1e-3
    assert torch.equal(known_part(out, paint), known_part(condition.latent, paint))


@pytest.mark.compatibility("Neighbours", "attention masks of prompts", "works")
def test_an_attention_mask_of_the_host_keeps_its_tokens(model, lora) -> None:
    """A mask that hides the first text token from everyone, by rows and columns of all tokens."""
    conditioned = apply(model, integrated(random_condition(), box()), lora)
    seen = []

    def override(func, q, k, v, heads, mask=None, **kwargs):
        seen.append(mask)
        return func(q, k, v, heads, mask=mask, **kwargs)

    conditioned.model_options["transformer_options"]["optimized_attention_override"] = override
    size = 5 + 36
    mask = torch.ones(1, size, size, dtype=torch.bool)
    mask[:, :, 0] = False
    flux = type(conditioned.model.diffusion_model)
    forward = flux.forward_orig

    def masked(self, *args, **kwargs):
        kwargs["attn_mask"] = mask
        return forward(self, *args, **kwargs)

    with mock.patch.object(flux, "forward_orig", masked):
        sample(conditioned, steps=1)
    seen.pop(0)  # whether masks are heeded at all
    assert len(seen) == 5
    for each in seen:
        assert each.shape == (1, 5 + 9, 5 + 36)
        assert (each[..., 0] == -torch.inf).all() and (each[..., 1:] == 0).all()


@pytest.mark.parametrize("shift", [True, False])
def test_schedule_shift_follows_the_painted_tokens(model, lora, shift) -> None:
    paint = box()
    condition = integrated(random_condition(), paint, shift_schedule=shift)
    sampling = apply(model, condition, lora).get_model_object("model_sampling")
    if shift:  # the original's calculate_shift for 9 tokens
        assert sampling.shift == pytest.approx(0.5 + 0.65 * (9 - 256) / (4096 - 256))
    else:
        assert sampling.shift == 1.15
    assert model.get_model_object("model_sampling").shift == 1.15


def test_schnells_schedule_is_not_shifted(lora) -> None:
    schnell = make_model(flux_config(False))
    conditioned = apply(schnell, integrated(random_condition(), box()), lora)
    assert "model_sampling" not in conditioned.object_patches


def test_leftover_noise_is_left_alone(model, lora) -> None:
    """A run that stops half-way hands on a noisy picture; the next one ends in what is known."""
    condition = random_condition()
    paint = box()
    conditioned = apply(model, integrated(condition, paint), lora)
    half = sample(conditioned, steps=4, last_step=2)
    assert not torch.equal(known_part(half, paint), known_part(condition.latent, paint))


def test_pruned_known_tokens_stay_in_the_picture(model, lora) -> None:
    pixels = torch.zeros(1, 96, 96, 3)
    pixels[:, :48] = torch.rand(1, 48, 96, 3)
    condition = image_condition(pixels)
    paint = box()
    pruned = integrated(condition, paint, prune="empty")
    assert pruned.token_count < integrated(condition, paint).token_count
    out = sample(apply(model, pruned, lora))
    assert torch.equal(known_part(out, paint), known_part(condition.latent, paint))


def test_refusals(model, lora) -> None:
    condition = integrated(random_condition(), box())
    once = apply(model, condition, lora)
    with refused("condition: this model has a token integration already") as error:
        apply(once, condition, lora)
    sentence(error)
    with refused("condition: token integration .* condition is 96x96 and the picture 128x64"):
        sample(once, 4, 8)


def test_two_compact_tokens_in_a_row(model, lora) -> None:
    condition = integrated(random_condition(), box())
    assert compact(condition)[0] is condition
    with refused("compression: this condition is a token integration") as error:
        compact(condition, compression=0.5)
    sentence(error)
    with refused("token_integration: this condition is one already") as error:
        integrated(condition, box())
    sentence(error)
    nothing_known = integrated(random_condition(), torch.ones(6, 6, dtype=torch.bool))
    assert compact(nothing_known)[2] == 0
