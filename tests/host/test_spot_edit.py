"""Omini2 Spot Edit on the host's editing models: against the whole forward with K/V replaced."""

import inspect
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import comfy.model_management
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from helpers.editing import MODELS, Tiny, cached, sample
from helpers.refusals import refused, sentence
from helpers.spot import spot_edit, spot_file
from helpers.spot_oracle import MaskOracle, SpotOracle
from tiny import (
    apply,
    pixel_mask,
    random_condition,
    random_lora,
    recorded_runs,
    relative_error,
)
from torch import Tensor

from omini2_extension.omini2_core.cache.entry import KeysValues, Storage
from omini2_extension.omini2_core.engine.spot import SpotEdit
from omini2_extension.omini2_core.host import report, sampling
from omini2_extension.omini2_core.host.attach import get_setup, with_setup

TOLERANCE = 2e-5
SERVED = [name for name in MODELS if name.startswith(("Kontext", "FLUX.2", "Qwen"))]
H, W = 4, 6
HALF = 20.0  # leaves about half of the tokens of a tiny Kontext out, without guidance


def row(name: str) -> Any:
    """Under its row of what it works with."""
    model = "FLUX.1 Kontext" if name == "Kontext" else name.split()[0]
    model = "Qwen-Image-Edit" if model == "Qwen" else model
    return pytest.param(
        name, marks=pytest.mark.compatibility("Models", f"{model}, Spot Edit", "works")
    )


@pytest.fixture(params=[row(name) for name in SERVED])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return MODELS[request.param]


def chosen(scores: Any, full: set[int], threshold: float) -> Any:
    """Left out is what scores less than a threshold."""
    return lambda step, denoised: (
        None if step in full or not (found := scores(denoised) < threshold).any() else found
    )


def fourth_powers(tiny: Tiny, known: Tensor) -> Any:
    """A score for each token: the mean of its differences to the fourth power."""

    def scores(denoised: Tensor) -> Tensor:
        each = ((denoised - known) ** 4).flatten(1, -3).mean(1)
        h, w = each.shape[-2] // tiny.side, each.shape[-1] // tiny.side
        return each.reshape(-1, h, tiny.side, w, tiny.side).mean((-3, -1)).amax(0)

    return scores


def median(tiny: Tiny, model: Any, known: Tensor, positive: Any, **options: Any) -> float:
    """A threshold that leaves about half of the tokens out."""
    seen: list[float] = []
    scores = fourth_powers(tiny, model.model.process_latent_in(known))

    def look(step: int, denoised: Tensor | None) -> None:
        if denoised is not None:
            seen.append(float(scores(denoised).median()))

    sample(SpotOracle(model, tiny, known, look).model, tiny, positive, **options)
    return seen[len(seen) // 2]


def test_a_run_is_the_whole_forward_with_what_was_kept(tiny: Tiny) -> None:
    """Two prompts, two references of which the first counts, a batch of two pictures."""
    model = tiny.make()
    known = tiny.latent(H, W, 1)
    positive = tiny.prompt(0, known, tiny.latent(3, 5, 2))
    negative = tiny.prompt(1, known, tiny.latent(3, 5, 2))
    options = {"negative": negative, "cfg": 3.0, "batch": 2, "steps": 6}
    threshold = median(tiny, model, known, positive, **options)
    scores = fourth_powers(tiny, model.model.process_latent_in(known))
    oracle = SpotOracle(model, tiny, known, chosen(scores, {0, 1, 4}, threshold))
    want = oracle.finished(sample(oracle.model, tiny, positive, **options))
    edited = spot_edit(model, select="latent", threshold=threshold, full_steps=2, reset_steps="4")
    with recorded_runs() as runs:
        got = sample(edited, tiny, positive, **options)
    assert {u is not None for u in oracle.unedited} == {True, False}
    assert relative_error(got, want) < TOLERANCE
    assert relative_error(got, sample(model, tiny, positive, **options)) > 100 * TOLERANCE
    (last,) = [u for u in oracle.unedited if u is not None][-1:]
    assert torch.equal(runs[0].spot.edited, ~last)
    assert runs[0].spot.share < 1


def painted(*tokens: tuple[int, int]) -> Tensor:
    """(H, W) bool, true where it is painted."""
    mask = torch.zeros(H, W, dtype=torch.bool)
    for row, column in tokens:
        mask[row, column] = True
    return mask


def by_mask(model: Any, edited: Tensor, **options: Any) -> Any:
    """Edits in a mask only."""
    return spot_edit(model, **{"select": "mask", "mask": pixel_mask(edited), **options})


def test_with_a_mask_nothing_else_is_ever_in_the_model(tiny: Tiny) -> None:
    model = tiny.make()
    known, edited = tiny.latent(H, W, 1), painted((1, 1), (1, 2), (2, 4), (3, 5))
    positive, negative = tiny.prompt(0, known, tiny.latent(3, 5, 2)), tiny.prompt(1, known)
    options = {"negative": negative, "cfg": 3.0, "steps": 5}
    oracle = MaskOracle(model, tiny, known, edited, {0, 1, 3})
    want = oracle.finished(sample(oracle.model, tiny, positive, **options))
    calls: list[int] = []
    spot = by_mask(model, edited, full_steps=2, reset_steps="3")
    with rows_of_blocks(model, calls):
        got = sample(spot, tiny, positive, **options)
    assert relative_error(got, want) < TOLERANCE
    outside = ~pixels_of(edited, tiny, got)
    assert torch.equal(got[..., outside], known.expand_as(got)[..., outside])
    assert min(calls) == 4  # the painted ones, once the references are known


def pixels_of(tokens: Tensor, tiny: Tiny, latent: Tensor) -> Tensor:
    """(h, w) tokens -> those of a latent."""
    whole = tokens.repeat_interleave(tiny.side, 0).repeat_interleave(tiny.side, 1)
    return whole[: latent.shape[-2], : latent.shape[-1]]


@contextmanager
def rows_of_blocks(model: Any, calls: list[int]) -> Iterator[None]:
    """Collects how many rows the image stream of the model's first block has at each call."""
    inner = model.model.diffusion_model
    blocks = getattr(inner, "double_blocks", None) or inner.transformer_blocks
    at = "img" if hasattr(inner, "double_blocks") else "hidden_states"
    handle = blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs[at].shape[1]), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


