"""Accuracy under corruptions, measured against brute force; the table of synthetic shifts against published numbers."""

from pathlib import Path

import numpy as np
import pytest

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.statistics import clopper_pearson
from clip_robustness.data.published import import_published
from clip_robustness.metrics.corruption import (
    ALEXNET,
    ALEXNET_CLEAN,
    corruption_rows,
    measure_corruption,
    summarise_corruptions,
)
from clip_robustness.metrics.gather import gather, write_table

ROOT = Path(__file__).parents[2]
CLASSES, PHOTOGRAPHS = 5, 120


def build(folder, corruptions=("blur", "fog", "snow"), severities=(1, 3, 5), ids="{c}/{s}/{i:04d}", masked=(), seed=0):
    """Embeddings, index and labels of photographs whose accuracy falls with severity, and what is right."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, CLASSES, PHOTOGRAPHS).astype(np.int32)
    hard = rng.normal(size=PHOTOGRAPHS)  # what makes the settings of a photograph alike
    rows, logits, right = [], [], []
    for k, c in enumerate(corruptions):
        for s in severities:
            ok = hard + 0.5 * rng.normal(size=PHOTOGRAPHS) > 0.3 * s + 0.2 * k - 1
            answer = np.where(ok, label, (label + 1) % CLASSES)
            rows += [(ids.format(c=c, s=s, i=i), c, s, label[i]) for i in range(PHOTOGRAPHS)]
            logits.append(np.eye(CLASSES)[answer] - 0.5)
            right.append(ok)
    order = rng.permutation(len(rows))
    names = ("image_id", "corruption", "severity", "label")
    columns = {name: [rows[i][k] for i in order] for k, name in enumerate(names)}
    columns["label"] = np.array(columns["label"], np.int32)
    io.write_parquet(folder / "index.parquet", columns)
    classes = [f"class {k}" for k in range(CLASSES)]
    members = [[k] for k in range(CLASSES)]
    io.write_json(folder / "s.json", {"name": "s", "base": None, "pool": "max", "classes": classes, "members": members})
    io.save_array(folder / "e.npy", np.concatenate(logits)[order].astype(np.float16))
    facts = {"model": "m", "dataset": "some_c", "kind": "logits", "n": len(rows), "dim": CLASSES}
    digest = io.ids_digest(columns["image_id"])
    io.write_json(folder / "e.json", facts | {"ids_sha256": digest, "masked": list(masked)})
    right = {
        (c, s): right[k * len(severities) + j] for k, c in enumerate(corruptions) for j, s in enumerate(severities)
    }
    return (folder / "e.npy", folder / "index.parquet", folder / "s.json"), right


def measure(folder, files, **more):
    measure_corruption(*files, folder / "out.json", **more)
    content = io.read_json(folder / "out.json")
    return {row["slice"]: row for row in content["rows"]}, content["manifest"]


def test_is_brute_force(tmp_path):
    files, right = build(tmp_path)
    rows, manifest = measure(tmp_path, files)
    assert manifest["resampled"] == "photographs" and set(rows) == {
        "", "blur", "fog", "snow", *(f"{c}:{s}" for c, s in right)
    }  # fmt: skip
    for (c, s), ok in right.items():
        row = rows[f"{c}:{s}"]
        assert (row["value"], row["n"], row["convention"]) == (pytest.approx(ok.mean()), PHOTOGRAPHS, "5_way")
        assert [row["low"], row["high"]] == pytest.approx([float(v) for v in clopper_pearson(ok.sum(), PHOTOGRAPHS)])
    means = {c: np.mean([ok for (name, _), ok in right.items() if name == c], axis=0) for c in ("blur", "fog", "snow")}
    means[""] = np.mean(list(means.values()), axis=0)
    for text, mean in means.items():
        assert rows[text]["value"] == pytest.approx(mean.mean()) and rows[text]["n"] == PHOTOGRAPHS
        # All settings show the same photographs, so that their errors go together.
        width = (rows[text]["high"] - rows[text]["low"]) / 3.92
        assert width == pytest.approx(mean.std() / PHOTOGRAPHS**0.5, rel=0.1)


def test_images_that_do_not_match_are_resampled_by_setting(tmp_path):
    files, right = build(tmp_path, ids="{c}-{s}-{i}")
    rows, manifest = measure(tmp_path, files)
    assert manifest["resampled"] == "images" and rows[""]["n"] == 9 * PHOTOGRAPHS
    assert rows["fog"]["n"] == 3 * PHOTOGRAPHS
    p = np.array([ok.mean() for ok in right.values()])
    assert rows[""]["value"] == pytest.approx(p.mean())
    error = np.sqrt((p * (1 - p) / PHOTOGRAPHS).sum()) / len(p)
    assert (rows[""]["high"] - rows[""]["low"]) / 3.92 == pytest.approx(error, rel=0.1)


def test_severities_count_alike_and_so_do_corruptions(tmp_path):
    """However many images or severities there are of each."""
    corruption = np.array(["fog"] * 12 + ["snow"] * 4)
    severity = np.array([1] * 10 + [2] * 2 + [1] * 4)
    correct = np.array([True] * 10 + [False] * 2 + [False] * 4)
    rows = {row["slice"]: row for row in corruption_rows(correct, corruption, severity, None)}
    assert [rows[text]["value"] for text in ("fog:1", "fog:2", "fog", "snow", "")] == [1, 0, 0.5, 0, 0.25]
    assert rows["snow"]["high"] == pytest.approx(float(clopper_pearson(0, 4)[1]))


def test_masked_and_unlabelled_images_are_left_out(tmp_path):
    lost = ["fog/3/0000", "snow/1/0007"]
    files, right = build(tmp_path, masked=lost)
    right["fog", 3] = right["fog", 3][1:]
    right["snow", 1] = np.delete(right["snow", 1], 7)
    rows, manifest = measure(tmp_path, files)
    assert (manifest["masked"], manifest["measured"], manifest["resampled"]) == (2, 9 * PHOTOGRAPHS - 2, "photographs")
    for (c, s), ok in right.items():
        assert (rows[f"{c}:{s}"]["value"], rows[f"{c}:{s}"]["n"]) == (pytest.approx(ok.mean()), len(ok))
    table = io.read_parquet(files[1])
    io.write_parquet(files[1], table | {"label": np.full(len(table["label"]), -1, np.int32)})
    with pytest.raises(InputError, match="no image has a label"):
        measure(tmp_path, files)


def test_an_index_of_something_else_is_named(tmp_path):
    files, _ = build(tmp_path)
    table = io.read_parquet(files[1])
    del table["severity"]
    io.write_parquet(files[1], table)
    with pytest.raises(InputError, match="no column 'severity'"):
        measure(tmp_path, files)


def test_the_same_numbers_whatever_the_order_of_rows(tmp_path):
    one, two = [], []
    for seed, found in ((0, one), (1, two)):
        rng = np.random.default_rng(7)
        correct, name = rng.random(600) < 0.6, np.repeat(["a", "b", "c"], 200)
        level, photo = np.tile(np.repeat([1, 2], 100), 3), np.tile(np.arange(100), 6)
        order = np.random.default_rng(seed).permutation(600)
        found += corruption_rows(*(column[order] for column in (correct, name, level, photo)))
    assert one == two


# ---- The table of synthetic shifts ----


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Rows of the published study's table, by (model, data set, metric, slice)."""
    out = tmp_path_factory.mktemp("published")
    import_published(ROOT / "config" / "published", out, "published")
    shifts = ["stylized_imagenet", "imagenet_c", "imagenet_greyscale", "imagenet_pgd"]
    files = (out / "accuracy.parquet", out / "models.parquet", out / "synthetic.parquet")
    summarise_corruptions(*files, shifts, "imagenet_val", normaliser="testbed.alexnet", sources=["testbed"],
                          resamples=50)  # fmt: skip
    table = io.read_parquet(files[2])
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    return {(r["model"].removeprefix("testbed."), r["dataset"], r["metric"], r["slice"]): r for r in rows}


