"""Tokens of a condition and where they lie, by numbers worked out by hand.

``dev/quality/mutation.py`` runs these first: they are quick and look at one function each.
"""

import itertools
import re
from typing import Any

import pytest
import torch

from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.flux1.numbers import rope_axes
from omini2_extension.omini2_core.lora.family import (
    BY_NAME,
    EASYCONTROL,
    FAMILIES,
    OMINICONTROL,
    PLACEMENT_CHOICES,
    chosen_placement,
    family_of,
)
from omini2_extension.omini2_core.lora.names import PLAIN, PROCESSOR, parse
from omini2_extension.omini2_core.tokens.compact import (
    PRUNE,
    background,
    compress,
    draw_tokens,
    grown,
    prune,
    tokens_with_content,
)
from omini2_extension.omini2_core.tokens.condition import (
    PLACEMENTS,
    Condition,
    Placement,
    pack,
    require_condition,
    token_positions,
    unpack,
)
from omini2_extension.omini2_core.tokens.encode import (
    crop_to_tokens,
    encode_condition,
    masked_tokens,
    require_image,
    require_mask,
)


def latents(pixels):
    """A VAE whose latents are the means of 8x8 pixels of the red channel, and the black's 0."""
    red = pixels[..., 0].unfold(1, 8, 8).unfold(2, 8, 8).mean((-1, -2))
    return red[:, None].expand(-1, 16, -1, -1).contiguous()


def condition(h=2, w=3, n=1, **options) -> Condition:
    pixels = torch.rand(n, 16 * h, 16 * w, 3)
    empty = torch.zeros(1, 16, 2 * h, 2 * w)
    return Condition(pixels, latents(pixels), empty, latents, (16 * h, 16 * w), **options)


def resize(pixels, height, width):
    return torch.full((len(pixels), height, width, 3), 0.25)


# --- what other nodes may give -----------------------------------------------------------------


def test_only_a_condition_is_one() -> None:
    require_condition(condition())
    said = "^condition: this is no condition but str; connect Omini2 Condition Encode.$"
    with pytest.raises(Omini2Error, match=said):
        require_condition("a condition")


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(16, 16, 3),
        torch.rand(1, 16, 16, 2),
        torch.zeros(1, 16, 16, 3, dtype=torch.uint8),
        torch.rand(0, 16, 16, 3),
        torch.rand(1, 0, 16, 3),
    ],
    ids=lambda image: str(tuple(image.shape)),
)
def test_images_have_pictures_and_colours(image) -> None:
    kind = rf"{re.escape(str(tuple(image.shape)))} of (float32|uint8)"
    with pytest.raises(Omini2Error, match=f"^image: it is {kind} instead of pictures x"):
        require_image(image)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1000.5, 1001.0])
def test_images_hold_colours(value) -> None:
    image = torch.zeros(1, 16, 16, 4)
    image[0, 3, 3, 1] = -1000.0
    require_image(image)
    image[0, 3, 3, 1] = value
    with pytest.raises(Omini2Error, match=r"^image: it holds NaN, infinite or huge values"):
        require_image(image)
    with pytest.raises(Omini2Error, match=r"^image: .* no image but str; connect Load Image\.$"):
        require_image("picture")


def test_masks_have_pixels_and_numbers() -> None:
    mask = torch.zeros(1, 1, 16, 16)
    assert require_mask(mask[0, 0]).shape == require_mask(mask[0]).shape == mask.shape
    assert require_mask(torch.ones(3, 4, 5, dtype=torch.bool)).tolist() == [[[[1.0] * 5] * 4]] * 3
    for wrong in (mask[0, 0, 0], torch.zeros(1, 0, 16), torch.zeros(1, 16, 16, dtype=torch.cfloat)):
        size = re.escape(str(tuple(wrong.shape)))
        with pytest.raises(Omini2Error, match=f"^mask: it is {size} instead of masks x height"):
            require_mask(wrong)
    for value in (float("nan"), float("inf")):
        mask[0, 0, 2, 3] = value
        with pytest.raises(Omini2Error, match=r"^mask: it holds NaN or infinite values"):
            require_mask(mask)
    with pytest.raises(Omini2Error, match=r"^mask: .* but str; connect Load Image's mask\.$"):
        require_mask("mask")


