"""Six factors: which models are a pair, whether planted effects come back, and the figure of them."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from clip_robustness.core import io, statistics
from clip_robustness.figures import draw
from clip_robustness.figures import six_factors as figure
from clip_robustness.metrics import matched_pairs as pairs
from clip_robustness.metrics import six_factors as six

FACTS = {
    "group": "clip_zero_shot", "library": "open_clip", "finetuning": "none", "finetuned_on": "", "loss": "softmax",
    "parent": "", "prompts": "", "image_size": 224, "train_images": 4e8, "source": "WIT",
}  # fmt: skip
NETWORKS = {
    "RN50": ("resnet", 151.3, 12.2),
    "RN101": ("resnet", 149.6, 19.5),
    "ViT-B-32": ("vit", 151.3, 8.8),
    "ViT-B-16": ("vit", 149.6, 35.1),
    "ViT-L-14": ("vit", 427.6, 162.0),
    "ViT-H-14": ("vit", 986.1, 334.6),
}
SIZES = {"LAION-80M": 8e7, "LAION-400M": 4e8, "LAION-2B": 2e9}
# What the world does to an axis: these come back as estimates. A larger network helps too, and is no factor.
PLANTED = {
    "CNN → ViT": 0.05, "WIT → LAION": -0.04, "ten times the images": 0.03, "zero-shot → cross entropy": -0.20,
    "softmax → sigmoid": 0.06, "biased → unbiased": 0.25,
}  # fmt: skip


def model(network, name=None, **facts):
    family, params, gflops = NETWORKS[network]
    row = {**FACTS, "architecture": network, "family": family, "params_m": params, "gflops": gflops, **facts}
    row["train_images"] = SIZES.get(row["source"], row["train_images"])
    parts = [network, row["source"], row["finetuning"], row["loss"], str(row["image_size"])]
    return {"model": name or "-".join(parts).lower(), **row}


def child(parent, number=0, **facts):
    tuned = {"group": "clip_finetuned", "library": "timm", "finetuning": "cross_entropy", "loss": "cross_entropy"}
    name = f"{parent['model']}.ft{number}"
    return {**parent, **tuned, "model": name, "architecture": name, "parent": parent["model"], **facts}


def zoo():
    """Sources of unequal numbers and sizes of networks, and several children of some parents."""
    wit = [model(network) for network in ("RN50", "RN101", "ViT-B-32", "ViT-B-16", "ViT-L-14")]
    laion = [model(network, source=source) for network in list(NETWORKS)[2:] for source in SIZES]
    children = [child(parent, number) for number, parent in enumerate([*wit, *wit[2:4], *laion[:3], wit[2]])]
    world = [model(n, source=f"world_{kind}", train_images=6000.0) for n in NETWORKS for kind in ("biased", "unbiased")]
    sigmoid = [
        {**one, "architecture": f"{one['architecture']}-SigLIP", "loss": "sigmoid", "model": one["model"] + "-sigmoid"}
        for one in (*laion[:4], world[4])
    ]
    return pd.DataFrame([*wit, *laion, *children, *world, *sigmoid])


def truth(facts):
    """The planted score of a model: the factors' effects, and what its size does."""
    return (
        0.5 + 0.20 * np.log10(facts["params_m"] / 150)
        + PLANTED["CNN → ViT"] * (facts["family"] == "vit")
        + PLANTED["WIT → LAION"] * facts["source"].startswith("LAION")
        + PLANTED["ten times the images"] * np.log10(facts["train_images"] / 4e8)
        + PLANTED["zero-shot → cross entropy"] * (facts["finetuning"] == "cross_entropy")
        + PLANTED["softmax → sigmoid"] * (facts["loss"] == "sigmoid")
        + PLANTED["biased → unbiased"] * facts["source"].endswith("_unbiased")
    )  # fmt: skip


def row(name, dataset, metric, value, slice="", convention="", half=0.01, source="measured"):
    where = {"study": "test", "model": name, "dataset": dataset, "metric": metric, "slice": slice}
    interval = {"value": value, "low": value - half, "high": value + half}
    return {**where, **interval, "n": 1000, "convention": convention, "source": source}


