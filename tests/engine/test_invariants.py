"""What must hold whatever the sizes, counts, places and scales are."""

import hashlib
import subprocess
import sys

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    apply,
    prompt,
    random_condition,
    random_lora,
    recorded_runs,
    relative_error,
    sample,
    with_cache,
)

from dev.paths import ROOT

SIDE = st.integers(1, 7)
DELTA = st.integers(-9, 9)
CONDITIONS = st.lists(
    st.tuples(
        SIDE,
        SIDE,
        st.sampled_from(["aligned", "fit", "left", "right", "above", "below", "custom"]),
        st.tuples(DELTA, DELTA),
        st.sampled_from([0.5, 1.0, 2.0, 2.75]),
        st.sampled_from([0.3, 1.0, 1.7]),
        st.integers(0, 1),
    ),
    min_size=1,
    max_size=4,
)


@pytest.fixture(scope="module")
def loras() -> list[str]:
    return [random_lora(f"invariant{seed}.safetensors", seed=seed) for seed in range(2)]


def build(model: ModelPatcher, loras: list[str], specs: list, attention: str) -> ModelPatcher:
    for seed, (h, w, placement, delta, position_scale, condition_scale, lora) in specs:
        if placement == "fit":
            position_scale = 1.0
        condition = random_condition(
            h, w, seed, placement=placement, delta=delta, position_scale=position_scale
        )
        model = apply(
            model, condition, loras[lora], attention=attention, condition_scale=condition_scale
        )
    return model


@settings(max_examples=15, deadline=None)
@given(CONDITIONS, SIDE, SIDE)
def test_once_is_exact_for_independent_conditions(model, loras, specs, h, w) -> None:
    conditioned = build(model, loras, list(enumerate(specs)), "independent")
    with recorded_runs() as runs:
        every_step = sample(conditioned, h, w, steps=3)
        once = sample(with_cache(conditioned, "once"), h, w, steps=3)
    # Not to the bit: computed once, conditions of one length are a batch.
    assert relative_error(once, every_step) < 1e-6
    assert [run.refreshes for run in runs] == [3, 1]


@settings(max_examples=15, deadline=None)
@given(CONDITIONS, SIDE, SIDE, st.sampled_from(["joint", "independent"]), st.randoms())
def test_the_order_of_conditions_does_not_matter(model, loras, specs, h, w, attention, rng) -> None:
    specs = list(enumerate(specs))
    shuffled = specs[:]
    rng.shuffle(shuffled)
    a = sample(build(model, loras, specs, attention), h, w, steps=2)
    b = sample(build(model, loras, shuffled, attention), h, w, steps=2)
    assert relative_error(a, b) < 1e-5


@settings(max_examples=10, deadline=None)
@given(CONDITIONS, SIDE, SIDE, st.sampled_from(["joint", "independent"]))
def test_condition_scale_0_is_no_condition(model, loras, specs, h, w, attention) -> None:
    shut_out = [(i, (*spec[:5], 0.0, spec[6])) for i, spec in enumerate(specs)]
    conditioned = build(model, loras, shut_out, attention)
    assert torch.equal(sample(conditioned, h, w, steps=2), sample(model, h, w, steps=2))


def test_a_condition_changes_the_picture(model, loras) -> None:
    plain = sample(model)
    for attention in ("joint", "independent"):
        conditioned = apply(model, random_condition(), loras[0], attention=attention)
        assert relative_error(sample(conditioned), plain) > 0.01


def test_applying_to_a_clone_leaves_the_original_alone(model, loras) -> None:
    before = sample(model)
    options = repr(model.model_options), repr(model.wrappers)
    conditioned = apply(model.clone(), random_condition(), loras[0])
    changed = sample(conditioned)
    assert not torch.equal(changed, before)
    assert torch.equal(sample(model), before)
    assert (repr(model.model_options), repr(model.wrappers)) == options


