"""OOD detection against brute force and scikit-learn, where widely copied code goes wrong, and from files."""

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
from sklearn import metrics

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.metrics import ood

RNG = np.random.default_rng(0)
SAME = RNG.normal(size=40)
CASES = {
    "random": (RNG.normal(1, 1, 300), RNG.normal(0, 1, 200)),
    "worse than chance": (RNG.normal(0, 1, 60), RNG.normal(1, 1, 90)),
    "tied": (RNG.integers(2, 9, 200), RNG.integers(0, 7, 150)),
    "saturated": (np.minimum(RNG.normal(1, 0.3, 100), 1), np.minimum(RNG.normal(0.9, 0.3, 80), 1)),
    "all equal": (np.ones(30), np.ones(20)),
    "the same images": (SAME, SAME),
    "separate": (np.arange(20, 50), np.arange(20)),
    "one image a side": (np.array([1.0]), np.array([0.0])),
    "one image a side, tied": (np.array([1.0]), np.array([1.0])),
    "twenty, where 0.95 is exact": (np.arange(20), np.arange(20) - 2.5),
    "ten, where 0.9 and 1.0 are as close": (np.arange(10), np.arange(10) - 2.5),
}


def values(id_scores, ood_scores, resamples=10):
    rows = ood.detection_rows(np.asarray(id_scores, float), np.asarray(ood_scores, float), "s", resamples=resamples)
    return {(row["metric"], row["convention"]): row for row in rows}


def brute_force(positive, negative):
    """FPR where recall is first >= 0.95, and where it is closest, by trying every score as threshold."""
    tried = []
    for threshold in sorted({*positive, *negative}, reverse=True):
        tried.append((np.mean(positive >= threshold), np.mean(negative >= threshold)))
        if tried[-1][0] == 1:
            break
    first = next(rate for recall, rate in tried if recall >= 0.95)
    return first, min(reversed(tried), key=lambda pair: abs(pair[0] - 0.95))[1]


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_those_of_brute_force_and_of_sklearn(case):
    id_scores, ood_scores = CASES[case]
    found = {name: row["value"] for name, row in values(id_scores, ood_scores).items()}
    pairs = (id_scores[:, None] > ood_scores) + 0.5 * (id_scores[:, None] == ood_scores)
    truth, scores = np.repeat([1, 0], [len(id_scores), len(ood_scores)]), np.concatenate([id_scores, ood_scores])
    first, closest = brute_force(id_scores, ood_scores)
    assert found == pytest.approx(
        {
            ("auroc", "id_positive"): pairs.mean(),
            ("aupr_in", "average_precision"): metrics.average_precision_score(truth, scores),
            ("aupr_out", "average_precision"): metrics.average_precision_score(1 - truth, -scores),
            ("fpr95", "id_recall_at_least"): first,
            ("fpr95", "id_recall_closest"): closest,
            ("fpr95", "ood_recall_at_least"): brute_force(-ood_scores, -id_scores)[0],
        }
    )
    assert found["auroc", "id_positive"] == pytest.approx(metrics.roc_auc_score(truth, scores))
    for convention, label, sign in (("id_recall_at_least", truth, 1), ("ood_recall_at_least", 1 - truth, -1)):
        fpr, tpr, _ = metrics.roc_curve(label, sign * scores, drop_intermediate=False)
        assert found["fpr95", convention] == pytest.approx(fpr[(tpr >= 0.95).argmax()])


def test_the_three_fpr95_differ():
    found = values(np.arange(10), [-1, 0, 0, 5])
    assert found["fpr95", "id_recall_at_least"]["value"] == 3 / 4  # at 0, where recall is 1
    assert found["fpr95", "id_recall_closest"]["value"] == 1 / 4  # at 1, where recall is 0.9
    assert found["fpr95", "ood_recall_at_least"]["value"] == 6 / 10  # at 5, where OOD recall is 1


