"""Metrics against brute force and against other libraries; joins that must fail."""

import json
import math

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from sklearn.linear_model import HuberRegressor
from sklearn.metrics import log_loss

from clip_robustness.core import io, statistics
from clip_robustness.core.io import InputError
from clip_robustness.metrics import accuracy, calibration, effective_robustness, logits, shape_bias

N, CLASSES, DIMENSIONS = 120, 6, 8
MODEL = {"model": "tiny", "kind": "features"}


@pytest.mark.parametrize(("k", "n"), [(0, 5), (3, 7), (7, 7), (499, 1000), (1, 50000)])
@pytest.mark.parametrize("level", [0.95, 0.995])
def test_clopper_pearson_is_scipys(k, n, level):
    expected = scipy.stats.binomtest(k, n).proportion_ci(level, method="exact")
    np.testing.assert_allclose(statistics.clopper_pearson(k, n, level), expected, atol=1e-10)


def test_the_correlation_is_scipys():
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 9, 50), rng.integers(0, 9, 50) + np.arange(50)
    assert statistics.pearson(x, y) == pytest.approx(scipy.stats.pearsonr(x, y).statistic)


def models(seed: int, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.4, 0.95, n)
    return x, scipy.special.expit(1.2 * scipy.special.logit(x) - 1.5 + 0.15 * rng.standard_t(2, n))


@pytest.mark.parametrize("seed", range(5))
def test_fits_are_those_of_scipy_and_sklearn(seed):
    x, y = models(seed)
    for name, axis in (("logit", scipy.special.logit), ("probit", scipy.stats.norm.ppf), ("linear", np.asarray)):
        expected = scipy.stats.linregress(axis(x), axis(y))
        line = statistics.fit_line(x, y, name)
        assert (line.slope, line.intercept, line.r) == pytest.approx(tuple(expected[:3]))
    a, b = scipy.special.logit(x), scipy.special.logit(y)
    line = statistics.fit_line(x, y, "logit", "huber")
    sklearn = HuberRegressor(epsilon=1.35, alpha=0, tol=1e-9, max_iter=10_000).fit(a[:, None], b)
    assert line.slope == pytest.approx(sklearn.coef_[0], abs=1e-5)
    assert line.intercept == pytest.approx(sklearn.intercept_, abs=1e-5)

    def loss(parameters):
        slope, intercept, log_scale = parameters
        z = np.abs(b - intercept - slope * a) / math.exp(log_scale)
        return (math.exp(log_scale) * (1 + np.where(z <= 1.35, z**2, 2 * 1.35 * z - 1.35**2))).sum()

    best = scipy.optimize.minimize(
        loss, [1, 0, 0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 5000}
    )
    assert (line.slope, line.intercept) == pytest.approx(tuple(best.x[:2]), abs=1e-5)


@pytest.mark.parametrize("estimator", ["ols", "huber"])
def test_the_band_is_that_of_refitting_one_resample_at_a_time(estimator):
    x, y = models(3, 20)
    grid = np.array([0.5, 0.8])
    draws = np.random.default_rng(7).multinomial(20, np.full(20, 1 / 20), size=60)
    lines = [statistics.fit_line(np.repeat(x, c), np.repeat(y, c), "logit", estimator) for c in draws]
    axis = [line.intercept + line.slope * scipy.special.logit(grid) for line in lines]
    expected = scipy.special.expit(np.quantile(axis, [0.025, 0.975], axis=0))
    band = statistics.baseline_band(x, y, grid, "logit", estimator, resamples=60, seed=7)
    np.testing.assert_allclose(band, expected, atol=1e-6)


def scores(seed: int = 0, n: int = 500, k: int = 7, factor: float = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, k))
    labels = np.array([rng.choice(k, p=p) for p in scipy.special.softmax(1.5 * z, axis=1)])
    return (factor * z).astype(np.float32), labels


@pytest.mark.parametrize("t", [0.7, 1, 4])
def test_nll_is_sklearns_and_softmax_scipys(t):
    z, labels = scores()
    prediction, confidence = logits.top1(z, t)
    nll = logits.negative_log_likelihood(z, labels, prediction, confidence, t)
    probabilities = scipy.special.softmax(z.astype(float) / t, axis=1)
    assert nll.mean() == pytest.approx(log_loss(labels, probabilities, labels=range(7)), rel=1e-5)
    np.testing.assert_allclose(logits.softmax(z, t), probabilities, atol=1e-6)