def test_a_mask_keeps_something() -> None:
    place = Placement()
    with pytest.raises(Omini2Error, match=r"^mask: it keeps no token of the condition"):
        encode_condition(torch.rand(1, 32, 32, 3), latents, place, torch.zeros(1, 32, 32))


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_vae_gives_numbers(value) -> None:
    def broken(pixels):
        out = latents(pixels)
        out[0, 5, 1, 2] = value
        return out

    with pytest.raises(Omini2Error, match=r"^vae: it gives NaN or infinite values"):
        encode_condition(torch.rand(1, 32, 32, 3), broken, Placement())


# --- positions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("aligned", [0, 0]),
        ("fit", [0.5, 0.5]),  # twice the size: the centre of a 2 x 2 block
        ("left", [0, -3]),
        ("right", [0, 3]),
        ("above", [-2, 0]),
        ("below", [2, 0]),
        ("custom", [7, -9]),
    ],
)
def test_where_the_first_token_lies(kind, first) -> None:
    place = Placement(kind, (7.0, -9.0))
    positions = token_positions((2, 3), place, (4, 6))
    step = 2 if kind == "fit" else 1
    steps = torch.tensor(list(itertools.product((0, 1), (0, 1, 2))))
    assert positions.dtype == torch.float32
    assert torch.equal(positions, torch.tensor(first) + step * steps)


def test_the_shift_is_scaled_and_the_centre_is_not_shifted() -> None:
    """Axes are independent: (i + delta) * s + (s - 1) / 2."""
    place = Placement("custom", (1.0, -2.0), (3.0, 0.5))
    rows = [[4.0, -1.25], [4.0, -0.75]]
    assert token_positions((1, 2), place, (9, 9)).tolist() == rows
    assert token_positions((1, 2), place, (9, 9), centred=False).tolist() == [[3, -1], [3, -0.5]]


def test_fit_multiplies_its_own_scale() -> None:
    """Rows and columns each by the picture's size over the condition's, times the scale."""
    assert Placement("fit", scale=(0.5, 3.0)).scale_for((2, 3), (8, 3)) == (2.0, 3.0)
    assert Placement("left", scale=(0.5, 3.0)).scale_for((2, 3), (8, 3)) == (0.5, 3.0)


def test_a_condition_says_its_size() -> None:
    keep = torch.tensor([[True, False, True], [False, False, True]])
    pruned = condition(keep=keep, placement=Placement(scale=(2.0, 3.0)))
    assert pruned.hw == (2, 3) and condition().token_count == 6 and pruned.token_count == 3
    assert pruned.coverage() == (4.0, 9.0)
    assert condition(placement=Placement("custom")).coverage() is None
    tokens = torch.arange(12.0).reshape(1, 6, 2)
    assert pruned.select(tokens).tolist() == [[[0, 1], [4, 5], [10, 11]]]
    assert condition().select(tokens) is tokens
    assert pruned.positions((9, 9)).tolist() == [[0.5, 1], [0.5, 7], [2.5, 7]]
    assert pruned.positions((9, 9), centred=False).tolist() == [[0, 0], [0, 6], [2, 6]]


def test_bounds_of_position_scale() -> None:
    assert Placement(scale=(1e-3, 1e4)).scale == (1e-3, 1e4)
    for beyond in (0.99e-3, 1.0001e4):
        for scale in ((beyond, 1.0), (1.0, beyond)):
            with pytest.raises(Omini2Error, match=r"^position_scale: .* from 0\.001 to 10000\.$"):
                Placement(scale=scale)


def test_bounds_of_delta() -> None:
    assert Placement("custom", (1e6, -1e6)).delta == (1e6, -1e6)
    for name, delta in (("delta_rows", (1e6 + 0.5, 0.0)), ("delta_cols", (0.0, -1e6 - 0.5))):
        with pytest.raises(Omini2Error, match=f"^{name}: .* from -1000000 to 1000000"):
            Placement("custom", delta)


def test_which_placements_lie_on_the_picture() -> None:
    on_it = [kind for kind in PLACEMENTS if Placement(kind).on_the_picture]
    assert on_it == ["aligned", "fit"]


def test_placements_have_names() -> None:
    with pytest.raises(Omini2Error, match=r"^placement: up is not on offer; choose aligned or fit"):
        Placement("up")
    assert Placement() == Placement("aligned", (0.0, 0.0), (1.0, 1.0))
    assert PLACEMENT_CHOICES == (
        "aligned", "fit", "left", "right", "above", "below", "custom", "easycontrol_subject",
    )  # fmt: skip


