"""Attacks on a model: rows by hand and by simulation, faults that must not count as robustness, and refusals."""

import numpy as np
import pytest
import scipy.stats

from clip_robustness.core import io, statistics
from clip_robustness.core.io import InputError
from clip_robustness.metrics.adversarial import UNION, measure_adversarial, median_interval
from clip_robustness.metrics.gather import gather

N = 40
BUDGETS = (0.5, 1.0, 2.0, 8.0)


def write(folder, name, distance, fault=None, clean=None, facts=None, label=None):
    """One attack's files; a distance in 255ths, as float32 like the attacks write it."""
    n = len(distance)
    label = np.arange(n, dtype=np.int32) % 5 if label is None else label
    distance = (np.asarray(distance, float) / 255).astype(np.float32)
    ids = np.array([f"im{i:03d}" for i in range(n)], object)
    clean = np.where(distance > 0, label, label + 1).astype(np.int32) if clean is None else clean
    fault = np.zeros(n, np.int8) if fault is None else np.asarray(fault, np.int8)
    columns = {"image_id": ids, "label": label, "clean": clean, "distance": distance, "fault": fault}
    path = folder / f"{name}.parquet"
    io.write_parquet(path, {**columns, "prediction": clean, "queries": np.arange(n)})
    manifest = {
        "model": "tiny", "dataset": "val", "attack": name, "norm": "linf", "eps_space": "pixel", "n": n,
        "budgets": [b / 255 for b in BUDGETS], "reported": 2 / 255, "ids_sha256": io.ids_digest(ids),
    }  # fmt: skip
    io.write_json(path.with_suffix(".json"), {**manifest, **(facts or {})})
    return path


def measured(folder, *paths):
    measure_adversarial(list(paths), folder / "out.json")
    content = io.read_json(folder / "out.json")
    assert all((r["model"], r["dataset"], r["source"]) == ("tiny", "val", "measured") for r in content["rows"])
    return {(r["metric"], r["slice"]): r for r in content["rows"]}, content["manifest"]


@pytest.fixture
def distances():
    rng = np.random.default_rng(0)
    distance = np.round(rng.exponential(2, N), 3)
    distance[rng.random(N) < 0.2] = 0
    distance[rng.random(N) < 0.1] = np.inf
    return distance


def test_rows_are_those_of_a_loop_over_images(tmp_path, distances):
    rows, manifest = measured(tmp_path, write(tmp_path, "bim", distances))
    for budget in BUDGETS:
        robust = sum(1 for d in distances if d > budget)
        row = rows["accuracy_at", f"bim:{budget:g}"]
        assert (row["value"], row["n"], row["convention"]) == (robust / N, N, "linf")
        interval = scipy.stats.binomtest(robust, N).proportion_ci(method="exact")
        assert (row["low"], row["high"]) == pytest.approx(tuple(interval))
    reported = rows["accuracy", "bim"]
    assert reported["value"] == rows["accuracy_at", "bim:2"]["value"]
    assert reported["convention"] == "linf_2"
    assert rows["clean_accuracy", ""]["value"] == np.mean(distances > 0)
    assert rows["faults", "bim"]["value"] == 0
    assert rows["median_distance", "bim"]["value"] == pytest.approx(np.median(distances) / 255)
    assert len(rows) == len(BUDGETS) + 4
    assert manifest["attacks"] == {"bim": {"faults": {}, "mean_queries": (N - 1) / 2}}


def test_accuracy_never_rises_with_the_budget(tmp_path, distances):
    rows, _ = measured(tmp_path, write(tmp_path, "bim", distances))
    values = [rows["clean_accuracy", ""]["value"], *(rows["accuracy_at", f"bim:{b:g}"]["value"] for b in BUDGETS)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1]


def test_a_distance_of_exactly_the_budget_is_within_it(tmp_path):
    budgets = [float(b) for b in range(1, 9)]
    above = [b for b in budgets if float(np.float32(b / 255)) > b / 255]
    assert above  # a comparison without slack would call these images robust
    rows, _ = measured(tmp_path, write(tmp_path, "fgsm", budgets, facts={"budgets": [b / 255 for b in budgets]}))
    assert [rows["accuracy_at", f"fgsm:{b:g}"]["value"] for b in budgets] == [(8 - b) / 8 for b in budgets]


