"""The mini study in full, from nothing: what it was built to show."""

import pytest

from clip_robustness.core import io
from clip_robustness.core.statistics import difference_interval

from .conftest import build_house

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tables(tmp_path_factory, root):
    house = build_house(tmp_path_factory.mktemp("mini") / "house", root)
    house.snakemake("--configfile", "config/mini.yaml")
    return house.path / "results/mini/tables"


def chosen(tables, name, **where):
    rows = io.read_parquet(tables / f"{name}.parquet")
    keep = [all(rows[key][i] == value for key, value in where.items()) for i in range(len(rows["model"]))]
    return {rows["model"][i]: (rows["value"][i], rows["n"][i]) for i in range(len(keep)) if keep[i]}


def test_a_mini_clip_learns_its_world(tables):
    accuracy = chosen(tables, "accuracy", dataset="mini_val", metric="accuracy")
    assert max(value for model, (value, _) in accuracy.items() if "clip" in model) >= 0.90


def test_filtered_images_are_the_reference_classifiers_errors(tables):
    assert chosen(tables, "accuracy", dataset="mini_filtered", metric="accuracy")["mini_resnet"][0] == 0


def test_shifts_are_harder_than_the_set_that_they_shift_from(tables):
    home = chosen(tables, "accuracy", dataset="mini_val", metric="accuracy")
    for shift in ("mini_fresh", "mini_pose", "mini_stylized", "mini_sketch"):
        there = chosen(tables, "accuracy", dataset=shift, metric="accuracy")
        assert all(there[model][0] < home[model][0] for model in home), shift


@pytest.mark.parametrize("tower", ["vit", "resnet"])
def test_texture_that_follows_class_lowers_shape_bias(tables, tower):
    """The planted cause: the twins differ in how strongly texture and class go together in training."""
    bias = chosen(tables, "shape_bias", metric="shape_bias", slice="")
    counts = [(round(value * n), n) for value, n in (bias[f"mini_clip_{tower}_{t}"] for t in ("biased", "unbiased"))]
    difference, _, high = difference_interval(*counts, seed=0)
    assert difference < 0 and high < -0.05


def test_temperature_scaling_lowers_the_nll_where_it_was_fitted(tables):
    where = {"dataset": "mini_val", "metric": "nll"}
    before, after = (chosen(tables, "calibration", **where, slice=state) for state in ("before", "after"))
    assert all(after[model][0] <= before[model][0] + 0.005 for model in before)


def test_a_planted_factor_is_recovered(tables):
    """Textures that follow the class in training make a model fail where an image's texture is another class's."""
    where = {"metric": "effective_robustness", "slice": "texture", "convention": "top-logit-huber"}
    robust = chosen(tables, "factor_robustness", **where)
    assert robust["mini_clip_resnet_unbiased"][0] > robust["mini_clip_resnet_biased"][0]


def test_the_six_factors_find_the_planted_cause(tables):
    rows = io.read_parquet(tables / "six_factors.parquet")
    found = {
        (rows["axis"][i], rows["contrast"][i]): (rows["low"][i], rows["effect"][i]) for i in range(len(rows["axis"]))
    }
    (low, effect), *others = [v for (axis, c), v in found.items() if axis == "shape_bias" and "unbiased" in c]
    assert not others and effect > low > 0.05


def test_every_axis_is_measured(tables):
    ood = chosen(tables, "ood", metric="auroc", dataset="mini_unseen", slice="msp")
    recall = chosen(tables, "retrieval", metric="image_recall@10", convention="duplicates_positive")
    assert len(ood) == 15 and max(value for value, _ in ood.values()) > 0.6
    assert len(recall) == 7 and max(value for value, _ in recall.values()) > 0.1
    verdicts = set(io.read_parquet(tables / "claims.parquet")["verdict"].tolist())
    assert {"reproduced", "undecided", "not measured here"} <= verdicts
