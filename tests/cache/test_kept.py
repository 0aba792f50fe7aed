"""K/V between runs: a second seed computes none, and nothing stale is ever used."""

import gc
import weakref
from dataclasses import replace

import comfy.model_management
import comfy.sd
import pytest
import torch
from tiny import (
    apply,
    flux_config,
    make_model,
    prompt,
    random_condition,
    random_easycontrol_lora,
    random_lora,
    recorded_runs,
    reference,
    relative_error,
    sample,
    with_cache,
)

from omini2_extension.omini2_core.cache import between_runs
from omini2_extension.omini2_core.cache.run_cache import RunCache
from omini2_extension.omini2_core.host import identity
from omini2_extension.omini2_core.host.patches import judge


@pytest.fixture
def model():
    return make_model(flux_config(True))


def independent(model, lora, condition=None, **options):
    condition = condition or random_condition()
    return with_cache(apply(model, condition, lora, attention="independent", **options))


def runs_of(*calls) -> list:
    """What each of some runs, one after the other, reports."""
    with recorded_runs(keep=True) as runs:
        for call in calls:
            call()
    return runs


def test_a_second_seed_computes_nothing(model, lora) -> None:
    conditioned = independent(model, lora)
    runs = runs_of(lambda: sample(conditioned, seed=1), lambda: sample(conditioned, seed=2))
    assert [(run.refreshes, run.reused) for run in runs] == [(1, 0), (0, 1)]
    got = sample(conditioned, seed=3)
    identity.between_runs(model).clear()
    assert torch.equal(sample(conditioned, seed=3), got)


def test_nodes_that_are_executed_again_find_it(model, lora) -> None:
    """condition_scale, percents and the number of steps are not part of it."""
    runs = runs_of(
        lambda: sample(independent(model, lora)),
        lambda: sample(independent(model, lora, condition_scale=1.4, end_percent=0.9), steps=3),
    )
    assert [run.reused for run in runs] == [0, 1]


def test_positive_and_negative_have_their_own(model, lora) -> None:
    conditioned = independent(model, lora)
    runs = runs_of(
        lambda: sample(conditioned, cfg=3.0),
        lambda: sample(conditioned, cfg=3.0, seed=1),
        lambda: sample(conditioned, cfg=3.0, positive=prompt(1), negative=prompt(0)),
    )
    assert [run.reused for run in runs] == [0, 2, 2]


def with_style(model, strength):
    style = reference("dev_like").under("lora.style.")
    return comfy.sd.load_lora_for_models(model, None, style, strength, 0)[0]


def merged(model):
    other = {k: v + 0.05 for k, v in model.model.diffusion_model.state_dict().items()}
    clone = model.clone()
    patches = make_model(flux_config(True), other).get_key_patches("diffusion_model.")
    clone.add_patches(patches, 0.5, 0.5)
    return clone


def with_other_block(model):
    """An object patch, as extensions that replace parts of the model make them."""
    clone = model.clone()
    linear = model.model.diffusion_model.img_in
    other = type(linear)(64, 32)
    other.load_state_dict({k: -v for k, v in linear.state_dict().items()})
    clone.add_object_patch("diffusion_model.img_in", other)
    return clone


def moved(model):
    clone = model.clone()
    clone.set_model_rope_options(2.0, 0.0, 1.0, 0.0, 1.0, 0.0)
    return clone


def doubled(condition):
    return replace(condition, latent=2 * condition.latent)


def fit():
    return random_condition(placement="fit")


def diagonal():
    return random_condition(keep=torch.eye(6, dtype=torch.bool))