SAMPLERS = ("euler", "heun", "dpmpp_2m", "euler_ancestral", "dpm_2", "ddim", "uni_pc")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("select", ["latent", "mask"])
def test_unedited_tokens_are_the_references_with_any_sampler(sampler: str, select: str) -> None:
    tiny = MODELS["Kontext"]
    model, known = tiny.make(), tiny.latent(H, W, 1)
    positive = tiny.prompt(0, known)
    edited = painted((0, 0), (2, 3))
    spot = spot_edit(model, select=select, threshold=HALF, full_steps=2, mask=pixel_mask(edited))
    with recorded_runs() as runs:
        got = sample(spot, tiny, positive, sampler=sampler, steps=8)
    assert torch.isfinite(got).all()
    chosen = runs[0].spot.edited
    assert 2 <= chosen.sum() < H * W
    assert chosen[0, 0] and chosen[2, 3]
    unedited = ~pixels_of(chosen, tiny, got)
    assert torch.equal(got[..., unedited], known[..., unedited])
    assert not torch.equal(got[..., ~unedited], known[..., ~unedited])


def test_a_run_that_stops_before_its_end_is_not_overwritten() -> None:
    tiny = MODELS["Kontext"]
    model, known = tiny.make(), tiny.latent(H, W, 1)
    spot = by_mask(model, painted((1, 1)))
    options = {"steps": 6, "start_step": 0, "last_step": 4, "force_full_denoise": False}
    got = sample(spot, tiny, tiny.prompt(0, known), **options)
    outside = ~pixels_of(painted((1, 1)), tiny, got)
    assert not torch.isclose(got[..., outside], known[..., outside]).any(0).all()


def run(select: str = "latent", cache: dict[str, Any] | None = None, **options: Any) -> Any:
    """A run on Kontext, and what it says of itself."""
    tiny = MODELS["Kontext"]
    model, known = tiny.make(), tiny.latent(H, W, 1)
    given = {"threshold": 150.0, "full_steps": 2, "reset_steps": "none", **options}
    if cache is not None:
        model = cached(model, **cache)
    spot = spot_edit(model, select=select, **given)
    with recorded_runs() as runs:
        got = sample(spot, tiny, tiny.prompt(0, known), tiny.prompt(1, known), cfg=3.0, steps=6)
    return got, runs[0]