def test_an_image_with_a_fault_is_no_robust_image(tmp_path):
    distance = [0, 1, 4, np.inf, np.inf, np.inf, 1, 0]
    fault = [0, 0, 0, 0, 1, 2, 1, 1]
    rows, manifest = measured(tmp_path, write(tmp_path, "bim", distance, fault))
    assert (rows["faults", "bim"]["value"], rows["faults", "bim"]["n"]) == (0.5, 8)
    assert (rows["accuracy", "bim"]["value"], rows["accuracy", "bim"]["n"]) == (0.5, 4)
    assert rows["median_distance", "bim"]["n"] == 4
    assert rows["clean_accuracy", ""]["n"] == 8
    assert manifest["attacks"]["bim"]["faults"] == {"zero_gradient": 3, "not_finite": 1}


def test_a_model_without_a_gradient_has_no_accuracy(tmp_path):
    rows, _ = measured(tmp_path, write(tmp_path, "bim", [np.inf] * 6, [1] * 6))
    assert set(rows) == {("clean_accuracy", ""), ("faults", "bim")}
    assert rows["faults", "bim"]["value"] == 1


def test_the_worst_case_counts_an_image_that_one_attack_broke(tmp_path):
    paths = [
        write(tmp_path, "bim", [1, 4, np.inf, np.inf, 4], [0, 0, 1, 1, 0]),
        write(tmp_path, "deepfool", [4, 1, 1, 4, 4]),
        write(tmp_path, "nes", [0.5] * 5),  # no white-box attack
    ]
    rows, manifest = measured(tmp_path, *paths)
    # Broken: 0 by BIM; 1 and 2 by DeepFool. 3: a fault that nobody broke. 4: survives both.
    assert (rows["accuracy", UNION]["value"], rows["accuracy", UNION]["n"]) == (0.25, 4)
    assert rows["accuracy", UNION]["value"] <= min(rows["accuracy", name]["value"] for name in ("bim", "deepfool"))
    assert manifest[UNION] == ["bim", "deepfool"]


def test_no_worst_case_over_different_budgets(tmp_path):
    paths = [write(tmp_path, "bim", [1] * 5), write(tmp_path, "mim", [1] * 5, facts={"reported": 1 / 255})]
    rows, manifest = measured(tmp_path, *paths)
    assert ("accuracy", UNION) not in rows and manifest[UNION] == []
    assert ("accuracy", UNION) not in measured(tmp_path, paths[0])[0]


def test_a_median_beyond_the_largest_budget_is_censored(tmp_path):
    distance = [0, 1, 2, 3, 4, 9, 9, 9, np.inf, np.inf, np.inf, np.inf]  # the attack may find more than it was asked
    rows, _ = measured(tmp_path, write(tmp_path, "deepfool", distance))
    row = rows["median_distance", "deepfool"]
    assert (row["value"], row["high"], row["convention"]) == (8 / 255, 8 / 255, "linf_censored")
    assert row["low"] == pytest.approx(2 / 255)  # the third smallest of twelve
    rows, _ = measured(tmp_path, write(tmp_path, "deepfool", distance[:9]))
    assert rows["median_distance", "deepfool"]["convention"] == "linf"


def test_an_l2_attack_in_normalised_pixels_says_so(tmp_path):
    facts = {"norm": "l2", "eps_space": "normalized", "budgets": [0.1, 0.5], "reported": 0.5}
    rows, _ = measured(tmp_path, write(tmp_path, "pgd", [0.2 * 255, 0.7 * 255], facts=facts))
    assert rows["accuracy_at", "pgd:0.1"]["value"] == 1
    assert rows["accuracy", "pgd"]["value"] == 0.5
    conventions = {(metric, slice): row["convention"] for (metric, slice), row in rows.items()}
    assert conventions["accuracy", "pgd"] == "l2_normalized_0.5"
    assert conventions["accuracy_at", "pgd:0.5"] == "l2_normalized"