# model, LoRA, another LoRA -> a model with one thing changed, and how to sample it.
CHANGES = {
    "condition": lambda m, a, b: (independent(m, a, doubled(random_condition())), {}),
    "kept tokens": lambda m, a, b: (independent(m, a, diagonal()), {}),
    "lora": lambda m, a, b: (independent(m, b), {}),
    "strength": lambda m, a, b: (independent(m, a, strength=0.5), {}),
    "placement": lambda m, a, b: (independent(m, a, random_condition(placement="right")), {}),
    "picture size": lambda m, a, b: (independent(m, a, fit()), {"h": 6, "w": 8}),
    "rope options": lambda m, a, b: (independent(moved(m), a), {}),
    "pooled text": lambda m, a, b: (independent(m, a), {"positive": prompt(5)}),
    "ordinary lora": lambda m, a, b: (independent(with_style(m, 0.6), a), {}),
    "merged model": lambda m, a, b: (independent(merged(m), a), {}),
    "replaced part": lambda m, a, b: (independent(with_other_block(m), a), {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_never_served_stale(model, lora, change) -> None:
    """After runs without the change: the same as on a model that has seen nothing else."""
    other = random_lora("kept_other.safetensors", seed=5)
    changed, options = CHANGES[change](model, lora, other)
    with recorded_runs(keep=True) as runs:
        sample(independent(model, lora))
        sample(independent(model, lora, fit()))
        got, again = sample(changed, **options), sample(changed, **options)
    assert [run.reused for run in runs[2:]] == [0, 1]
    changed, options = CHANGES[change](make_model(flux_config(True)), lora, other)
    want = sample(changed, **options)
    assert relative_error(got, want) < 1e-6
    assert torch.equal(again, got)


def test_guidance_is_part_of_it_where_the_branch_follows_it(model, lora) -> None:
    for name, reused in ((random_easycontrol_lora("kept_easy.safetensors"), 0), (lora, 1)):
        conditioned = independent(model, name)
        runs = runs_of(
            lambda c=conditioned: sample(c, positive=prompt(guidance=2.0)),
            lambda c=conditioned: sample(c, positive=prompt(guidance=4.0)),
        )
        assert runs[1].reused == reused


def test_storage_is_part_of_it(model, lora) -> None:
    conditioned = independent(model, lora)
    runs = runs_of(
        lambda: sample(with_cache(conditioned, storage="fp8")),
        lambda: sample(conditioned),
        lambda: sample(with_cache(conditioned, keep_on="cpu")),
    )
    assert [run.reused for run in runs] == [0, 0, 1]


def test_black_images_of_image_guidance_are_kept_apart(model, lora) -> None:
    from omini2_extension.nodes import ImageGuidance

    guided = ImageGuidance.execute(independent(model, lora), 1.5)[0]
    want = sample(guided)
    runs = runs_of(lambda: sample(guided, seed=1))
    assert runs[0].reused == 2
    assert torch.equal(sample(guided), want)


@pytest.mark.parametrize("reuse", ["off", "every_n_steps"])
def test_only_what_is_computed_once_is_kept(model, lora, reuse) -> None:
    conditioned = apply(model, random_condition(), lora, attention="independent")
    sample(with_cache(conditioned, reuse))
    assert identity.between_runs(model).nbytes == 0


def test_joint_conditions_are_never_kept(model, lora) -> None:
    """They have seen the picture, so another seed has others."""
    conditioned = with_cache(apply(model, random_condition(), lora, attention="joint"), "once")
    runs = runs_of(lambda: sample(conditioned), lambda: sample(conditioned, seed=1))
    assert [run.refreshes for run in runs] == [1, 1]
    assert identity.between_runs(model).nbytes == 0


def test_hooks_on_weights_keep_nothing(model, lora) -> None:
    conditioned = independent(model, lora)
    conditioned.hook_patches = {"hook": {}}
    assert judge(conditioned).identity is None


class Stop(Exception):
    pass


def test_a_run_that_fails_leaves_what_is_whole(model, lora, monkeypatch) -> None:
    conditioned = independent(model, lora)
    keep, calls = RunCache.store, []

    def fail(cache, entry, number, k, v):
        calls.append(1)
        if len(calls) == 3:
            raise Stop
        keep(cache, entry, number, k, v)

    with monkeypatch.context() as patch:
        patch.setattr(RunCache, "store", fail)
        with pytest.raises(Stop):
            sample(conditioned)
    assert identity.between_runs(model).nbytes == 0
    want = sample(conditioned)
    fresh = sample(independent(make_model(flux_config(True)), lora))
    assert relative_error(want, fresh) < 1e-6


def test_bounded(model, lora, monkeypatch) -> None:
    """The last run's stay; older ones go once there are new ones to compute."""
    monkeypatch.setattr(between_runs.BetweenRuns.trim, "__defaults__", (0,))
    conditions = [independent(model, lora, random_condition(6, 6, seed)) for seed in range(4)]
    for conditioned in conditions:
        sample(conditioned)
        assert identity.between_runs(model).nbytes == 36 * 2 * 5 * 32 * 4
    runs = runs_of(lambda: sample(conditions[3]), lambda: sample(conditions[0]))
    assert [run.reused for run in runs] == [1, 0]


@pytest.mark.compatibility("Neighbours", "unloading the model between runs", "works")
def test_gone_when_the_host_unloads_the_model(model, lora) -> None:
    """As by the host's Free model and node cache, and when another model needs the room."""
    conditioned = independent(model, lora)
    sample(conditioned)
    assert identity.between_runs(model).nbytes > 0
    other = independent(model, lora, strength=0.7)
    sample(other)  # another clone takes over: not unloaded
    assert identity.between_runs(model).nbytes == 2 * 36 * 2 * 5 * 32 * 4
    comfy.model_management.unload_all_models()
    assert identity.between_runs(model).nbytes == 0


def test_gone_with_the_model(lora) -> None:
    model = make_model(flux_config(True))
    conditioned = independent(model, lora)
    sample(conditioned)
    tensors = [
        weakref.ref(block.k)
        for entry in identity.between_runs(model)._entries.values()
        for block in entry.blocks.values()
    ]
    assert len(tensors) == 5
    comfy.model_management.unload_all_models()
    del model, conditioned
    gc.collect()
    assert not any(reference() is not None for reference in tensors)