@pytest.mark.parametrize("fusion", ["off", "recursive"])
def test_storage_of_condition_cache_applies(fusion: str) -> None:
    want, plain = run(fusion=fusion)
    away, on_cpu = run(fusion=fusion, cache={"keep_on": "cpu"})
    small, fp8 = run(fusion=fusion, cache={"storage": "fp8", "keep_on": "gpu"})
    assert torch.equal(away, want)
    assert 1e-7 < relative_error(small, want) < 0.05
    assert [each.storage for each in (plain, on_cpu, fp8)] == ["model", "model", "fp8"]
    assert on_cpu.keep_on == "cpu"
    assert fp8.kv_bytes * 4 == plain.kv_bytes == 2 * 2 * H * W * 2 * 32 * 4 * 5


def test_what_is_written_anew_in_fp8_is_as_good_as_the_rest() -> None:
    """Token by token, however large their numbers are."""
    generator = torch.Generator().manual_seed(0)
    k, v = (torch.randn(1, 2, 8, 16, generator=generator) for _ in range(2))
    kept = KeysValues.room_for(k, Storage("fp8", "gpu"), by_token=True)
    kept.fill(k, v)
    which = torch.tensor([1, 5])
    k[:, :, which] *= 100
    v[:, :, which] *= 0.01
    kept.replace(which, k[:, :, which], v[:, :, which])
    got_k, got_v = torch.empty_like(k), torch.empty_like(v)
    kept.write(got_k, got_v)
    for got, want in ((got_k, k), (got_v, v)):
        each = (got - want).norm(dim=-1) / want.norm(dim=-1)
        assert each.max() < 0.05


def one_prompt_at_a_time() -> Any:
    """The host has no room for two prompts in one batch."""

    def free(device: object = None, torch_free_too: bool = False) -> object:
        return (1 << 34, 1 << 34) if torch_free_too else 0

    return mock.patch.object(comfy.model_management, "get_free_memory", free)


def test_a_prompt_without_references_and_prompts_evaluated_apart() -> None:
    tiny = MODELS["Kontext"]
    model, known = tiny.make(), tiny.latent(H, W, 1)
    spot = spot_edit(model, select="latent", threshold=150.0, full_steps=2, fusion="once")
    for negative in (tiny.prompt(1), tiny.prompt(1, known)):
        options = {"negative": negative, "cfg": 3.0, "steps": 6}
        together = sample(spot, tiny, tiny.prompt(0, known), **options)
        with one_prompt_at_a_time():
            apart = sample(spot, tiny, tiny.prompt(0, known), **options)
        assert relative_error(apart, together) < TOLERANCE


def test_a_prompt_that_starts_late_is_computed_in_full_first() -> None:
    tiny = MODELS["Kontext"]
    model, known = tiny.make(), tiny.latent(H, W, 1)
    late = tiny.prompt(2, known, start_percent=0.5, end_percent=1.0)
    spot = spot_edit(model, select="latent", threshold=HALF, full_steps=2, reset_steps="none")
    with recorded_runs() as runs:
        got = sample(spot, tiny, [*tiny.prompt(0, known), *late], steps=8)
    assert torch.isfinite(got).all()
    shares = runs[0].spot.shares
    assert shares[:2] == [1, 1] and shares[2] < 1 and shares[-1] < 1
    assert max(shares[3:]) == 1  # both prompts are in one batch


def test_grow_widens_the_edited_side() -> None:
    _, tight = run()
    _, wide = run(grow=1)
    assert tight.spot.edited.sum() < wide.spot.edited.sum()


def test_nothing_edited_is_the_reference_and_costs_nothing() -> None:
    got, stats = run(threshold=1e6)
    known = MODELS["Kontext"].latent(H, W, 1)
    assert torch.equal(got, known)
    assert stats.spot.shares == [1, 1, 0, 0, 0, 0]
    assert not stats.spot.edited.any()


def test_a_mask_over_everything_is_the_host_bit_for_bit(caplog: pytest.LogCaptureFixture) -> None:
    tiny = MODELS["Kontext"]
    model, positive = tiny.make(), tiny.prompt(0, tiny.latent(H, W, 1))
    got = sample(by_mask(model, torch.ones(H, W, dtype=torch.bool)), tiny, positive)
    assert torch.equal(got, sample(model, tiny, positive))
    assert "mask: it covers the whole picture" in caplog.text


def test_a_short_schedule_says_that_nothing_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    tiny = MODELS["Kontext"]
    model, positive = tiny.make(), tiny.prompt(0, tiny.latent(H, W, 1))
    got = sample(spot_edit(model, select="latent"), tiny, positive, steps=4)
    assert torch.equal(got, sample(model, tiny, positive, steps=4))
    assert "full_steps: all 4 steps of this run" in caplog.text


