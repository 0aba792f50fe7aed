"""A refresh happens at the first evaluation of its step, however often a sampler evaluates."""

import math
from itertools import pairwise

import comfy.samplers
import comfy_extras.nodes_advanced_samplers as advanced
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
    sample,
    with_cache,
)

from omini2_extension.omini2_core.engine.evaluation import Schedule

SAMPLERS = {  # evaluations per step, of n steps
    "euler": lambda n: n,
    "heun": lambda n: 2 * n - 1,
    "dpmpp_2m": lambda n: n,
    "dpmpp_sde": lambda n: 2 * n - 1,
    "uni_pc": lambda n: n,
}


@pytest.fixture(scope="module")
def joint():
    model = make_model(flux_config(True))
    return apply(model, random_condition(3, 3), random_lora("sampler.safetensors"))


@pytest.mark.compatibility("Neighbours", "KSampler's samplers of one and several stages", "works")
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 5, 7])
@pytest.mark.parametrize("every", [1, 2, 5])
def test_refreshes_follow_the_schedule(joint, sampler, steps, every) -> None:
    with recorded_runs() as runs:
        sample(with_cache(joint, "auto", every), 3, 3, steps=steps, sampler=sampler)
    assert runs[0].refreshes == math.ceil(steps / every)
    if sampler != "uni_pc" or steps > 1:
        assert runs[0].evaluations == SAMPLERS[sampler](steps)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_a_cache_every_evaluation_runs_every_branch(joint, sampler) -> None:
    with recorded_runs() as runs:
        sample(joint, 3, 3, steps=4, sampler=sampler)
    assert runs[0].refreshes == runs[0].evaluations
    assert runs[0].kv_bytes == 0


@pytest.mark.compatibility("Neighbours", "KSampler (Advanced), parts of a schedule", "works")
@pytest.mark.parametrize(("start", "end"), [(0, 4), (3, 10), (4, 8), (9, 10)])
def test_ksampler_advanced(joint, start, end) -> None:
    with recorded_runs() as runs:
        sample(
            with_cache(joint, "every_n_steps", 3),
            3,
            3,
            steps=10,
            start_step=start,
            last_step=end,
        )
    assert runs[0].refreshes == math.ceil((end - start) / 3)


def test_once_computes_joint_conditions_once(joint) -> None:
    with recorded_runs() as runs:
        sample(with_cache(joint, "once"), 3, 3, steps=6, sampler="heun")
    assert runs[0].refreshes == 1
    assert runs[0].spared == pytest.approx(1 - 1 / 11)


def test_every_step_cache_equals_no_cache(joint) -> None:
    a = sample(joint, 3, 3, steps=4)
    assert torch.equal(sample(with_cache(joint, "every_n_steps", 1), 3, 3, steps=4), a)
    assert torch.equal(sample(with_cache(joint, "off"), 3, 3, steps=4), a)


def test_looking_ahead_does_not_refresh_twice(joint) -> None:
    with recorded_runs() as runs:
        sample(with_cache(joint, "every_n_steps", 3), 3, 3, steps=6, sampler="heunpp2")
    assert runs[0].refreshes == 2


def steps_of(sigmas, schedule) -> list[int]:
    at, steps = Schedule(schedule), []
    for sigma in sigmas:
        at.call()
        steps.append(at.step(sigma))
        assert at.step(sigma) == steps[-1]  # another prompt in the same call
    return steps