def test_openoods_fpr95_is_too_high_where_sklearn_drops_points():
    """With drop_intermediate, roc_curve leaves out points on a straight part, among them the one at 0.95."""
    scores, truth = np.tile(np.arange(100), 2), np.repeat([1, 0], 100)
    fpr, tpr, _ = metrics.roc_curve(1 - truth, -scores)
    assert fpr[(tpr >= 0.95).argmax()] == 1
    assert values(np.arange(100), np.arange(100))["fpr95", "ood_recall_at_least"]["value"] == 0.95


def test_a_strict_comparison_calls_a_useless_score_perfect():
    """OpenOOD's first fpr_recall keeps ID at the threshold and rejects OOD there: FPR95 of 0 for constant scores."""
    id_scores, ood_scores = np.ones(40), np.ones(30)
    threshold = np.sort(id_scores)[-math.floor(0.95 * 40)]
    assert (ood_scores > threshold).mean() == 0
    found = values(id_scores, ood_scores)
    assert found["fpr95", "id_recall_at_least"]["value"] == found["fpr95", "id_recall_closest"]["value"] == 1


def test_the_trapezoid_under_precision_and_recall_is_too_high():
    """OpenOOD and pytorch-ood draw a line to (recall 0, precision 1), which no threshold of a tied score reaches."""
    truth = np.repeat([1, 0], [20, 40])
    precision, recall, _ = metrics.precision_recall_curve(truth, np.ones(60))
    assert metrics.auc(recall, precision) == pytest.approx(2 / 3)
    assert values(np.ones(20), np.ones(40))["aupr_in", "average_precision"]["value"] == pytest.approx(1 / 3)


@pytest.mark.parametrize(("sizes", "distance"), [((300, 150), 1.5), ((3000, 800), 1.5), ((3000, 800), 4)])
def test_intervals_are_those_of_resampling_one_image_at_a_time(sizes, distance):
    """The larger sets are resampled in groups of neighbouring scores."""
    rng = np.random.default_rng(1)
    id_scores, ood_scores = rng.normal(distance, 1, sizes[0]), rng.normal(0, 1, sizes[1])
    draws = []
    for _ in range(1500):
        counts = ood.count_scores(rng.choice(id_scores, sizes[0]), rng.choice(ood_scores, sizes[1]))
        rates = ood.false_positive_rates(counts[0][::-1], counts[1][::-1]), ood.false_positive_rates(*counts[::-1])
        draws.append([*ood.areas(*counts), *rates[0], rates[1][0]])
    expected = np.quantile(draws, [0.025, 0.975], axis=0).T
    found = values(id_scores, ood_scores, resamples=4000)
    for (low, high), row in zip(expected, found.values(), strict=True):
        assert (row["low"], row["high"]) == pytest.approx((low, high), abs=0.17 * (high - low))


def test_groups_do_not_move_an_interval(monkeypatch):
    """However coarse they are: the areas of grouped scores, where more is tied, differ from those reported."""
    monkeypatch.setattr(ood, "GROUPS", 10)
    rng = np.random.default_rng(4)
    found = values(rng.normal(2, 1, 3000), rng.normal(0, 1, 800), resamples=1000)
    for name in (("auroc", "id_positive"), ("aupr_in", "average_precision"), ("aupr_out", "average_precision")):
        low, value, high = (found[name][key] for key in ("low", "value", "high"))
        assert 0.35 < (value - low) / (high - low) < 0.65