@pytest.mark.parametrize("factor", [0.05, 0.5, 3, 60])
def test_the_temperature_is_that_of_a_generic_minimiser(factor):
    z, labels = scores(factor=factor)

    def nll(log_t):
        return -scipy.special.log_softmax(z.astype(float) / math.exp(log_t), axis=1)[np.arange(500), labels].mean()

    best = scipy.optimize.minimize_scalar(
        nll, bounds=(math.log(0.01), math.log(100)), method="bounded", options={"xatol": 1e-9}
    )
    fitted = calibration.fit_temperature(z, labels)
    assert fitted.value == pytest.approx(math.exp(best.x), rel=1e-4)
    assert (fitted.nll_before, fitted.nll_after) == pytest.approx((nll(0), best.fun), rel=1e-5)


def test_the_interval_of_the_temperature_is_as_wide_as_a_bootstrap():
    z, labels = scores()
    rng = np.random.default_rng(0)
    draws = [calibration.fit_temperature(z[i], labels[i]).value for i in rng.integers(0, 500, (200, 500))]
    fitted = calibration.fit_temperature(z, labels)
    assert np.log(fitted.high / fitted.low) == pytest.approx(2 * 1.96 * np.std(np.log(draws)), rel=0.2)


def test_ece_is_that_of_a_loop_over_images():
    rng = np.random.default_rng(0)
    confidence = np.concatenate([rng.random(300), [0, 1, 1, 1, 1 / 15, 2 / 15]])
    correct = rng.random(306) < confidence
    total = 0.0
    for b in range(15):
        held = [i for i, c in enumerate(confidence) if b / 15 < c <= (b + 1) / 15 or (b == 0 and c == 0)]
        if held:
            gap = np.mean([correct[i] for i in held]) - np.mean([confidence[i] for i in held])
            total += abs(gap) * len(held) / 306
    assert calibration.expected_calibration_error(confidence, correct) == pytest.approx(total)


def test_shape_bias_is_that_of_a_loop_over_images():
    rng = np.random.default_rng(0)
    prediction, shape, texture = rng.integers(0, 4, (3, 300))
    counts = shape_bias.decision_counts(prediction, shape, texture, 4)
    for k in range(4):
        mine = [(p, s, t) for p, s, t in zip(prediction, shape, texture, strict=True) if s == k and s != t]
        expected = (sum(p == s for p, s, _ in mine), sum(p == t for p, _, t in mine), len(mine))
        assert tuple(int(counts[key][k]) for key in ("shape", "texture", "conflicts")) == expected


def test_category_probabilities_average_and_do_not_take_the_largest():
    z = np.log(np.array([[0.4, 0.05, 0.3, 0.25]], np.float32))
    np.testing.assert_allclose(
        logits.category_probabilities(z, [[0, 1], [2, 3], [3]]), [[0.225, 0.275, 0.25]], rtol=1e-5
    )


def accuracy_rows(values: dict[tuple[str, str], dict[str, float]], n: int = 1000) -> list[dict]:
    return [
        {"study": "test", "model": model, "dataset": dataset, "metric": metric, "slice": "", "value": value, "n": n,
         "low": max(value - 0.02, 0), "high": min(value + 0.02, 1), "convention": "", "source": "measured"}
        for (dataset, metric), column in values.items() for model, value in column.items()
    ]  # fmt: skip


def synthetic_table() -> tuple[list[dict], dict[str, str]]:
    x, y = models(0, 12)
    names = [f"model {i}" for i in range(12)]
    near = dict(zip(names, x, strict=True))
    values = {
        ("id_val", "accuracy"): near,
        ("shift", "accuracy"): dict(zip(names, y, strict=True)),
        ("shift", "reference_accuracy"): {name: math.sqrt(value) for name, value in near.items()},
        ("other", "accuracy"): {name: 0.9 * value for name, value in near.items()},
        ("rare", "accuracy"): dict.fromkeys(names[:2], 0.3),
    }
    return accuracy_rows(values), {name: "standard" if i < 9 else "clip_zero_shot" for i, name in enumerate(names)}


