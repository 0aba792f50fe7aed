"""Compression with corrected positions, and pruning."""

import pytest
import torch
from comfy.latent_formats import Flux as FluxLatents
from helpers.original import TOLERANCE, packed
from helpers.patterns import image_condition, token_pattern
from helpers.refusals import refused, sentence
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    LatentVae,
    apply,
    compact,
    encode,
    flux_config,
    make_model,
    pixel_mask,
    random_condition,
    random_lora,
    record,
    reference,
    relative_error,
    sample,
    with_cache,
)

import omini2_extension.nodes as nodes
from omini2_extension.omini2_core.engine.attention import KeyGroup, join
from omini2_extension.omini2_core.host import kernels
from omini2_extension.omini2_core.tokens.compact import background, tokens_with_content

CASES = [
    (file, name, mode)
    for file in ("dev_like", "schnell_like")
    for name, meta in reference(file).meta["cases"].items()
    for mode in ("every_step", "cached_once")
    if not meta.get("integrate")
    and any("scale" in cond or "mask" in cond for cond in meta["conds"])
]


@pytest.mark.parametrize(("file", "name", "mode"), CASES)
def test_the_originals_compact_and_pruned_cases(file, name, mode) -> None:
    """The same settings through Compact Tokens: shrunk from full size, pruned by a mask."""
    ref = reference(file)
    case = ref.case(name)
    model = ref.model()
    for k, cond in enumerate(case.meta["conds"]):
        latent = FluxLatents().process_out(case.tensors[f"cond{k}.latent"])
        scale = int(cond.get("scale", 1))
        h, w = (scale * side for side in cond["hw"])
        delta = cond.get("delta", [0, 0])
        compressed_left = scale > 1 and delta == [0, -cond["hw"][1]]
        condition = image_condition(
            torch.rand(1, 16 * h, 16 * w, 3),
            "left" if compressed_left else "custom",
            (0, 0) if compressed_left else delta,
            latent=latent,
        )
        keep = case.tensors.get(f"cond{k}.keep")
        options = {} if keep is None else {"prune": "mask", "mask": pixel_mask(keep)}
        condition, _, count = compact(condition, compression=1 / scale, **options)
        assert count == (cond["hw"][0] * cond["hw"][1] if keep is None else int(keep.sum()))
        model = apply(
            model,
            condition,
            ref.lora_file(cond["lora"]),
            condition_scale=case.meta.get("strength", 1.0),
            attention="independent" if case.meta.get("independent") else "joint",
        )
    if mode == "cached_once":
        model = with_cache(model, "once")
    assert relative_error(packed(record(model, case)), case.tensors[f"pred_{mode}"]) < TOLERANCE


def test_everything_off_changes_nothing() -> None:
    condition = random_condition()
    assert compact(condition)[0] is condition
    assert compact(condition)[2] == 36


SIDES = st.integers(1, 96)
COMPRESSION = st.floats(0.1, 1.0)
PLACEMENTS = st.sampled_from(["aligned", "fit", "left", "right", "above", "below", "custom"])


@settings(max_examples=60, deadline=None)
@given(SIDES, SIDES, COMPRESSION, PLACEMENTS, st.tuples(st.integers(-9, 9), st.integers(-9, 9)))
def test_compressed_tokens_lie_at_the_centre_of_what_they_stand_for(
    h, w, compression, placement, delta
) -> None:
    condition = image_condition(torch.rand(1, 16 * h, 16 * w, 3), placement, delta)
    if min(h, w) * compression < 0.5:
        with refused("compression: .* leaves no token"):
            compact(condition, compression=compression)
        return
    small = compact(condition, compression=compression)[0]
    for old, new in zip(condition.hw, small.hw, strict=True):
        assert abs(new - old * compression) <= 0.5 + 1e-9
    picture = (h + 3, w + 5)
    old, new = condition.positions(picture), small.positions(picture)
    assert new.shape == (small.token_count, 2)
    for axis in range(2):
        # Blocks of tokens tile the same interval: its ends are half a block beyond the centres.
        ends = []
        for c, positions in ((condition, old), (small, new)):
            half = c.placement.scale_for(c.hw, picture)[axis] / 2
            low, high = positions[:, axis].aminmax()
            ends.append((float(low) - half, float(high) + half))
        assert ends[1] == pytest.approx(ends[0], abs=1e-3)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 24), st.integers(2, 24), st.sampled_from([0.25, 0.5, 0.8]), PLACEMENTS)
