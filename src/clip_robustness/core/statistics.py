"""Intervals, bootstraps, logit-linear baselines and effective robustness: the statistics every wing shares.

    low, high = clopper_pearson(successes=37, n=50)
    line = fit_line(x, y, transform="logit", estimator="huber")
    rho = effective_robustness(line, x_model, y_model)           # a fraction: 0.05 is five points
    low, high = baseline_band(x, y, grid=np.linspace(0.5, 0.9, 50))

Accuracies are fractions in 0..1. Everything random takes a seed and gives the same numbers on every machine
that runs the same NumPy.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

RESAMPLES = 1000
LEVEL = 0.95
# Huber's threshold in units of the scale: 95 % as efficient as least squares when errors are normal.
HUBER_EPSILON = 1.35
# The most extreme accuracy that the logit and probit axes can show: one error in a million images.
CLIP = 1e-6


def clopper_pearson(successes: ArrayLike, n: ArrayLike, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """Exact binomial interval of a proportion (Clopper and Pearson 1934), element by element.

    `successes` need not be whole, so that a published rate times its n can be given. No trial: (0, 1).
    Errors: ValueError when a count is negative, exceeds its n or is not a number.
    """
    from scipy.special import betaincinv

    k, trials = np.broadcast_arrays(np.asarray(successes, float), np.asarray(n, float))
    if not np.all((k >= 0) & (k <= trials)):
        raise ValueError("clopper_pearson: need 0 <= successes <= n")
    tail = (1 - level) / 2
    with np.errstate(invalid="ignore"):
        low = np.where(k > 0, betaincinv(np.where(k > 0, k, 1), trials - k + 1, tail), 0.0)
        rest = np.where(k < trials, trials - k, 1)
        high = np.where(k < trials, betaincinv(k + 1, rest, 1 - tail), 1.0)
    return low, high


def percentile_interval(draws: ArrayLike, level: float = LEVEL) -> tuple[np.ndarray, np.ndarray]:
    """The central `level` of bootstrap draws along axis 0; draws that are NaN (undefined) are left out."""
    draws = np.asarray(draws, float)
    if np.isnan(draws).any():
        low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    else:
        low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def bootstrap_sums(values: ArrayLike, resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Sums of the columns of `values` [n, k] over bootstrap resamples of its rows -> [resamples, k].

    An exact bootstrap (n draws with replacement): the draws become counts, and the sums one matrix product
    for a chunk of resamples. Whatever is a function of sums (means, ratios, ECE) follows from the result.
    """
    values = np.asarray(values, float)
    values = values.reshape(len(values), -1)
    n = len(values)
    rng = np.random.default_rng(seed)
    sums = np.empty((resamples, values.shape[1]))
    counts = np.empty((min(resamples, max(1, 4_000_000 // max(n, 1))), n))
    for start in range(0, resamples, len(counts)):
        chunk = counts[: resamples - start]
        for row in chunk:
            row[:] = np.bincount(rng.integers(0, n, size=n, dtype=np.uint32), minlength=n)
        np.matmul(chunk, values, out=sums[start : start + len(chunk)])
    return sums


def bootstrap_mean(
    values: ArrayLike, resamples: int = RESAMPLES, seed: int = 0, level: float = LEVEL
) -> tuple[float, float]:
    """Percentile interval of the mean of `values` [n], over images. (For 0/1 prefer `clopper_pearson`.)"""
    values = np.asarray(values, float)
    low, high = percentile_interval(bootstrap_sums(values, resamples, seed)[:, 0] / len(values), level)
    return float(low), float(high)


def bootstrap_ratio(
    numerator: ArrayLike,
    denominator: ArrayLike,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Percentile interval of sum(numerator) / sum(denominator), over images that are resampled as pairs."""
    sums = bootstrap_sums(np.column_stack([numerator, denominator]), resamples, seed)
    draws = np.divide(sums[:, 0], sums[:, 1], out=np.full(resamples, np.nan), where=sums[:, 1] != 0)
    low, high = percentile_interval(draws, level)
    return float(low), float(high)


def difference_interval(
    a: tuple[float, float],
    b: tuple[float, float],
    resamples: int = 10 * RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[float, float, float]:
    """Difference of two independent ratios `a` - `b`, each (successes, n) -> (difference, low, high).

    A parametric bootstrap that draws each ratio from Beta(k + 1/2, n - k + 1/2) (Jeffreys): unlike the plain
    bootstrap, it does not collapse to a point when a ratio is 0 or 1. Errors: ValueError when an n is 0.
    """
    rng = np.random.default_rng(seed)
    draws = []
    for k, n in (a, b):
        if not 0 <= k <= n or n == 0:
            raise ValueError(f"difference_interval: need 0 <= successes <= n and n > 0, got {k} of {n}")
        draws.append(rng.beta(k + 0.5, n - k + 0.5, size=resamples))
    difference = a[0] / a[1] - b[0] / b[1]
    low, high = percentile_interval(draws[0] - draws[1], level)
    return difference, min(float(low), difference), max(float(high), difference)


def transform(p: ArrayLike, name: str = "logit") -> np.ndarray:
    """Accuracy (fraction) to the axis of a fit: logit, probit or linear.

    On logit and probit, `p` is first clipped to [CLIP, 1 - CLIP], so that accuracies of exactly 0 or 1 can
    be drawn and predicted from. They are not fitted to: see `fit_line`. Inverse: `inverse_transform`.
    """
    p = np.asarray(p, dtype=float)
    if name == "linear":
        return p
    inside = np.clip(p, CLIP, 1 - CLIP)
    if name == "logit":
        return np.log(inside) - np.log1p(-inside)
    if name == "probit":
        from scipy.special import ndtri

        return ndtri(inside)
    raise ValueError(f"transform {name!r}: expected logit, probit or linear")


def inverse_transform(t: ArrayLike, name: str = "logit") -> np.ndarray:
    """Axis value back to accuracy, without clipping."""
    t = np.asarray(t, float)
    if name == "linear":
        return t
    if name == "logit":
        return 0.5 * (1 + np.tanh(0.5 * t))
    if name == "probit":
        from scipy.special import ndtr

        return ndtr(t)
    raise ValueError(f"transform {name!r}: expected logit, probit or linear")


# For functions with an argument called transform.
_axis = transform


@dataclass(frozen=True)
class Line:
    """transform(y) = intercept + slope * transform(x); `r` is Pearson's on these axes, of the `n` points."""

    slope: float
    intercept: float
    r: float
    n: int
    transform: str
    estimator: str

    def predict(self, x: ArrayLike) -> np.ndarray:
        """Baseline accuracy at accuracy `x`. On logit and probit it lies in 0..1; x of 0 or 1 is clipped."""
        return inverse_transform(self.intercept + self.slope * _axis(x, self.transform), self.transform)


def fit_line(x: ArrayLike, y: ArrayLike, transform: str = "logit", estimator: str = "ols") -> Line:
    """Fit y on x (accuracies of the same models on two sets) along the axes of `transform`.

    Points that are not finite on these axes are left out, not clipped: a missing value anywhere; on logit and
    probit also an accuracy of exactly 0 or 1 (ResNet-50 on ImageNet-A, 0 by construction), whose clipped
    position would be arbitrary and far away. This is what imagenet-testbed's baselines amount to.

    `ols`: least squares. `huber`: minimises, over slope, intercept and scale s > 0,
    sum_i [s + H(residual_i / s) s], H(z) = z^2 up to |z| = 1.35 and 2 * 1.35 |z| - 1.35^2 beyond. This is
    Huber's joint scale estimate ("proposal 2") and equals sklearn's HuberRegressor(epsilon=1.35, alpha=0),
    not statsmodels' HuberT, whose scale is a MAD.

    Errors: ValueError when fewer than 3 points remain, or all have the same x.
    """
    x, y = _points(x, y, transform)
    if len(x) < 3:
        raise ValueError(f"fit_line: {len(x)} usable points; a baseline needs at least 3")
    if np.ptp(x) == 0:
        raise ValueError("fit_line: all points have the same x")
    slope, intercept = _fit(x, y, np.ones((1, len(x))), estimator)
    return Line(float(slope[0]), float(intercept[0]), pearson(x, y), len(x), transform, estimator)


def effective_robustness(line: Line, x: ArrayLike, y: ArrayLike) -> np.ndarray:
    """Accuracy above the baseline, as a fraction: y - line.predict(x) (Taori et al. 2020, section 2)."""
    return np.asarray(y, float) - line.predict(x)


def baseline_band(
    x: ArrayLike,
    y: ArrayLike,
    grid: ArrayLike,
    transform: str = "logit",
    estimator: str = "ols",
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> tuple[np.ndarray, np.ndarray]:
    """Pointwise bootstrap band of the baseline over models -> (low, high), accuracies at each of `grid`.

    Models are resampled with replacement and the line refitted. Resamples whose models all share one x have
    no line and are left out.
    """
    x, y = _points(x, y, transform)
    counts = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), size=resamples)
    slope, intercept = _fit(x, y, counts.astype(float), estimator)
    # The inverse is monotone, so the quantiles may be taken first, and few numbers inverted.
    low, high = percentile_interval(intercept[:, None] + slope[:, None] * _axis(grid, transform), level)
    return inverse_transform(low, transform), inverse_transform(high, transform)


def effective_robustness_interval(
    line: Line,
    x: ArrayLike,
    y: ArrayLike,
    x_interval: tuple[ArrayLike, ArrayLike],
    y_interval: tuple[ArrayLike, ArrayLike],
    band: tuple[ArrayLike, ArrayLike],
) -> tuple[np.ndarray, np.ndarray]:
    """Interval of `effective_robustness(line, x, y)` from three independent sources of error.

    The binomial error of y (`y_interval`, Clopper-Pearson), the binomial error of x carried through the line
    (`x_interval`), and the error of the baseline over models (`band`: `baseline_band` at x). Distances of the
    limits from their estimates add in squares, each side for itself (MOVER; Zou and Donner 2008), which
    needs no normality and keeps the asymmetry of each interval. All three need the same level.
    """
    expected = line.predict(x)
    ends = np.stack([line.predict(x_interval[0]), line.predict(x_interval[1]), expected])
    value = np.asarray(y, float)
    y_low, y_high, band_low, band_high = (np.asarray(v, float) for v in (*y_interval, *band))
    below = _root_sum_squares(value - y_low, band_high - expected, ends.max(axis=0) - expected)
    above = _root_sum_squares(y_high - value, expected - band_low, expected - ends.min(axis=0))
    return value - expected - below, value - expected + above


def _root_sum_squares(*distances: np.ndarray) -> np.ndarray:
    # A limit on the wrong side of its estimate (bootstrap bands can be biased) adds nothing.
    return np.sqrt(np.sum([np.maximum(d, 0) ** 2 for d in np.broadcast_arrays(*distances)], axis=0))


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation; 0 when either side is constant (no tendency can be seen)."""
    dx, dy = (values - values.mean() for values in (np.asarray(x, float), np.asarray(y, float)))
    norm = np.sqrt((dx @ dx) * (dy @ dy))
    return float(np.clip((dx @ dy) / norm, -1, 1)) if norm > 0 else 0.0


def _points(x: ArrayLike, y: ArrayLike, name: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.atleast_1d(np.asarray(x, float)), np.atleast_1d(np.asarray(y, float))
    usable = np.isfinite(x) & np.isfinite(y)
    if name != "linear":
        usable &= (x > 0) & (x < 1) & (y > 0) & (y < 1)
    return transform(x[usable], name), transform(y[usable], name)


def _fit(x: np.ndarray, y: np.ndarray, counts: np.ndarray, estimator: str) -> tuple[np.ndarray, np.ndarray]:
    """Slopes and intercepts [B] of the lines through (x, y) [n] counted `counts` [B, n] times."""
    if estimator == "ols":
        return _weighted_line(x, y, counts)
    if estimator == "huber":
        return _huber(x, y, counts)
    raise ValueError(f"estimator {estimator!r}: expected ols or huber")


def _weighted_line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Centred first: the sums of squares then lose no digits when the points lie far from zero.
    x0, y0 = x.mean(), y.mean()
    x, y = x - x0, y - y0
    w = weights.sum(axis=1)
    mx, my = weights @ x / w, weights @ y / w
    sxx = weights @ (x * x) - w * mx * mx
    sxy = weights @ (x * y) - w * mx * my
    defined = sxx > 1e-12 * w * max(float(x @ x) / len(x), 1e-300)
    slope = np.divide(sxy, sxx, out=np.full(len(w), np.nan), where=defined)
    return slope, y0 + my - slope * (x0 + mx)


def _huber(
    x: np.ndarray, y: np.ndarray, counts: np.ndarray, tolerance: float = 1e-10, steps: int = 1000
) -> tuple[np.ndarray, np.ndarray]:
    """Reweighted least squares, with the fixed point of the scale, s^2 = mean(min(|residual|, 1.35 s)^2)."""
    slope, intercept = _weighted_line(x, y, counts)
    n = counts.sum(axis=1)
    residual = np.abs(y - intercept[:, None] - slope[:, None] * x)
    scale = np.sqrt((counts * residual**2).sum(axis=1) / n)
    # When the majority lies on one line, the scale tends to 0; the floor then makes that line the answer.
    spread = max(float(np.ptp(y)), 1e-300)
    floor = 1e-12 * spread
    active = np.flatnonzero(np.isfinite(slope))
    for _ in range(steps):
        if not len(active):
            break
        limit = HUBER_EPSILON * np.maximum(scale[active], floor)[:, None]
        weights = counts[active] * np.minimum(1, limit / np.maximum(residual[active], 1e-300))
        new_slope, new_intercept = _weighted_line(x, y, weights)
        new = np.abs(y - new_intercept[:, None] - new_slope[:, None] * x)
        new_scale = np.sqrt((counts[active] * np.minimum(new, limit) ** 2).sum(axis=1) / n[active])
        moved = np.abs(new - residual[active]).max(axis=1) + np.abs(new_scale - scale[active])
        slope[active], intercept[active], scale[active] = new_slope, new_intercept, new_scale
        residual[active] = new
        active = active[moved > tolerance * spread]
    return slope, intercept
