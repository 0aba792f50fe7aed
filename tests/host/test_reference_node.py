"""Omini2 Reference: against the host's whole forward, with masks and positions made by hand."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from helpers.editing import (
    MODELS,
    Oracle,
    Tiny,
    cached,
    counting,
    has,
    one_prompt_at_a_time,
    row,
    sample,
)
from helpers.reference import image, refer, stock, token_mask
from tiny import recorded_runs, relative_error

TOLERANCE = 1e-5
NEWER = has("Krea2")
# Where rows can be left out and moved: Qwen-Image has no `post_input` on the older host.
MOVABLE = [name for name in MODELS if NEWER or not name.startswith("Qwen")]
MODES = {
    "no cache": (None, lambda step: True),
    "joint once": ({"references": "joint"}, lambda step: step == 0),
    "joint every 2": ({"references": "joint", "reuse": "every_n_steps"}, lambda s: s % 2 == 0),
    "isolated": ({"references": "isolated"}, None),
}


@pytest.fixture(params=MODELS)
def tiny(request: pytest.FixtureRequest) -> Tiny:
    return MODELS[request.param]


@pytest.fixture(params=MOVABLE)
def movable(request: pytest.FixtureRequest) -> Tiny:
    return MODELS[request.param]


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    return MODES[request.param]


def kept(model: ModelPatcher, options: dict[str, Any] | None) -> ModelPatcher:
    """Condition Cache, if any."""
    if options is None:
        return model
    options = {"reuse": "once", **options}
    return cached(model, options.pop("reuse"), 2, **options)


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    return relative_error(got, want) < TOLERANCE


# --- at its defaults, and what stands beside it --------------------------------------------------


def test_defaults_are_the_stock_reference_bit_for_bit(tiny: Tiny) -> None:
    model, pixels = tiny.make(), image(4, 5)
    want = sample(
        model, tiny, tiny.prompt(0, stock(tiny, pixels)), tiny.prompt(1, stock(tiny, pixels)), cfg=3
    )
    patched, positive, negative = refer(model, tiny, tiny.prompt(0), pixels, tiny.prompt(1))
    with recorded_runs() as runs:
        assert torch.equal(sample(patched, tiny, positive, negative, cfg=3), want)
    assert runs == []


def test_defaults_on_a_kept_model(tiny: Tiny) -> None:
    model, pixels = tiny.make(), image(4, 5)
    for how in ("joint", "isolated"):
        want = sample(
            cached(model, "once", references=how), tiny, tiny.prompt(0, stock(tiny, pixels))
        )
        patched, positive, _ = refer(model, tiny, tiny.prompt(0), pixels)
        got = sample(cached(patched, "once", references=how), tiny, positive)
        assert torch.equal(got, want)


def test_images_of_a_batch(tiny: Tiny) -> None:
    """Each picture has its own reference, also where the VAE would make a video of them."""
    model, pixels = tiny.make(), image(4, 5, n=2)
    each = torch.cat([stock(tiny, pixels[:1]), stock(tiny, pixels[1:])])
    want = sample(model, tiny, tiny.prompt(0, each), batch=2)
    patched, positive, _ = refer(model, tiny, tiny.prompt(0), pixels)
    assert torch.equal(sample(patched, tiny, positive, batch=2), want)


def test_stock_references_beside_it_keep_their_meaning(tiny: Tiny, mode: Any) -> None:
    """Before and behind it; a strength on ours only."""
    options, refresh = mode
    model, pixels = tiny.make(), image(3, 4)
    before, behind = tiny.latent(2, 3, 5), tiny.latent(2, 2, 6)
    patched, positive, _ = refer(model, tiny, tiny.prompt(0, before), pixels, strength=0.3)
    positive[0][1]["reference_latents"] = [*positive[0][1]["reference_latents"], behind]
    got = sample(kept(patched, options), tiny, positive)
    bias = [0.0] * 6 + [math.log(0.3)] * 12 + [0.0] * 4
    plain = tiny.prompt(0, before, stock(tiny, pixels), behind)
    assert same(got, sample(Oracle(model, refresh, bias).model, tiny, plain))


def test_without_a_negative_prompt_the_zeroed_one_is_given(tiny: Tiny) -> None:
    _, positive, negative = refer(tiny.make(), tiny, tiny.prompt(0), image(4, 5))
    (text, said), (words, other) = negative[0], positive[0]
    assert not text.any() and text.shape == words.shape
    assert not said["pooled_output"].any() and said["guidance"] == other["guidance"]
    assert said["reference_latents"][0] is other["reference_latents"][0]


# --- strength -------------------------------------------------------------------------------------


def test_strength_is_a_bias_in_the_logits(tiny: Tiny, mode: Any) -> None:
    options, refresh = mode
    strength = 0.25
    model, one, two = tiny.make(), image(4, 5), image(3, 4, 1)
    patched, positive, negative = refer(
        model, tiny, tiny.prompt(0), one, tiny.prompt(1), strength=strength
    )
    patched, positive, negative = refer(
        patched, tiny, positive, two, negative, strength=1 / strength
    )
    got = sample(kept(patched, options), tiny, positive, negative, cfg=3)
    bias = [math.log(strength)] * 20 + [-math.log(strength)] * 12
    refs = stock(tiny, one), stock(tiny, two)
    prompts = tiny.prompt(0, *refs), tiny.prompt(1, *refs)
    assert same(got, sample(Oracle(model, refresh, bias).model, tiny, *prompts, cfg=3))
    assert not same(got, sample(Oracle(model, refresh).model, tiny, *prompts, cfg=3))


def test_strength_0_is_no_reference(tiny: Tiny) -> None:
    model = tiny.make()
    patched, positive, _ = refer(model, tiny, tiny.prompt(0), image(4, 5), strength=0)
    patched, positive, _ = refer(patched, tiny, positive, image(3, 4, 1), strength=2)
    only, prompt, _ = refer(model, tiny, tiny.prompt(0), image(3, 4, 1), strength=2)
    assert torch.equal(sample(patched, tiny, positive), sample(only, tiny, prompt))


def test_the_model_s_own_mask_stays() -> None:
    """As some style models give FLUX.1 one; it and ours add up."""
    tiny = MODELS["Kontext"]

    def forward(executor: Any, *args: Any, **kwargs: Any) -> Any:
        mask = torch.zeros(1, 1, 5 + 24 + 20, 5 + 24 + 20)
        mask[..., 5:, 1] = -3.0
        return executor(*args, **{**kwargs, "attention_mask": mask})

    model, pixels = tiny.make(), image(4, 5)
    plain, positive, _ = refer(model, tiny, tiny.prompt(0), pixels, strength=0.3)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "mask", forward)
    patched, _, _ = refer(model, tiny, tiny.prompt(0), pixels)
    got = sample(patched, tiny, positive)
    prompt = tiny.prompt(0, stock(tiny, pixels))
    want = sample(Oracle(model, lambda step: True, [math.log(0.3)] * 20).model, tiny, prompt)
    assert same(got, want)
    assert not same(got, sample(plain, tiny, positive))


@pytest.mark.skipif(not NEWER, reason="this host's Qwen-Image looks at no mask")
def test_a_prompt_s_own_mask_stays(mode: Any) -> None:
    """Qwen-Image hands its text's mask over by position."""
    options, refresh = mode
    tiny = MODELS["Qwen"]
    model, pixels = tiny.make(), image(4, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0]])
    patched, positive, _ = refer(
        model, tiny, tiny.prompt(0, attention_mask=mask), pixels, strength=0.3
    )
    got = sample(kept(patched, options), tiny, positive)
    prompt = tiny.prompt(0, stock(tiny, pixels), attention_mask=mask)
    want = sample(Oracle(model, refresh, [math.log(0.3)] * 20).model, tiny, prompt)
    assert same(got, want)


