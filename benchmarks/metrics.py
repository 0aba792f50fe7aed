"""What is measured on pictures: edges, likeness, silhouettes, and a distance of two sets.

Pictures are (n, height, width, 3) float32 from 0 to 1, edge maps (height, width) bool. A value that
means nothing for a picture (edge F1 where nothing has an edge) is NaN and left out of every mean.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy import linalg, ndimage
from torch import Tensor

TOLERANCE = 1  # pixels, in all eight directions
THRESHOLDS = 0.1, 0.2  # of Canny's gradients; higher ones see no edge at all in many scenes
EIGHT = np.ones((3, 3), bool)


def edges(pictures: Tensor, thresholds: tuple[float, float] = THRESHOLDS) -> np.ndarray:
    """Canny's edges, (n, height, width) bool, as ComfyUI's Canny node finds them.

    kornia's own hysteresis walks along every weak edge pixel by pixel; looking for the connected
    parts that hold a strong pixel finds the same edges in a fraction of the time.
    """
    from kornia.filters import canny

    raw = canny(pictures.movedim(-1, 1), *thresholds, hysteresis=False)[1][:, 0].numpy()
    found = np.zeros(raw.shape, bool)
    for image, out in zip(raw, found, strict=True):
        labels, _ = ndimage.label(image > 0, EIGHT)
        strong = np.unique(labels[image == 1])
        out[...] = np.isin(labels, strong[strong > 0])
    return found


def edge_recall(found: np.ndarray, wanted: np.ndarray, tolerance: int = TOLERANCE) -> float:
    """The share of the wanted edge pixels that have a found one within the tolerance."""
    if not wanted.any():
        return math.nan
    return float((widened(found, tolerance) & wanted).sum() / wanted.sum())


def edge_f1(found: np.ndarray, wanted: np.ndarray, tolerance: int = TOLERANCE) -> float:
    """Harmonic mean of precision and recall of edge pixels; NaN if none is wanted.

    A pixel counts as met if the other map has one within `tolerance` pixels in all directions.
    """
    if not wanted.any():
        return math.nan
    if not found.any():
        return 0.0
    precision = edge_recall(wanted, found, tolerance)
    recall = edge_recall(found, wanted, tolerance)
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def offset(found: np.ndarray, wanted: np.ndarray) -> float:
    """Length in pixels of the shift that best lays found edges on wanted ones; NaN without edges.

    The peak of the two maps' cross-correlation, both blurred by a pixel so that lines one pixel
    apart still meet.
    """
    if not found.any() or not wanted.any():
        return math.nan
    height, width = found.shape
    padded = 2 * height, 2 * width  # or a shift would come round at the other side
    a, b = (ndimage.gaussian_filter(m.astype(np.float32), 1.0) for m in (found, wanted))
    product = np.fft.rfft2(a, padded) * np.conj(np.fft.rfft2(b, padded))
    peak = np.fft.irfft2(product, padded).argmax()
    dy, dx = np.unravel_index(peak, padded)
    dy, dx = ((d + n // 2) % n - n // 2 for d, n in zip((dy, dx), padded, strict=True))
    return math.hypot(dy, dx)


def centroid_distance(found: np.ndarray, wanted: np.ndarray) -> float:
    """Pixels between the middles of two silhouettes, (height, width) bool; NaN if one is empty."""
    if not found.any() or not wanted.any():
        return math.nan
    (fy, fx), (wy, wx) = ([axis.mean() for axis in np.nonzero(m)] for m in (found, wanted))
    return math.hypot(fy - wy, fx - wx)


def overlap(found: np.ndarray, wanted: np.ndarray) -> float:
    """Intersection over union of two silhouettes."""
    union = (found | wanted).sum()
    return float((found & wanted).sum() / union) if union else math.nan


def psnr(pictures: Tensor, truth: Tensor, where: Tensor | None = None) -> list[float]:
    """Peak signal to noise in dB, one a picture; only `where`, (n, height, width) bool, is seen.

    Equal pictures would give infinity; 8 bits can't tell errors below 1/510 apart, which is where
    it stops.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio

    found = []
    for i, (picture, true) in enumerate(zip(pictures, truth, strict=True)):
        if where is not None:
            picture, true = picture[where[i]], true[where[i]]
        value = float(peak_signal_noise_ratio(picture, true, data_range=1.0))
        found.append(min(value, 20 * math.log10(510)))
    return found


def ssim(pictures: Tensor, truth: Tensor, where: Tensor | None = None) -> list[float]:
    """Structural similarity, one a picture; only `where`, (n, height, width) bool, is averaged."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    similarity, full = structural_similarity_index_measure(
        pictures.movedim(-1, 1),
        truth.movedim(-1, 1),
        data_range=1.0,
        reduction="none",
        return_full_image=True,
    )
    if where is None:
        return [float(value) for value in similarity.reshape(-1)]
    means = full.mean(dim=1)
    return [float(mean[mask].mean()) for mean, mask in zip(means, where, strict=True)]


def thin_parts(masks: np.ndarray, width: int = 20) -> np.ndarray:
    """What of the silhouettes (things, height, width) is narrower than `width` pixels, bool.

    What an opening by a disc of that diameter takes away: points of stars, arms, small rings.
    """
    line = np.arange(width) - (width - 1) / 2
    disc = np.hypot(*np.meshgrid(line, line)) <= width / 2
    thin = np.zeros(masks.shape[1:], bool)
    for mask in masks > 0.5:
        thin |= mask & ~_opened(mask, disc)
    return thin


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    """Frechet distance of two sets of features, (n, d) each, taken as Gaussians (as in FID)."""
    mean = one.mean(0) - other.mean(0)
    a, b = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    # The trace of sqrt(a b) is that of the symmetric sqrt(sqrt(a) b sqrt(a)), which is stabler.
    root = _root(a)
    both = np.sqrt(linalg.eigvalsh(root @ b @ root).clip(min=0)).sum()
    return float(max(mean @ mean + np.trace(a) + np.trace(b) - 2 * both, 0.0))


def _root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = linalg.eigh(matrix)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def widened(mask: np.ndarray, by: int) -> np.ndarray:
    """(height, width) bool, by so many pixels in all eight directions."""
    return ndimage.maximum_filter(mask, size=2 * by + 1, mode="constant") if by else mask


def _opened(mask: np.ndarray, disc: np.ndarray) -> np.ndarray:
    """Opening by `disc`, by FFT: direct morphology with large discs is slow."""
    from scipy.signal import fftconvolve

    kernel = disc.astype(np.float32)
    eroded = fftconvolve(mask.astype(np.float32), kernel[::-1, ::-1], "valid") > kernel.sum() - 0.5
    return fftconvolve(eroded.astype(np.float32), kernel, "full") > 0.5


def as_pictures(bytes_: np.ndarray) -> Tensor:
    """(n, height, width, 3) bytes -> float32 from 0 to 1."""
    return torch.from_numpy(bytes_.astype(np.float32) / 255)
