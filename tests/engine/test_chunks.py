"""Positive and negative prompts, batches and splits: everyone gets their own K/V."""

from unittest import mock

import comfy.model_management
import pytest
import torch
from tiny import (
    apply,
    flux_config,
    make_model,
    prompt,
    random_condition,
    random_lora,
    recorded_runs,
    relative_error,
    sample,
    with_cache,
)

from omini2_extension.omini2_core.engine.run import Run


@pytest.fixture(scope="module", params=["joint", "independent"])
def conditioned(request):
    model = make_model(flux_config(True))
    lora = random_lora("chunks.safetensors")
    model = apply(model, random_condition(), lora, attention=request.param)
    return apply(model, random_condition(3, 4, 1, placement="right"), lora, attention=request.param)


def split():
    """Leaves no memory for batching, so the host evaluates each chunk by itself."""

    def free(device: object = None, torch_free_too: bool = False) -> object:
        return (1 << 34, 1 << 34) if torch_free_too else 0

    return mock.patch.object(comfy.model_management, "get_free_memory", free)


@pytest.mark.compatibility("Neighbours", "batches of pictures and of prompts", "works")
@pytest.mark.parametrize("batch", [1, 2, 3, 4])
@pytest.mark.parametrize("reuse", ["off", "once", "every_n_steps"])
def test_batched_and_split_evaluation_agree(conditioned, batch, reuse) -> None:
    model = with_cache(conditioned, reuse, 2)
    rows = []
    evaluation = Run.evaluation

    def spy(run, call):
        rows.append(len(call.chunks))
        return evaluation(run, call)

    with mock.patch.object(Run, "evaluation", spy):
        together = sample(model, cfg=3.0, batch=batch)
        assert set(rows) == {2}
        rows.clear()
        with split():
            apart = sample(model, cfg=3.0, batch=batch)
        assert set(rows) == {1}
    assert relative_error(apart, together) < 1e-5


def test_each_chunk_has_its_own_kv(conditioned) -> None:
    """Sharing K/V between prompts would show: they depend on the pooled text."""
    model = with_cache(conditioned, "once")
    with recorded_runs() as runs:
        one = sample(model, cfg=1.0)
        sample(model, cfg=3.0)
    assert runs[1].kv_bytes == 2 * runs[0].kv_bytes
    same = sample(model, cfg=3.0, positive=prompt(0), negative=prompt(0))
    assert relative_error(same, one) < 1e-4


def test_prompts_of_different_length(conditioned) -> None:
    model = with_cache(conditioned, "every_n_steps", 2)
    long = prompt(1, length=9)
    out = sample(model, cfg=3.0, negative=long)
    with split():
        assert relative_error(sample(model, cfg=3.0, negative=long), out) < 1e-5


def test_uncond_at_cfg_equals_its_own_run(conditioned) -> None:
    """At cfg 0 only the negative prompt counts; it must see its own K/V."""
    model = with_cache(conditioned, "once")
    negative_only = sample(model, cfg=0.0)
    swapped = sample(model, cfg=1.0, positive=prompt(1))
    assert relative_error(negative_only, swapped) < 1e-5


def test_batch_size_changes_between_runs(conditioned) -> None:
    model = with_cache(conditioned)
    first = sample(model, batch=2)
    sample(model, batch=4)
    sample(model, batch=1)
    assert torch.equal(sample(model, batch=2), first)


def test_rows_of_a_batch_are_independent_pictures(conditioned) -> None:
    from comfy.sample import prepare_noise

    batch = sample(conditioned, batch=3, steps=2)
    noise = prepare_noise(torch.zeros(3, 16, 12, 12), 0)
    with mock.patch("comfy.sample.prepare_noise", lambda *a, **k: noise[2:3]):
        alone = sample(conditioned, batch=1, steps=2)
    assert relative_error(batch[2:3], alone) < 1e-5


def test_one_model_in_two_samplers_of_different_size(conditioned) -> None:
    model = with_cache(conditioned)
    small = sample(model, 4, 6)
    large = sample(model, 8, 5)
    assert torch.equal(sample(model, 4, 6), small)
    assert torch.equal(sample(model, 8, 5), large)


@pytest.mark.compatibility("Neighbours", "batches of pictures and of prompts", "works")
def test_prompts_that_differ_within_a_batch(conditioned) -> None:
    """A batch of conditioning rows: each picture's K/V come from its own pooled text."""
    both = sample(conditioned, batch=2, steps=2, positive=prompt(5, batch=2))
    text, options = prompt(5, batch=2)[0]
    for i in range(2):
        row = [[text[i : i + 1], {**options, "pooled_output": options["pooled_output"][i : i + 1]}]]
        alone = sample(conditioned, batch=2, steps=2, positive=row)
        assert relative_error(both[i], alone[i]) < 1e-5


def test_odd_latent_sides_are_padded_to_whole_tokens(conditioned) -> None:
    import comfy.sample

    latent = torch.zeros(1, 16, 11, 13)
    out = comfy.sample.sample(
        conditioned,
        comfy.sample.prepare_noise(latent, 0),
        2,
        1.0,
        "euler",
        "simple",
        prompt(0),
        prompt(1),
        latent,
        disable_pbar=True,
    )
    assert out.shape == latent.shape
