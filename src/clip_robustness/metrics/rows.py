"""Measurement rows: what every metric returns, and what every table is made of."""

from typing import Any

import numpy as np

from clip_robustness.core.statistics import clopper_pearson

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