@pytest.mark.parametrize("n", [6, 7, 25, 200, 2001])
def test_the_interval_of_a_median_is_that_of_scipys_quantile_test(n):
    values = np.random.default_rng(n).lognormal(size=n)
    expected = scipy.stats.quantile_test(values, p=0.5).confidence_interval(0.95)
    assert median_interval(values) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_few_values_have_no_interval_of_the_median(tmp_path):
    assert median_interval([1, 2, 3, 4, 5]) == median_interval([]) == (-np.inf, np.inf)
    rows, _ = measured(tmp_path, write(tmp_path, "bim", [1, 1, 1]))
    row = rows["median_distance", "bim"]
    assert (row["low"], row["value"], row["high"]) == (0, pytest.approx(1 / 255), 8 / 255)


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    rng = np.random.default_rng(1)
    limits = np.array([median_interval(rng.exponential(size=30)) for _ in range(2000)])
    inside = int(np.sum((limits[:, 0] <= np.log(2)) & (limits[:, 1] >= np.log(2))))
    low, high = statistics.clopper_pearson(inside, 2000, 0.999)
    exact = 1 - 2 * scipy.stats.binom.cdf(9, 30, 0.5)
    assert low < exact < high and exact == pytest.approx(0.9572, abs=1e-4)


def test_several_attacks_make_one_table(tmp_path, distances):
    paths = [write(tmp_path, name, distances) for name in ("spsa", "bim", "fgsm")]
    (tmp_path / "tiny").mkdir()
    measure_adversarial(paths, tmp_path / "tiny" / "val.json")
    gather("mini", [tmp_path / "tiny" / "val.json"], tmp_path / "table.parquet")
    table = io.read_parquet(tmp_path / "table.parquet")
    assert set(table["slice"][table["metric"] == "accuracy"]) == {"bim", "fgsm", "spsa", UNION}
    again = tmp_path / "again.json"
    measure_adversarial(paths[::-1], again)
    assert again.read_bytes() == (tmp_path / "tiny" / "val.json").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"facts": {"model": "other"}}, "model 'other', but .* has 'tiny'"),
        ({"facts": {"dataset": "cifar10"}}, "dataset 'cifar10', but .* has 'val'"),
        ({"facts": {"attack": "bim"}}, "attack 'bim' a second time"),
        ({"facts": {"ids_sha256": "0" * 64}}, "not the images that mim.json lists"),
        ({"facts": {"budgets": [2, 1]}}, "budgets .2, 1., expected positive numbers that ascend"),
        ({"label": np.full(4, 3, np.int32)}, "labels differ"),
        ({"distance": [1, np.nan, 1, 1]}, "image 'im001': expected distance a number"),
        ({"distance": [1, -1, 1, 1]}, "image 'im001': expected distance a number"),
        ({"fault": [0, 0, 3, 0]}, "image 'im002': expected fault one of 0, 1, 2"),
        ({"clean": np.array([0, 1, 2, 9], np.int32)}, "image 'im003': expected distance 0 where the answer is wrong"),
        ({"distance": [1, 1, 1]}, "ids_sha256"),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path, change, message):
    one = write(tmp_path, "bim", [1, 2, 3, 4])
    other = write(tmp_path, "mim", **{"distance": [1, 2, 3, 4], **change})
    with pytest.raises(InputError, match=message):
        measure_adversarial([one, other], tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()


def test_missing_parts_are_named(tmp_path):
    path = write(tmp_path, "bim", [1, 2])
    table = io.read_parquet(path)
    with pytest.raises(InputError, match="no attack given"):
        measure_adversarial([], tmp_path / "out.json")
    io.write_parquet(path, {name: column for name, column in table.items() if name != "fault"})
    with pytest.raises(InputError, match=r"bim.parquet: no 'fault' in it"):
        measure_adversarial([path], tmp_path / "out.json")
    path.with_suffix(".json").unlink()
    with pytest.raises(InputError, match=r"bim.json: no such file"):
        measure_adversarial([path], tmp_path / "out.json")