def world(models, seed=0, noise=0.005):
    """Tables in which every axis is the planted score, with an error of its own for each model: that of its images."""
    rng = np.random.default_rng(seed)
    tables = {
        name: [] for name in ("accuracy", "effective_robustness", "shape_bias", "ood", "calibration", "retrieval")
    }
    for facts in models.to_dict("records"):
        name, score = facts["model"], truth(facts) + noise * rng.normal()
        tables["accuracy"].append(row(name, "w_val", "accuracy", score))
        for shift, away in (("w_a", 0.1), ("w_b", -0.1)):
            tables["effective_robustness"].append(
                row(name, shift, "effective_robustness", score + away, "val", "logit-ols")
            )
        tables["shape_bias"].append(row(name, "cue", "shape_bias", score, convention="16_way"))
        scores = ("mcm_t1", "msp") if facts["finetuning"] == "none" else ("msp",)
        tables["ood"] += [row(name, "texture", "auroc", score - 0.3 * (s == "msp"), s, "id_positive") for s in scores]
        for state, metric in itertools.product(("before", "after"), ("ece", "nll")):
            for dataset in ("w_val", "w_a", "w_b"):
                tables["calibration"].append(row(name, dataset, metric, score, state, "15_equal_width"))
        tables["retrieval"] += [row(name, "coco", f"{way}_recall@1", score) for way in ("image", "text")]
    return {"models": models, **{name: pd.DataFrame(rows) for name, rows in tables.items()}}


def estimates(tables, **options):
    found = six.effects(tables, **options)
    return {(one["axis"], one["contrast"]): one for one in found}


def test_planted_effects_come_back_within_their_intervals():
    models, errors, covered = zoo(), [], []
    for seed in range(30):
        tables = {name: table for name, table in world(models, seed).items() if name in ("models", "accuracy")}
        found = estimates(tables, seed=seed, resamples=200)
        assert {contrast for _, contrast in found} == set(PLANTED)
        for (_, contrast), one in found.items():
            errors.append((contrast, one["effect"] - PLANTED[contrast]))
            covered.append(one["low"] <= PLANTED[contrast] <= one["high"])
    assert 0.91 <= np.mean(covered) <= 0.99
    assert pd.DataFrame(errors).groupby(0)[1].mean().abs().max() < 0.002


def test_every_axis_has_its_own_unit_and_all_contrasts():
    found = estimates(world(zoo(), noise=0))
    axes = [axis for axis in six.AXES if axis != "factor_robustness"]  # which takes a table of its own
    assert list(dict.fromkeys(axis for axis, _ in found)) == axes
    for axis, contrast in itertools.product(axes, PLANTED):
        one = found[axis, contrast]
        assert one["effect"] == pytest.approx(PLANTED[contrast])
        assert one["low_images"] < one["effect"] < one["high_images"]
        assert one["unit"].startswith("nats" if axis.startswith("nll") else "fraction")
        assert one["unit"].endswith("per factor of ten") == (one["factor"] == "size")