def test_without_position_correcting_positions_stay_unscaled(h, w, compression, placement) -> None:
    condition = image_condition(torch.rand(1, 16 * h, 16 * w, 3), placement)
    small = compact(condition, compression=compression, position_correcting=False)[0]
    positions = small.positions(condition.hw).reshape(*small.hw, 2)
    if small.hw[0] > 1:
        assert torch.allclose(positions[1:, :, 0] - positions[:-1, :, 0], torch.tensor(1.0))
    if small.hw[1] > 1:
        assert torch.allclose(positions[:, 1:, 1] - positions[:, :-1, 1], torch.tensor(1.0))


def test_a_mask_survives_compression() -> None:
    keep = torch.zeros(8, 8, dtype=torch.bool)
    keep[:4, 2:6] = True
    condition = image_condition(torch.rand(1, 128, 128, 3), mask=pixel_mask(keep))
    small = compact(condition, compression=0.5)[0]
    want = torch.zeros(4, 4, dtype=torch.bool)
    want[:2, 1:3] = True
    assert torch.equal(small.keep, want)


@pytest.mark.parametrize("factor", [0.5, 1, 2, 3, 4, 8])
@pytest.mark.parametrize("resize", [(), ("stretch", 128)])
def test_a_thin_stroke_counts_whatever_size_it_was_painted_at(factor, resize) -> None:
    """A line of one pixel, from top to bottom in the third column of tokens."""
    size = int(128 * factor)
    mask = torch.zeros(1, size, size)
    mask[:, :, int(40 * factor)] = 1
    want = torch.zeros(8, 8, dtype=torch.bool)
    want[:, 2] = True
    image = torch.ones(1, 128, 128, 3)
    kept = nodes.ConditionEncode.execute(image, LatentVae(), "aligned", 0, 0, 1.0, mask, *resize)[0]
    assert torch.equal(kept.keep, want)
    whole = nodes.ConditionEncode.execute(image, LatentVae(), "aligned", 0, 0, 1.0)[0]
    assert torch.equal(compact(whole, token_integration=True, mask=mask)[0].paint, want)
    assert torch.equal(compact(whole, prune="mask", mask=mask)[0].keep, want)


def test_a_mask_goes_with_the_image_as_it_was_given() -> None:
    """Also when Condition Encode cropped the image."""
    image = torch.rand(1, 70, 57, 3)
    mask = torch.zeros(1, 70, 57)
    mask[:, 3, 4] = 1  # the first pixel that cropping left
    kept = compact(image_condition(image), prune="mask", mask=mask)[0]
    assert kept.keep.nonzero().tolist() == [[0, 0]]


MASKS = st.sampled_from(["empty", "full", "one", "checkerboard", "random"])


@settings(max_examples=40, deadline=None)
@given(MASKS, st.integers(1, 30), st.integers(1, 30), st.integers(0, 3))
def test_prune_by_content_and_by_mask(kind, h, w, grow) -> None:
    content = token_pattern(kind, h, w)
    pixels = torch.full((1, 16 * h, 16 * w, 3), 0.2)
    # one pixel of content a token, so a mean would not see it
    pixels[0, 7::16, 9::16][content] = 0.9
    grown = torch.zeros(h, w, dtype=torch.bool)
    for i, j in content.nonzero().tolist():
        grown[max(0, i - grow) : i + grow + 1, max(0, j - grow) : j + grow + 1] = True
    condition = image_condition(pixels)
    for options in ({"prune": "empty"}, {"prune": "mask", "mask": pixel_mask(content)}):
        if not content.any():
            with refused("prune: it leaves no token") as error:
                compact(condition, grow=grow, **options)
            sentence(error)
            continue
        small, picture, count = compact(condition, grow=grow, **options)
        assert count == small.token_count == int(grown.sum())
        assert picture.shape == pixels.shape
        assert (small.keep is None) == bool(grown.all())
        if small.keep is not None:
            assert torch.equal(small.keep, grown)
            assert small.positions((h, w)).tolist() == grown.nonzero().tolist()