# --- parts of a reference, and of sampling --------------------------------------------------------

KEEP = [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]]
UNSEEN = [not each for row in KEEP for each in row]


def test_tokens_outside_of_the_mask_are_as_if_nothing_looked_at_them(
    movable: Tiny, mode: Any
) -> None:
    options, refresh = mode
    tiny, model, one, two = movable, movable.make(), image(3, 4), image(2, 5, 1)
    patched, positive, negative = refer(
        model, tiny, tiny.prompt(0), one, tiny.prompt(1), mask=token_mask(KEEP)
    )
    patched, positive, negative = refer(patched, tiny, positive, two, negative)
    with recorded_runs() as runs:
        got = sample(kept(patched, options), tiny, positive, negative, cfg=3)
    refs = stock(tiny, one), stock(tiny, two)
    prompts = tiny.prompt(0, *refs), tiny.prompt(1, *refs)
    oracle = Oracle(model, refresh, hidden=lambda step: UNSEEN + [False] * 10)
    assert same(got, sample(oracle.model, tiny, *prompts, cfg=3))
    stats = runs[0].references
    assert stats is not None and stats.tokens == 5 + 10


@pytest.mark.parametrize("method", ["offset", "index", "uxo", "index_timestep_zero"])
@pytest.mark.parametrize("name", [name for name in ("Kontext", "FLUX.2 klein") if name in MOVABLE])
def test_masks_with_every_method_of_placing_references(name: str, method: str) -> None:
    if name == "Kontext" and method == "index_timestep_zero":
        pytest.skip("the host itself fails with it on FLUX.1")
    tiny = MODELS[name]
    model, one, two = tiny.make(), image(3, 4), image(2, 5, 1)
    said = {"reference_latents_method": method}
    patched, positive, _ = refer(model, tiny, tiny.prompt(0, **said), one, mask=token_mask(KEEP))
    patched, positive, _ = refer(patched, tiny, positive, two)
    plain = tiny.prompt(0, stock(tiny, one), stock(tiny, two), **said)
    for options, refresh in MODES.values():
        oracle = Oracle(model, refresh, hidden=lambda step: UNSEEN + [False] * 10)
        got = sample(kept(patched, options), tiny, positive)
        assert same(got, sample(oracle.model, tiny, plain))