def test_intervals_hold_the_truth_as_often_as_they_say():
    """300 data sets with 300 ID ~ N(1, 1) and 200 OOD ~ N(0, 1), of which everything is known."""
    recall = np.linspace(0, 1, 20_001)[1:]
    threshold = scipy.stats.norm.isf(recall, loc=1)
    precision = 300 * recall / (300 * recall + 200 * scipy.stats.norm.sf(threshold))
    fpr = scipy.stats.norm.sf(scipy.stats.norm.isf(0.95, loc=1))
    truth = {"auroc": scipy.stats.norm.cdf(1 / math.sqrt(2)), "aupr_in": precision.mean(), "fpr95": fpr}
    rng, hits = np.random.default_rng(2), np.zeros(5)
    for seed in range(300):
        rows = ood.detection_rows(rng.normal(1, 1, 300), rng.normal(0, 1, 200), "s", seed, resamples=200)
        hits += [row["low"] <= truth[row["metric"]] <= row["high"] for row in rows if row["metric"] in truth]
    assert (hits / 300 >= 0.91).all()
    assert (hits / 300 <= 0.99).all()


@pytest.mark.parametrize("n", [20, 2000])
def test_perfect_separation_is_not_certain(n):
    found = values(np.arange(n, 3 * n + 5), np.arange(n))
    low, high = scipy.stats.binomtest(n, n).proportion_ci(method="exact")
    row = found["auroc", "id_positive"]
    assert (row["value"], row["low"], row["high"]) == (1, pytest.approx(low), high)
    row = found["fpr95", "id_recall_at_least"]
    assert (row["value"], row["low"], row["high"]) == (0, 0, pytest.approx(1 - low))


def test_a_constant_score_says_little_of_few_images():
    found = values(np.ones(9), np.ones(7))
    row = found["auroc", "id_positive"]
    assert row["value"] == 0.5
    assert row["low"] < 0.2
    assert row["high"] > 0.8
    row = found["fpr95", "id_recall_at_least"]
    assert (row["value"], row["low"]) == (1, pytest.approx(scipy.stats.binomtest(7, 7).proportion_ci().low))


