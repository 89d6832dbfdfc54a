"""Properties of OOD detection's metrics."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_robustness.metrics import ood

# Few distinct values, so that ties are common.
scores = st.lists(st.integers(-6, 6), min_size=1, max_size=60).map(lambda values: np.array(values, float))


def values(id_scores, ood_scores):
    rows = ood.detection_rows(id_scores, ood_scores, "s", resamples=30)
    assert all(0 <= row["low"] <= row["value"] <= row["high"] <= 1 for row in rows)
    return {(row["metric"], row["convention"]): row["value"] for row in rows}


@given(scores, scores)
@settings(deadline=None)
def test_only_the_order_of_the_scores_counts(id_scores, ood_scores):
    expected = values(id_scores, ood_scores)
    assert values(np.exp(id_scores), np.exp(ood_scores)) == expected
    assert values(id_scores**3 - 7, ood_scores**3 - 7) == expected
    assert values(id_scores[::-1], ood_scores[::-1]) == expected


@given(scores, scores)
@settings(deadline=None)
def test_swapping_the_sides_mirrors_every_metric(id_scores, ood_scores):
    one, other = values(id_scores, ood_scores), values(ood_scores, id_scores)
    assert one["auroc", "id_positive"] == pytest.approx(1 - other["auroc", "id_positive"])
    negated = values(-ood_scores, -id_scores)
    assert one["auroc", "id_positive"] == pytest.approx(negated["auroc", "id_positive"])
    assert one["aupr_in", "average_precision"] == pytest.approx(negated["aupr_out", "average_precision"])
    assert one["fpr95", "id_recall_at_least"] == negated["fpr95", "ood_recall_at_least"]


@given(scores)
@settings(deadline=None)
def test_a_set_cannot_be_told_from_itself(same):
    found = values(same, same)
    assert found["auroc", "id_positive"] == 0.5
    assert found["fpr95", "id_recall_at_least"] >= 0.95


@given(scores, scores, st.integers(2, 4))
@settings(deadline=None)
def test_counting_every_image_several_times_changes_only_the_intervals(id_scores, ood_scores, times):
    repeated = values(np.repeat(id_scores, times), np.repeat(ood_scores, times))
    assert repeated == pytest.approx(values(id_scores, ood_scores))


@given(scores, scores)
def test_no_threshold_lets_more_ood_in_than_the_one_that_keeps_all_id(id_scores, ood_scores):
    id_counts, ood_counts = ood.count_scores(id_scores, ood_scores)
    at_least, closest = ood.false_positive_rates(id_counts[::-1], ood_counts[::-1])
    full = (ood_scores >= id_scores.min()).mean()
    assert max(at_least, closest) <= full + 1e-12


@given(st.integers(0, 9999), st.floats(0, 3))
@settings(deadline=None, max_examples=40)
def test_intervals_of_ordinary_data_lie_on_both_sides_of_the_estimate(seed, distance):
    rng = np.random.default_rng(seed)
    id_scores, ood_scores = rng.normal(distance, 1, 400), rng.normal(0, 1, 300)
    rows = ood.detection_rows(id_scores, ood_scores, "s", seed, resamples=200)
    assert rows == ood.detection_rows(id_scores, ood_scores, "s", seed, resamples=200)
    for row in rows:
        assert row["low"] < row["value"] < row["high"]