def test_applying_twice_is_two_branches(model, loras) -> None:
    once = apply(model, random_condition(), loras[0])
    twice = apply(once, random_condition(), loras[0])
    with recorded_runs() as runs:
        first = sample(once)
        second = sample(twice)
        again = sample(once)
    assert [run.tokens for run in runs] == [[36], [36, 36], [36]]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_start_and_end_percent(model, loras) -> None:
    plain = sample(model, steps=4)
    condition = random_condition()
    late = apply(model, condition, loras[0], start_percent=0.4)
    never = apply(model, condition, loras[0], start_percent=0.0, end_percent=0.0001)
    with recorded_runs() as runs:
        assert not torch.equal(sample(late, steps=4), plain)
        sample(never, steps=4)
    assert runs[0].refreshes == 2  # of the steps at 0, 25, 50 and 75 percent
    assert runs[1].refreshes == 1


def test_image_guidance(model, loras) -> None:
    from dataclasses import replace

    from omini2_extension.nodes import ImageGuidance

    condition = random_condition()
    guided = ImageGuidance.execute(apply(model, condition, loras[0]), 1.5)[0]
    off = ImageGuidance.execute(apply(model, condition, loras[0]), 1.0)[0]
    black = apply(model, replace(condition, latent=condition.empty), loras[0])
    with_image = sample(apply(model, condition, loras[0]), steps=1)
    with_black = sample(black, steps=1)
    # One Euler step from pure noise is linear in the velocity.
    want = with_black + 1.5 * (with_image - with_black)
    assert relative_error(sample(guided, steps=1), want) < 1e-5
    assert torch.equal(sample(off, steps=1), with_image)


def test_image_guidance_caches_both_images(model, loras) -> None:
    from omini2_extension.nodes import ImageGuidance

    conditioned = apply(model, random_condition(), loras[0], attention="independent")
    guided = ImageGuidance.execute(conditioned, 1.5)[0]
    with recorded_runs() as runs:
        assert torch.equal(sample(guided), sample(with_cache(guided)))
    assert runs[1].kv_bytes == 2 * 36 * 2 * 5 * 32 * 4


WITHOUT_EXTENSION = """
import importlib.util, sys, hashlib
from unittest import mock
root = {root!r}
spec = importlib.util.spec_from_file_location("load", root + "/dev/load.py")
load = importlib.util.module_from_spec(spec)
spec.loader.exec_module(load)
load.load_host()
core = ("", ".host", ".engine", ".engine.run", ".errors", ".flux1", ".flux1.numbers")
for name in ("", ".nodes", *(".omini2_core" + part for part in core)):
    sys.modules["omini2_extension" + name] = mock.MagicMock()
# All that the tests' own model needs of it: which fields this host's FLUX has.
versions = "omini2_extension.omini2_core.host.versions"
spec = importlib.util.spec_from_file_location(versions, root + "/omini2_core/host/versions.py")
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["omini2_extension.omini2_core.host"].versions = module
sys.path.append(root + "/tests")
import torch
from tiny import *
torch.set_num_threads({threads})
with torch.inference_mode():
    out = sample(make_model(flux_config(True)))
print(hashlib.sha256(out.numpy().tobytes()).hexdigest())
"""


def test_installed_but_unused_it_changes_no_bit(model) -> None:
    root = str(ROOT)
    code = WITHOUT_EXTENSION.format(root=root, threads=torch.get_num_threads())
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    here = hashlib.sha256(sample(model).numpy().tobytes()).hexdigest()
    assert result.stdout.split()[-1] == here


def test_images_of_a_batch_steer_their_own_pictures(model, loras) -> None:
    from tiny import encode

    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(2, 16, 8, 8, generator=generator)
    for attention in ("joint", "independent"):
        both = sample(
            apply(model, encode(latents), loras[0], attention=attention), batch=2, steps=2
        )
        for i in range(2):
            one = apply(model, encode(latents[i : i + 1]), loras[0], attention=attention)
            alone = sample(one, batch=2, steps=2)
            assert relative_error(both[i], alone[i]) < 1e-5


def test_prompt_is_used(model) -> None:
    assert not torch.equal(sample(model, positive=prompt(3)), sample(model, positive=prompt(4)))