def test_a_larger_network_of_one_source_does_not_leak_into_the_source():
    """LAION has large networks that WIT lacks: group means differ by what size does, matched pairs do not."""
    wit = [model("ViT-B-32"), model("ViT-B-16")]
    laion = [model(network, source="LAION-400M") for network in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14")]
    models = pd.DataFrame([*wit, *laion])
    scores = {facts["model"]: truth(facts) for facts in models.to_dict("records")}
    naive = np.mean([scores[one["model"]] for one in laion]) - np.mean([scores[one["model"]] for one in wit])
    one = estimates(world(models, noise=0))["clean_accuracy", "WIT → LAION"]
    assert naive > 0 > PLANTED["WIT → LAION"]
    assert one["effect"] == pytest.approx(PLANTED["WIT → LAION"])
    assert (one["n"], one["models"]) == (2, 4)


@pytest.mark.parametrize(
    ("change", "paired"),
    [
        ({}, True),
        ({"architecture": "ViT-B-32-quickgelu"}, True),
        ({"params_m": 200.0}, True),
        ({"params_m": 300.0}, False),
        ({"params_m": np.nan}, False),
        ({"image_size": 256}, False),
        ({"train_images": 2e9}, False),
        ({"library": "timm"}, False),
        ({"loss": "sigmoid"}, False),
        ({"prompts": "learned"}, False),
        ({"architecture": "roberta-ViT-B-32"}, False),
        ({"name": "vit-b-32.laion400m_s3b"}, False),
        ({"name": "vit-b-32.laion400m_s13b"}, True),
        ({"name": "vit-b-32.laion400m_e32"}, True),
    ],
)
def test_a_pair_is_the_same_in_everything_else(change, paired):
    wit = model("ViT-B-32", "vit-b-32.openai")
    other = model("ViT-B-32", **{"name": "vit-b-32.laion_400m_13b", "source": "laion", **change})
    found = pairs.matched_pairs(pd.DataFrame([wit, {**other, "source": "LAION-400M"}]))
    assert (("source", "WIT → LAION") in found) == paired


def test_size_goes_to_the_next_larger_and_never_across_filters():
    models = [model("ViT-B-32", source=source) for source in SIZES]
    models += [model("ViT-B-16", source="CommonPool", train_images=n, name=f"pool{n:.0f}") for n in (3e8, 1e9)]
    (found,) = pairs.matched_pairs(pd.DataFrame(models)).values()
    names = [one["model"] for one in models]
    assert [(p.before, p.after) for p in found] == [((names[1],), (names[2],)), ((names[0],), (names[1],))]
    assert [p.step for p in found] == pytest.approx([np.log10(5)] * 2)


def test_fine_tuning_pairs_are_parent_and_child_at_one_resolution():
    parent = model("ViT-B-16")
    children = [
        child(parent, 0, finetuned_on="ImageNet-1k"),
        child(parent, 1, finetuned_on="ImageNet-12k+ImageNet-1k"),
        child(parent, 2, finetuned_on="ImageNet-1k", image_size=384),
        child(parent, 3, finetuning="parameter_efficient", loss="softmax"),
    ]
    children.append(child(children[0], 4))  # its parent is no zero-shot model
    names = [one["model"] for one in children]
    found = pairs.matched_pairs(pd.DataFrame([parent, *children]))
    shown = {contrast: [(*p.before, *p.after) for p in some] for (_, contrast), some in found.items()}
    assert shown == {
        "zero-shot → cross entropy": [(parent["model"], names[0]), (parent["model"], names[1])],
        "zero-shot → parameter-efficient": [(parent["model"], names[3])],
        "on 1k → on 12k, then 1k": [(names[0], names[1])],
    }


def test_the_mini_twins_are_pairs():
    table = Path(__file__).parents[2] / "config/mini/models.tsv"
    found = pairs.matched_pairs(pd.read_csv(table, sep="\t", keep_default_na=False))
    shown = {label: [(*p.before, *p.after) for p in some] for (_, label), some in found.items()}
    networks = ("mini_clip_resnet", "mini_clip_vit")
    for label, twins in {
        "biased → unbiased": [(f"{network}_biased", f"{network}_unbiased") for network in networks],
        "ten times the images": [("mini_clip_vit_third", "mini_clip_vit_biased")],
        "softmax → sigmoid": [("mini_clip_vit_biased", "mini_clip_vit_sigmoid")],
        "CNN → ViT": [tuple(f"{network}_{kind}" for network in networks) for kind in ("biased", "unbiased")],
        "zero-shot → contrastive": [("mini_clip_vit_biased", "mini_clip_vit_contrastive")],
    }.items():
        assert set(twins) <= set(shown[label])


def test_models_that_the_table_cannot_tell_apart_are_one_side():
    twins = [model("ViT-B-32", f"run{i}", source="LAION-400M") for i in range(3)]
    models = pd.DataFrame([model("ViT-B-32", "one"), *twins])
    values = {"one": 0.5, "run0": 0.6, "run1": 0.7, "run2": 0.8}
    accuracy = pd.DataFrame([row(name, "w_val", "accuracy", value) for name, value in values.items()])
    (one,) = six.effects({"models": models, "accuracy": accuracy})
    assert one["effect"] == pytest.approx(0.2)
    assert (one["n"], one["models"], one["pairs"]) == (1, 4, "one > run0+run1+run2")
    # The mean of three is known better than one: 0.01 * sqrt(1 + 1/3).
    assert one["high"] - one["effect"] == pytest.approx(0.01 * np.sqrt(4 / 3))
    assert (one["interval"], one["p"]) == ("images", None)


def test_a_shared_parent_counts_with_its_net_weight_and_as_one_cluster():
    parent = model("ViT-B-16")
    models = pd.DataFrame([parent, *(child(parent, i) for i in range(6))])
    one = estimates(world(models, noise=0))["clean_accuracy", "zero-shot → cross entropy"]
    assert (one["n"], one["clusters"], one["interval"]) == (6, 1, "images")
    assert one["high"] - one["effect"] == pytest.approx(0.01 * np.sqrt(1 + 1 / 6))


def test_both_sides_are_read_under_one_convention():
    found = estimates(world(zoo(), noise=0))
    # Zero-shot models have both scores and classifiers one: where mcm_t1 is missing on a side, both are read by msp.
    assert found["ood_auroc", "WIT → LAION"]["convention"] == "mcm_t1"
    assert found["ood_auroc", "zero-shot → cross entropy"]["convention"] == "msp"
    assert found["ood_auroc", "zero-shot → cross entropy"]["effect"] == pytest.approx(-0.2)
    tables = world(zoo())
    tuned = tables["shape_bias"]["model"].str.contains(".ft", regex=False)
    tables["shape_bias"].loc[tuned, "convention"] = "1000_way"
    assert ("shape_bias", "zero-shot → cross entropy") not in estimates(tables)


def test_a_shift_that_one_side_lacks_is_left_out_on_the_other():
    tables = world(pd.DataFrame([model("ViT-B-32", "a"), model("ViT-B-32", "b", source="LAION-400M")]), noise=0)
    robust = tables["effective_robustness"]
    tables["effective_robustness"] = robust[(robust["model"] != "a") | (robust["dataset"] != "w_b")]
    one = estimates(tables)["effective_robustness", "WIT → LAION"]
    assert one["effect"] == pytest.approx(PLANTED["WIT → LAION"])


def test_conditions_of_one_shift_weigh_as_one():
    models = pd.DataFrame([model("ViT-B-32", "a"), model("ViT-B-32", "b", source="LAION-400M")])
    rows = [row("a", shift, "effective_robustness", 0, "val", "logit-ols") for shift in ("x", "v0", "v1")]
    values = {"x": 0.3, "v0": 0.1, "v1": 0.2}
    rows += [row("b", shift, "effective_robustness", value, "val", "logit-ols") for shift, value in values.items()]
    tables = {"models": models, "effective_robustness": pd.DataFrame(rows)}
    (one,) = six.effects(tables, natural=["x", "v0+v1"])
    assert one["effect"] == pytest.approx((0.3 + 0.15) / 2)


def prompted():
    models = pd.DataFrame([model("ViT-B-32", f"m{i}", train_images=1e8 * (i + 1)) for i in range(6)])
    line = {"slope": 1.0, "intercept": -1.0, "r": 1.0, "n": 9, "transform": "logit", "estimator": "ols"}
    baselines = pd.DataFrame([{"dataset": "w_a", "reference": "val", **line, "source": "measured"}])
    fits = pd.DataFrame([{"dataset": "x", "slice": "pose", "convention": "top", **line, "source": "measured"}])
    baseline, rows = statistics.Line(*line.values()), []
    for (number, name), (prompts, drop) in itertools.product(enumerate(models["model"]), (("p_80", 0), ("p_1", 0.02))):
        score = 0.6 + 0.01 * number - drop
        above = float(baseline.predict(score)) + 0.1 - drop  # the planted effect on robustness is -0.02 too
        rows.append(row(name, "w_val", "accuracy", score, prompts))
        rows.append(row(name, "w_a", "accuracy", above, prompts))
        rows.append(row(name, "w_val", "ece", 0.1 + drop, f"{prompts}:before"))
        rows.append(row(name, "texture", "auroc", 0.8 + drop, f"{prompts}:mcm_t1"))
        rows.append(row(name, "x", "accuracy", score, prompts, "top"))
        rows.append(row(name, "x", "factor_accuracy", above, f"{prompts}:pose", "top"))
    return {"models": models, "baselines": baselines, "factor_fits": fits, "prompts": pd.DataFrame(rows)}


def test_prompts_compare_each_model_with_itself():
    found = estimates(prompted(), reference="w_val", natural=["w_a"])
    planted = {"clean_accuracy": -0.02, "effective_robustness": -0.02, "factor_robustness": -0.02, "ece_id": 0.02}
    assert {axis for axis, _ in found} == {*planted, "ood_auroc"}
    for axis, effect in {**planted, "ood_auroc": 0.02}.items():
        one = found[axis, "80 → 1 template"]
        assert one["effect"] == pytest.approx(effect)
        assert (one["n"], one["clusters"], one["models"], one["interval"]) == (6, 6, 6, "pairs")
        assert one["p"] == pytest.approx(2 / 2**6)
        assert (one["comparisons"], one["p_holm"]) == (5, pytest.approx(5 * 2 / 2**6))


def test_clusters_are_connected_components():
    groups = [("a", "b"), ("c", "d"), ("e",), ("d", "a"), ("f", "e")]
    assert pairs.clusters(groups).tolist() == [0, 0, 1, 0, 1]


def test_a_cluster_interval_covers_where_pairs_share_a_model():
    """Pairs of one parent err together: an interval that takes them as independent misses far too often."""
    rng, missed, missed_naive = np.random.default_rng(0), 0, 0
    for trial in range(200):
        shared, own = rng.normal(size=(6, 1)), rng.normal(size=(6, 4))
        differences = 1 + shared + 0.5 * own
        low, high = pairs.cluster_interval(np.stack([differences.sum(axis=1), np.full(6, 4.0)], axis=1), 200, trial)
        missed += not low <= 1 <= high
        low, high = statistics.bootstrap_mean(differences.ravel(), 200, trial)
        missed_naive += not low <= 1 <= high
    assert missed <= 0.10 * 200 < 0.2 * 200 < missed_naive


def test_a_sign_flip_is_that_of_a_loop_over_all_signs():
    sums = np.array([0.3, -0.1, 0.2, 0.4, 0.1])
    totals = [abs(np.dot(signs, sums)) for signs in itertools.product((-1, 1), repeat=5)]
    assert pairs.sign_flip(sums) == pytest.approx(np.mean([total >= sums.sum() - 1e-12 for total in totals]))
    assert pairs.sign_flip(np.ones(20)) == pytest.approx(1 / 10_001)
    assert pairs.sign_flip(np.tile([1.0, -1.0], 10)) == 1


def test_holm_is_that_of_an_independent_library():
    multitest = pytest.importorskip("scipy.stats")
    p = [0.01, 0.04, 0.03, 0.005, 0.5]
    by_hand = [0.04, 0.09, 0.09, 0.025, 0.5]  # Holm: 4 * .01, max(3 * .03, 2 * .04), 3 * .03, 5 * .005, 1 * .5
    assert pairs.holm(p) == pytest.approx(by_hand)
    assert pairs.holm([]) == []
    # Never below what Benjamini and Hochberg correct to, which controls less.
    assert np.all(pairs.holm(p) >= multitest.false_discovery_control(p))


def test_without_a_table_there_is_less_and_without_models_there_is_nothing(tmp_path):
    tables = world(zoo())
    for missing in tables:
        rows = six.effects({name: table for name, table in tables.items() if name != missing})
        assert bool(rows) == (missing != "models")
    six.six_factors(tmp_path, tmp_path / "six_factors.parquet")
    assert list(io.read_parquet(tmp_path / "six_factors.parquet")) == list(six.COLUMNS)
    draw.draw("six_factors", "test", tmp_path, tmp_path / "a.pdf", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000


def test_the_table_is_that_of_its_folder_and_the_same_twice(tmp_path):
    for name, table in world(zoo()).items():
        io.write_parquet(tmp_path / f"{name}.parquet", {column: table[column].tolist() for column in table})
    for out in ("one", "two"):
        six.six_factors(tmp_path, tmp_path / f"{out}.parquet", resamples=200)
    assert (tmp_path / "one.csv").read_bytes() == (tmp_path / "two.csv").read_bytes()
    table = pd.read_parquet(tmp_path / "one.parquet")
    assert len(table) == len(pd.read_csv(tmp_path / "one.csv")) == 13 * len(PLANTED)
    tested = table[table["interval"] == "pairs"]
    assert set(table["comparisons"]) == {len(tested)} and (tested["p_holm"] >= tested["p"]).all()
    assert table.loc[table["interval"] == "images", ["p", "p_holm"]].isna().all(axis=None)


def test_the_figure_shows_each_effect_once_with_its_interval_and_pairs():
    tables, prompts = world(zoo()), prompted()
    prompts["models"] = pd.concat([tables["models"], prompts["models"]])
    table = pd.DataFrame(six.effects({**tables, **prompts}, natural=["w_a", "w_b"]))
    assert set(table["factor"]) == set(figure.FACTORS) == set(six.FACTORS)
    made = figure.draw({"six_factors": table})
    made.draw_without_rendering()
    panels = [axes for axes in made.axes if axes.get_title()]
    shown = [axis for block in figure.BLOCKS for axis in block if axis in set(table["axis"])]
    assert len(panels) == len(shown)
    for axis, axes in zip(shown, panels, strict=True):
        rows = table[table["axis"] == axis]
        scale = 1 if axis.startswith("nll") else 100
        dots = [line for line in axes.lines if str(line.get_gid()).startswith("factor:")]
        assert sorted(line.get_xdata()[0] for line in dots) == pytest.approx(sorted(scale * rows["effect"]))
        hollow = [line for line in dots if line.get_markerfacecolor() == "white"]
        assert len(hollow) == (rows["interval"] == "images").sum()
        assert sorted(text.get_text() for text in axes.texts) == sorted(f"{n}" for n in rows["n"])
    labels = [text.get_window_extent() for text in panels[0].get_yticklabels()]
    titles = [axes.title.get_window_extent() for axes in panels]
    for one, other in (*itertools.combinations(labels, 2), *itertools.combinations(titles, 2)):
        assert not one.overlaps(other)
    assert all(made.bbox.padded(1).contains(*corner) for box in (*labels, *titles) for corner in (box.min, box.max))
