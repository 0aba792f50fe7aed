"""Condition Cache on references: against the host's whole forward with K/V replaced by hand."""

import logging
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from helpers.editing import (
    MODELS,
    Oracle,
    Tiny,
    cached,
    counting,
    models_with_rows,
    one_prompt_at_a_time,
    sample,
)
from tiny import recorded_runs, relative_error

from omini2_extension.omini2_core.host import report, sampling
from omini2_extension.omini2_core.host.attach import get_setup, with_setup

TOLERANCE = 1e-5


@pytest.fixture(params=models_with_rows())
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return MODELS[request.param]


def two(tiny: Tiny) -> list[torch.Tensor]:
    """Two references of different sizes."""
    return [tiny.latent(4, 5, 1), tiny.latent(3, 4, 2)]


SCHEDULES = {
    "once": (("once", 5), lambda step: step == 0),
    "every_2": (("every_n_steps", 2), lambda step: step % 2 == 0),
    "auto_3": (("auto", 3), lambda step: step % 3 == 0),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_joint_is_the_whole_forward_with_the_kept_keys_and_values(
    tiny: Tiny, schedule: str
) -> None:
    (reuse, every), refresh = SCHEDULES[schedule]
    model = tiny.make()
    positive, negative = tiny.prompt(0, *two(tiny)), tiny.prompt(1, *two(tiny))
    calls = counting(model)
    got = sample(cached(model, reuse, every), tiny, positive, negative, cfg=3.0)
    assert [n > 0 for n in calls] == [refresh(step) for step in range(4)]
    want = sample(Oracle(model, refresh).model, tiny, positive, negative, cfg=3.0)
    plain = sample(model, tiny, positive, negative, cfg=3.0)
    assert relative_error(got, want) < TOLERANCE
    assert relative_error(got, plain) > 10 * TOLERANCE


def test_joint_off_is_the_host_bit_for_bit(tiny: Tiny) -> None:
    model = tiny.make()
    positive, negative = tiny.prompt(0, *two(tiny)), tiny.prompt(1)
    for sampler in ("euler", "heun"):
        got = sample(cached(model, "off"), tiny, positive, negative, cfg=3.0, sampler=sampler)
        want = sample(model, tiny, positive, negative, cfg=3.0, sampler=sampler)
        assert torch.equal(got, want)


def test_references_off_is_the_host_bit_for_bit(tiny: Tiny) -> None:
    model, positive = tiny.make(), tiny.prompt(0, *two(tiny))
    got = sample(cached(model, "once", references="off"), tiny, positive)
    assert torch.equal(got, sample(model, tiny, positive))


def test_isolated_is_the_whole_forward_with_references_alone_at_time_0(tiny: Tiny) -> None:
    model = tiny.make()
    positive, negative = tiny.prompt(0, *two(tiny)), tiny.prompt(1, *two(tiny))
    want = sample(Oracle(model, None).model, tiny, positive, negative, cfg=3.0)
    runs, calls = {}, counting(model)
    # auto means once here, and the run before has left what it needs.
    for reuse, computed in {"off": 4, "once": 1, "auto": 0, "every_n_steps": 2}.items():
        calls.clear()
        kept = cached(model, reuse, 2, references="isolated")
        runs[reuse] = sample(kept, tiny, positive, negative, cfg=3.0)
        assert (len(calls), sum(n > 0 for n in calls)) == (4 + computed, computed)
    for got in runs.values():
        assert relative_error(got, want) < TOLERANCE
    assert relative_error(runs["off"], runs["once"]) < TOLERANCE
    joint = sample(model, tiny, positive, negative, cfg=3.0)
    assert relative_error(runs["off"], joint) > 10 * TOLERANCE


def test_a_batch_of_pictures_and_one_of_references(tiny: Tiny) -> None:
    """A reference for each picture of the batch; the same ones for all."""
    model = tiny.make()
    for refs in (two(tiny), [tiny.latent(4, 5, 1, batch=2)]):
        positive = tiny.prompt(0, *refs)
        for mode, refresh in (("joint", lambda step: step == 0), ("isolated", None)):
            got = sample(cached(model, "once", references=mode), tiny, positive, batch=2)
            want = sample(Oracle(model, refresh).model, tiny, positive, batch=2)
            assert relative_error(got, want) < TOLERANCE


def test_prompts_with_different_references(tiny: Tiny) -> None:
    model = tiny.make()
    one, other = two(tiny)
    negatives = (tiny.prompt(1), tiny.prompt(1, other), tiny.prompt(1, one, other, one))
    for mode, refresh in (("joint", lambda step: step % 2 == 0), ("isolated", None)):
        for negative in negatives:
            positive = tiny.prompt(0, one, other)
            kept = cached(model, "every_n_steps", 2, references=mode)
            got = sample(kept, tiny, positive, negative, cfg=3.0)
            want = sample(Oracle(model, refresh).model, tiny, positive, negative, cfg=3.0)
            assert relative_error(got, want) < TOLERANCE


@pytest.mark.parametrize("mode", ["joint", "isolated"])
def test_prompts_evaluated_apart_give_the_same(tiny: Tiny, mode: str) -> None:
    positive, negative = tiny.prompt(0, *two(tiny)), tiny.prompt(1, *two(tiny))
    model = cached(tiny.make(), "every_n_steps", 2, references=mode)
    together = sample(model, tiny, positive, negative, cfg=3.0)
    with one_prompt_at_a_time():
        apart = sample(model, tiny, positive, negative, cfg=3.0)
    assert relative_error(apart, together) < TOLERANCE


def test_a_prompt_that_starts_later_is_refreshed_on_its_own(tiny: Tiny) -> None:
    """In one batch with prompts that aren't due, these are as they were kept."""
    model = cached(tiny.make(), "once")
    refs = two(tiny)
    positive = [
        *tiny.prompt(0, *refs),
        *tiny.prompt(2, *refs, start_percent=0.5, end_percent=1.0),
    ]
    together = sample(model, tiny, positive, tiny.prompt(1, *refs), cfg=3.0, steps=6)
    with one_prompt_at_a_time():
        apart = sample(model, tiny, positive, tiny.prompt(1, *refs), cfg=3.0, steps=6)
    assert relative_error(apart, together) < TOLERANCE


@pytest.mark.parametrize("reuse", ["off", "every_n_steps"])
def test_isolated_ones_of_prompts_that_come_and_go(tiny: Tiny, reuse: str) -> None:
    """A prompt's rows lie elsewhere in the batch when others are over."""
    model = cached(tiny.make(), reuse, 1, references="isolated")
    refs = [tiny.latent(4, 5, seed) for seed in range(3)]
    positive = [*tiny.prompt(0, refs[0]), *tiny.prompt(2, refs[1])]
    negative = tiny.prompt(1, refs[2], start_percent=0.0, end_percent=0.5)
    together = sample(model, tiny, positive, negative, cfg=3.0, steps=6)
    with one_prompt_at_a_time():
        apart = sample(model, tiny, positive, negative, cfg=3.0, steps=6)
    assert relative_error(apart, together) < TOLERANCE


@pytest.mark.parametrize("mode", ["joint", "isolated"])
@pytest.mark.parametrize("keep_on", ["gpu", "cpu"])
def test_storage(tiny: Tiny, mode: str, keep_on: str) -> None:
    positive = tiny.prompt(0, *two(tiny))
    model, options = tiny.make(), {"references": mode, "keep_on": keep_on}
    with recorded_runs() as runs:
        want = sample(cached(model, "once", references=mode), tiny, positive)
        got = sample(cached(model, "once", **options), tiny, positive)
        small = sample(cached(model, "once", storage="fp8", **options), tiny, positive)
    assert torch.equal(got, want)
    assert 1e-6 < relative_error(small, want) < 0.05
    assert [run.storage for run in runs] == ["model", "model", "fp8"]
    assert runs[2].kv_bytes * 4 == runs[0].kv_bytes > 0


def test_a_second_seed_computes_no_isolated_reference(tiny: Tiny) -> None:
    positive = tiny.prompt(0, *two(tiny))
    model = cached(tiny.make(), "once", references="isolated")
    with recorded_runs(keep=True) as runs:
        sample(model, tiny, positive)
        got = sample(model, tiny, positive, seed=1)
    assert [(run.refreshes, run.reused) for run in runs] == [(1, 0), (0, 1)]
    fresh = cached(tiny.make(), "once", references="isolated")
    assert relative_error(got, sample(fresh, tiny, positive, seed=1)) < TOLERANCE


def test_joint_references_are_never_kept_between_runs(tiny: Tiny) -> None:
    positive = tiny.prompt(0, *two(tiny))
    model = cached(tiny.make(), "once")
    with recorded_runs(keep=True) as runs:
        sample(model, tiny, positive)
        sample(model, tiny, positive, seed=1)
    assert [(run.refreshes, run.reused) for run in runs] == [(1, 0), (1, 0)]


def test_figures_of_a_run(tiny: Tiny) -> None:
    positive = tiny.prompt(0, *two(tiny))
    with recorded_runs() as runs:
        sample(cached(tiny.make(), "every_n_steps", 2), tiny, positive, steps=4)
    stats = runs[0].references
    assert stats is not None
    assert (stats.count, stats.tokens, stats.spared) == (2, 4 * 5 + 3 * 4, 0.5)
    assert stats.drift is not None and 1e-5 < stats.drift < 1


def test_the_node_and_the_log_say_what_was_done(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    shown: list[dict[str, Any]] = []

    def keep(run: Any, steps: int, seconds: float, nodes: dict[str, Any]) -> None:
        shown.append(nodes)
        report.report(run, steps, seconds, nodes)

    model = cached(tiny.make(), "every_n_steps", 2)
    setup = get_setup(model)
    model = with_setup(model, replace(setup, policy_node="7"))
    with mock.patch.object(sampling, "report", keep), caplog.at_level(logging.INFO):
        sample(model, tiny, tiny.prompt(0, *two(tiny)))
    figures = shown[0]["7"]
    drift = figures["references"].pop("drift")
    assert 1e-5 < drift < 1
    assert figures["references"] == {
        "beside": 0, "attention": "joint", "count": 2, "tokens": 32, "saved": 0.5,
    }  # fmt: skip
    assert figures["computed"] == 2 and figures["kv_bytes"] > 0
    (line,) = [m for m in caplog.messages if m.startswith("Omini2:")]
    assert "2 joint reference(s), 32 tokens" in line and "50 % of the references' work" in line