def test_published_mean_corruption_errors(published):
    """Relative to the testbed's own AlexNet: 76.51 and 70.84, computed without this project's code."""
    for model, value in (("resnet50", 0.7651), ("resnet101", 0.7084), ("alexnet", 1.0)):
        row = published[model, "imagenet_c", "mce", ""]
        assert row["value"] == pytest.approx(value, abs=6e-5) and row["low"] < row["value"] < row["high"]
        assert row["convention"] == "testbed.alexnet"
    assert published["alexnet", "imagenet_c", "relative_mce", ""]["value"] == pytest.approx(1)
    # Hendrycks and Dietterich 2019, table 2: 105.0, from the images as they are.
    assert published["resnet50", "imagenet_c", "relative_mce", ""]["value"] == pytest.approx(1.05, abs=0.05)


def test_published_severities_add_up(published):
    for model in ("resnet50", "alexnet"):
        levels = [published[model, "imagenet_c", "accuracy", f"severity:{s}"]["value"] for s in range(1, 6)]
        whole = published[model, "imagenet_c", "accuracy", ""]["value"]
        assert np.mean(levels) == pytest.approx(whole, abs=1e-5) and levels == sorted(levels, reverse=True)


def test_published_verdict_on_stylized_images_depends_on_the_measure(published):
    pairs = {"resnet50_clip_zeroshot": "resnet50", "vit_b_32_clip_zeroshot": "vit_base_patch32_384"}
    for (clip, other), kept, above in zip(
        pairs.items(), ((0.213, 0.269), (0.336, 0.416)), (0.0359, 0.1028), strict=True
    ):
        values = {
            metric: [published[model, "stylized_imagenet", metric, slice_]["value"] for model in (clip, other)]
            for metric, slice_ in (("accuracy", ""), ("retention", ""), ("effective_robustness", "val"))
        }
        assert values["accuracy"][0] < values["accuracy"][1]
        assert values["retention"] == pytest.approx(kept, abs=6e-4)
        assert values["effective_robustness"][0] == pytest.approx(above, abs=6e-5)
        assert values["effective_robustness"][0] > values["effective_robustness"][1]


