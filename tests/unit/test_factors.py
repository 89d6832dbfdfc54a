"""Visual factors: one model's accuracy by factor, and the fits across models."""

import itertools

import numpy as np
import pytest

from clip_robustness.core import io, statistics
from clip_robustness.core.io import InputError
from clip_robustness.metrics.factors import fit_factors, measure_factors

N = 40


@pytest.fixture
def annotated(tmp_path):
    """A factor table of three factors and the predictions of a model, in another order and with more images."""
    rng = np.random.default_rng(0)
    table = {
        "image_id": np.array([f"im{i}" for i in range(N)]),
        "label": rng.integers(0, 5, N).astype(np.int32),
        "top_factor": rng.choice(["pose", "texture", "rare", ""], N, p=[0.5, 0.3, 0.1, 0.1]).astype(object),
        "prototype": rng.random(N) < 0.2,
        **{name: rng.random(N) < 0.5 for name in ("pose", "texture", "rare")},
    }
    order = rng.permutation(N + 10)
    labels = np.concatenate([table["label"], np.zeros(10, np.int32)])
    predicted = {
        "image_id": np.array([f"im{i}" for i in order]),
        "label": labels[order],
        "prediction": np.where(rng.random(N + 10) < 0.6, labels[order], 9).astype(np.int32),
    }
    io.write_parquet(tmp_path / "factors.parquet", table)
    io.write_parquet(tmp_path / "predictions.parquet", predicted)
    return tmp_path, table, predicted


def measured(folder, **options):
    paths = [folder / name for name in ("predictions.parquet", "factors.parquet", "out.json")]
    measure_factors(*paths, **options)
    content = io.read_json(paths[-1])
    return {(r["metric"], r["slice"], r["convention"]): r for r in content["rows"]}, content["manifest"]


def test_rows_are_those_of_a_loop_over_images(annotated):
    folder, table, predicted = annotated
    right = dict(zip(predicted["image_id"], predicted["prediction"] == predicted["label"], strict=True))
    rows, manifest = measured(folder, prototypes=True, fewest=1)
    assert len(rows) == 4 * 4
    for (metric, factor, convention), row in rows.items():
        some = []
        for i in range(N):
            has = not factor or (table["top_factor"][i] == factor if "top" in convention else table[factor][i])
            if has and ("with_prototypes" in convention or not table["prototype"][i]):
                some.append(right[table["image_id"][i]])
        assert metric == ("factor_accuracy" if factor else "accuracy")
        assert (row["value"], row["n"]) == (pytest.approx(np.mean(some)), len(some))
        low, high = statistics.clopper_pearson(sum(some), len(some))
        assert (row["low"], row["high"]) == (pytest.approx(low), pytest.approx(high))
    assert (manifest["n"], manifest["masked"]) == (N, 0)


def test_by_default_prototypes_and_rare_factors_are_left_out(annotated):
    folder, table, _ = annotated
    rare = int((table["top_factor"][~table["prototype"]] == "rare").sum())
    rows, manifest = measured(folder, fewest=rare + 1)
    assert {key[1] for key in rows} == {"", "pose", "texture"} == {"", *manifest["factors"]}
    assert {key[2] for key in rows} == {"top", "multi"}
    with pytest.raises(InputError, match=r"no factor is the top factor of 150 images"):
        measured(folder)


def test_masked_images_are_left_out_and_counted(annotated):
    folder, _, predicted = annotated
    kept = ~np.isin(predicted["image_id"], ["im3", "im7"])
    io.write_parquet(folder / "predictions.parquet", {name: column[kept] for name, column in predicted.items()})
    assert measured(folder, fewest=1)[1]["masked"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": np.full(N + 10, 4, np.int32)}, r"label of 'im\d+' differs"),
        ({"image_id": np.array([f"other{i}" for i in range(N + 10)])}, "none of the images"),
        ({"prediction": None}, "no column 'prediction'"),
    ],
)
def test_predictions_of_something_else_are_refused(annotated, change, message):
    folder, _, predicted = annotated
    columns = {name: column for name, column in {**predicted, **change}.items() if column is not None}
    io.write_parquet(folder / "predictions.parquet", columns)
    with pytest.raises(InputError, match=message):
        measured(folder, fewest=1)