def test_effective_robustness_by_hand():
    rows, groups = synthetic_table()
    fits = effective_robustness.fit_baselines(rows, groups, ["shift", "other", "rare"], "id_val", resamples=50)
    keys = [(b["dataset"], b["reference"], b["estimator"], b["n"]) for b in fits.baselines]
    assert keys == [
        (d, r, e, 9)
        for d, r in (("shift", "val"), ("shift", "class_subset"), ("other", "val"))
        for e in ("ols", "huber")
    ]
    assert len(fits.notes) == 2
    assert all("rare" in note for note in fits.notes)
    x, y = models(0, 12)
    expected = scipy.stats.linregress(scipy.special.logit(np.sqrt(x[:9])), scipy.special.logit(y[:9]))
    line = next(
        b for b in fits.baselines if (b["dataset"], b["reference"], b["estimator"]) == ("shift", "class_subset", "ols")
    )
    assert (line["slope"], line["intercept"], line["r"]) == pytest.approx(tuple(expected[:3]))
    for row in fits.rows:
        assert row["low"] <= row["value"] <= row["high"]
        if (row["dataset"], row["slice"], row["convention"]) == ("shift", "class_subset", "logit-ols"):
            i = int(row["model"].split()[1])
            baseline = scipy.special.expit(expected.intercept + expected.slope * scipy.special.logit(math.sqrt(x[i])))
            assert row["value"] == pytest.approx(y[i] - baseline)
    assert effective_robustness.fit_baselines(rows[::-1], groups, ["shift"], "id_val", resamples=50).rows == [
        row for row in fits.rows if row["dataset"] == "shift"
    ]


def test_a_population_is_chosen_by_group_and_source():
    rows, groups = synthetic_table()
    for row in rows:
        row["source"] = "one" if row["model"] < "model 5" else "two"
    fits = effective_robustness.fit_baselines(rows, groups, ["shift"], "id_val", sources=["two"], resamples=20)
    assert {(b["n"], b["source"]) for b in fits.baselines} == {(4, "two")}
    assert len({row["model"] for row in fits.rows}) == 12
    fits = effective_robustness.fit_baselines(
        rows, groups, ["shift"], "id_val", population="clip_zero_shot", resamples=20
    )
    assert {b["n"] for b in fits.baselines} == {3}


def test_the_average_weighs_two_conditions_of_a_video_set_as_one():
    values = {
        ("id_val", "accuracy"): {"a": 0.8, "b": 0.7},
        ("one", "accuracy"): {"a": 0.6, "b": 0.5},
        ("pm0", "accuracy"): {"a": 0.4},
        ("pm10", "accuracy"): {"a": 0.2},
        ("pm0", "reference_accuracy"): {"a": 0.9},
        ("pm10", "reference_accuracy"): {"a": 0.9},
    }
    rows = effective_robustness.natural_average(accuracy_rows(values), "id_val", ["one", "pm0+pm10"])
    found = {row["metric"]: row for row in rows}
    assert [(row["model"], row["dataset"], row["n"]) for row in rows] == [("a", "natural_average", 3000)] * 2
    assert found["accuracy"]["value"] == pytest.approx((0.6 + 0.3) / 2)
    # `one` has no reference accuracy: all classes, so its reference is the accuracy on id_val.
    assert found["reference_accuracy"]["value"] == pytest.approx((0.8 + 0.9) / 2)
    assert found["accuracy"]["high"] - found["accuracy"]["value"] == pytest.approx(0.02 * math.sqrt(0.25 + 2 / 16))
    assert found["reference_accuracy"]["high"] - found["reference_accuracy"]["value"] == pytest.approx(0.02)


