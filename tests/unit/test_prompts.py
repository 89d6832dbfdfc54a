"""Prompt sets: measured as every head is, compared in pairs, and drawn."""

import numpy as np
import pandas as pd
import pytest

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.figures import prompts as figure_of_prompts
from clip_robustness.figures import style
from clip_robustness.metrics import accuracy, calibration, factors, ood, prompts
from clip_robustness.metrics.gather import gather

N, CLASSES, DIMENSIONS = 240, 6, 8
SIZES = (30, 1, 7)
FACTORS = ("pose", "texture")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An ID set `val` with factors, an OOD set, and heads that are noisier the fewer templates they average."""
    folder, rng = tmp_path_factory.mktemp("prompts"), np.random.default_rng(0)
    weight = np.linalg.qr(rng.normal(size=(DIMENSIONS, CLASSES)))[0].T
    labels = np.arange(N) % CLASSES
    ids = write(folder, "val", rng, weight[labels] + 0.35 * rng.normal(size=(N, DIMENSIONS)), labels)
    write(folder, "ood", rng, rng.normal(size=(N // 2, DIMENSIONS)), np.full(N // 2, -1))
    for size in SIZES:
        noisy = weight + rng.normal(size=weight.shape) / (6 * np.sqrt(size))
        noisy = (noisy / np.linalg.norm(noisy, axis=1, keepdims=True)).astype(np.float32)
        np.savez(folder / f"set_{size}.base.npz", weight=noisy, scale=np.float32(10), bias=np.float32(0))
    space = {"name": "base", "base": None, "classes": list("abcdef"), "members": [[i] for i in range(CLASSES)]}
    io.write_json(folder / "space.json", {**space, "pool": "max"})
    top = rng.choice(np.array([*FACTORS, "rare", ""], object), N, p=[0.4, 0.3, 0.02, 0.28])
    table = {"image_id": ids, "label": labels.astype(np.int32), "top_factor": top, "prototype": rng.random(N) < 0.1}
    io.write_parquet(folder / "factors.parquet", table | {factor: top == factor for factor in (*FACTORS, "rare")})
    return folder


def write(folder, name, rng, features, labels, **facts):
    features = (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float16)
    ids = np.array([f"{name}/{i:03d}" for i in range(len(labels))], object)
    io.save_array(folder / f"{name}.npy", features)
    manifest = {"model": "tiny", "kind": "features", "dataset": name, "n": len(ids), "dim": DIMENSIONS}
    io.write_json(folder / f"{name}.json", {**manifest, "ids_sha256": io.ids_digest(ids), **facts})
    io.write_parquet(folder / f"{name}.parquet", {"image_id": ids, "label": labels.astype(np.int32)})
    return ids


def of(folder, name):
    return folder / f"{name}.npy", folder / f"{name}.parquet", folder / "space.json"


def heads(folder):
    return [folder / f"set_{size}.base.npz" for size in SIZES]


def rows_of(path):
    return {(row["metric"], row["slice"], row["convention"]): row for row in io.read_json(path)["rows"]}


def measured(folder, name="val", **options):
    prompts.measure_prompts(*of(folder, name), heads(folder), folder / "p.json", **{"resamples": 200, **options})
    return rows_of(folder / "p.json")


def one(rows, metric, slice):
    (found,) = [row for (m, s, _), row in rows.items() if (m, s) == (metric, slice)]
    return found


def outside(folder):
    reference = {"reference_embeddings": folder / "val.npy", "reference_index": folder / "val.parquet"}
    return measured(folder, "ood", **reference)


def test_each_set_is_measured_as_by_the_metrics_of_its_head(made):
    rows = measured(made, held_out=1, factors=made / "factors.parquet", fewest=20)
    for size, head in zip(SIZES, heads(made), strict=True):
        name = f"set_{size}"
        accuracy.measure_accuracy(*of(made, "val"), made / "a.json", made / "a.parquet", head)
        expected = one(rows_of(made / "a.json"), "accuracy", "")
        assert one(rows, "accuracy", name) == {**expected, "slice": name}
        calibration.fit_temperature_file(*of(made, "val"), made / "t.json", head)
        calibration.measure_calibration(*of(made, "val"), made / "t.json", made / "c.json", head, held_out=1)
        for (metric, slice, convention), row in rows_of(made / "c.json").items():
            own = name + {"": "", "before": "", "after": ":after"}.get(slice, "no row")
            if "no row" not in own:
                assert rows[metric, own, convention]["value"] == pytest.approx(row["value"], rel=1e-6)
                assert rows[metric, own, convention]["n"] == row["n"]
        factors.measure_factors(made / "a.parquet", made / "factors.parquet", made / "f.json", fewest=20)
        for (metric, slice, convention), row in rows_of(made / "f.json").items():
            if metric == "factor_accuracy" and convention == "top":
                assert rows[metric, f"{name}:{slice}", "top"] == {**row, "slice": f"{name}:{slice}", **who(rows)}
        assert one(rows, "templates", name)["value"] == size


def who(rows):
    return {name: next(iter(rows.values()))[name] for name in ("model", "dataset")}


def test_ood_detection_is_that_of_mcm_with_each_head(made):
    rows = outside(made)
    for size, head in zip(SIZES, heads(made), strict=True):
        ood.measure_ood(*of(made, "ood"), made / "o.json", made / "val.npy", made / "val.parquet", head, resamples=200)
        expected = {key: row for key, row in rows_of(made / "o.json").items() if key[1] == "mcm_t1"}
        for (metric, _, convention), row in expected.items():
            if metric in prompts.OOD_METRICS:
                assert rows[metric, f"set_{size}", convention] == {**row, "slice": f"set_{size}"}
    assert {key[0] for key in rows} == {"auroc", "fpr95", "auroc_difference", "templates"}


def test_differences_are_to_the_largest_set(made):
    rows = measured(made, held_out=1, factors=made / "factors.parquet", fewest=20) | outside(made)
    differences = [key for key in rows if key[0].endswith("_difference")]
    assert {key[0].removesuffix("_difference") for key in differences} == {
        "accuracy", "factor_accuracy", "factor_gap", "auroc", *calibration.METRICS
    }  # fmt: skip
    for metric, slice, convention in differences:
        name, colon, detail = slice.partition(":")
        assert name in ("set_1", "set_7")
        own, largest = (
            rows[metric.removesuffix("_difference"), f"{s}{colon}{detail}", convention] for s in (name, "set_30")
        )
        row = rows[metric, slice, convention]
        assert row["value"] == pytest.approx(own["value"] - largest["value"], abs=1e-9)
        assert row["low"] <= row["value"] <= row["high"]
        # Pairs share their images, so that their difference is better known than by two separate intervals.
        assert row["high"] - row["low"] < own["high"] - own["low"] + largest["high"] - largest["low"]


def test_a_factor_gap_is_that_of_a_loop_and_its_interval_that_of_resampled_images():
    rng = np.random.default_rng(0)
    top = rng.choice(np.array(["pose", "texture", ""], object), 300)
    correct = {name: rng.random(300) < 0.9 - 0.2 * (top == "pose") for name in ("few_1", "many_9")}

    def gap(right, top):
        return np.mean([right[top == factor].mean() for factor in FACTORS]) - right.mean()

    draws = []
    for _ in range(400):
        chosen = rng.integers(0, 300, 300)
        draws.append(gap(correct["few_1"][chosen], top[chosen]) - gap(correct["many_9"][chosen], top[chosen]))
    gaps = prompts._gaps(correct, top, FACTORS, 0, 2000)
    assert gaps["few_1"][0] == pytest.approx(gap(correct["few_1"], top))
    difference = gaps["few_1"] - gaps["many_9"]
    assert difference[1:].std() == pytest.approx(np.std(draws), rel=0.15)


def test_the_auroc_difference_has_the_interval_of_resampled_images(made):
    rows, rng = outside(made), np.random.default_rng(0)
    z = {}
    for size in (1, 30):
        weight = np.load(made / f"set_{size}.base.npz")["weight"]
        z[size] = [
            ood.detection_scores(10 * io.load_array(made / f"{name}.npy").astype(np.float32) @ weight.T, 10)["mcm_t1"]
            for name in ("val", "ood")
        ]
    draws = []
    for _ in range(400):
        chosen = rng.integers(0, N, N), rng.integers(0, N // 2, N // 2)
        few, many = (ood.areas(*ood.count_scores(*(s[i] for s, i in zip(z[k], chosen, strict=True))))[0] for k in z)
        draws.append(few - many)
    row = one(rows, "auroc_difference", "set_1")
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * np.std(draws), rel=0.15)


def test_the_auroc_is_the_mean_share_that_a_score_beats_and_a_tie_is_half_a_win():
    assert prompts._share_below(np.array([1, 2, 2]), np.array([2, 0])).tolist() == [0.5, 0.75, 0.75]
    inside, outside = np.random.default_rng(0).integers(0, 5, (2, 60))
    auroc = ood.areas(*ood.count_scores(inside, outside))[0]
    assert prompts._share_below(inside, outside).mean() == pytest.approx(auroc)
    assert 1 - prompts._share_below(outside, inside).mean() == pytest.approx(auroc)


def test_sets_that_agree_on_every_image_still_have_an_interval(made, tmp_path):
    for number in (1, 2):
        (tmp_path / f"same_{number}.base.npz").write_bytes((made / "set_30.base.npz").read_bytes())
    same = sorted(tmp_path.glob("*.npz"))
    prompts.measure_prompts(*of(made, "val"), same, tmp_path / "p.json", resamples=50)
    row = one(rows_of(tmp_path / "p.json"), "accuracy_difference", "same_1")
    assert row["value"] == 0 and -0.02 < row["low"] < 0 < row["high"] < 0.02
    assert one(rows_of(tmp_path / "p.json"), "nll_difference", "same_1")["high"] == 0


def test_what_cannot_be_measured_is_refused(made, tmp_path):
    with pytest.raises(InputError, match="an OOD set needs a reference"):
        measured(made, "ood")
    with pytest.raises(InputError, match="without a label"):
        measured(made, "val", reference_embeddings=made / "val.npy", reference_index=made / "val.parquet")
    (tmp_path / "learned.base.npz").write_bytes((made / "set_1.base.npz").read_bytes())
    with pytest.raises(InputError, match="'learned': expected a name that ends in its number"):
        prompts.measure_prompts(*of(made, "val"), [tmp_path / "learned.base.npz"], tmp_path / "p.json")
    table = io.read_parquet(made / "factors.parquet")
    with pytest.raises(InputError, match="lower `fewest`"):
        measured(made, factors=made / "factors.parquet")
    io.write_parquet(tmp_path / "f.parquet", {**table, "label": (table["label"] + 1).astype(np.int32)})
    with pytest.raises(InputError, match="annotate anew"):
        measured(made, factors=tmp_path / "f.parquet", fewest=1)
    manifest = io.read_json(made / "val.json")
    (tmp_path / "val.npy").write_bytes((made / "val.npy").read_bytes())
    io.write_json(tmp_path / "val.json", {**manifest, "model": "other"})
    with pytest.raises(InputError, match="of model 'other'"):
        measured(made, "ood", reference_embeddings=tmp_path / "val.npy", reference_index=made / "val.parquet")


@pytest.fixture(scope="module")
def tables(made, tmp_path_factory):
    """Tables of three models that were measured on the ID and the OOD set."""
    folder, files = tmp_path_factory.mktemp("tables"), []
    for seed, model in enumerate(("clip_a", "clip_b", "tuned")):
        reference = {"reference_embeddings": made / "val.npy", "reference_index": made / "val.parquet"}
        for name, options in (
            ("val", {"held_out": 1, "factors": made / "factors.parquet", "fewest": 20}),
            ("ood", reference),
        ):
            path = folder / model / f"{name}.json"
            prompts.measure_prompts(*of(made, name), heads(made), path, seed=seed, resamples=50, **options)
            content = io.read_json(path)
            io.write_json(path, {**content, "rows": [{**row, "model": model} for row in content["rows"]]})
            files.append(path)
    gather("test", files, folder / "prompts.parquet")
    groups = {"clip_a": "clip_zero_shot", "clip_b": "clip_zero_shot", "tuned": "clip_finetuned"}
    models = pd.DataFrame({"model": list(groups), "title": list(groups), "group": list(groups.values())})
    return {"prompts": pd.read_parquet(folder / "prompts.parquet"), "models": models.assign(family="vit")}


def titles(figure):
    return [axes.get_title() for axes in figure.axes]


def test_the_figure_has_a_line_a_model_that_ends_at_the_largest_set(tables):
    figure = figure_of_prompts.draw(tables)
    assert titles(figure) == [
        "Accuracy ↑", "ECE ↓", "ECE, scaled ↓", "NLL (nats) ↓", "Factor gap ↑", "AUROC, Ood ↑"
    ]  # fmt: skip
    rows = tables["prompts"].query("metric == 'accuracy_difference' and model == 'clip_a'").set_index("slice")["value"]
    for axes in figure.axes:
        lines = [line for line in axes.lines if str(line.get_gid()).startswith("group:")]
        assert len(lines) == 3
        assert {line.get_color() for line in lines} == {style.color("clip_zero_shot"), style.color("clip_finetuned")}
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "7", "30"]
        assert all(line.get_ydata()[-1] == 0 for line in lines)
    first = next(line for line in figure.axes[0].lines if line.get_gid()).get_ydata()
    np.testing.assert_allclose(first, [100 * rows["set_1"], 100 * rows["set_7"], 0])


def test_many_models_are_thin_lines_with_the_mean_of_their_group(tables):
    some = tables["prompts"].query("model == 'clip_a'")
    many = {"prompts": pd.concat([some.assign(model=f"m{i}") for i in range(20)])}
    many["models"] = pd.DataFrame({"model": [f"m{i}" for i in range(20)], "group": "clip_zero_shot", "family": "vit"})
    axes = figure_of_prompts.draw(many).axes[0]
    lines = [line for line in axes.lines if line.get_gid()]
    assert len(lines) == 21
    assert lines[-1].get_linewidth() > lines[0].get_linewidth()


@pytest.mark.parametrize("lacks", ["everything", "rows", "differences", "models"])
def test_what_was_not_measured_is_said(tables, lacks):
    rows = tables["prompts"]
    some = {
        "everything": {},
        "rows": {**tables, "prompts": rows.iloc[:0]},
        "differences": {**tables, "prompts": rows[~rows["metric"].str.endswith("_difference")]},
        "models": {"prompts": rows},
    }[lacks]
    figure = figure_of_prompts.draw(some)
    said = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert ("not measured\nin this study" in said) == (lacks != "models")


def test_the_figure_is_the_same_for_any_order_of_rows(tables, tmp_path):
    contents = []
    for number, some in enumerate((tables, {n: t.sample(frac=1, random_state=1) for n, t in tables.items()})):
        paths = tmp_path / f"{number}.pdf", tmp_path / f"{number}.png"
        style.save(figure_of_prompts.draw(some), *paths, title="prompts", study="test")
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]
