"""An image for a reference: what size it gets, and which tokens are kept."""

import logging

import pytest
import torch

from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.host import images
from omini2_extension.omini2_core.tokens.reference import (
    ReferenceImage,
    megapixel,
    reference_image,
)


def made(image: torch.Tensor, mask=None, target=None, compression: float = 1.0) -> ReferenceImage:
    return reference_image(image, mask, target, compression, images.resize, images.lanczos)


def ramp(height: int, width: int) -> torch.Tensor:
    """An image whose first two colours are the row and the column."""
    image = torch.zeros(1, height, width, 3)
    image[..., 0] = torch.linspace(0, 1, height)[:, None]
    image[..., 1] = torch.linspace(0, 1, width)
    return image


def test_as_it_is_as_long_as_nothing_is_asked_for() -> None:
    image = torch.rand(2, 50, 70, 4)
    for compression in (1.0, 0.9):  # 3x4 tokens, which a side of 0.9 leaves as they are
        got = made(image, compression=compression)
        assert torch.equal(got.pixels, image[..., :3])
        assert (got.whole, got.keep, got.of_tokens) == (None, None, False)
    assert made(image, target=(50, 70)).pixels.shape == (2, 50, 70, 3)


def test_compression_rounds_to_whole_tokens_of_the_cropped_image(
    caplog: pytest.LogCaptureFixture,
) -> None:
    image = ramp(16 * 4 + 6, 16 * 5)
    with caplog.at_level(logging.WARNING):
        got = made(image, compression=0.5)
    assert got.whole == (4, 5) and got.hw == (2, 3)
    assert "80x70 was cropped around its centre to 80x64" in caplog.text
    means = image[:, 3:-3, :, 0].reshape(2, 32, 80).mean((1, 2))
    assert torch.allclose(got.pixels[0, :, :, 0].reshape(2, 16, 48).mean((1, 2)), means, atol=1e-3)


@pytest.mark.parametrize(
    ("size", "target"), [((64, 128), (64, 64)), ((128, 64), (32, 64)), ((48, 64), (96, 128))]
)
def test_another_size_keeps_the_middle(size: tuple[int, int], target: tuple[int, int]) -> None:
    got = made(ramp(*size), target=target).pixels[0]
    assert got.shape == (*target, 3)
    scale = min(size[0] / target[0], size[1] / target[1])  # pixels of the image for each new one
    for axis, colour in ((0, 0), (1, 1)):
        line = got[..., colour].mean(1 - axis)
        assert abs(float(line.mean()) - 0.5) < 0.01
        spread = scale * (target[axis] - 1) / (size[axis] - 1)
        assert abs(float(line[-1] - line[0]) - spread) < 0.04


def test_a_line_of_pixels_is_left_of_a_shape_that_is_quite_another() -> None:
    for size, target in (((16, 999), (512, 16)), ((998, 16), (16, 512))):
        assert made(ramp(*size), target=target).pixels.shape == (1, *target, 3)


def test_a_megapixel_in_the_image_s_own_shape() -> None:
    assert megapixel((1000, 1000)) == (1024, 1024)
    assert megapixel((1080, 1920)) == (768, 1360)
    assert megapixel((16, 16)) == (1024, 1024)
    height, width = megapixel((10, 10_000))
    assert height == 32 and width % 16 == 0


def test_a_mask_goes_along_with_crop_and_compression() -> None:
    image, mask = torch.rand(1, 64, 128, 3), torch.zeros(1, 64, 128)
    mask[:, 0, 32] = 1  # the first pixel that a square crop leaves
    got = made(image, mask, target=(64, 64), compression=0.5)
    assert got.whole == (4, 4) and got.keep is not None
    assert got.keep.tolist() == [[True, False], [False, False]]
    assert made(image, torch.ones(1, 64, 128)).keep is None
    small = torch.zeros(4, 8)
    small[3, 7] = 1
    kept = made(image, small).keep
    assert kept is not None and kept.nonzero().tolist() == [[3, 7]]


def test_what_leaves_nothing_is_refused() -> None:
    image, mask = torch.rand(1, 64, 128, 3), torch.zeros(1, 64, 128)
    mask[:, 0, 0] = 1
    with pytest.raises(Omini2Error, match=r"mask: it keeps no token"):
        made(image, 0 * mask)
    with pytest.raises(Omini2Error, match=r"mask: it keeps no token"):
        made(image, mask, target=(64, 64))  # which crops it away
    with pytest.raises(Omini2Error, match=r"compression: 0.1 leaves no token of 8x4"):
        made(image, compression=0.1)
    with pytest.raises(Omini2Error, match=r"image: 128x15 pixels is smaller than one token"):
        made(image[:, :15])
    for compression in (0.0, 1.5, float("nan")):
        with pytest.raises(Omini2Error, match="compression: "):
            made(image, compression=compression)
