"""95 % confidence intervals: of means, of shares, of paired differences, of a set's distance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate, its 95 % confidence interval, and the number of values that it rests on."""

    value: float
    low: float
    high: float
    count: int


def mean(values: Sequence[float]) -> Interval:
    """By Student's t; NaN are left out."""
    array = np.asarray(values, np.float64)
    array = array[~np.isnan(array)]
    n = len(array)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    middle = float(array.mean())
    if n == 1:
        return Interval(middle, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * array.std(ddof=1) / math.sqrt(n))
    return Interval(middle, middle - half, middle + half, n)


def share(values: Sequence[float]) -> Interval:
    """Of ones among zeros and ones, by Wilson's score, which holds near 0 and 1 too."""
    n = len(values)
    if n == 0:
        return Interval(math.nan, math.nan, math.nan, 0)
    p, z = float(np.mean(values)), float(stats.norm.ppf((1 + LEVEL) / 2))
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(p, max(middle - half, 0.0), min(middle + half, 1.0), n)


def difference(one: Sequence[float], other: Sequence[float]) -> Interval:
    """Mean of one - other, scene by scene."""
    return mean(np.asarray(one, np.float64) - np.asarray(other, np.float64))


def distance(
    one: np.ndarray,
    other: np.ndarray,
    of: Callable[[np.ndarray, np.ndarray], float],
    draws: int = 200,
) -> Interval:
    """Of two paired sets, (n, d) each, by the basic bootstrap; never below 0.

    A small sample makes such a distance too large. Drawing with replacement does so by about as
    much once more, and so much is taken off the value as well as its interval.
    """
    value, random = of(one, other), np.random.default_rng(0)
    drawn = []
    for _ in range(draws):
        rows = random.integers(0, len(one), len(one))
        drawn.append(of(one[rows], other[rows]))
    high, low = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    corrected = (max(2 * value - float(d), 0.0) for d in (np.mean(drawn), low, high))
    return Interval(*corrected, len(one))
