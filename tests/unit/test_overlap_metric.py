"""Overlap: the threshold and the three accuracies against brute force and scipy's own test; and what is refused."""

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from clip_robustness.core import io, statistics
from clip_robustness.core.io import InputError
from clip_robustness.metrics import overlap
from clip_robustness.metrics.gather import gather

DETECTOR = {"weights": {"model.safetensors": "a" * 64}, "preprocess": "resize(32)"}


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def write(folder, name, rows, columns=None, **facts):
    ids = [f"{name}/{i}" for i in range(len(rows))]
    path = folder / f"{name}.npy"
    io.save_array(path, np.asarray(rows, np.float16))
    manifest = {"model": "detector", "dataset": name, "kind": "features", "n": len(rows), "dim": rows.shape[1]}
    io.write_json(path.with_suffix(".json"), manifest | DETECTOR | {"ids_sha256": io.ids_digest(ids)} | facts)
    io.write_parquet(path.with_suffix(".parquet"), {"image_id": ids} | (columns or {}))
    return path


def planted(folder, sources=400, noise=(0.2, 0.9), **facts):
    """Sources, and two copies of each: a faithful one and one so noisy that some are lost."""
    rng = np.random.default_rng(0)
    rows = unit(rng.normal(size=(sources, 24)))
    copies = unit(np.concatenate([rows + level * unit(rng.normal(size=rows.shape)) for level in noise]))
    columns = {
        "source": [f"sources/{i}" for i in range(sources)] * len(noise),
        "transform": np.repeat(["faithful", "noisy"], sources).tolist(),
    }
    return write(folder, "copies", copies, columns, **facts), write(folder, "sources", rows)


def choose(copies, sources, out, **options):
    overlap.choose_threshold(copies, copies.with_suffix(".parquet"), sources, sources.with_suffix(".parquet"), out,
                             **options)  # fmt: skip
    content = json.loads(out.read_text())
    return content, {(row["metric"], row["slice"]): row for row in content["rows"]}


@pytest.mark.parametrize("rate", [0, 0.001, 0.03, 0.2, 0.25, 0.999])
@pytest.mark.parametrize("n", [1, 2, 40, 997])
def test_the_threshold_is_the_smallest_that_keeps_the_rate(rate, n):
    others = np.random.default_rng(n).integers(0, 60, n).astype(np.float32) / 100  # with many ties
    threshold = np.float32(overlap.smallest_threshold(others, rate))
    assert np.mean(others >= threshold) <= rate
    below = np.nextafter(threshold, np.float32(-2))
    assert np.mean(others >= below) > rate


def test_pairs_are_those_of_brute_force(monkeypatch):
    rng = np.random.default_rng(1)
    sources, source = unit(rng.normal(size=(30, 8))).astype(np.float32), rng.integers(0, 30, 70)
    copies = unit(sources[source] + 0.5 * rng.normal(size=(70, 8))).astype(np.float32)
    expected = []
    for copy, own in zip(copies, source, strict=True):
        cosines = [float(copy @ row) for row in sources]
        expected.append((cosines.pop(own), max(cosines)))
    for block in (1024, 16):
        monkeypatch.setattr(overlap, "COPIES", block)
        np.testing.assert_allclose(np.column_stack(overlap.similar_pairs(copies, sources, source)), expected, atol=1e-6)


def test_rates_are_of_the_half_that_chose_nothing(tmp_path):
    copies, sources = planted(tmp_path)
    content, rows = choose(copies, sources, tmp_path / "threshold.json", false_positives=0.02)
    threshold = content["manifest"]["threshold"]
    half = np.sort(np.array_split(np.random.default_rng(0).permutation(400), 2)[1])
    features = [np.load(path).astype(float) for path in (copies, sources)]
    cosines = unit(features[0]) @ unit(features[1])[half].T
    own = np.tile(np.arange(400), 2)[:, None] == half
    mine = own.any(axis=1)
    positive = cosines[mine][own[mine]]
    negative = np.where(own[mine], -1, cosines[mine]).max(axis=1)
    assert len(positive) == 400
    hit, false = positive >= threshold, negative >= threshold
    noisy = (np.arange(800) >= 400)[mine]
    assert 0 < hit[noisy].mean() < 1 == hit[~noisy].mean()  # a case that can tell right from wrong
    for key, value in {
        ("recall", ""): hit.mean(), ("recall", "noisy"): hit[noisy].mean(), ("recall", "faithful"): 1,
        ("false_positive_rate", ""): false.mean(), ("precision", ""): hit.sum() / (hit.sum() + false.sum()),
    }.items():  # fmt: skip
        assert rows[key]["value"] == pytest.approx(value), key
        assert rows[key]["low"] <= value <= rows[key]["high"]
    assert rows["recall", ""]["n"] == 400 and rows["recall", "noisy"]["n"] == 200
    # Two copies of a source count once in the interval.
    low, high = statistics.clopper_pearson(hit.mean() * 200, 200)
    assert (rows["recall", ""]["low"], rows["recall", ""]["high"]) == (pytest.approx(low), pytest.approx(high))
    assert rows["threshold", ""]["n"] == 400 and rows["threshold", ""]["convention"] == "false_positives_0.02"
    assert content["manifest"]["references"] == 200