def test_baseline_tables_are_written_whole(tmp_path):
    rows, groups = synthetic_table()
    io.write_parquet(tmp_path / "accuracy.parquet", {name: [row[name] for row in rows] for name in rows[0]})
    io.write_parquet(tmp_path / "models.parquet", {"model": list(groups), "group": list(groups.values())})
    paths = [tmp_path / f"{name}.parquet" for name in ("accuracy", "models", "baselines", "robustness")]
    effective_robustness.fit_baselines_file(*paths, natural=["shift", "other"], resamples=50)
    baselines, robustness = io.read_parquet(paths[2]), io.read_parquet(paths[3])
    assert set(baselines["dataset"]) == {"shift", "other", "natural_average"}
    own = robustness["metric"] == "effective_robustness"
    assert own.sum() == 12 * len(baselines["dataset"])
    assert set(robustness["dataset"][~own]) == {"natural_average"}
    assert sorted(robustness["metric"][~own]) == ["accuracy"] * 12 + ["reference_accuracy"] * 12
    keys = list(zip(*(robustness[k] for k in ("model", "dataset", "metric", "slice", "convention")), strict=True))
    assert len(set(keys)) == len(keys)
    first = [path.read_bytes() for path in paths[2:]]
    effective_robustness.fit_baselines_file(*paths, natural=["shift", "other"], resamples=50)
    assert [path.read_bytes() for path in paths[2:]] == first


