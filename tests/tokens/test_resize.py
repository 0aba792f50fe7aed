"""Condition images of any size and shape: stretched or padded to a square, the mask with them."""

import inspect

import comfy.utils
import pytest
import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny import LatentVae

from omini2_extension.nodes import CompactTokens, ConditionEncode
from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.host import images
from omini2_extension.omini2_core.tokens.resize import PAD_COLOUR, padded_content, resized

GREY = 0.5


def encode(image, mask=None, **options):
    return ConditionEncode.execute(image, LatentVae(), "fit", 0, 0, 1.0, mask, **options)[0]


def halves(height: int, width: int) -> torch.Tensor:
    """Left half red, right half blue."""
    image = torch.zeros(1, height, width, 3)
    image[:, :, : width // 2, 0] = 1
    image[:, :, width // 2 :, 2] = 1
    return image


def test_graphs_from_before_these_inputs_run_as_before() -> None:
    image = torch.rand(2, 48, 80, 4)
    before = ConditionEncode.execute(image, LatentVae(), "aligned", 0, 0, 1.0)[0]
    assert torch.equal(before.pixels, image[..., :3])
    schema = {i.id: i for i in ConditionEncode.define_schema().inputs}
    assert schema["resize"].optional and schema["size"].optional
    defaults = inspect.signature(ConditionEncode.execute).parameters
    assert (defaults["resize"].default, defaults["size"].default) == ("off", 512)


@pytest.mark.parametrize(("height", "width"), [(100, 300), (64, 64), (300, 7)])
def test_stretch_fills_the_square(height, width) -> None:
    condition = encode(halves(height, width), resize="stretch", size=64)
    assert condition.hw == (4, 4)
    assert condition.pixels[0, :, 4].allclose(torch.tensor([1.0, 0, 0]), atol=0.02)
    assert condition.pixels[0, :, -4].allclose(torch.tensor([0, 0, 1.0]), atol=0.02)


def test_pad_keeps_the_shape_and_puts_grey_around() -> None:
    condition = encode(halves(60, 240), resize="pad", size=128)
    assert condition.hw == (8, 8)
    pixels = condition.pixels[0]
    assert (pixels[:48] == GREY).all() and (pixels[80:] == GREY).all()
    assert pixels[48:80, 8].allclose(torch.tensor([1.0, 0, 0]), atol=0.02)
    assert pixels[48:80, -8].allclose(torch.tensor([0, 0, 1.0]), atol=0.02)


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(4, 256).map(lambda n: 16 * n))
def test_padded_content_fits_the_square_in_whole_tokens(height, width, size) -> None:
    h, w = padded_content(height, width, size)
    assert h % 16 == w % 16 == 0
    assert 16 <= min(h, w) <= max(h, w) == size
    # Less than a token is lost to rounding, unless the image is thinner than one.
    for side, other in ((h, height), (w, width)):
        exact = other * size / max(height, width)
        assert side <= max(exact, 16) and exact - side < 16
    assert padded_content(width, height, size) == (w, h)


@given(
    st.integers(1, 90), st.integers(1, 90), st.sampled_from(["stretch", "pad"]), st.integers(1, 3)
)
def test_the_square_has_its_size_and_the_padding_is_outside_of_the_mask(h, w, how, n) -> None:
    image, mask, _ = resized(torch.rand(n, h, w, 3), torch.ones(1, h, w), how, 64, images.lanczos)
    assert image.shape == (n, 64, 64, 3) and mask.shape == (1, 64, 64)
    height, width = (64, 64) if how == "stretch" else padded_content(h, w, 64)
    assert int(mask.sum()) == height * width
    assert (image.movedim(-1, 1)[:, :, mask[0] == 0] == PAD_COLOUR).all()


def test_the_mask_goes_along() -> None:
    mask = torch.zeros(1, 60, 240)
    mask[:, :, :120] = 1
    condition = encode(halves(60, 240), mask, resize="pad", size=128)
    kept = torch.zeros(8, 8, dtype=torch.bool)
    kept[3:5, :4] = True
    assert torch.equal(condition.keep, kept)
    assert encode(halves(60, 240), mask, resize="stretch", size=64).keep[:, :2].all()


def test_a_thin_stroke_survives() -> None:
    mask = torch.zeros(1, 1000, 1000)
    mask[:, 500] = 1
    condition = encode(torch.rand(1, 1000, 1000, 3), mask, resize="stretch", size=64)
    assert condition.keep.any(dim=1).tolist() == [False, False, True, False]


def test_a_mask_of_another_size_is_resized_with_a_warning(caplog) -> None:
    mask = torch.zeros(1, 4, 4)
    mask[:, :2] = 1
    condition = encode(torch.rand(1, 64, 64, 3), mask, resize="stretch", size=64)
    assert caplog.text.count("mask: 4x4 was resized to the image's 64x64") == 1
    assert condition.keep[:2].all() and not condition.keep[2:].any()


@pytest.mark.parametrize("how", ["stretch", "pad", "crop"])
def test_nan_is_not_hidden_by_resampling(how) -> None:
    image = torch.rand(1, 32, 32, 3)
    image[0, 3, 3, 0] = float("nan")
    with pytest.raises(Omini2Error, match=r"^image: it holds NaN.*check the node that made it\.$"):
        encode(image, resize=how, size=64)


@pytest.mark.parametrize("size", [(300, 500), (640, 427), (512, 512), (1000, 333), (123, 77)])
def test_the_pixels_are_those_of_easycontrols_pipeline(size) -> None:
    """Its preparation of images, by the library that it uses."""
    preprocess = VaeImageProcessor(vae_scale_factor=16).preprocess
    colours = torch.randint(0, 256, (*size[::-1], 3), dtype=torch.uint8)
    picture = Image.fromarray(colours.numpy())
    image = colours.float()[None] / 255

    stretched, *_ = resized(image, None, "stretch", 512, images.lanczos)
    assert torch.equal(preprocess(picture, 512, 512), stretched.movedim(-1, 1) * 2 - 1)

    scale = 512 / max(size)
    content = preprocess(picture, int(size[1] * scale), int(size[0] * scale))
    above, left = (512 - content.shape[-2]) // 2, (512 - content.shape[-1]) // 2
    padded, *_ = resized(image, None, "pad", 512, images.lanczos)
    assert torch.equal(F.pad(content, (left, left, above, above)), padded.movedim(-1, 1) * 2 - 1)


def test_a_size_from_a_link_may_be_a_float() -> None:
    image = halves(40, 24)
    whole, linked = (encode(image, resize="stretch", size=size) for size in (32, 32.0))
    assert torch.equal(linked.pixels, whole.pixels)


# --- crop --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 500), (640, 428), (96, 96), (1000, 332)])
def test_crop_is_the_hosts_own_resizing_around_the_centre(size) -> None:
    """So that a graph can go without the host's node."""
    image = torch.rand(2, *size, 3)
    cropped = encode(image, resize="crop", size=128).pixels
    host = comfy.utils.common_upscale(image.movedim(-1, 1), 128, 128, "lanczos", "center")
    assert torch.equal(cropped, host.movedim(1, -1))


@pytest.mark.parametrize("how", ["stretch", "pad", "crop"])
def test_a_square_of_that_size_is_left_as_it_is(how) -> None:
    image = torch.rand(1, 64, 64, 3)  # not in 8 bits, as resampling would have it
    assert torch.equal(encode(image, resize=how, size=64).pixels, image)


def test_the_image_comes_out_as_it_was_encoded() -> None:
    image = torch.rand(1, 70, 100, 3)
    condition, shown = ConditionEncode.execute(image, LatentVae(), "aligned", 0, 0, 1.0).args
    assert torch.equal(shown, condition.pixels) and torch.equal(shown, image[:, 3:67, 2:98])
    assert ConditionEncode.define_schema().outputs[0].display_name == "condition"


@pytest.mark.parametrize(
    ("how", "rows", "columns"),
    [
        ("crop", slice(0, 2), slice(0, 2)),  # columns 24 to 72, the first half of which is marked
        ("pad", slice(1, 2), slice(0, 2)),  # 32 rows in the middle of 64
        ("stretch", slice(0, 2), slice(0, 2)),
    ],
)
def test_a_mask_of_the_image_as_it_was_follows_to_compact_tokens(how, rows, columns) -> None:
    mask = torch.zeros(1, 48, 96)
    mask[:, :24, :48] = 1
    expected = torch.zeros(4, 4, dtype=torch.bool)
    expected[rows, columns] = True
    condition = encode(torch.rand(1, 48, 96, 3), resize=how, size=64)
    values = (1.0, True, "mask", 0.1, 0, False)
    assert torch.equal(CompactTokens.execute(condition, *values, mask)[0].keep, expected)


def test_a_mask_of_the_square_is_taken_as_it_is() -> None:
    mask = torch.zeros(1, 64, 64)
    mask[:, :16, :16] = 1
    condition = encode(torch.rand(1, 48, 96, 3), resize="crop", size=64)
    kept = CompactTokens.execute(condition, 1.0, True, "mask", 0.1, 0, False, mask)[0].keep
    assert kept.nonzero().tolist() == [[0, 0]]