def test_heads_are_shared_as_flux_does() -> None:
    assert rope_axes(128) == [16, 56, 56]


def test_tokens_are_two_by_two_patches_channel_by_channel() -> None:
    latent = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = pack(latent)
    assert tokens.shape == (2, 6, 12)
    for b, row, column in itertools.product(range(2), range(2), range(3)):
        patch = latent[b, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(tokens[b, row * 3 + column], patch.flatten())
    assert torch.equal(unpack(tokens, (2, 3)), latent)


# --- images and masks --------------------------------------------------------------------------


def test_cropping_takes_as_much_from_both_sides() -> None:
    image = torch.arange(35 * 50.0).reshape(1, 35, 50, 1).expand(-1, -1, -1, 3)
    assert torch.equal(crop_to_tokens(image), image[:, 1:33, 1:49])
    assert torch.equal(crop_to_tokens(image[0]), image[0, 1:33, 1:49])


def test_encoding_an_image(caplog) -> None:
    image = torch.rand(2, 37, 50, 4)
    mask = torch.zeros(37, 50)
    mask[2, 1] = 0.51  # the first pixel of the first token
    made = encode_condition(image, latents, Placement("left"), mask)
    assert torch.equal(made.pixels, image[:, 2:34, 1:49, :3])
    assert torch.equal(made.latent, latents(made.pixels))
    assert torch.equal(made.empty, torch.zeros(1, 16, 4, 6))
    assert made.encode is latents and made.image_size == (37, 50)
    assert made.placement == Placement("left") and made.paint is None and not made.shift_schedule
    assert made.keep.tolist() == [[True, False, False], [False] * 3]
    assert "image: 50x37 was cropped around its centre to 48x32" in caplog.text
    caplog.clear()
    assert encode_condition(image[:, :32, :48], latents, Placement()).keep is None
    assert not caplog.text


def test_the_black_image_goes_through_the_vae_too() -> None:
    made = encode_condition(torch.ones(3, 16, 32, 3), lambda p: 0.5 - latents(p), Placement())
    assert torch.equal(made.empty, torch.full((1, 16, 2, 4), 0.5))
    assert torch.equal(made.latent, torch.full((3, 16, 2, 4), -0.5))


@pytest.mark.parametrize(("height", "width"), [(16, 15), (15, 16)])
def test_one_token_is_the_least(height, width) -> None:
    assert encode_condition(torch.rand(1, 16, 16, 3), latents, Placement()).hw == (1, 1)
    said = f"^image: {width}x{height} pixels is smaller than one token of 16x16;"
    with pytest.raises(Omini2Error, match=said):
        encode_condition(torch.rand(1, height, width, 3), latents, Placement())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_one_bad_number_is_enough(value) -> None:
    image = torch.rand(1, 32, 32, 3)
    image[0, 7, 9, 2] = value
    with pytest.raises(Omini2Error, match=r"^image: it holds NaN, infinite or huge values"):
        encode_condition(image, latents, Placement())


@pytest.mark.parametrize("shape", [(4, 4, 6), (16, 4, 5), (16, 5, 6)])
def test_a_vae_that_is_not_fluxs_is_refused(shape) -> None:
    said = rf"^vae: it gives latents of shape \({shape[0]}, {shape[1]}, {shape[2]}\) instead of "
    with pytest.raises(Omini2Error, match=said + r"\(16, 4, 6\);"):
        encode_condition(torch.rand(1, 32, 48, 3), lambda p: torch.zeros(1, *shape), Placement())


def test_a_mask_marks_every_token_that_it_touches() -> None:
    masks = torch.zeros(2, 32, 48)
    masks[0, 15, 47] = 0.6
    masks[1, 16, 0] = 1
    masks[1, 0, 20] = 0.5  # not above 0.5
    kept = masked_tokens(masks, (2, 3), (32, 48))
    assert kept.dtype == torch.bool
    assert kept.tolist() == [[False, False, True], [True, False, False]]
    assert masked_tokens(masks[0], (1, 3), (32, 48)).tolist() == [[False, False, True]]


def test_a_mask_of_another_size_is_resized(caplog) -> None:
    mask = torch.zeros(4, 6)
    mask[:2, :2] = 1
    assert masked_tokens(mask, (2, 3), (32, 48)).tolist() == [[True, False, False], [False] * 3]
    assert "mask: 6x4 was resized to the image's 48x32" in caplog.text
    fine = torch.zeros(32, 64)
    fine[8:10, 8:10] = 1
    fine[8, 8] = 0  # three quarters of a pixel of the image
    assert masked_tokens(fine, (1, 2), (16, 32)).tolist() == [[True, False]]
    caplog.clear()
    mask = torch.zeros(1, 35, 50)
    mask[0, 0, 0] = 1  # cropped away with the image's border
    assert not masked_tokens(mask, (2, 3), (35, 50)).any()
    assert not caplog.text


# --- compression -------------------------------------------------------------------------------


def test_compression_rounds_each_side_and_corrects_each_axis() -> None:
    keep = torch.zeros(4, 5, dtype=torch.bool)
    keep[0, 4] = True
    old = condition(4, 5, n=2, keep=keep, placement=Placement("custom", (6.0, -4.0), (2.0, 1.0)))
    small = compress(old, 0.5, True, resize)
    assert small.hw == (2, 3)  # 2.5 tokens are rounded up
    assert torch.equal(small.pixels, torch.full((2, 32, 48, 3), 0.25))
    assert torch.equal(small.latent, torch.full((2, 16, 4, 6), 0.25))
    assert torch.equal(small.empty, torch.zeros(1, 16, 4, 6))
    assert small.keep.tolist() == [[False, False, True], [False] * 3]
    assert small.placement.scale == pytest.approx((4, 5 / 3))
    assert small.placement.delta == pytest.approx((3, -4 * 3 / 5))
    assert small.image_size == old.image_size
    plain = compress(old, 0.5, False, resize)
    assert plain.placement == old.placement


def test_compression_of_a_fitted_condition() -> None:
    """Its scale follows from the sizes; uncorrected, it stays as it was before compression."""
    old = condition(4, 5, placement=Placement("fit", scale=(1.0, 2.0)))
    assert compress(old, 0.5, True, resize).placement == old.placement
    plain = compress(old, 0.5, False, resize).placement
    assert plain.scale == pytest.approx((0.5, 2 * 3 / 5))
    assert plain.scale_for((2, 3), (8, 5)) == pytest.approx(old.placement.scale_for((4, 5), (8, 5)))


def test_compression_that_changes_nothing_is_the_same_condition() -> None:
    old = condition(2, 3, paint=torch.ones(2, 3, dtype=torch.bool))
    assert compress(old, 0.9, True, resize) is old
    with pytest.raises(Omini2Error, match=r"^compression: this condition is a token integration"):
        compress(old, 0.5, True, resize)


def test_bounds_of_compression() -> None:
    assert compress(condition(2, 5), 0.25, True, resize).hw == (1, 1)
    assert compress(condition(2, 5), 1, True, resize).hw == (2, 5)
    said = r"^compression: 0\.24 leaves no token of 5x2; use at least 0\.25\.$"
    with pytest.raises(Omini2Error, match=said):
        compress(condition(2, 5), 0.24, True, resize)
    for value in (-0.01, 1.01):
        with pytest.raises(Omini2Error, match=r"^compression: .* from 0 to 1\.$"):
            compress(condition(2, 5), value, True, resize)


# --- pruning -----------------------------------------------------------------------------------


def test_pruning_keeps_what_both_keep(caplog) -> None:
    assert PRUNE == ("off", "empty", "mask")
    first = torch.tensor([[True, True, False], [False, True, False]])
    second = torch.tensor([[False, True, True], [False, True, True]])
    both = prune(condition(keep=first), second)
    assert both.keep.tolist() == [[False, True, False], [False, True, False]]
    assert prune(condition(), first).keep is first
    assert not caplog.text
    assert prune(condition(), torch.ones(2, 3, dtype=torch.bool)).keep is None
    assert "prune: every token is kept" in caplog.text
    with pytest.raises(Omini2Error, match=r"^prune: it leaves no token"):
        prune(condition(keep=first), ~first)


def test_a_token_has_content_if_any_pixel_of_any_image_differs() -> None:
    pixels = torch.full((2, 32, 48, 3), 0.5)
    pixels[0, 15, 15, 1] = 0.8
    pixels[1, 31, 47, 2] = 0.1
    want = [[True, False, False], [False, False, True]]
    assert tokens_with_content(pixels, 0.2, 0).tolist() == want
    assert tokens_with_content(pixels, 0.35, 0).tolist() == [[False] * 3, want[1]]
    assert tokens_with_content(pixels, 0.35, 1).tolist() == [[False, True, True]] * 2
    exact = torch.zeros(1, 16, 32, 3)
    exact[0, 0, 0] = 0.5
    assert not tokens_with_content(exact, 0.5, 0).any()  # by more than the threshold
    for ok, wrong in ((0.0, -0.01), (1.0, 1.01)):
        tokens_with_content(exact, ok, 0)
        with pytest.raises(Omini2Error, match=r"^threshold: .* from 0 to 1\.$"):
            tokens_with_content(exact, wrong, 0)


def test_growing_in_all_eight_directions() -> None:
    tokens = torch.zeros(7, 8, dtype=torch.bool)
    tokens[3, 4] = True
    for by in (1, 2):
        want = torch.zeros(7, 8, dtype=torch.bool)
        want[3 - by : 4 + by, 4 - by : 5 + by] = True
        assert torch.equal(grown(tokens, by), want)
    assert grown(tokens, 0) is tokens
    line = torch.tensor([[True, False, False, False, False]])
    assert grown(line, 3).tolist() == [[True, True, True, True, False]]
    with pytest.raises(
        Omini2Error, match=r"^grow: -1 is out of bounds; use a value from 0 to 1024"
    ):
        grown(tokens, -1)


def test_the_background_is_the_mean_of_the_fullest_cell() -> None:
    """32 levels a channel; 1.0 belongs to the last."""
    cell = torch.tensor([[0.51, 1.0, 0.0], [0.53, 0.98, 0.03]])  # of the same cell
    others = torch.tensor([[0.49, 1.0, 0.0], [0.51, 0.96, 0.0], [0.51, 1.0, 0.04]])
    pixels = torch.cat((others, cell)).reshape(1, 1, 5, 3)
    assert background(pixels).tolist() == pytest.approx([0.52, 0.99, 0.015])
    # a channel's levels don't run into the next one's
    pair = torch.tensor([[0.0, 1 / 32, 0.0], [0.0, 0.0, 1.0], [0.0, 1 / 32, 0.0]])
    assert background(pair.reshape(1, 1, 3, 3)).tolist() == pytest.approx([0, 1 / 32, 0])


def test_dropped_tokens_are_dimmed_and_tinted() -> None:
    grey = torch.full((2, 16, 32, 3), 0.5)
    whole = condition(1, 2)
    assert torch.equal(draw_tokens(whole), whole.pixels)
    assert draw_tokens(whole) is not whole.pixels
    keep = torch.tensor([[True, False]])
    drawn = draw_tokens(Condition(grey, latents(grey), grey, latents, (16, 32), keep=keep))
    assert drawn.shape == (1, 16, 32, 3)
    assert torch.equal(grey, torch.full((2, 16, 32, 3), 0.5))  # it draws on a copy
    tinted = [0.35 * 0.5 + 0.65 * tint for tint in (0.45, 0.1, 0.35)]
    assert drawn[0, 1, 1].tolist() == [0.5] * 3
    assert drawn[0, 15, 31].tolist() == pytest.approx(tinted)
    for row, column in ((0, 17), (5, 16), (0, 16)):  # the grid, darkened once
        assert drawn[0, row, column].tolist() == pytest.approx([0.8 * each for each in tinted])
    for row, column in ((0, 1), (5, 0)):
        assert drawn[0, row, column].tolist() == pytest.approx([0.4] * 3)


# --- families ----------------------------------------------------------------------------------


EASY = "transformer_blocks.0.attn.processor"


@pytest.mark.parametrize(
    ("key", "want"),
    [
        ("transformer.x_embedder.lora_A.weight", (("x_embedder",), "down", PLAIN, 0)),
        ("x_embedder.lora_B.weight", (("x_embedder",), "up", PLAIN, 0)),
        ("transformer.x_embedder.alpha", (("x_embedder",), "alpha", PLAIN, 0)),
        ("lora_unet_double_blocks_11_img_attn_proj.lora_up.weight",
         (("transformer_blocks.11.attn.to_out.0",), "up", PLAIN, 0)),
        ("diffusion_model.single_blocks.3.linear1.lora_A.default.weight",
         (tuple(f"single_transformer_blocks.3.{name}"
                for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
          "down", PLAIN, 0)),
        ("lora_unet_time_in_in_layer.lora_down.weight",
         (("time_text_embed.timestep_embedder.linear_1",), "down", PLAIN, 0)),
        ("final_layer.linear.lora_B.weight", (("proj_out",), "up", PLAIN, 0)),
        ("some.where.lora_A.weight", (("some.where",), "down", PLAIN, 0)),
        ("transformer.x_embedder.weight", None),
        *(
            (f"{prefix}{block}.attn.processor.{linear}_loras.{n}.{part}.weight",
             ((f"{block}.attn.{name}",), part, PROCESSOR, n))
            for prefix, block, linear, name, n, part in (
                ("", "transformer_blocks.18", "q", "to_q", 0, "down"),
                ("", "transformer_blocks.3", "k", "to_k", 1, "up"),
                ("module.", "single_transformer_blocks.0", "v", "to_v", 12, "up"),
                ("transformer.", "transformer_blocks.0", "proj", "to_out.0", 0, "down"),
            )
        ),
        (f"{EASY}.o_loras.0.down.weight", None),
        (f"{EASY}.q_loras.0.down.weight.x", None),
    ],
)  # fmt: skip
def test_what_a_key_names(key, want) -> None:
    assert parse(key) == want


def test_families_differ_as_their_originals_do() -> None:
    """A row each, in the order in which keys alone decide."""
    names = [family.name for family in FAMILIES]
    assert names == ["OminiControl", "EasyControl", "OmniConsistency", "IEAP", "UniCombine",
                     "OmniPaint", "PhotoDoodle"]  # fmt: skip

    def where(**switches: object) -> list[str]:
        return [f.name for f in FAMILIES if all(getattr(f, k) == v for k, v in switches.items())]

    easy = ["EasyControl", "OmniConsistency"]
    assert where(way=PROCESSOR) == where(attention=("independent",)) == where(centred=False) == easy
    assert where(branch_guidance=1.0) == ["OminiControl", "IEAP"]
    assert where(keeps_ordinary=True) == [*easy, "PhotoDoodle"]
    assert where(at_step=True) == where(way=None) == ["PhotoDoodle"]
    assert where(on_picture=True) == ["IEAP"] and where(one_sequence=True) == ["OmniPaint"]
    assert where(reads_output=("attn.to_out.0",)) == where(subject_delta=(64.0, 0.0)) == easy[:1]
    assert where(unused=("attn.to_out.0",)) == easy[1:]


def test_attention_that_a_family_was_not_trained_with_is_refused() -> None:
    for attention in ("auto", "joint", "independent"):
        OMINICONTROL.require_attention(attention)
    said = r"^attention: EasyControl's LoRAs were trained .* so joint would .* auto or independent"
    with pytest.raises(Omini2Error, match=said):
        EASYCONTROL.require_attention("joint")
    EASYCONTROL.require_attention("auto")
    EASYCONTROL.require_attention("independent")
    said = r"^attention: OmniPaint's .* look at the picture too, so independent .* auto or joint"
    with pytest.raises(Omini2Error, match=said):
        BY_NAME["OmniPaint"].require_attention("independent")


def test_most_keys_decide_and_none_is_ominicontrol() -> None:
    easy = "transformer_blocks.0.attn.processor.q_loras.0.down.weight"
    omini = "transformer.x_embedder.lora_A.weight"
    assert family_of([easy, easy, omini]) is EASYCONTROL
    assert family_of([easy, omini, omini]) is OMINICONTROL
    assert family_of(iter([easy])) is EASYCONTROL
    assert family_of(["noise"]) is family_of([easy, omini]) is OMINICONTROL


def test_a_familys_subject_is_a_shift() -> None:
    scale = (2.0, 3.0)
    moved = chosen_placement("easycontrol_subject", (1.0, 2.0), scale)
    assert moved == Placement("custom", (64.0, 0.0), scale)
    assert chosen_placement("custom", (1.0, 2.0), scale) == Placement("custom", (1.0, 2.0), scale)


@pytest.mark.parametrize("choice", ["nowhere", ["left"], {"left": 1}, None])
def test_a_placement_that_is_not_on_offer_is_refused(choice: Any) -> None:
    said = "^placement: .* is not on offer; choose aligned or .* or easycontrol_subject"
    with pytest.raises(Omini2Error, match=said):
        chosen_placement(choice, (0.0, 0.0), (1.0, 1.0))