def percent(model: ModelPatcher, step: int, steps: int = 4) -> float:
    """A share of sampling that begins between a step and the one before it."""
    import comfy.samplers

    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "simple", steps)
    shares = [i / 1000 for i in range(1001)]
    return next(
        p for p in shares if sigmas[step] <= sampling.percent_to_sigma(p) < sigmas[step - 1] - 1e-4
    )


def test_a_part_of_sampling_is_a_run_with_and_a_run_without(tiny: Tiny, mode: Any) -> None:
    """The second reference for the first half only; where K/V are kept, for the second one."""
    options, refresh = mode
    late = options is not None
    model, one, two = tiny.make(), image(4, 5), image(3, 4, 1)
    half = percent(model, 2)
    patched, positive, negative = refer(model, tiny, tiny.prompt(0), one, tiny.prompt(1))
    span = {"start_percent": half} if late else {"end_percent": half}
    patched, positive, negative = refer(patched, tiny, positive, two, negative, **span)
    calls = counting(model)
    got = sample(kept(patched, options), tiny, positive, negative, cfg=3)
    assert max(calls[:2]) == (1 if late else 2)
    with_both = [tiny.prompt(i, stock(tiny, one), stock(tiny, two)) for i in (0, 1)]
    with_one = [tiny.prompt(i, stock(tiny, one)) for i in (0, 1)]
    halves = [with_one, with_both] if late else [with_both, with_one]
    want = in_halves(model, tiny, refresh, halves)
    assert same(got, want)


def in_halves(
    model: ModelPatcher,
    tiny: Tiny,
    refresh: Callable[[int], bool] | None,
    prompts: Sequence[Any],
) -> torch.Tensor:
    """Two samplers behind one another, each with its own prompts."""
    import comfy.sample

    latent = torch.zeros_like(tiny.latent(4, 6, 0))
    noise = comfy.sample.prepare_noise(latent, 0)
    for i, (positive, negative) in enumerate(prompts):
        latent = comfy.sample.sample(
            Oracle(model, refresh).model, noise if i == 0 else torch.zeros_like(noise), 4, 3.0,
            "euler", "simple", positive, negative, latent, start_step=2 * i, last_step=2 * i + 2,
            force_full_denoise=i == 1, disable_noise=i == 1, disable_pbar=True,
        )  # fmt: skip
    return latent


def test_one_that_others_follow_leaves_them_where_they_are(movable: Tiny, mode: Any) -> None:
    options, refresh = mode
    tiny, model, one, two = movable, movable.make(), image(4, 5), image(3, 4, 1)
    half = percent(model, 2)
    patched, positive, _ = refer(model, tiny, tiny.prompt(0), one, end_percent=half)
    patched, positive, _ = refer(patched, tiny, positive, two)
    got = sample(kept(patched, options), tiny, positive)
    own = None if refresh is None else (lambda step: refresh(step % 2))

    def hidden(step: int) -> list[bool]:
        return [step >= 2] * 20 + [False] * 12

    plain = tiny.prompt(0, stock(tiny, one), stock(tiny, two))
    oracle = Oracle(model, own, hidden=hidden)
    assert same(got, sample(oracle.model, tiny, plain))


# --- positions ------------------------------------------------------------------------------------


