"""The mini study in full, from nothing: what it was built to show."""

import numpy as np
import pytest
import yaml

from clip_robustness.core import io
from clip_robustness.core.registry import load_study
from clip_robustness.core.statistics import difference_interval

from . import invariants
from .conftest import build_house

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tables(tmp_path_factory, root):
    house = build_house(tmp_path_factory.mktemp("mini") / "house", root)
    house.snakemake("--configfile", "config/mini.yaml")
    return house.path / "results/mini/tables"


@pytest.fixture(scope="module")
def study(root):
    return load_study(yaml.safe_load((root / "config/mini.yaml").read_text()), root)


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


# What claims name that the rendered world has no counterpart of.
ONLY_OF_THE_PAPERS = (
    *("pattern", "partial_view", "subcategory"),
    *("flickr30k", "imagenet_v2", "greyscale", "mini_pgd", "vid_pm0", "ytbb"),
)


def test_a_claim_without_a_verdict_lacks_models_or_what_only_the_papers_have(tables):
    ledger = io.read_parquet(tables / "claims.parquet")
    lacking = {name: what for name, what in zip(ledger["id"], ledger["missing"], strict=True) if what}
    assert len(ledger["id"]) - len(lacking) > 50
    strange = {n: w for n, w in lacking.items() if "models" not in w and not any(k in w for k in ONLY_OF_THE_PAPERS)}
    assert not strange


def test_attacks_get_nowhere_by_chance(tables, study):
    attacks = study.config["attacks"]
    victims = set(study.attacked)
    invariants.check_attacks(tables, victims, set(attacks["names"]), 2.0, attacks["images"])
    left = {
        slice_: chosen(tables, "adversarial", metric="accuracy", slice=slice_)
        for slice_ in ("white_box_union", "noise")
    }
    assert all(left["white_box_union"][model][0] < left["noise"][model][0] for model in victims)


def test_shifts_that_were_made_are_what_they_are_made_of(tables, study):
    models = set(study.computed)
    invariants.check_corruptions(tables, models, study.config["normaliser"])
    invariants.check_video(tables, models)
    invariants.check_printed_words(tables, models)
    kept = io.read_parquet(tables / "synthetic.parquet")
    assert set(kept["dataset"]) == {"mini_stylized", "mini_c"}
    by_severity = [
        chosen(tables, "synthetic", dataset="mini_c", metric="accuracy", slice=f"severity:{s}") for s in (1, 5)
    ]
    assert all(by_severity[1][model][0] < by_severity[0][model][0] for model in models)


def test_planted_copies_are_found_and_other_pictures_are_not(tables, study):
    """Copies of the planted set were made as those that the threshold was chosen on; no corpus has renditions."""
    invariants.check_overlap(tables, set(study.computed), set(study.config["overlap"]["datasets"]))
    rows = io.read_parquet(tables / "data_overlap.parquet")
    found = {
        (rows["dataset"][i], rows["metric"][i]): (rows["low"][i], rows["value"][i], rows["high"][i])
        for i in range(len(rows["metric"]))
        if rows["convention"][i] in ("planted", "disjoint")
    }
    pairs = io.read_parquet(tables / "overlap_thresholds.parquet")
    recall = next(i for i in range(len(pairs["metric"])) if (pairs["metric"][i], pairs["slice"][i]) == ("recall", ""))
    assert found["mini_fresh", "detected_recall"][2] >= pairs["low"][recall], "as on the labelled pairs"
    assert found["mini_fresh", "detected_recall"][0] > found["mini_rendition", "overlap_share"][2]


def test_prompts_are_searched_for_each_model(tables, study):
    invariants.check_searched_prompts(tables.parent, set(study.prompted), "mini_auto_5", 5)


def test_3d_corruptions_grow_with_severity(tables, study):
    invariants.check_corruptions_3d(tables, set(study.computed))
    for dataset in ("mini_3dcc", "mini_3dcc_video"):
        found = invariants.values(tables, "accuracy", "model", "slice", dataset=dataset, metric="accuracy")
        mean = [np.mean([v for (_, s), (v, _) in found.items() if s.endswith(f":{n}")]) for n in range(1, 6)]
        assert mean[4] < mean[0] and (np.diff(mean) < 0.01).all(), (dataset, mean)


def test_a_mini_llava_answers_where_the_selector_was_wrong(tables, study):
    selectors = study.config["lmm"]["selectors"]
    invariants.check_questions(tables, selectors, {"mini_llava"})
    rows = io.read_parquet(tables / "choice.parquet")
    low = {
        (rows["convention"][i], rows["slice"][i]): rows["low"][i]
        for i in range(len(rows["low"]))
        if rows["metric"][i] == "gain"
    }
    assert low[f"clip:likelihood-two_way_own:{selectors['clip']}", "selector_wrong"] > 0.05


def test_points_are_found_again_far_above_chance(tables, study):
    models = set(study.named_models(study.config["correspondence"]["models"]))
    invariants.check_correspondence(tables, models)
    recall = invariants.values(tables, "correspondence", "model", "convention", metric="recall", slice="2px")
    by_model = {m: max(value for (n, _), (value, _) in recall.items() if n == m) for m in models}
    assert min(by_model.values()) > 0.05, "by chance a fiftieth of a solid's points are that near"