def test_published_pgd_is_the_mean_of_its_settings(published):
    for model, four in (("resnet50", (11.42, 6.32, 55.79, 10.56)), ("alexnet", (20.05, 6.93, 51.08, 18.28))):
        assert published[model, "imagenet_pgd", "accuracy", ""]["value"] == pytest.approx(np.mean(four) / 100, abs=1e-4)
        assert published[model, "imagenet_pgd", "effective_robustness", "val"]["n"] == 50000


CORRUPTIONS = list(ALEXNET)


def study(folder, parts, errors, clean, adversarial=None):
    """Tables of a small study: `errors` of each model by corruption, in data sets that hold `parts` of them."""
    models = sorted(errors)
    columns = {"model": models, "group": ["standard"] * len(models)}
    write_table(folder / "models.parquet", columns)
    files = []
    for model in models:
        for dataset, names in ({"val": []} | parts).items():
            path = folder / "metrics" / model / f"{dataset}.json"
            slices = {"": clean[model]} if dataset == "val" else {"": 1 - np.mean([errors[model][c] for c in names])}
            for c in names:
                slices |= {c: 1 - errors[model][c], f"{c}:1": 1 - errors[model][c], f"{c}:5": 1 - errors[model][c]}
            io.write_json(path, {"rows": [_row(text, value) for text, value in slices.items()]})
            files.append(path)
    gather("test", files, folder / "accuracy.parquet")
    if adversarial:
        files = []
        for model, values in adversarial.items():
            files.append(folder / "adversarial" / model / "val.json")
            io.write_json(files[-1], {"rows": [_row(text, value) for text, value in values.items()]})
        gather("test", files, folder / "adversarial.parquet")
    return folder / "accuracy.parquet", folder / "models.parquet", folder / "synthetic.parquet"


def _row(text, value):
    limits = {"low": max(value - 0.02, 0), "high": min(value + 0.02, 1)}
    return {"metric": "accuracy", "slice": text, "value": value, **limits, "n": 500, "convention": "9_way"}


def summary(files, *arguments, **more):
    summarise_corruptions(*files, *arguments, resamples=50, **more)
    table = io.read_parquet(files[2])
    rows = [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]
    return {(r["model"], r["dataset"], r["metric"], r["slice"]): r for r in rows}


def test_four_archives_are_one_data_set(tmp_path):
    parts = {"c_noise": CORRUPTIONS[:3], "c_blur": CORRUPTIONS[3:7], "c_rest": CORRUPTIONS[7:]}
    rng = np.random.default_rng(0)
    errors = {f"m{k}": {c: rng.uniform(0.2, 0.9) for c in CORRUPTIONS} for k in range(5)} | {"alexnet": ALEXNET}
    clean = {model: 0.7 + 0.04 * k for k, model in enumerate(sorted(errors))} | {"alexnet": 1 - ALEXNET_CLEAN}
    files = study(tmp_path, parts, errors, clean)
    rows = summary(files, ["all_c=c_noise+c_blur+c_rest"], "val")
    for model, own in errors.items():
        whole = rows[model, "all_c", "accuracy", ""]
        assert whole["value"] == pytest.approx(1 - np.mean(list(own.values())))
        assert whole["high"] - whole["low"] == pytest.approx(0.04), "the same photographs: errors go together"
        assert rows[model, "all_c", "accuracy", "severity:5"]["value"] == pytest.approx(whole["value"])
        relative = rows[model, "all_c", "mce", ""]
        assert relative["value"] == pytest.approx(np.mean([own[c] / ALEXNET[c] for c in CORRUPTIONS]))
        assert relative["convention"] == "alexnet" and relative["low"] < relative["value"] < relative["high"]
        lost = [(own[c] - 1 + clean[model]) / (ALEXNET[c] - ALEXNET_CLEAN) for c in CORRUPTIONS]
        assert rows[model, "all_c", "relative_mce", ""]["value"] == pytest.approx(np.mean(lost))
        kept = rows[model, "all_c", "retention", ""]
        assert kept["value"] == pytest.approx(whole["value"] / clean[model]) and kept["low"] < kept["value"]
        assert ("m0", "all_c", "effective_robustness", "val") in rows
    assert rows["alexnet", "all_c", "mce", ""]["value"] == pytest.approx(1)
    assert {key[1] for key in rows} == {"all_c"}