def test_everything_kept_is_said(caplog) -> None:
    image = torch.rand(1, 64, 64, 3)
    assert compact(image_condition(image), prune="empty")[2] == 16
    assert "prune: every token is kept" in caplog.text


@pytest.mark.parametrize("colour", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.3, 0.6, 0.1)])
def test_the_background_is_found(colour) -> None:
    pixels = torch.tensor(colour).expand(1, 64, 64, 3).clone()
    pixels[:, 20:30, 20:30] = torch.rand(1, 10, 10, 3)
    assert torch.allclose(background(pixels), torch.tensor(colour), atol=0.02)
    assert tokens_with_content(pixels, 0.1, 0).nonzero().tolist() == [[1, 1]]


def test_threshold() -> None:
    pixels = torch.zeros(1, 16, 48, 3)
    pixels[0, 3, 20] = 0.3
    pixels[0, 3, 40] = 0.6
    for threshold, want in ((0.2, [1, 2]), (0.5, [2]), (0.7, [])):
        kept = tokens_with_content(pixels, threshold, 0)
        assert kept[0].nonzero()[:, 0].tolist() == want


@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_pruned_tokens_are_as_if_masked_out_of_attention(attention, monkeypatch) -> None:
    """Against an implementation that keeps all tokens and masks the dropped ones densely."""
    model = make_model(flux_config(True))
    lora = random_lora("pruned.safetensors")
    condition = random_condition(5, 7)
    keep = token_pattern("random", 5, 7, seed=3)
    pruned = compact(condition, prune="mask", mask=pixel_mask(keep))[0]
    got = sample(apply(model, pruned, lora, attention=attention))

    from omini2_extension.omini2_core.engine import run as engine

    dropped = torch.where(keep.flatten(), 0.0, -torch.inf)

    def masked(attend, q, k, v):
        row = torch.cat((torch.zeros(k.shape[2] - keep.numel()), dropped))
        return attend(q, k, v, row.expand(1, 1, q.shape[2], -1))

    def main(attend, partial, q, k, v, mask, conditions: list[KeyGroup]):
        return masked(attend, q, *join(k, v, conditions))

    def joint(attend, partial, queries, own: list[KeyGroup], k, v):
        return [masked(attend, queries[0], *join(k, v, own))]

    monkeypatch.setattr(engine, "main_attention", main)
    monkeypatch.setattr(engine, "joint_attention", joint)
    attend = kernels.attend

    def attend_masked(q, k, v, mask):
        return masked(attend, q, k, v)

    monkeypatch.setattr(kernels, "attend", attend_masked)
    want = sample(apply(model, condition, lora, attention=attention))
    assert relative_error(got, want) < 1e-6
    monkeypatch.undo()
    assert relative_error(sample(apply(model, condition, lora, attention=attention)), want) > 1e-4


@pytest.mark.parametrize(
    ("options", "pattern"),
    [
        ({"token_integration": True}, "mask: token_integration needs one; connect a mask"),
        ({"prune": "mask"}, "mask: prune mask needs one; connect a mask"),
        ({"compression": 0.05}, "compression: 0.05 leaves no token of 6x6; use at least 0.0833"),
        (
            {"token_integration": True, "compression": 0.5, "mask": torch.ones(1, 96, 96)},
            "compression: token_integration needs the condition at the picture's own size",
        ),
        (
            {"token_integration": True, "prune": "mask", "mask": torch.ones(1, 96, 96)},
            "prune: with token_integration the mask marks what to paint",
        ),
        (
            {"token_integration": True, "mask": torch.zeros(1, 96, 96)},
            "mask: it marks nothing to paint",
        ),
    ],
)
def test_refusals(options, pattern) -> None:
    with refused(pattern) as error:
        compact(random_condition(), **options)
    sentence(error)


@pytest.mark.parametrize(
    "options",
    [{"placement": "right"}, {"placement": "fit"}, {"position_scale": 2.0},
     {"placement": "custom", "delta": (0, 3)}],
)  # fmt: skip
def test_integration_needs_an_aligned_condition(options) -> None:
    condition = encode(torch.randn(1, 16, 8, 8), **options)
    with refused("token_integration: the condition has to lie on the picture") as error:
        compact(condition, token_integration=True, mask=torch.ones(1, 64, 64))
    sentence(error)
