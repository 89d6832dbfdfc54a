"""Properties of logits, accuracy, calibration and shape bias."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from clip_robustness.core.io import InputError
from clip_robustness.metrics import accuracy, calibration, logits, shape_bias

finite = st.floats(-50, 50, width=32)


few, several = st.integers(1, 12), st.integers(1, 7)


def tables(columns=several, elements=finite):
    return st.tuples(few, columns).flatmap(lambda shape: arrays(np.float32, shape, elements=elements))


def some_members(classes: int):
    return st.lists(st.lists(st.integers(0, classes - 1), min_size=1, max_size=4), min_size=1, max_size=5)


@given(tables(), st.floats(0.05, 20))
def test_softmax_is_a_distribution_that_a_shift_leaves_as_it_is(z, t):
    p = logits.softmax(z, t)
    np.testing.assert_allclose(p.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(logits.softmax(z + 3, t), p, atol=1e-4)


@given(tables())
def test_confidence_is_the_softmax_at_the_prediction_within_one_over_k_and_one(z):
    prediction, confidence = logits.top1(z)
    p = logits.softmax(z)
    np.testing.assert_allclose(confidence, p[np.arange(len(z)), prediction], rtol=1e-5)
    assert (confidence <= 1).all()
    assert (confidence >= (1 - 1e-5) / z.shape[1]).all()


@given(tables(elements=st.sampled_from([np.float32(0), np.float32(1)])))
def test_a_tie_goes_to_the_first_class(z):
    prediction, _, _ = accuracy.per_image(z, np.zeros(len(z), int))
    assert prediction.tolist() == [row.tolist().index(max(row)) for row in z]


@given(tables(), st.integers(0, 1000))
def test_predictions_follow_a_permutation_of_the_rows(z, seed):
    order = np.random.default_rng(seed).permutation(len(z))
    labels = np.arange(len(z)) % z.shape[1]
    for whole, part in zip(accuracy.per_image(z, labels), accuracy.per_image(z[order], labels[order]), strict=True):
        np.testing.assert_array_equal(whole[order], part)


@given(tables(elements=st.integers(-100, 100).map(np.float32)), st.floats(0.1, 30))
def test_a_prediction_does_not_change_under_scaling_or_temperature(z, factor):
    # Whole numbers keep distinct logits distinct, whatever they are multiplied by.
    expected = logits.top1(z)[0]
    np.testing.assert_array_equal(logits.top1(z * np.float32(factor) + 1)[0], expected)
    np.testing.assert_array_equal(logits.top1(z, factor)[0], expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_with_its_row(value):
    z = np.zeros((700, 3), np.float32)
    z[601, 1] = value
    with pytest.raises(InputError, match=r"row 601"):
        logits.top1(z)
    with pytest.raises(InputError, match=r"here\.npy: row 601"):
        list(logits.stored_blocks(z, name="here.npy"))
    with pytest.raises(InputError, match=r"row 601"):
        list(logits.stored_blocks(z, np.array([5, 601])))


@given(st.data(), tables(columns=st.integers(2, 7)))
def test_restriction_is_the_maximum_over_members_and_monotone(data, z):
    members = data.draw(some_members(z.shape[1]))
    pooled = logits.restrict(z, members)
    for k, member in enumerate(members):
        np.testing.assert_array_equal(pooled[:, k], z[:, member].max(axis=1))
    np.testing.assert_array_equal(logits.restrict(np.cbrt(z), members), np.cbrt(pooled))
    np.testing.assert_array_equal(logits.restrict(z, [[i] for i in range(z.shape[1])]), z)


def test_a_label_space_of_other_logits_is_refused():
    for members in ([[0], []], [[0], [3]], [[-1]]):
        with pytest.raises(InputError, match="members"):
            logits.restrict(np.zeros((2, 3), np.float32), members)
        with pytest.raises(InputError, match="members"):
            logits.category_probabilities(np.zeros((2, 3), np.float32), members)


@given(tables(), st.integers(1, 5))
def test_categories_of_one_class_have_its_probability(z, _):
    single = [[i] for i in range(z.shape[1])]
    np.testing.assert_allclose(logits.category_probabilities(z, single), logits.softmax(z), rtol=1e-5)


@given(st.integers(1, 40), st.integers(0, 9999))
def test_a_zero_shot_head_in_blocks_equals_one_product(n, seed):
    rng = np.random.default_rng(seed)
    features, weight = rng.normal(size=(n, 4)).astype(np.float16), rng.normal(size=(3, 4)).astype(np.float32)
    rows = rng.integers(0, n, size=7)
    whole = logits.zero_shot_logits(features, weight, 20, -3)
    np.testing.assert_allclose(whole, 20 * features.astype(float) @ weight.T - 3, atol=1e-3)
    chosen = np.concatenate([block.copy() for _, block in logits.zero_shot_blocks(features, weight, 20, -3, rows)])
    np.testing.assert_allclose(chosen, whole[rows], atol=1e-4)


def test_bins_are_closed_on_the_right_and_hold_zero_and_one():
    confidence = np.array([0, 1e-9, 0.5, np.nextafter(0.5, 1), 1.0])
    assert calibration.bin_index(confidence, 2).tolist() == [0, 0, 0, 1, 1]
    assert calibration.bin_index(np.ones(3, np.float32)).tolist() == [14] * 3
    edges = np.arange(1, 16) / 15
    assert calibration.bin_index(edges).tolist() == list(range(15))


def test_saturated_confidence_counts():
    # All at confidence 1 and half right: an ECE of 0.5, which is 0 when the last bin is open.
    z = np.array([[1000.0, 0.0], [1000.0, 0.0]], np.float32)
    _, confidence, correct = accuracy.per_image(z, np.array([0, 1]))
    assert confidence.tolist() == [1, 1]
    assert calibration.expected_calibration_error(confidence, correct) == 0.5


@given(st.integers(1, 200), st.integers(0, 9999))
@settings(deadline=None)
def test_ece_is_bounded_ignores_order_and_is_zero_when_confidence_is_the_truth(n, seed):
    rng = np.random.default_rng(seed)
    confidence, correct = rng.random(n).astype(np.float32), rng.random(n) < 0.5
    order = rng.permutation(n)
    for error in (calibration.expected_calibration_error, calibration.adaptive_calibration_error):
        ece = error(confidence, correct)
        assert 0 <= ece <= 1
        assert error(confidence[order], correct[order]) == pytest.approx(ece)
        assert ece >= abs(correct.mean() - confidence.mean()) - 1e-6
        assert error(correct.astype(np.float32), correct) == 0


@given(st.integers(1, 60), st.integers(0, 9999))
@settings(deadline=None, max_examples=30)
def test_calibration_rows_hold_their_values_and_leave_empty_bins_out(n, seed):
    rng = np.random.default_rng(seed)
    confidence, correct = np.sqrt(rng.random(n)), rng.random(n) < 0.5
    nll, brier = rng.exponential(size=n), 2 * rng.random(n)
    scores = {
        slice: calibration.Scores(c, correct, nll, brier)
        for slice, c in (("before", confidence), ("after", confidence**2))
    }
    rows = calibration.calibration_rows(scores, seed=1, resamples=100)
    assert rows == calibration.calibration_rows(scores, seed=1, resamples=100)
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows)
    most = {metric: limit for metric, (_, limit) in calibration.METRICS.items()}
    assert all(row["low"] >= 0 and row["high"] <= most.get(row["metric"], 1) for row in rows)
    assert len({(row["metric"], row["slice"]) for row in rows}) == len(rows)
    bins = [row for row in rows if row["metric"] == "bin_accuracy" and row["slice"].startswith("before:")]
    assert sum(row["n"] for row in bins) == n
    assert {int(row["slice"][-2:]) for row in bins} == set(calibration.bin_index(confidence).tolist())


@given(st.lists(st.integers(-1, 4), min_size=1, max_size=60), st.integers(0, 9999))
def test_half_of_each_class_fits_whatever_the_order(labels, seed):
    labels = np.array(labels)
    ids = [f"image {i}" for i in range(len(labels))]
    mask = calibration.stratified_half(labels, ids, seed)
    for value in set(labels.tolist()):
        expected = (labels == value).sum() // 2 if value >= 0 else 0
        assert mask[labels == value].sum() == expected
    order = np.random.default_rng(seed).permutation(len(labels))
    np.testing.assert_array_equal(
        calibration.stratified_half(labels[order], [ids[i] for i in order], seed), mask[order]
    )


def test_the_seed_changes_the_half():
    labels, ids = np.zeros(40, int), [str(i) for i in range(40)]
    assert (calibration.stratified_half(labels, ids, 0) != calibration.stratified_half(labels, ids, 1)).any()


@given(st.integers(0, 9999), st.floats(0.2, 5))
@settings(deadline=None, max_examples=30)
def test_the_temperature_scales_with_the_logits_and_never_worsens_the_nll(seed, factor):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(300, 5)).astype(np.float32)
    # The largest of logits plus Gumbel noise is a draw from their softmax.
    labels = (2 * z + rng.gumbel(size=z.shape)).argmax(axis=1)
    one, other = calibration.fit_temperature(z, labels), calibration.fit_temperature(z * np.float32(factor), labels)
    assert other.value == pytest.approx(factor * one.value, rel=1e-3)
    assert one.nll_after <= one.nll_before + 1e-9
    assert one.low <= one.value <= one.high


def test_temperatures_at_the_ends():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(50, 3)).astype(np.float32)
    right, wrong = z.argmax(axis=1), z.argmin(axis=1)
    # With every label on top, the NLL falls until it is flat at 0; with every label at the bottom, it never does.
    best = calibration.fit_temperature(z, right)
    assert 0.01 <= best.value < 0.1
    assert best.nll_after < 0.01
    assert calibration.fit_temperature(z, wrong).value == pytest.approx(100, rel=1e-3)
    assert calibration.fit_temperature(np.full((4, 1), 7, np.float32), np.zeros(4, int)).value == 1
    with pytest.raises(InputError, match="no image"):
        calibration.fit_temperature(np.zeros((0, 3), np.float32), np.zeros(0, int))


@given(st.integers(1, 100), st.integers(1, 5), st.integers(0, 9999))
@settings(deadline=None)
def test_shape_bias_counts_only_conflicts_and_ignores_order(n, classes, seed):
    rng = np.random.default_rng(seed)
    prediction, shape, texture = rng.integers(0, classes, (3, n))
    texture[rng.random(n) < 0.2] = -1
    counts = shape_bias.decision_counts(prediction, shape, texture, classes)
    assert (counts["shape"] + counts["texture"] <= counts["conflicts"]).all()
    assert counts["conflicts"].sum() == sum(s != t >= 0 for s, t in zip(shape, texture, strict=True))
    order = rng.permutation(n)
    again = shape_bias.decision_counts(prediction[order], shape[order], texture[order], classes)
    assert all((again[key] == counts[key]).all() for key in counts)
    names = [f"class {i}" for i in range(classes)]
    rows = {(row["metric"], row["slice"]): row for row in shape_bias.shape_bias_rows(counts, names)}
    swapped = shape_bias.shape_bias_rows({**counts, "shape": counts["texture"], "texture": counts["shape"]}, names)
    for row in swapped:
        if row["metric"] == "shape_bias":
            assert row["value"] == pytest.approx(1 - rows["shape_bias", row["slice"]]["value"])
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in rows.values())
    by_class = [row["n"] for (metric, slice), row in rows.items() if metric == "shape_bias" and slice]
    assert sum(by_class) == (counts["shape"] + counts["texture"]).sum()


def test_one_class_has_no_conflict_and_no_rows():
    zeros = np.zeros(5, int)
    counts = shape_bias.decision_counts(zeros, zeros, zeros, 1)
    assert shape_bias.shape_bias_rows(counts, ["only"]) == []
    assert accuracy.accuracy_rows(np.zeros(0, bool)) == []