def test_a_model_without_all_corruptions_has_no_mean(tmp_path):
    parts = {"c_noise": CORRUPTIONS[:3], "c_rest": CORRUPTIONS[3:]}
    errors = {model: dict.fromkeys(CORRUPTIONS, 0.5) for model in ("a", "b")}
    files = study(tmp_path, parts, errors, {"a": 0.8, "b": 0.9})
    table = io.read_parquet(files[0])
    kept = [not (m == "b" and d == "c_rest") for m, d in zip(table["model"], table["dataset"], strict=True)]
    io.write_parquet(files[0], {name: column[kept] for name, column in table.items()})
    rows = summary(files, ["all_c=c_noise+c_rest"], "val")
    assert ("a", "all_c", "mce", "") in rows and ("b", "all_c", "mce", "") not in rows
    assert ("b", "all_c", "accuracy", "") not in rows and ("b", "all_c", "accuracy", "shot_noise") in rows


def test_a_named_model_is_the_yardstick_of_other_corruptions(tmp_path):
    names = ["haze", "rain"]
    errors = {"a": {"haze": 0.2, "rain": 0.6}, "b": {"haze": 0.4, "rain": 0.4}, "c": {"haze": 0.3, "rain": 0.5}}
    files = study(tmp_path, {"mini_c": names}, errors, {"a": 0.9, "b": 0.8, "c": 0.85})
    rows = summary(files, ["mini_c"], "val", normaliser="b")
    assert rows["a", "mini_c", "mce", ""]["value"] == pytest.approx((0.2 / 0.4 + 0.6 / 0.4) / 2)
    assert rows["a", "mini_c", "relative_mce", ""]["value"] == pytest.approx((0.1 / 0.2 + 0.5 / 0.2) / 2)
    assert rows["b", "mini_c", "mce", ""]["value"] == pytest.approx(1)
    rows = summary(files, ["mini_c"], "val")
    assert not any(key[2] == "mce" for key in rows), "AlexNet's errors are of other corruptions"
    with pytest.raises(InputError, match="normaliser 'z'"):
        summary(files, ["mini_c"], "val", normaliser="z")
    with pytest.raises(InputError, match="no accuracy on none_c"):
        summary(files, ["mini_c", "none_c"], "val")


def test_no_relative_error_where_the_yardstick_loses_nothing(tmp_path, capsys):
    errors = {"a": {"haze": 0.3}, "b": {"haze": 0.1}, "c": {"haze": 0.2}}
    files = study(tmp_path, {"mini_c": ["haze"]}, errors, {"a": 0.8, "b": 0.8, "c": 0.7})
    rows = summary(files, ["mini_c"], "val", normaliser="b")
    assert ("a", "mini_c", "mce", "") in rows and ("a", "mini_c", "relative_mce", "") not in rows
    assert "no relative_mce" in capsys.readouterr().err


def test_attacks_are_a_shift_made_of_slices(tmp_path):
    attacked = {m: {"pgd_a": 0.1 * k + 0.1, "pgd_b": 0.2, "fgsm": 0.9} for k, m in enumerate("abcd")}
    errors = {m: {"haze": 0.3 + 0.1 * k} for k, m in enumerate("abcd")}
    clean = {m: 0.6 + 0.1 * k for k, m in enumerate("abcd")}
    files = study(tmp_path, {"mini_c": ["haze"]}, errors, clean, attacked)
    rows = summary(files, ["mini_pgd=val:pgd_a+val:pgd_b"], "val", adversarial=tmp_path / "adversarial.parquet")
    for k, model in enumerate("abcd"):
        whole = rows[model, "mini_pgd", "accuracy", ""]
        assert whole["value"] == pytest.approx((0.1 * k + 0.3) / 2)
        assert rows[model, "mini_pgd", "retention", "pgd_b"]["value"] == pytest.approx(0.2 / clean[model])
        assert (model, "mini_pgd", "effective_robustness", "val") in rows
    assert not any("fgsm" in key[3] or key[2] == "mce" for key in rows)