@pytest.fixture
def made(tmp_path):
    """A tiny data set `val` over six base classes, and `shift`: its first half over a space of three."""
    rng = np.random.default_rng(0)
    weight = np.linalg.qr(rng.normal(size=(DIMENSIONS, CLASSES)))[0].T.astype(np.float32)
    labels = np.arange(N) % CLASSES
    features = weight[labels] + 0.5 * rng.normal(size=(N, DIMENSIONS))
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
    ids = np.array([f"val/{i:03d}" for i in range(N)], object)
    texture = (labels + 1 + np.arange(N) // 40) % CLASSES
    space = {
        "name": "base",
        "base": None,
        "classes": list("abcdef"),
        "pool": "max",
        "members": [[i] for i in range(CLASSES)],
    }
    write(tmp_path, "val", features, ids, labels, space, texture)
    np.savez(tmp_path / "p.base.npz", weight=weight, scale=np.float32(10), bias=np.float32(-2))
    members = [[4, 1], [0], [5]]
    three = {"name": "three", "base": "base", "classes": ["eb", "a", "f"], "pool": "max", "members": members}
    of_base = np.array([1, 0, -1, -1, 0, 2])
    keep = np.flatnonzero(of_base[labels] >= 0)[::2]
    write(tmp_path, "shift", features[keep], ids[keep], of_base[labels[keep]], three, of_base[texture[keep]])
    return tmp_path, features, weight, labels


def write(folder, name, features, ids, labels, space, texture, **facts):
    io.save_array(folder / f"{name}.npy", features)
    manifest = {**MODEL, "dataset": name, "n": len(ids), "dim": features.shape[1], "ids_sha256": io.ids_digest(ids)}
    io.write_json(folder / f"{name}.json", {**manifest, **facts})
    columns = {"image_id": ids, "label": labels.astype(np.int32), "texture_class": texture.astype(np.int32)}
    io.write_parquet(folder / f"{name}.parquet", columns)
    io.write_json(folder / f"{name}-space.json", space)


def paths_of(folder, name):
    return folder / f"{name}.npy", folder / f"{name}.parquet", folder / f"{name}-space.json"


def run_accuracy(folder, name="val", *reference):
    out, head = (folder / "out.json", folder / "out.parquet"), folder / "p.base.npz"
    accuracy.measure_accuracy(*paths_of(folder, name), *out, head, *reference)
    return json.loads(out[0].read_text()), io.read_parquet(out[1])


def test_accuracy_from_files_with_its_class_subset_reference(made):
    folder, features, weight, labels = made
    content, predictions = run_accuracy(folder, "shift", *paths_of(folder, "val"))
    z = features.astype(float) @ weight.T
    pooled = np.stack([np.maximum(z[:, 4], z[:, 1]), z[:, 0], z[:, 5]], axis=1)
    of_base = np.array([1, 0, -1, -1, 0, 2])[labels]
    right = (pooled.argmax(axis=1) == of_base)[of_base >= 0]
    rows = {row["metric"]: row for row in content["rows"]}
    assert (rows["accuracy"]["value"], rows["accuracy"]["n"]) == (pytest.approx(right[::2].mean()), len(right[::2]))
    assert (rows["reference_accuracy"]["value"], rows["reference_accuracy"]["n"]) == (
        pytest.approx(right.mean()),
        len(right),
    )
    assert rows["accuracy"]["convention"] == "3_way"
    assert 0.5 < rows["accuracy"]["value"] < 1
    np.testing.assert_array_equal(predictions["prediction"], pooled[of_base >= 0][::2].argmax(axis=1))
    p = scipy.special.softmax(10 * pooled, axis=1)[of_base >= 0][::2]
    np.testing.assert_allclose(predictions["confidence"], p.max(axis=1), atol=1e-4)


def test_a_classifiers_logits_need_no_head(made):
    folder, features, weight, _ = made
    z = (10 * features.astype(np.float32) @ weight.T).astype(np.float16)
    index = io.read_parquet(folder / "val.parquet")
    space = io.read_json(folder / "val-space.json")
    write(folder, "logits", z, index["image_id"], index["label"], space, index["texture_class"], kind="logits")
    accuracy.measure_accuracy(*paths_of(folder, "logits"), folder / "l.json", folder / "l.parquet")
    assert io.read_json(folder / "l.json")["rows"][0]["value"] == run_accuracy(folder)[0]["rows"][0]["value"]
    with pytest.raises(InputError, match="no head"):
        accuracy.measure_accuracy(
            *paths_of(folder, "logits"), folder / "l.json", folder / "l.parquet", folder / "p.base.npz"
        )


def test_masked_images_are_left_out_and_reported(made):
    folder, _, _, labels = made
    manifest = io.read_json(folder / "val.json")
    io.write_json(folder / "val.json", {**manifest, "masked": ["val/003", "val/100"]})
    content, predictions = run_accuracy(folder)
    assert content["manifest"]["masked"] == 2
    assert content["rows"][0]["n"] == N - 2
    assert predictions["label"].tolist() == np.delete(labels, [3, 100]).tolist()


def test_calibration_from_files_reports_on_the_other_half(made):
    folder, features, weight, labels = made
    head, fit = folder / "p.base.npz", folder / "t.json"
    calibration.fit_temperature_file(*paths_of(folder, "val"), fit, head, seed=4)
    half = calibration.stratified_half(labels, [f"val/{i:03d}" for i in range(N)], 4)
    z = logits.zero_shot_logits(features, weight, 10)
    fitted = calibration.fit_temperature(z[half], labels[half])
    assert io.read_json(fit)["temperature"]["value"] == pytest.approx(fitted.value, rel=1e-4)
    calibration.measure_calibration(*paths_of(folder, "val"), fit, folder / "c.json", head, held_out=1, resamples=100)
    rows = {(row["metric"], row["slice"]): row for row in io.read_json(folder / "c.json")["rows"]}
    assert rows["nll", "before"]["n"] == (~half).sum() == N // 2
    p = scipy.special.softmax(z[~half].astype(float) / fitted.value, axis=1)
    assert rows["nll", "after"]["value"] == pytest.approx(log_loss(labels[~half], p, labels=range(CLASSES)), rel=1e-4)
    assert rows["temperature", ""]["value"] == pytest.approx(fitted.value, rel=1e-4)
    calibration.measure_calibration(*paths_of(folder, "shift"), fit, folder / "s.json", head, resamples=100)
    shifted = io.read_json(folder / "s.json")["rows"]
    assert {row["n"] for row in shifted if row["metric"] == "ece"} == {len(io.load_array(folder / "shift.npy"))}
    assert "temperature" not in {row["metric"] for row in shifted}
    with pytest.raises(InputError, match="other images"):
        calibration.measure_calibration(*paths_of(folder, "shift"), fit, folder / "s.json", head, held_out=1)
    io.write_json(fit, {**io.read_json(fit), "model": "other"})
    with pytest.raises(InputError, match="of model 'other'"):
        calibration.measure_calibration(*paths_of(folder, "shift"), fit, folder / "s.json", head)


@pytest.mark.parametrize("pool", ["max", "mean_probability"])
def test_shape_bias_from_files(made, pool):
    folder, _, weight, _ = made
    space = io.read_json(folder / "shift-space.json")
    io.write_json(folder / "shift-space.json", {**space, "pool": pool})
    shape_bias.measure_shape_bias(*paths_of(folder, "shift"), folder / "s.json", folder / "p.base.npz")
    index, array = io.read_parquet(folder / "shift.parquet"), io.load_array(folder / "shift.npy")
    z = 10 * array.astype(float) @ weight.T
    p = scipy.special.softmax(z, axis=1) if pool == "mean_probability" else z
    join = np.mean if pool == "mean_probability" else np.max
    decision = np.stack([join(p[:, m], axis=1) for m in space["members"]], axis=1).argmax(axis=1)
    conflict = (index["texture_class"] >= 0) & (index["texture_class"] != index["label"])
    to_shape = int((decision == index["label"])[conflict].sum())
    to_texture = int((decision == index["texture_class"])[conflict].sum())
    rows = {(row["metric"], row["slice"]): row for row in io.read_json(folder / "s.json")["rows"]}
    assert rows["shape_bias", ""]["value"] == pytest.approx(to_shape / (to_shape + to_texture))
    assert rows["cue_accuracy", ""]["n"] == conflict.sum()
    assert rows["shape_bias", ""]["convention"] == {"max": "3_way", "mean_probability": "6_way_mean_probability"}[pool]


def test_joins_that_are_not_proven_fail(made):
    folder, features, weight, _ = made
    index = io.read_parquet(folder / "val.parquet")
    good = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails(message):
        with pytest.raises(InputError, match=message):
            run_accuracy(folder)
        for name, content in good.items():
            (folder / name).write_bytes(content)

    run_accuracy(folder)
    io.write_parquet(folder / "val.parquet", {name: column[::-1] for name, column in index.items()})
    fails(r"val\.npy: made from other images, or another order")
    io.write_parquet(folder / "val.parquet", {name: column[:-1] for name, column in index.items()})
    fails(r"val\.npy: 120 rows, but .*val\.parquet has 119")
    io.save_array(folder / "val.npy", features[:-1])
    fails(r"val\.npy: shape \(119, 8\), its manifest says \(120, 8\)")
    bad = features.copy()
    bad[77, 2] = np.nan
    io.save_array(folder / "val.npy", bad)
    fails(r"val\.npy: row 77: a value is NaN")
    (folder / "val.npy").write_bytes(good["val.npy"][:-100])
    fails(r"val\.npy: not a whole")
    (folder / "val.npy").unlink()
    fails(r"val\.npy: no such file")
    io.write_parquet(folder / "val.parquet", {**index, "label": index["label"] + np.int32(1)})
    fails(r"column label: row 5: 6; expected -1\.\.5")
    np.savez(folder / "p.base.npz", weight=weight[:, :5], scale=1, bias=0)
    fails(r"p\.base\.npz: weight \(6, 5\)")
    np.savez(folder / "p.base.npz", weight=weight * np.nan, scale=1, bias=0)
    fails(r"p\.base\.npz: a value is NaN")
    np.savez(folder / "p.base.npz", weight=weight)
    fails(r"p\.base\.npz: not a whole head")
    np.savez(folder / "p.base.npz", weight=weight[:5], scale=1, bias=0)
    fails(r"5 logits, but .* has 6 classes")
    space = io.read_json(folder / "val-space.json")
    io.write_json(folder / "val-space.json", {**space, "name": "another"})
    fails(r"expected a head over the base space 'another'")
    io.write_json(folder / "val-space.json", {**space, "pool": "mean_probability"})
    fails(r"pool is 'mean_probability', expected max")
    with pytest.raises(InputError, match="needs a head"):
        accuracy.measure_accuracy(*paths_of(folder, "val"), folder / "o.json", folder / "o.parquet")


def test_a_reference_of_another_model_or_incomplete_is_refused(made):
    folder, *_ = made
    io.write_json(folder / "val.json", {**io.read_json(folder / "val.json"), "model": "other"})
    with pytest.raises(InputError, match="same model"):
        run_accuracy(folder, "shift", *paths_of(folder, "val"))
    with pytest.raises(InputError, match="needed"):
        run_accuracy(folder, "shift", folder / "val.npy")