def test_scores_are_those_of_scipy():
    cosines = RNG.uniform(-1, 1, (50, 7))
    for scale, bias in ((100, 0), (117.3, -16.5)):
        found = ood.detection_scores((scale * cosines + bias).astype(np.float32), scale)
        z = scale * cosines + bias
        np.testing.assert_allclose(found["mcm_t1"], scipy.special.softmax(cosines, axis=1).max(axis=1), rtol=1e-5)
        np.testing.assert_allclose(found["msp"], scipy.special.softmax(z, axis=1).max(axis=1), rtol=1e-4)
        np.testing.assert_allclose(found["energy"], scipy.special.logsumexp(z, axis=1), rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(found["max_logit"], z.max(axis=1), rtol=1e-5)
    assert list(ood.detection_scores(np.zeros((1, 3), np.float32))) == list(ood.SCORES["logits"])


def test_saturated_confidences_are_tied_and_energies_are_not():
    z = np.array([[500, 0], [400, 0], [300, 0]], np.float32)
    found = ood.detection_scores(z)
    assert found["msp"].tolist() == [1, 1, 1]
    assert values(found["msp"][:1], found["msp"][1:])["auroc", "id_positive"]["value"] == 0.5
    assert values(found["energy"][:1], found["energy"][1:])["auroc", "id_positive"]["value"] == 1


@pytest.mark.parametrize("case", CASES)
def test_histograms_are_numpys(case):
    id_scores, ood_scores = CASES[case]
    rows = ood.histogram_rows(id_scores, ood_scores, "msp")
    low, high = (
        next(row["value"] for row in rows if row["metric"] == f"score_{end}") for end in ("minimum", "maximum")
    )
    assert (low, high) == (min(*id_scores, *ood_scores), max(*id_scores, *ood_scores))
    for side, scores in (("id", id_scores), ("ood", ood_scores)):
        share = {row["slice"]: row["value"] for row in rows if row["metric"] == f"score_histogram_{side}"}
        assert list(share) == [f"msp:{b:02d}" for b in range(40)]
        assert sum(share.values()) == pytest.approx(1)
        if case in ("random", "worse than chance", "the same images"):
            counts = np.histogram(scores, bins=np.linspace(low, high, 41))[0]
            np.testing.assert_allclose(list(share.values()), counts / len(scores))
    assert {row["n"] for row in rows[2:42]} == {len(id_scores)}
    assert {row["n"] for row in rows[42:]} == {len(ood_scores)}


SPACE = {"name": "base", "base": None, "classes": list("abcd"), "pool": "max", "members": [[i] for i in range(4)]}


def write(folder, name, array, labels, **facts):
    ids = np.array([f"{name}/{i:03d}" for i in range(len(array))], object)
    manifest = {"model": "tiny", "kind": "features", "dataset": name, "n": len(ids), "dim": array.shape[1]}
    io.save_array(folder / f"{name}.npy", array)
    io.write_json(folder / f"{name}.json", {**manifest, "ids_sha256": io.ids_digest(ids), **facts})
    io.write_parquet(folder / f"{name}.parquet", {"image_id": ids, "label": labels.astype(np.int32)})


def run(folder, head="p.base.npz", of=("far", "val")):
    (far, far_index), (val, val_index) = ((folder / f"{name}.npy", folder / f"{name}.parquet") for name in of)
    out = folder / "out.json"
    head = head and folder / head
    ood.measure_ood(far, far_index, folder / "space.json", out, val, val_index, head, seed=3, resamples=20)
    content = io.read_json(out)
    return content["manifest"], {(r["metric"], r["slice"], r["convention"]): r for r in content["rows"]}


@pytest.fixture
def made(tmp_path):
    """A SigLIP-like model (with a bias), 90 ID images near its four classes and 60 OOD images anywhere."""
    rng = np.random.default_rng(5)
    weight = np.linalg.qr(rng.normal(size=(8, 8)))[0][:4].astype(np.float32)
    labels = np.arange(90) % 4
    features = {"val": weight[labels] + 0.35 * rng.normal(size=(90, 8)), "far": rng.normal(size=(60, 8))}
    features = {name: f / np.linalg.norm(f, axis=1, keepdims=True) for name, f in features.items()}
    features = {name: f.astype(np.float16) for name, f in features.items()}
    write(tmp_path, "val", features["val"], labels)
    write(tmp_path, "far", features["far"], np.full(60, -1))
    io.write_json(tmp_path / "space.json", SPACE)
    np.savez(tmp_path / "p.base.npz", weight=weight, scale=np.float32(110), bias=np.float32(-15))
    return tmp_path, {name: f.astype(float) @ weight.T for name, f in features.items()}, labels


def test_a_zero_shot_model_from_files(made):
    folder, cosines, _ = made
    manifest, rows = run(folder)
    assert manifest["kind"] == "features"
    assert (manifest["default"], manifest["measured"], manifest["reference_measured"]) == ("mcm_t1", 60, 90)
    assert (manifest["dataset"], manifest["reference"], manifest["seed"]) == ("far", "val", 3)
    truth = np.repeat([1, 0], [90, 60])
    cosines = np.concatenate([cosines["val"], cosines["far"]])
    for score, expected in (
        ("mcm_t1", scipy.special.softmax(cosines, axis=1).max(axis=1)),
        ("energy", scipy.special.logsumexp(110 * cosines - 15, axis=1)),
        ("max_logit", cosines.max(axis=1)),
    ):
        row = rows["auroc", score, "id_positive"]
        assert row["value"] == pytest.approx(metrics.roc_auc_score(truth, expected), abs=1e-3)
        assert 0.6 < row["low"] <= row["value"] <= row["high"] < 1
        assert row["n"] == 150
    assert {slice for metric, slice, _ in rows if metric == "fpr95"} == set(ood.SCORES["features"])
    assert {slice[:-3] for metric, slice, _ in rows if metric.startswith("score_histogram")} == {"mcm_t1"}
    assert run(folder)[1] == rows


def test_scale_and_bias_do_not_reach_mcm(made):
    folder, _, _ = made
    before, weight = run(folder)[1], np.load(folder / "p.base.npz")["weight"]
    np.savez(folder / "q.base.npz", weight=weight, scale=np.float32(8), bias=np.float32(0))
    after = run(folder, "q.base.npz")[1]
    for name in (("auroc", "mcm_t1", "id_positive"), ("score_maximum", "mcm_t1", "")):
        assert after[name]["value"] == pytest.approx(before[name]["value"], abs=1e-3)
    energy = "auroc", "energy", "id_positive"
    assert after[energy]["value"] != pytest.approx(before[energy]["value"], abs=1e-3)


def test_a_classifier_has_msp_as_default_and_no_mcm(made):
    folder, cosines, labels = made
    for name, own in (("val", labels), ("far", np.full(60, -1))):
        write(folder, name, (20 * cosines[name]).astype(np.float16), own, kind="logits")
    manifest, rows = run(folder, head=None)
    assert (manifest["kind"], manifest["default"]) == ("logits", "msp")
    assert {slice for metric, slice, _ in rows if metric == "auroc"} == {"msp", "energy", "max_logit"}


def test_the_id_classes_are_those_of_the_label_space(made):
    """ID is a part of the base space: its classes alone are scored, and other images of the set are not ID."""
    folder, cosines, labels = made
    part = {"name": "part", "base": "base", "classes": ["d", "ab"], "pool": "max", "members": [[3], [0, 1]]}
    io.write_json(folder / "space.json", part)
    features = io.load_array(folder / "val.npy", mmap=False)
    write(folder, "val", features, np.array([1, 1, -1, 0])[labels])
    manifest, rows = run(folder)
    assert manifest["reference_measured"] == (labels != 2).sum()
    scores = [c[:, [3, 0, 1]].max(axis=1) for c in (cosines["val"][labels != 2], cosines["far"])]
    expected = metrics.roc_auc_score(np.repeat([1, 0], [len(s) for s in scores]), np.concatenate(scores))
    assert rows["auroc", "max_logit", "id_positive"]["value"] == pytest.approx(expected, abs=1e-3)


def test_masked_images_of_both_sets_are_left_out(made):
    folder, _, _ = made
    for name, masked in (("val", ["val/001", "val/002"]), ("far", ["far/007"])):
        io.write_json(folder / f"{name}.json", {**io.read_json(folder / f"{name}.json"), "masked": masked})
    manifest, rows = run(folder)
    assert (manifest["masked"], manifest["measured"], manifest["reference_measured"]) == (1, 59, 88)
    assert rows["auroc", "msp", "id_positive"]["n"] == 147


def test_sets_that_cannot_be_compared_are_refused(made):
    folder, _, labels = made
    good = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fails(message, **options):
        with pytest.raises(InputError, match=message):
            run(folder, **options)
        for name, content in good.items():
            (folder / name).write_bytes(content)

    fails(r"val\.parquet: row 0: label 0; expected -1", of=("val", "far"))
    fails(r"far\.npy: holds features and needs a head", head=None)
    manifest, features = io.read_json(folder / "val.json"), io.load_array(folder / "val.npy", mmap=False)
    io.write_json(folder / "val.json", {**manifest, "model": "other"})
    fails(r"val\.npy: of model 'other', expected 'tiny'")
    write(folder, "val", features, np.full(90, -1))
    fails(r"val\.parquet: no image to score")
    masked = {"masked": [f"far/{i:03d}" for i in range(60)]}
    io.write_json(folder / "far.json", {**io.read_json(folder / "far.json"), **masked})
    fails(r"far\.parquet: no image to score")
    features[50, 3] = np.nan
    write(folder, "val", features, labels)
    fails(r"val\.npy: row 50: a value is NaN")
    io.write_json(folder / "val.json", {**manifest, "ids_sha256": "0" * 64})
    fails(r"val\.npy: made from other images")
