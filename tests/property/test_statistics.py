"""Properties that the statistics must have for every input."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clip_robustness.core import statistics as s

inside = st.floats(0.001, 0.999)
counts = st.integers(1, 10_000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
names = st.sampled_from(["logit", "probit", "linear"])
estimators = st.sampled_from(["ols", "huber"])


def points(low: int = 5, high: int = 30):
    return st.integers(low, high).flatmap(
        lambda n: st.tuples(arrays(float, n, elements=inside), arrays(float, n, elements=inside))
    )


@given(counts)
def test_clopper_pearson_holds_the_estimate_and_mirrors(count):
    k, n = count
    low, high = s.clopper_pearson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high
    other = s.clopper_pearson(n - k, n)
    np.testing.assert_allclose([1 - other[1], 1 - other[0]], [low, high], atol=1e-12)


@given(counts, st.floats(0.5, 0.99))
def test_clopper_pearson_widens_with_the_level_and_narrows_with_n(count, level):
    k, n = count
    inner, outer = s.clopper_pearson(k, n, level), s.clopper_pearson(k, n, (1 + level) / 2)
    assert outer[0] <= inner[0]
    assert inner[1] <= outer[1]
    more = s.clopper_pearson(10 * k, 10 * n, level)
    assert more[1] - more[0] < inner[1] - inner[0]


def test_clopper_pearson_refuses_impossible_counts():
    assert [float(v) for v in s.clopper_pearson(0, 0)] == [0, 1]
    for k, n in ((-1, 5), (6, 5), (np.nan, 5)):
        with pytest.raises(ValueError, match="successes"):
            s.clopper_pearson(k, n)


@given(st.floats(1e-5, 1 - 1e-5), names)
def test_transform_and_inverse_undo_each_other(p, name):
    assert float(s.inverse_transform(s.transform(p, name), name)) == pytest.approx(p, abs=1e-9)


@given(names, names)
def test_transform_rises_and_stays_finite_at_zero_and_one(name, _):
    axis = s.transform([0, 1e-3, 0.5, 0.9, 1], name)
    assert np.isfinite(axis).all()
    assert (np.diff(axis) > 0).all()


@given(points(), names, estimators, st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=60)
def test_a_fit_does_not_depend_on_the_order_of_the_models(xy, name, estimator, random):
    x, y = xy
    assume(np.ptp(s.transform(x, name)) > 0.05)
    order = np.array(random.sample(range(len(x)), len(x)))
    one, two = s.fit_line(x, y, name, estimator), s.fit_line(x[order], y[order], name, estimator)
    np.testing.assert_allclose(one.predict(x), two.predict(x), atol=1e-6)
    assert one.n == two.n == len(x)
    assert -1 <= one.r <= 1


@given(st.floats(0.3, 3), st.floats(-2, 2), names, estimators, st.integers(3, 20))
@settings(deadline=None)
def test_a_fit_finds_an_exact_line_and_nobody_is_robust(slope, intercept, name, estimator, n):
    x = np.linspace(0.3, 0.8, n)
    if name == "linear":
        slope, intercept = 0.5, 0.1
    y = s.inverse_transform(intercept + slope * s.transform(x, name), name)
    line = s.fit_line(x, y, name, estimator)
    assert (line.slope, line.intercept) == (pytest.approx(slope, abs=1e-6), pytest.approx(intercept, abs=1e-6))
    assert line.r == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(s.effective_robustness(line, x, y), 0, atol=1e-7)


def test_huber_resists_what_moves_least_squares():
    x = np.linspace(0.4, 0.9, 30)
    noise = np.random.default_rng(0).normal(0, 0.02, 30)
    y = s.inverse_transform(s.transform(x) - 1 + noise)
    bad = y.copy()
    bad[-3:] = 0.05
    moved = {
        e: abs(s.fit_line(x, bad, "logit", e).slope - s.fit_line(x, y, "logit", e).slope) for e in ("ols", "huber")
    }
    assert moved["huber"] < 0.2 * moved["ols"]


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan])
@pytest.mark.parametrize("side", ["x", "y"])
def test_saturated_and_missing_points_are_left_out_of_the_fit(value, side):
    x, y = np.array([0.4, 0.5, 0.6, 0.7]), np.array([0.2, 0.35, 0.4, 0.6])
    more = (np.append(x, value), np.append(y, 0.5)) if side == "x" else (np.append(x, 0.8), np.append(y, value))
    assert s.fit_line(*more) == s.fit_line(x, y)
    assert np.isfinite(s.fit_line(x, y).predict([0, 1])).all()


def test_a_linear_fit_keeps_zero_and_one():
    assert s.fit_line([0, 0.5, 1], [0, 0.4, 1], "linear").n == 3


def test_too_few_points_or_one_x_are_refused():
    with pytest.raises(ValueError, match="at least 3"):
        s.fit_line([0.5, 0.6, 1.0], [0.3, 0.4, 0.5])
    with pytest.raises(ValueError, match="same x"):
        s.fit_line([0.5, 0.5, 0.5], [0.3, 0.4, 0.5])
    for wrong in ({"transform": "log"}, {"estimator": "lasso"}):
        with pytest.raises(ValueError, match="expected"):
            s.fit_line([0.5, 0.6, 0.7], [0.3, 0.4, 0.5], **wrong)


@given(st.integers(0, 1000), estimators)
@settings(deadline=None, max_examples=20)
def test_the_band_is_seeded_holds_the_line_and_does_not_need_sorted_input(seed, estimator):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.4, 0.9, 25)
    y = s.inverse_transform(s.transform(x) - 1 + rng.normal(0, 0.1, 25))
    grid = np.linspace(0.45, 0.85, 7)
    low, high = s.baseline_band(x, y, grid, "logit", estimator, resamples=200, seed=seed)
    again = s.baseline_band(x, y, grid, "logit", estimator, resamples=200, seed=seed)
    np.testing.assert_array_equal((low, high), again)
    expected = s.fit_line(x, y, "logit", estimator).predict(grid)
    assert ((low < expected) & (expected < high)).all()


def test_the_interval_of_effective_robustness_holds_its_parts():
    x, y = np.array([0.5, 0.6, 0.7, 0.8]), np.array([0.3, 0.45, 0.5, 0.7])
    line = s.fit_line(x, y)
    at, value = np.array([0.65]), np.array([0.6])
    expected = line.predict(at)
    exact = ((at, at), (value, value), (expected, expected))
    low, high = s.effective_robustness_interval(line, at, value, *exact)
    np.testing.assert_allclose([low, high], [value - expected] * 2)
    only_y = (exact[0], (value - 0.03, value + 0.04), (expected - 0.04, expected + 0.03))
    low, high = s.effective_robustness_interval(line, at, value, *only_y)
    # 3 and 4 hundredths on one side and 3 and 4 on the other: squares add to 3 sqrt 2 and 4 sqrt 2.
    np.testing.assert_allclose([value - expected - low, high - value + expected], [[0.03 * 2**0.5], [0.04 * 2**0.5]])
    with_x = s.effective_robustness_interval(line, at, value, (at - 0.01, at + 0.01), *only_y[1:])
    assert with_x[0] < low
    assert with_x[1] > high


@given(counts, counts)
@settings(max_examples=40)
def test_the_difference_of_two_ratios_mirrors_and_holds_its_estimate(a, b):
    difference, low, high = s.difference_interval(a, b, resamples=2000)
    assert -1 <= low <= difference <= high <= 1
    assert difference == pytest.approx(-s.difference_interval(b, a, resamples=2000)[0])


def test_the_difference_interval_covers_the_truth():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        one, two = rng.binomial(60, 0.7), rng.binomial(80, 0.55)
        _, low, high = s.difference_interval((one, 60), (two, 80), resamples=1000, seed=trial)
        hits += low <= 0.15 <= high
    assert 0.91 <= hits / 300 <= 0.99
    with pytest.raises(ValueError, match="n > 0"):
        s.difference_interval((0, 0), (1, 2))


def test_the_bootstrap_is_exact_in_its_moments_and_seeded():
    values = np.random.default_rng(1).gamma(1, size=(400, 2))
    sums = s.bootstrap_sums(values, 4000, seed=3)
    np.testing.assert_array_equal(sums, s.bootstrap_sums(values, 4000, seed=3))
    np.testing.assert_allclose(sums.mean(axis=0) / 400, values.mean(axis=0), rtol=0.01)
    np.testing.assert_allclose(sums.std(axis=0), values.std(axis=0) * 20, rtol=0.05)
    np.testing.assert_allclose(s.bootstrap_sums(np.ones(7), 50)[:, 0], 7)


def test_ratio_and_mean_agree_when_the_denominator_is_constant():
    values = np.random.default_rng(1).random(100)
    assert s.bootstrap_ratio(values, np.ones(100), seed=5) == pytest.approx(s.bootstrap_mean(values, seed=5))
    low, high = s.bootstrap_ratio([1, 0, 1, 1], [1, 1, 0, 0], seed=5)
    assert low <= 1.5 <= high