def test_the_other_half_does_not_move_the_threshold(tmp_path):
    copies, sources = planted(tmp_path)
    before, _ = choose(copies, sources, tmp_path / "threshold.json")
    half = np.array_split(np.random.default_rng(0).permutation(400), 2)[1]
    rows = np.load(sources)
    rows[half] = unit(np.random.default_rng(9).normal(size=(200, 24)))
    sources = write(tmp_path, "sources", rows)
    after, _ = choose(copies, sources, tmp_path / "threshold.json")
    assert after["manifest"]["threshold"] == before["manifest"]["threshold"]
    assert after["rows"][1:] != before["rows"][1:]


def test_images_that_could_not_be_read_take_no_part(tmp_path):
    copies, sources = planted(tmp_path, masked=[f"copies/{i}" for i in range(400, 800)])
    _, rows = choose(copies, sources, tmp_path / "threshold.json")
    assert ("recall", "noisy") not in rows and rows["recall", ""]["n"] == 200


def test_thresholds_that_cannot_be(tmp_path):
    copies, sources = planted(tmp_path)
    out = tmp_path / "threshold.json"
    with pytest.raises(InputError, match="false_positives is 1"):
        choose(copies, sources, out, false_positives=1)
    other = write(tmp_path, "others", np.load(sources))
    with pytest.raises(InputError, match="source 'sources/0' is no image of"):
        choose(copies, other, out)
    other = write(tmp_path, "sources", np.load(sources), preprocess="resize(64)")
    with pytest.raises(InputError, match="'preprocess' differs"):
        choose(copies, other, out)
    with pytest.raises(InputError, match="fewer than two sources"):
        choose(*planted(tmp_path, sources=3), out)
    same = np.ones((40, 24)) / 24**0.5  # a detector to which all images look the same
    copies = write(tmp_path, "copies", same, {"source": [f"sources/{i}" for i in range(40)], "transform": ["x"] * 40})
    with pytest.raises(InputError, match="no copy is as similar to its source"):
        choose(copies, write(tmp_path, "sources", same), out)
    assert not out.exists()


@pytest.mark.parametrize("seed", range(40))
def test_p_is_that_of_scipy(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 400))
    k, p0 = int(rng.integers(0, n + 1)), float(rng.choice([0, 1, rng.random(), rng.random() ** 8]))
    expected = binomtest(k, n, p0, alternative="greater").pvalue
    assert overlap.binomial_p(k, n, p0) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_accuracies_gain_and_p():
    rng = np.random.default_rng(2)
    shared = rng.random(2000) < 0.1
    correct = rng.random(2000) < np.where(shared, 0.8, 0.6)
    rows = {(r["metric"], r["slice"] or r["convention"]): r for r in overlap.overlap_rows(correct, shared, tests=12)}
    for name, some in (("all", slice(None)), ("clean", ~shared), ("overlap", shared)):
        found = rows["accuracy", name]
        assert (found["value"], found["n"]) == (correct[some].mean(), len(correct[some]))
        assert (found["low"], found["high"]) == tuple(statistics.clopper_pearson(correct[some].sum(), found["n"]))
    plain = {metric: found for (metric, _), found in rows.items()}
    assert plain["overlap_share"]["value"] == shared.mean() and plain["overlap_share"]["n"] == 2000
    assert plain["gain"]["value"] == pytest.approx(correct.mean() - correct[~shared].mean(), abs=1e-12)
    difference = correct[shared].mean() - correct[~shared].mean()
    assert plain["accuracy_difference"]["value"] == pytest.approx(difference)
    p = binomtest(int(correct[shared].sum()), int(shared.sum()), correct[~shared].mean(), alternative="greater").pvalue
    assert rows["binomial_p", "one_sided"]["value"] == pytest.approx(p)
    assert rows["binomial_p", "one_sided_bonferroni_12"]["value"] == pytest.approx(min(1, 12 * p))
    assert p < 1e-5


def test_the_interval_of_the_gain_is_near_that_of_a_bootstrap_over_images():
    """Given the share, which the parametric bootstrap holds: images are drawn within clean and within overlap."""
    rng = np.random.default_rng(3)
    shared = np.arange(3000) < 600
    correct = rng.random(3000) < np.where(shared, 0.75, 0.6)
    row = next(r for r in overlap.overlap_rows(correct, shared) if r["metric"] == "gain")
    sums = [statistics.bootstrap_sums(correct[some], 4000, seed=7)[:, 0] / some.sum() for some in (shared, ~shared)]
    low, high = statistics.percentile_interval(0.2 * (sums[0] - sums[1]))
    assert (row["low"], row["high"]) == (pytest.approx(low, abs=1e-3), pytest.approx(high, abs=1e-3))


def test_a_few_overlapping_images_that_are_all_right_leave_doubt():
    shared = np.arange(500) < 3
    correct = shared | (np.arange(500) % 10 < 9)
    gain = next(r for r in overlap.overlap_rows(correct, shared) if r["metric"] == "gain")
    assert gain["low"] < 0 < gain["value"] <= gain["high"]


