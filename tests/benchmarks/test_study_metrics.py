"""What the study measures with: each figure on pictures whose answer is known."""

import math

import numpy as np
import pytest
import torch

from benchmarks import classifier, intervals, metrics


def lines(*columns: int, side: int = 32) -> np.ndarray:
    """Upright lines of one pixel."""
    mask = np.zeros((side, side), bool)
    mask[:, list(columns)] = True
    return mask


def square_picture(top: int, left: int, side: int = 20, size: int = 64) -> torch.Tensor:
    """A white square on black, (1, size, size, 3)."""
    picture = torch.zeros(1, size, size, 3)
    picture[:, top : top + side, left : left + side] = 1
    return picture


def test_f1_by_hand() -> None:
    # One of two wanted lines found, and one line where none is: precision and recall 1/2.
    assert metrics.edge_f1(lines(4, 20), lines(4, 12)) == pytest.approx(0.5)
    # One of two wanted lines and nothing else: precision 1, recall 1/2.
    assert metrics.edge_f1(lines(4), lines(4, 12)) == pytest.approx(2 / 3)


@pytest.mark.parametrize(("shift", "f1"), [(0, 1), (1, 1), (2, 0)])
def test_f1_forgives_one_pixel(shift: int, f1: float) -> None:
    assert metrics.edge_f1(lines(10 + shift), lines(10)) == f1


def test_f1_of_nothing() -> None:
    assert math.isnan(metrics.edge_f1(lines(3), lines()))
    assert metrics.edge_f1(lines(), lines(3)) == 0


@pytest.mark.parametrize("shift", [(0, 0), (3, 4), (-6, 8), (0, -20)])
def test_offset_is_the_shift(shift: tuple[int, int]) -> None:
    one = metrics.edges(square_picture(22, 22))[0]
    other = metrics.edges(square_picture(22 + shift[0], 22 + shift[1]))[0]
    assert metrics.offset(other, one) == pytest.approx(math.hypot(*shift))


def test_centroids_and_overlap_of_known_boxes() -> None:
    one, other = np.zeros((2, 40, 40), bool)
    one[10:20, 10:20] = other[13:23, 14:24] = True
    assert metrics.centroid_distance(one, other) == pytest.approx(5)
    assert metrics.overlap(one, other) == pytest.approx(42 / 158)
    assert math.isnan(metrics.centroid_distance(one, np.zeros_like(one)))


def test_edges_are_those_of_the_hosts_canny_node() -> None:
    from comfy_extras.nodes_canny import Canny

    torch.manual_seed(3)
    noise = torch.rand(3, 16, 16, 3).repeat_interleave(4, 1).repeat_interleave(4, 2)
    pictures = (0.5 + 0.3 * (noise - 0.5) + 0.3 * square_picture(9, 14)).clamp(0, 1)
    for thresholds in ((0.1, 0.2), (0.2, 0.6)):
        wanted = Canny.execute(pictures, *thresholds)[0][..., 0].numpy() > 0
        assert wanted.any() and not wanted.all()
        assert (metrics.edges(pictures, thresholds) == wanted).all()


def test_likeness_of_equal_and_other_pictures() -> None:
    one = torch.rand(2, 32, 32, 3)
    assert metrics.ssim(one, one) == pytest.approx([1, 1], abs=1e-5)
    assert min(metrics.psnr(one, one)) > 54
    other = (one + 0.1 * torch.randn_like(one)).clamp(0, 1)
    assert max(metrics.ssim(one, other)) < 0.99
    # An error of 0.1 everywhere is 20 dB.
    assert metrics.psnr(0.5 * one, 0.5 * one + 0.1) == pytest.approx([20, 20], abs=1e-3)


def test_likeness_in_a_hole_sees_nothing_else() -> None:
    one = torch.rand(1, 32, 32, 3)
    other, hole = one.clone(), torch.zeros(1, 32, 32, dtype=torch.bool)
    other[:, :8] = 0
    hole[:, 20:] = True
    assert metrics.psnr(one, other, hole)[0] > 54 > metrics.psnr(one, other)[0]
    assert metrics.ssim(one, other, hole)[0] == pytest.approx(1, abs=1e-5)
    assert metrics.ssim(one, other)[0] < 0.95


def test_a_narrow_arm_is_thin_and_a_box_is_not() -> None:
    mask = np.zeros((1, 96, 96), np.float32)
    mask[0, 20:70, 20:70] = 1
    mask[0, 40:46, 70:94] = 1
    thin = metrics.thin_parts(mask)
    assert thin[43, 85] and not thin[45, 45]
    assert not metrics.thin_parts(mask, width=4)[43, 85]


def test_frechet_of_equal_and_shifted_sets() -> None:
    random = np.random.default_rng(0)
    one = random.normal(size=(300, 8))
    assert metrics.frechet(one, one) == pytest.approx(0, abs=1e-6)
    assert metrics.frechet(one, one + 2) == pytest.approx(8 * 4, rel=1e-6)
    # Three times the spread of a unit Gaussian: (3 - 1)^2 for each of the sample's variances.
    wide = metrics.frechet(one, one * 3)
    assert wide == pytest.approx(4 * np.trace(np.cov(one.T)) + 4 * (one.mean(0) ** 2).sum())


def test_intervals_hold_what_they_say() -> None:
    random = np.random.default_rng(1)
    held = sum(
        found.low < 5 < found.high
        for found in (intervals.mean(random.normal(5, 2, 25)) for _ in range(400))
    )
    assert 0.92 < held / 400 < 0.98
    assert intervals.mean([1, math.nan, 3])[::3] == (2, 2)
    every = intervals.share([1] * 200)
    assert every.value == every.high == 1 and 0.97 < every.low < 0.99
    assert intervals.difference([2, 3, 4], [1, 2, 3])[:3] == pytest.approx((1, 1, 1))


def test_a_classifier_learns_and_tells_pictures_apart() -> None:
    model = classifier.train(count=256, epochs=3)
    again = classifier.train(count=256, epochs=3)
    pictures, _ = classifier.drawn(0, 64, test=True)
    scenes = pictures.movedim(1, -1)
    found = classifier.features(model, scenes)
    assert found.shape == (64, classifier.FEATURES)
    assert (found == classifier.features(again, scenes)).all()
    noise = classifier.features(model, torch.rand_like(scenes))
    other = classifier.features(model, classifier.drawn(64, 64, test=True)[0].movedim(1, -1))
    assert metrics.frechet(found, noise) > 3 * metrics.frechet(found, other) > 0


def test_a_distance_loses_what_a_small_sample_adds() -> None:
    draw = np.random.default_rng(0)
    one, other = draw.normal(size=(2, 200, 8))

    def apart(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.square(a.mean(0) - b.mean(0)).sum())

    same = intervals.distance(one, other, apart)
    assert same.low <= same.value < apart(one, other) and same.value <= same.high
    far = intervals.distance(one, other + 1, apart)
    assert far.low < 8 < far.high and far.low <= far.value <= far.high