def test_steps_of_a_falling_schedule() -> None:
    schedule = [1.0, 0.8, 0.5, 0.1, 0.0]
    sigmas = [1.2, 1.0, 0.9, 0.8, 0.6, 0.5, 0.3, 0.1, 0.05, 0.0]
    assert steps_of(sigmas, schedule) == [0, 0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert steps_of([0.8 * (1 - 1e-6), 0.8 * (1 + 1e-6)], schedule) == [1, 1]
    assert steps_of([0.5], [1.0]) == [0]
    assert steps_of([1.0, 0.8, 0.9, 0.8, 0.1, 0.3], schedule) == [0, 1, 0, 1, 3, 2]  # looks ahead


@pytest.mark.parametrize(
    "schedule",
    [
        [0.0, 0.1, 0.5, 0.8, 1.0],
        [1.0, 0.8, 0.6, 0.4, 0.8, 0.6, 0.4, 0.2, 0.0],
        [1.0, 0.8, 0.9, 0.7, 0.8, 0.5, 0.6, 0.3, 0.0],
        [0.2, 0.6, 0.2, 0.6, 0.2, 0.0],
    ],
)
def test_steps_of_schedules_that_rise_or_jump_back(schedule) -> None:
    """A sampler that evaluates once a step, and one that evaluates the end of a step as well."""
    count = len(schedule) - 1
    assert steps_of(schedule[:-1], schedule) == list(range(count))
    twice = [sigma for pair in pairwise(schedule) for sigma in pair][:-1]
    ahead = [step for i in range(count) for step in (i, i + 1)][:-1]
    assert steps_of(twice, schedule) == ahead


def test_steps_without_length() -> None:
    """Some schedules say the same noise level twice."""
    for schedule in (
        [1.0, 1.0, 0.5, 0.0],
        [1.0, 0.8, 0.5, 0.5, 0.5, 0.2, 0.0],
        [1.0, 0.5, 0.0, 0.0],
    ):
        assert steps_of(schedule[:-1], schedule) == list(range(len(schedule) - 1))


def guided(model, sigmas, sampler=None, h=6, positive=None):
    """A run with noise levels of one's own."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive or prompt(0), prompt(1))
    guider.set_cfg(1.0)
    generator = torch.Generator().manual_seed(9)
    noise, latent = torch.randn(2, 1, 16, 2 * h, 2 * h, generator=generator)
    sampler = sampler or comfy.samplers.sampler_object("euler")
    return guider.sample(noise, latent, sampler, torch.tensor(sigmas), disable_pbar=True, seed=1)


@pytest.mark.compatibility("Neighbours", "FlipSigmas, schedules that jump back", "works")
@pytest.mark.parametrize(
    "sigmas",
    [
        [1e-4, 0.2, 0.4, 0.6, 0.8, 0.999],
        [1.0, 0.8, 0.6, 0.4, 0.8, 0.6, 0.4, 0.2, 0.0],
        [1.0, 0.8, 0.9, 0.7, 0.8, 0.5, 0.6, 0.3, 0.0],
        [1.0, 0.6, 0.6, 0.3, 0.0],
    ],
)
def test_refreshes_follow_any_schedule(joint, sigmas) -> None:
    steps = len(sigmas) - 1
    for every in (1, 2, 3):
        with recorded_runs() as runs:
            picture = guided(with_cache(joint, "every_n_steps", every), sigmas)
        assert runs[0].refreshes == math.ceil(steps / every)
        if every == 1:
            assert torch.equal(picture, guided(joint, sigmas))


def growing(ratio):
    """The host's sampler whose picture ends at another size."""
    node, given = advanced.SamplerLCMUpscale, (ratio, -1, "bilinear")
    newer = hasattr(node, "execute")
    return node.execute(*given).args[0] if newer else node().get_sampler(*given)[0]


@pytest.mark.compatibility("Neighbours", "SamplerLCMUpscale, a picture that grows", "works")
@pytest.mark.parametrize("placement", ["fit", "aligned"])
def test_a_picture_may_grow_while_it_is_sampled(placement, caplog) -> None:
    """Each step's K/V are those of a run at that size, and an aligned condition says what it is."""
    model = make_model(flux_config(True))
    condition = random_condition(3, 3, placement=placement)
    grown = apply(model, condition, random_lora("grow.safetensors"), attention="independent")
    node = advanced.SamplerLCMUpscale
    given = 2.0, -1, "bilinear"
    sampler = (
        node.execute(*given).args[0] if hasattr(node, "execute") else node().get_sampler(*given)[0]
    )
    sigmas = [1.0, 0.7, 0.4, 0.2, 0.0]
    torch.manual_seed(0)
    every = guided(grown, sigmas, sampler)
    said = [record.message for record in caplog.records if "placement: aligned" in record.message]
    assert (len(said) > 1) is (placement == "aligned")
    assert every.shape == (1, 16, 24, 24)
    torch.manual_seed(0)
    with recorded_runs() as runs:
        once = guided(with_cache(grown, "once"), sigmas, sampler)
    assert torch.equal(once, every) or (once - every).norm() < 1e-5 * every.norm()
    # 12, 18 and 24 latent pixels, each with K/V of its own.
    assert runs[0].branches_computed == 3


def test_a_picture_that_shrinks_is_refused_with_the_samplers_name(joint) -> None:
    node = advanced.SamplerLCMUpscale
    given = 0.5, -1, "bilinear"
    sampler = (
        node.execute(*given).args[0] if hasattr(node, "execute") else node().get_sampler(*given)[0]
    )
    with pytest.raises(ValueError, match="a sampler that makes the picture smaller"):
        guided(joint, [1.0, 0.7, 0.4, 0.2, 0.0], sampler)


def test_a_part_that_stays_while_the_picture_grows_around_it() -> None:
    """An area of a prompt keeps its size; a condition that is fitted to the picture moves in it."""
    model = make_model(flux_config(True))
    condition = random_condition(3, 3, placement="fit")
    conditioned = apply(model, condition, random_lora("grow.safetensors"), attention="independent")
    sigmas = [1.0, 0.7, 0.4, 0.2, 0.0]
    pictures = []
    for reuse in ("off", "once"):
        torch.manual_seed(0)
        cached = with_cache(conditioned, reuse)
        pictures.append(
            guided(cached, sigmas, growing(2.0), positive=prompt(0, area=(6, 12, 0, 0)))
        )
    assert (pictures[0] - pictures[1]).norm() < 1e-5 * pictures[0].norm()