def test_automatic_resets_are_the_originals_at_50_steps() -> None:
    assert sorted(SpotEdit().full(50)) == [0, 1, 2, 3, 13, 22, 31]
    assert sorted(SpotEdit(full_steps=1, reset_steps=" 3,9 ").full(8)) == [0, 3]


def test_compiled_models_see_few_numbers_of_rows() -> None:
    tiny = MODELS["Kontext"]
    model, known = tiny.make(), tiny.latent(H, W, 1)
    spot = spot_edit(model, select="latent", threshold=HALF, full_steps=2)
    spot.add_wrapper_with_key("apply_model", "torch.compile", lambda e, *a, **k: e(*a, **k))
    calls: list[int] = []
    with rows_of_blocks(model, calls):
        sample(spot, tiny, tiny.prompt(0, known), steps=8)
    assert {n % (H * W // 8) for n in calls} == {0}
    assert min(calls) < H * W and len(set(calls)) > 2


# --- what it can't be used with ------------------------------------------------------------------


def kontext() -> Any:
    return MODELS["Kontext"].make()


REFUSED = [
    ({"vae": None, "select": "perceptual"}, "vae: select perceptual compares"),
    ({"select": "perceptual", "vae": object()}, "vae: its decoder has no features"),
    ({"select": "mask"}, "mask: select mask needs one"),
    ({"select": "mask", "mask": torch.zeros(1, 64, 96)}, "mask: it marks nothing to edit"),
    ({"select": "eyes"}, "select: eyes is not on offer"),
    ({"threshold": float("nan")}, "threshold: nan is out of bounds"),
    ({"full_steps": 0}, "full_steps: 0 is out of bounds"),
    ({"reset_steps": "3; 4"}, "reset_steps: 3; 4 is no list of steps"),
    ({"reset_steps": "-1"}, "reset_steps: -1 is no list of steps"),
    ({"fusion": "twice"}, "fusion: twice is not on offer"),
    ({"grow": -1}, "grow: -1 is out of bounds"),
    ({"wishes": 1}, "wishes: this node has no such input"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED)
def test_wrong_inputs_are_refused(options: dict[str, Any], said: str) -> None:
    with refused(said) as error:
        spot_edit(kontext(), **{"select": "latent", **options})
    sentence(error)


def test_another_models_vae_is_refused() -> None:
    with refused("vae: it takes latents of 16 channels, but this model's have 128") as error:
        spot_edit(MODELS["FLUX.2 klein"].make(), vae=spot_file().vae())
    sentence(error)


def test_other_models_are_refused() -> None:
    others = [name for name in MODELS if name.startswith(("Krea", "Mage", "LongCat"))]
    for model in (object(), *(MODELS[name].make() for name in others)):
        with refused("model: this is .*; (load|connect)") as error:
            spot_edit(model, select="latent")
        sentence(error)


def test_a_prompt_without_a_reference_is_refused() -> None:
    tiny = MODELS["Kontext"]
    with refused("model: no prompt has a reference to edit; .*ReferenceLatent") as error:
        sample(spot_edit(kontext(), select="latent"), tiny, tiny.prompt())
    sentence(error)


def test_a_reference_of_another_size_is_refused() -> None:
    tiny = MODELS["Kontext"]
    positive = tiny.prompt(0, tiny.latent(H, W + 1, 1))
    with refused("model: the first reference is 112x64 and the picture 96x64"):
        sample(spot_edit(kontext(), select="latent"), tiny, positive)


@pytest.mark.compatibility(
    "Neighbours", "conditions and isolated references with Spot Edit", "refused"
)
def test_conditions_and_isolated_references_beside_it_are_refused() -> None:
    tiny = MODELS["Kontext"]
    positive = tiny.prompt(0, tiny.latent(H, W, 1))
    conditioned = apply(kontext(), random_condition(2, 2), random_lora("spot.safetensors"))
    isolated = cached(kontext(), references="isolated")
    for model, said in (
        (conditioned, "model: Omini2 Spot Edit can't be used together with conditions"),
        (isolated, "references: isolated ones look at each other only"),
    ):
        with refused(said) as error:
            sample(spot_edit(model, select="latent"), tiny, positive)
        sentence(error)


@pytest.mark.compatibility("Neighbours", "Flux KV Cache with Spot Edit", "refused")
def test_flux_kv_cache_beside_it_is_refused() -> None:
    class KV_Attn_Input:
        pass

    model = kontext()
    model.set_model_patch(KV_Attn_Input(), "attn1_patch")
    with refused("model: Flux KV Cache keeps .* or take Omini2 Spot Edit off") as error:
        spot_edit(model, select="latent")
    sentence(error)


# --- what it leaves ------------------------------------------------------------------------------


def test_the_model_given_and_later_runs_know_nothing_of_it() -> None:
    tiny = MODELS["Kontext"]
    model, positive = tiny.make(), tiny.prompt(0, tiny.latent(H, W, 1))
    plain = sample(model, tiny, positive, steps=6)
    spot = spot_edit(model, select="latent", threshold=HALF, full_steps=2)
    first = sample(spot, tiny, positive, steps=6)
    assert torch.equal(sample(model, tiny, positive, steps=6), plain)
    assert torch.equal(sample(spot, tiny, positive, steps=6), first)
    assert not torch.equal(first, plain)


@pytest.mark.compatibility("Faults", "Cancel in Spot Edit", "works")
def test_a_cancelled_run_leaves_nothing_behind() -> None:
    tiny = MODELS["Kontext"]
    model, positive = tiny.make(), tiny.prompt(0, tiny.latent(H, W, 1))
    spot = spot_edit(model, select="latent", threshold=HALF, full_steps=2)
    want = sample(spot, tiny, positive, steps=6)

    def cancel(step: int, *_: Any) -> None:
        if step == 3:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(spot, tiny, positive, steps=6, callback=cancel)
    assert torch.equal(sample(spot, tiny, positive, steps=6), want)


@pytest.mark.compatibility("Faults", "out of memory in Spot Edit", "works")
def test_out_of_memory_half_way_is_survived(caplog: pytest.LogCaptureFixture) -> None:
    tiny = MODELS["Kontext"]
    model, positive = tiny.make(), tiny.prompt(0, tiny.latent(H, W, 1))
    spot = spot_edit(model, select="latent", threshold=HALF, full_steps=2)
    want = sample(spot, tiny, positive, steps=6)
    calls: list[int] = []

    def fail(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise comfy.model_management.OOM_EXCEPTION("full")

    handle = model.model.diffusion_model.single_blocks[1].register_forward_pre_hook(fail)
    try:
        got = sample(spot, tiny, positive, steps=6)
    finally:
        handle.remove()
    assert relative_error(got, want) < 0.05
    assert "keep_on: the device ran out of memory" in caplog.text


@pytest.mark.compatibility("Faults", "two graphs of one model, with Spot Edit", "works")
def test_two_graphs_of_one_model_take_turns() -> None:
    tiny = MODELS["Kontext"]
    model = tiny.make()
    known = [tiny.latent(H, W, seed) for seed in (1, 2)]
    spots = [spot_edit(model, select=s, **o) for s, o in (
        ("latent", {"threshold": HALF, "full_steps": 2}),
        ("mask", {"mask": pixel_mask(painted((1, 1)))}),
    )]  # fmt: skip
    prompts = [tiny.prompt(0, each) for each in known]
    want = [sample(s, tiny, p, steps=6) for s, p in zip(spots, prompts, strict=True)]
    again = [sample(s, tiny, p, steps=6) for s, p in zip(spots, prompts, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(want, again, strict=True))


def test_the_node_and_the_log_say_what_was_left_out(caplog: pytest.LogCaptureFixture) -> None:
    shown: list[dict[str, Any]] = []

    def keep(run: Any, steps: int, seconds: float, nodes: dict[str, Any]) -> None:
        shown.append(nodes)
        report.report(run, steps, seconds, nodes)

    tiny = MODELS["Kontext"]
    spot = by_mask(kontext(), painted((0, 1), (0, 2)), full_steps=1, reset_steps="none")
    setup = get_setup(spot)
    spot = with_setup(spot, replace(setup, spot=replace(setup.spot, node="7")))
    with mock.patch.object(sampling, "report", keep), caplog.at_level(logging.INFO):
        sample(spot, tiny, tiny.prompt(0, tiny.latent(H, W, 1)), steps=3)
    text, n = 5, H * W
    shares = [(text + 2 + n) / (text + 2 * n), *2 * [(text + 2) / (text + 2 * n)]]
    figures = shown[0]["7"]
    assert figures["kind"] == "spot" and (figures["tokens"], figures["of"]) == (2, n)
    assert figures["kept"] == ["011000", *3 * ["000000"]]
    assert figures["shares"] == [round(share, 3) for share in shares]
    assert figures["saved"] == pytest.approx(1 - sum(shares) / 3)
    assert figures["kv_bytes"] == n * 2 * 32 * 4 * 5
    (line,) = [m for m in caplog.messages if m.startswith("Omini2:")]
    saved = round(100 * figures["saved"])
    assert f"Spot Edit of 2 in {n} tokens" in line and f"{saved} % of the model's rows" in line
    json.dumps(shown)


@pytest.mark.compatibility("Neighbours", "ControlNet with Spot Edit", "works")
def test_a_controlnets_residuals_lose_the_same_rows() -> None:
    """Residuals that are zero change nothing, whatever rows there are."""
    tiny = MODELS["Kontext"]
    model, known = kontext(), tiny.latent(H, W, 1)
    spot = spot_edit(model, select="latent", threshold=HALF, full_steps=2)
    want = sample(spot, tiny, tiny.prompt(0, known), steps=6)
    rows: list[int] = []

    def controlled(executor: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        each = torch.zeros(1, H * W, 32)
        bound.arguments["control"] = {"input": [each, each], "output": [each, each, each]}
        return executor(*bound.args, **bound.kwargs)

    with rows_of_blocks(model, rows):
        spot.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "control", controlled)
        got = sample(spot, tiny, tiny.prompt(0, known), steps=6)
    assert torch.equal(got, want)
    assert min(rows) < H * W


# --- beside others -------------------------------------------------------------------------------


@pytest.mark.compatibility("Neighbours", "Spot Edit in a replaced forward", "refused")
def test_a_replaced_forward_is_refused() -> None:
    tiny = MODELS["Kontext"]
    model, positive = kontext(), tiny.prompt(0, tiny.latent(H, W, 1))
    spot = by_mask(model, painted((1, 1)))
    flux = model.model.diffusion_model
    own = flux.forward_orig

    def another(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    flux.forward_orig = another
    try:
        with refused("model: another extension .*test_spot_edit") as error:
            sample(spot, tiny, positive)
        sentence(error)
    finally:
        del flux.forward_orig


@pytest.mark.compatibility("Neighbours", "torch.compile with Spot Edit", "works")
def test_torch_compile() -> None:
    torch.compiler.reset()  # code of other tests asks for options that these runs lack
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    tiny = MODELS["Kontext"]
    positive = tiny.prompt(0, tiny.latent(H, W, 1))
    spot = by_mask(kontext(), painted((1, 1), (2, 2)), full_steps=2)
    want = sample(spot, tiny, positive)
    compiled = TorchCompileModel.execute(spot, "eager")[0]
    assert relative_error(sample(compiled, tiny, positive), want) < 1e-4


@pytest.mark.compatibility("Faults", "the model is unloaded between steps of Spot Edit", "works")
@pytest.mark.parametrize("select", ["latent", "mask"])
def test_the_model_is_unloaded_between_steps(select: str) -> None:
    tiny = MODELS["Kontext"]
    model, positive = kontext(), tiny.prompt(0, tiny.latent(H, W, 1))
    mask = pixel_mask(painted((1, 1)))
    spot = spot_edit(model, select=select, threshold=HALF, full_steps=2, mask=mask)
    want = sample(spot, tiny, positive, steps=6)

    def unload(step: int, *_: Any) -> None:
        if step in (1, 3):
            comfy.model_management.unload_all_models()

    assert torch.equal(sample(spot, tiny, positive, steps=6, callback=unload), want)


@pytest.mark.compatibility("Neighbours", "parts of the picture with Spot Edit", "works")
def test_a_prompt_for_a_part_of_the_picture_is_computed_in_full(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny = MODELS["Kontext"]
    model, known = kontext(), tiny.latent(H, W, 1)
    area = tiny.prompt(2, known, area=(4, 8, 0, 0))
    edited = painted((1, 1))
    spot = by_mask(model, edited, full_steps=1)
    got = sample(spot, tiny, [*tiny.prompt(0, known), *area])
    outside = ~pixels_of(edited, tiny, got)
    assert torch.equal(got[..., outside], known[..., outside])
    only = sample(spot, tiny, area)
    assert torch.isfinite(only).all() and "so nothing was saved" in caplog.text
