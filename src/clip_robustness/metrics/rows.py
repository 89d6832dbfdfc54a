"""Measurement rows: what every metric returns, and what every table is made of."""

from typing import Any

import numpy as np

from clip_robustness.core.statistics import RESAMPLES, clopper_pearson, percentile_interval

Row = dict[str, Any]


def row(metric: str, value: float, low: float, high: float, n: int, slice: str = "", convention: str = "") -> Row:
    """One measurement with its 95 % interval and the number of images (or decisions) behind it.

    Errors: ValueError when value, low or high is not finite, which no table may hold.
    """
    if not np.isfinite([value, low, high]).all():
        raise ValueError(f"{metric} {slice}: {value} [{low}, {high}] is not finite")
    return {
        "metric": metric,
        "slice": slice,
        "value": float(value),
        "low": float(low),
        "high": float(high),
        "n": int(n),
        "convention": convention,
    }


def proportion_row(metric: str, successes: int, n: int, slice: str = "", convention: str = "") -> Row:
    """`successes` of `n` with the exact binomial interval of Clopper and Pearson. Needs n > 0."""
    low, high = clopper_pearson(successes, n)
    return row(metric, successes / n, float(low), float(high), n, slice, convention)


def draws_row(metric: str, gap: np.ndarray, n: int, slice: str, convention: str) -> Row:
    """A value that its bootstrap draws follow in one array."""
    low, high = percentile_interval(gap[1:])
    return row(metric, gap[0], min(low, gap[0]), max(high, gap[0]), n, slice, convention)


def paired_row(
    metric: str,
    right: np.ndarray,
    other: np.ndarray,
    slice: str,
    convention: str,
    seed: int,
    draws: int = 10 * RESAMPLES,
) -> Row:
    """Accuracy of `right` minus that of `other`, bool [n] each and of the same images.

    A parametric bootstrap of the images (right by one only, by the other only, by both or neither) with Jeffreys'
    half an image for each: unlike the plain bootstrap, it is not a point where both are right on the same images.
    """
    counts = [int((right & ~other).sum()), int((~right & other).sum()), int((right == other).sum())]
    shares = np.random.default_rng(seed).dirichlet([count + 0.5 for count in counts], size=draws)
    value = (counts[0] - counts[1]) / len(right)
    return draws_row(metric, np.append(value, shares[:, 0] - shares[:, 1]), len(right), slice, convention)
