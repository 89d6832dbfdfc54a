"""Calibration against brute force and scikit-learn, and where widely copied code goes wrong."""

import numpy as np
import pytest
import scipy.special
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, log_loss

from clip_robustness.metrics import calibration, logits

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(400, 6)).astype(np.float32)
LABELS = (2 * LOGITS + RNG.gumbel(size=LOGITS.shape)).argmax(axis=1)
CASES = {
    "random": (3 * LOGITS, LABELS),
    "tied": (np.round(LOGITS), LABELS),
    "saturated": (2000 * LOGITS, LABELS),
    "saturated and wrong": (2000 * LOGITS, LOGITS.argmin(axis=1)),
    "all logits equal": (np.zeros((50, 4), np.float32), RNG.integers(0, 4, 50)),
    "one class": (RNG.normal(size=(20, 1)).astype(np.float32), np.zeros(20, int)),
    "one image": (LOGITS[:1], LABELS[:1]),
}


def scores_of(case, temperature=1.0):
    z, labels = CASES[case]
    return z, labels, calibration.image_scores(z, labels, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_nll_and_brier_are_those_of_brute_force_and_sklearn(case, temperature):
    z, labels, scores = scores_of(case, temperature)
    p = scipy.special.softmax(z.astype(float) / temperature, axis=1)
    squares = ((p - np.eye(z.shape[1])[labels]) ** 2).sum(axis=1)
    nll = -scipy.special.log_softmax(z.astype(float) / temperature, axis=1)[np.arange(len(z)), labels]
    np.testing.assert_allclose(scores.brier, squares, atol=2e-6)
    np.testing.assert_allclose(scores.nll, nll, rtol=1e-5, atol=1e-6)
    if z.shape[1] > 1:
        classes = range(z.shape[1])
        expected = brier_score_loss(labels, p, labels=classes, scale_by_half=False)
        assert scores.brier.mean() == pytest.approx(expected, abs=1e-6)
        if "saturated" not in case:  # scikit-learn clips probabilities of 0, and with them the NLL
            assert scores.nll.mean() == pytest.approx(log_loss(labels, p, labels=classes), rel=1e-5)


def test_the_scores_are_those_of_the_functions_behind_accuracy():
    z, labels, scores = scores_of("random")
    prediction, confidence = logits.top1(z)
    np.testing.assert_array_equal(scores.confidence, confidence)
    np.testing.assert_array_equal(scores.correct, prediction == labels)


def in_bins(confidence, correct, bins):
    """|accuracy - confidence| of each bin, weighed by its share; bins: lists of images."""
    gaps = [abs(np.mean(correct[held]) - np.mean(confidence[held])) * len(held) for held in bins if len(held)]
    return sum(gaps) / len(confidence)


def equal_width_bins(confidence):
    return [
        [i for i, c in enumerate(confidence) if b / 15 < c <= (b + 1) / 15 or (b == 0 and c == 0)] for b in range(15)
    ]


def equal_mass_bins(confidence):
    """Fill 15 bins one confidence at a time, whole groups of equals, until each has its share of the images so far."""
    bins, filled, n = [[] for _ in range(15)], 0, len(confidence)
    for value in sorted(set(confidence.tolist())):
        # The bin in which the first of the equals falls: the b-th bin takes the images up to ceil((b + 1) n / 15).
        b = next(b for b in range(15) if filled < -(-(b + 1) * n // 15))
        group = np.flatnonzero(confidence == value).tolist()
        bins[b] += group
        filled += len(group)
    return bins


@pytest.mark.parametrize("case", CASES)
def test_ece_is_that_of_a_loop_over_images(case):
    confidence, correct = scores_of(case)[2][:2]
    equal_width = calibration.expected_calibration_error(confidence, correct)
    assert equal_width == pytest.approx(in_bins(confidence, correct, equal_width_bins(confidence)), abs=1e-12)
    equal_mass = calibration.adaptive_calibration_error(confidence, correct)
    assert equal_mass == pytest.approx(in_bins(confidence, correct, equal_mass_bins(confidence)), abs=1e-12)


@pytest.mark.parametrize("n", [15, 30, 300])
def test_both_ece_are_those_of_sklearns_bins(n):
    # For n = 15 m, the quantiles that scikit-learn interpolates between two confidences part them as ours do.
    rng = np.random.default_rng(n)
    confidence = rng.permutation(np.append(rng.random(n - 1), 1.0))
    correct = rng.random(n) < confidence**2
    for strategy, function in (
        ("uniform", calibration.expected_calibration_error),
        ("quantile", calibration.adaptive_calibration_error),
    ):
        accuracy, mean = calibration_curve(correct, confidence, n_bins=15, strategy=strategy)
        edges = np.arange(16) / 15 if strategy == "uniform" else np.quantile(confidence, np.arange(16) / 15)
        counts = np.histogram(-confidence, -edges[::-1])[0][::-1]  # negative, for bins that are closed on the right
        expected = np.abs(accuracy - mean) @ counts[counts > 0] / n
        assert function(confidence, correct) == pytest.approx(expected)


def test_equal_mass_bins_are_as_equal_as_ties_allow():
    rng = np.random.default_rng(0)
    for n in (15, 100, 1499):
        sizes = np.bincount(calibration.equal_mass_index(rng.random(n)), minlength=15)
        assert sizes.max() - sizes.min() <= 1
    assert calibration.equal_mass_index(np.array([0.2, 0.9, 0.4])).tolist() == [0, 10, 5]
    # 70 of 100 at exactly 1: they share the bin in which the first of them falls.
    saturated = np.append(np.arange(30) / 100, np.ones(70))
    assert np.bincount(calibration.equal_mass_index(saturated)).tolist() == [7, 7, 6, 7, 73]
    order = rng.permutation(100)
    np.testing.assert_array_equal(
        calibration.equal_mass_index(saturated[order]), calibration.equal_mass_index(saturated)[order]
    )


def test_a_bin_of_its_own_for_a_confidence_of_one_changes_the_ece():
    """torchmetrics (1.9) has bins [lo, hi) and a sixteenth for exactly 1, where a saturated CLIP has many images."""
    confidence, correct = np.repeat([1.0, 0.95], 10), np.repeat([0.0, 1.0], 10)
    sixteen = np.minimum((confidence * 15).astype(int), 15)
    theirs = in_bins(confidence, correct, [np.flatnonzero(sixteen == b) for b in range(16)])
    assert theirs == pytest.approx(0.525)
    assert calibration.expected_calibration_error(confidence, correct) == pytest.approx(0.475)


def test_a_loop_that_stops_before_the_last_bin_misses_the_most_confident_images():
    """The calibration error of Hendrycks et al.'s code runs over all of its bins of equal mass but the last."""
    confidence = np.linspace(0.1, 1, 150)
    correct = np.random.default_rng(0).random(150) < confidence
    correct[-10:] = False
    bins = [np.arange(start, start + 10) for start in range(0, 150, 10)]
    theirs, whole = (in_bins(confidence, correct, some) for some in (bins[:-1], bins))
    assert calibration.adaptive_calibration_error(confidence, correct) == pytest.approx(whole)
    assert whole - theirs > 0.06


@pytest.mark.parametrize("case", CASES)
def test_rows_hold_their_values_within_their_limits(case):
    *_, before = scores_of(case)
    after = scores_of(case, 3.0)[2]
    rows = calibration.calibration_rows({"before": before, "after": after}, resamples=100)
    assert {(row["metric"], row["slice"]) for row in rows} >= {
        (metric, slice) for metric in calibration.METRICS for slice in ("before", "after")
    }
    for row in rows:
        assert 0 <= row["low"] <= row["value"] <= row["high"]
        assert row["high"] <= calibration.METRICS.get(row["metric"], ("", 1.0))[1]


def test_intervals_are_as_wide_as_those_of_new_samples():
    """The spread of each metric over fresh sets of images, beside the interval that one set gives."""
    rng = np.random.default_rng(1)
    found = []
    for _ in range(300):
        z = rng.normal(size=(200, 4)).astype(np.float32)
        labels = (z + rng.gumbel(size=z.shape)).argmax(axis=1)
        scores = calibration.image_scores(2 * z, labels)
        draws = calibration.calibration_draws({"": scores}, resamples=100)
        found.append([(d.value, d.draws.std()) for d in draws.values()])
    values, spreads = np.moveaxis(np.array(found), -1, 0)
    np.testing.assert_allclose(spreads.mean(axis=0), values.std(axis=0), rtol=0.2)


def test_resampling_within_small_classes_would_lose_variance():
    """Why images are resampled over the whole set: with two images a class, half of the variance would be gone."""
    rng = np.random.default_rng(0)
    nll = rng.exponential(size=(500, 2))
    within = [np.take_along_axis(nll, rng.integers(0, 2, (500, 2)), axis=1).mean() for _ in range(1000)]
    scores = calibration.Scores(np.full(1000, 0.5), np.ones(1000), nll.ravel(), np.zeros(1000))
    whole = calibration.calibration_draws({"": scores})["", "nll"].draws
    true = 1 / np.sqrt(1000)  # an exponential variable has the standard deviation 1
    assert np.std(within) == pytest.approx(true * np.sqrt(0.5), rel=0.1)
    assert whole.std() == pytest.approx(true, rel=0.1)