@pytest.fixture
def zoo(tmp_path):
    """Tables of 12 standard models on the line logit(y) = 1.1 logit(x) - 0.4, two that are off it, and a CLIP."""
    names = [f"standard_{i:02}" for i in range(12)] + ["standard_odd", "standard_other", "clip"]
    x = np.array([*np.linspace(0.55, 0.85, 12), 0.7, 0.8, 0.65])
    y = statistics.inverse_transform(1.1 * statistics.transform(x) - 0.4)
    y[-3:] += [-0.3, -0.2, 0.08]
    rows = []
    for (name, at, value), convention in itertools.product(zip(names, x, y, strict=True), ("top", "multi")):
        for metric, factor, number, n in (("accuracy", "", at, 5000), ("factor_accuracy", "pose", value, 400)):
            low, high = map(float, statistics.clopper_pearson(number * n, n))
            who = {"study": "test", "model": name, "dataset": "imagenet_x", "source": "measured"}
            what = {"metric": metric, "slice": factor, "convention": convention}
            rows.append({**who, **what, "value": number, "low": low, "high": high, "n": n})
    groups = ["standard"] * 14 + ["clip_zero_shot"]
    io.write_parquet(tmp_path / "factors.parquet", {key: [row[key] for row in rows] for key in rows[0]})
    io.write_parquet(tmp_path / "models.parquet", {"model": names, "group": groups})
    return tmp_path, names, x, y


def fitted(folder, **options):
    paths = [folder / f"{name}.parquet" for name in ("factors", "models", "fits", "robustness")]
    fit_factors(*paths, resamples=100, **options)
    return [io.read_parquet(path) for path in paths[2:]]


def test_a_planted_line_and_what_lies_above_it_are_recovered(zoo):
    folder, names, _, y = zoo
    fits, robustness = fitted(folder, only=["standard_[0-9]*"], transforms=["logit"])
    assert sorted(map("-".join, zip(fits["convention"], fits["estimator"], strict=True))) == [
        "multi-huber", "multi-ols", "top-huber", "top-ols",
    ]  # fmt: skip
    np.testing.assert_allclose(fits["slope"], 1.1, atol=1e-6)
    np.testing.assert_allclose(fits["intercept"], -0.4, atol=1e-6)
    of_clip = (robustness["model"] == "clip") & (robustness["convention"] == "top-logit-ols")
    (row,) = np.flatnonzero(of_clip)
    assert robustness["value"][row] == pytest.approx(0.08)
    assert (robustness["slice"][row], robustness["metric"][row]) == ("pose", "effective_robustness")
    # The line is exact: what is left is the binomial error of 400 and of 5,000 images.
    half = (robustness["high"][row] - robustness["low"][row]) / 2
    expected = 1.96 * np.sqrt(y[names.index("clip")] * (1 - y[names.index("clip")]) / 400)
    assert expected < half < 1.2 * expected


def test_the_group_is_chosen_by_group_and_name(zoo):
    folder, names, x, y = zoo
    fits, robustness = fitted(folder, without=["*_odd", "*_other"])
    everyone, _ = fitted(folder)
    assert (set(fits["n"]), set(everyone["n"])) == ({12}, {14})
    assert set(robustness["model"]) == set(names)  # who is not fitted is measured against the line all the same
    line = statistics.fit_line(x[:14], y[:14], "linear", "huber")
    (row,) = np.flatnonzero(
        (everyone["convention"] == "top") & (everyone["transform"] == "linear") & (everyone["estimator"] == "huber")
    )
    assert (everyone["slope"][row], everyone["intercept"][row]) == pytest.approx((line.slope, line.intercept))


def test_too_few_models_give_no_fit_and_a_note(zoo, capsys):
    folder, *_ = zoo
    fits, robustness = fitted(folder, only=["standard_00", "standard_01"])
    assert len(fits["slope"]) == len(robustness["value"]) == 0
    assert "imagenet_x top: pose (val, logit-huber): no baseline" in capsys.readouterr().err