def corners(name: str, sizes: Sequence[tuple[int, int]]) -> list[tuple[float, float, float]]:
    """Index, row and column of the first token of references of these sizes in tokens, by hand."""
    first, second = sizes
    if name in ("Kontext", "LongCat"):
        longer = second[0] + first[0] > second[1] + first[1]
        shift = (0, first[1]) if longer else (first[0], 0)
        move = 5 if name == "LongCat" else 0  # behind the prompt's five tokens
        index = 2 if name == "LongCat" else 1
        return [(index, move, move), (index, move + shift[0], move + shift[1])]
    if name.startswith("FLUX.2"):
        return [(10, 0, 0), (20, 0, 0)]
    if name.startswith("Qwen"):
        return [(i + 1, -(h // 2), -(w // 2)) for i, (h, w) in enumerate(sizes)]
    if name == "Mage-Flow":
        return [(i + 1, -(h - h // 2), -(w - w // 2)) for i, (h, w) in enumerate(sizes)]
    assert name == "Krea 2"
    return [(1, 0, 0), (2, 0, 0)]


def placed_by_hand(model: ModelPatcher, name: str, small: Any, whole: Any) -> ModelPatcher:
    """The model with its references' rows at positions that are computed here."""
    model = model.clone()

    def post_input(args: dict[str, Any]) -> dict[str, Any]:
        ids = args["img_ids"].clone()
        row = ids.shape[1] - sum(h * w for h, w in small)
        for (index, top, left), (h, w), (rows, columns) in zip(
            corners(name, whole), small, whole, strict=True
        ):
            for i in range(h):
                for j in range(w):
                    s, t = rows / h, columns / w
                    ids[:, row, 0] = index
                    ids[:, row, 1] = top + s * i + (s - 1) / 2
                    ids[:, row, 2] = left + t * j + (t - 1) / 2
                    row += 1
        return {**args, "img_ids": ids}

    model.set_model_patch(post_input, "post_input")
    return model


@pytest.mark.parametrize("name", MOVABLE)
def test_compact_references_lie_where_the_whole_ones_would(name: str, mode: Any) -> None:
    options, refresh = mode
    tiny = MODELS[name]
    model, one, two = tiny.make(), image(4, 6), image(5, 3, 1)
    patched, positive, negative = refer(
        model, tiny, tiny.prompt(0), one, tiny.prompt(1), compression=0.5
    )
    patched, positive, negative = refer(patched, tiny, positive, two, negative)
    got = sample(kept(patched, options), tiny, positive, negative, cfg=3)
    latents = positive[0][1]["reference_latents"]
    assert [latent.shape[-2] // tiny.side for latent in latents] == [2, 5]
    prompts = tiny.prompt(0, *latents), tiny.prompt(1, *latents)
    right = placed_by_hand(model, name, [(2, 3), (5, 3)], [(4, 6), (5, 3)])
    want = sample(placed_oracle(right, refresh), tiny, *prompts, cfg=3)
    assert same(got, want)
    assert not same(got, sample(Oracle(model, refresh).model, tiny, *prompts, cfg=3))


def placed_oracle(model: ModelPatcher, refresh: Any) -> ModelPatcher:
    return Oracle(model, refresh).model


def test_without_correction_a_compact_reference_is_a_small_one(tiny: Tiny) -> None:
    model, pixels = tiny.make(), image(4, 6)
    patched, positive, _ = refer(
        model, tiny, tiny.prompt(0), pixels, compression=0.5, position_correcting=False
    )
    prompt = tiny.prompt(0, *positive[0][1]["reference_latents"])
    assert torch.equal(sample(patched, tiny, positive), sample(model, tiny, prompt))


@row(
    "Omini2 Reference",
    "works with a limit",
    "Older hosts can't move Qwen-Image's tokens: no mask, no corrected positions.",
)
@pytest.mark.parametrize("name", MOVABLE)
def test_mask_strength_range_and_compression_together(name: str, mode: Any) -> None:
    options, refresh = mode
    tiny = MODELS[name]
    model = tiny.make()
    half = percent(model, 2)
    mask = token_mask([[1, 1, 1, 1, 0, 0]] * 4)
    patched, positive, _ = refer(
        model, tiny, tiny.prompt(0), image(4, 6), compression=0.5, strength=0.5, mask=mask,
        start_percent=half,
    )  # fmt: skip
    patched, positive, _ = refer(patched, tiny, positive, image(5, 3, 1), strength=2)
    got = sample(kept(patched, options), tiny, positive)
    own = None if refresh is None else (lambda step: refresh(step % 2))
    bias = [math.log(0.5)] * 6 + [math.log(2)] * 15

    def hidden(step: int) -> list[bool]:
        return [step < 2, step < 2, True] * 2 + [False] * 15

    right = placed_by_hand(model, name, [(2, 3), (5, 3)], [(4, 6), (5, 3)])
    prompt = tiny.prompt(0, *positive[0][1]["reference_latents"])
    assert same(got, sample(Oracle(right, own, bias, hidden).model, tiny, prompt))


# --- prompts --------------------------------------------------------------------------------------


def test_prompts_with_other_settings_are_evaluated_apart(movable: Tiny, mode: Any) -> None:
    options, _ = mode
    tiny, model, pixels = movable, movable.make(), image(3, 4)
    patched, positive, _ = refer(model, tiny, tiny.prompt(0), pixels, mask=token_mask(KEEP))
    patched, negative, _ = refer(patched, tiny, tiny.prompt(1), pixels, strength=0.3)
    both = kept(patched, options)
    got = sample(both, tiny, positive, negative, cfg=3)
    with one_prompt_at_a_time():
        assert same(got, sample(both, tiny, positive, negative, cfg=3))
    other = sample(both, tiny, positive, tiny.prompt(1, stock(tiny, pixels)), cfg=3)
    assert not same(got, other)