def test_no_overlap_and_nothing_but_overlap():
    correct = np.arange(50) % 3 > 0
    none = {(r["metric"], r["slice"]): r for r in overlap.overlap_rows(correct, np.zeros(50, bool))}
    assert set(none) == {("accuracy", "all"), ("accuracy", "clean"), ("overlap_share", ""), ("gain", "")}
    assert [none["gain", ""][name] for name in ("value", "low", "high")] == [0, 0, 0]
    assert none["overlap_share", ""]["value"] == 0 < none["overlap_share", ""]["high"]
    every = {(r["metric"], r["slice"]): r for r in overlap.overlap_rows(correct, np.ones(50, bool))}
    assert set(every) == {("accuracy", "all"), ("accuracy", "overlap"), ("overlap_share", "")}


def files(folder, similarity, **facts):
    """Predictions and matches of ten images, of which the last has no label, and a threshold of 0.5."""
    ids = [f"test/{i}" for i in range(10)]
    predictions, matches = folder / "predictions.parquet", folder / "matches.parquet"
    label, answer = (
        np.array([1, 1, 1, 1, 1, 1, 1, 1, 1, -1], np.int32),
        np.array([1, 1, 1, 0, 0, 0, 1, 1, 1, 0], np.int32),
    )
    io.write_parquet(predictions, {"image_id": ids, "label": label, "prediction": answer})
    backwards = {"image_id": ids[::-1], "similarity": np.array(similarity, np.float32)[::-1]}
    io.write_parquet(matches, backwards)
    io.write_json(matches.with_suffix(".json"), {"model": "detector", "dataset": "test", "ids_sha256": "x",
                                                 "references": {"corpus": 70}} | DETECTOR | facts)  # fmt: skip
    io.write_json(folder / "threshold.json", {"manifest": {"model": "detector", "threshold": 0.5} | DETECTOR})
    return predictions, matches, folder / "threshold.json", folder / "clip" / "test.json"


def test_the_verb_joins_by_image(tmp_path):
    paths = files(tmp_path, [0.5, 0.9, 0.1, 0.6, 0.49, 0, 0, 0, 0, 1])
    overlap.measure_overlap(*paths, tests=3)
    gather("test", [paths[-1]], tmp_path / "table.parquet")
    table = io.read_parquet(tmp_path / "table.parquet")
    rows = {key: row for *key, row in zip(table["metric"], table["slice"], range(len(table["n"])), strict=True)
            for key in [tuple(key)]}  # fmt: skip
    assert table["value"][rows["overlap_share", ""]] == pytest.approx(3 / 9)
    assert table["value"][rows["accuracy", "overlap"]] == pytest.approx(2 / 3)
    assert table["value"][rows["accuracy", "clean"]] == pytest.approx(4 / 6)
    assert table["value"][rows["gain", ""]] == pytest.approx(0, abs=1e-12)
    assert set(table["model"]) == {"clip"} and set(table["dataset"]) == {"test"}
    assert set(table["convention"]) == {"detected", "one_sided", "one_sided_bonferroni_3"}


def test_planted_copies_give_recall_and_precision_of_the_search(tmp_path):
    paths = files(tmp_path, [0.6, 0.9, 0.1, 0.6, 0, 0, 0, 0, 0, 0])
    copies = tmp_path / "copies.parquet"
    io.write_parquet(copies, {"source": ["test/0", "test/0", "test/1", "test/2", "test/9"]})
    overlap.measure_overlap(*paths, control="planted", copies_index=copies)
    rows = {row["metric"]: row for row in io.read_json(paths[-1])["rows"]}
    assert (rows["detected_recall"]["value"], rows["detected_recall"]["n"]) == (2 / 3, 3)
    assert (rows["detected_precision"]["value"], rows["detected_precision"]["n"]) == (2 / 3, 3)
    assert rows["overlap_share"]["convention"] == "planted"


def test_what_the_verb_refuses(tmp_path):
    paths = files(tmp_path, np.zeros(10))
    with pytest.raises(InputError, match="control is 'other'"):
        overlap.measure_overlap(*paths, control="other")
    with pytest.raises(InputError, match="planted with copies_index"):
        overlap.measure_overlap(*paths, control="disjoint", copies_index=tmp_path)
    with pytest.raises(InputError, match="tests is 0"):
        overlap.measure_overlap(*paths, tests=0)
    io.write_parquet(paths[1], {"image_id": ["test/0"], "similarity": np.ones(1, np.float32)})
    with pytest.raises(InputError, match=r"no match for 8 images of .*such as 'test/1'"):
        overlap.measure_overlap(*paths)
    paths = files(tmp_path, np.zeros(10), weights={})
    with pytest.raises(InputError, match=r"matches.parquet: 'weights' differs"):
        overlap.measure_overlap(*paths)
    paths = files(tmp_path, np.zeros(10))
    io.write_parquet(paths[0], {"image_id": ["test/0"], "label": [-1], "prediction": [0]})
    with pytest.raises(InputError, match="no image has a label"):
        overlap.measure_overlap(*paths)
    assert not paths[-1].exists()
