"""Measured against published: what is compared, what is flagged, and which known reasons are named."""

from pathlib import Path

import pandas as pd
import pytest

from clip_robustness.core import statistics
from clip_robustness.core.io import InputError
from clip_robustness.figures import reproduction as figure
from clip_robustness.report import reproduction

ROOT = Path(__file__).resolve().parents[2]
KEY = "open_clip.vit-b-16.laion400m_e32"
PUBLISHED = [  # model, dataset, metric, slice, value, n, convention, source
    (KEY, "imagenet_val", "accuracy", "", 0.67, 50_000, "1000_way", "open_clip"),
    (KEY, "imagenet_v2", "accuracy", "", 0.60, 10_000, "1000_way", "open_clip"),
    (KEY, "imagenet_v2", "accuracy", "", 0.70, 10_000, "format_val", "testbed"),
    (KEY, "imagenet_r", "accuracy", "", 0.78, "", "200_way", "open_clip"),
    (KEY, "objectnet", "accuracy", "", 0.51, 18_574, "113_own_names", "open_clip"),
    (KEY, "coco", "image_recall@1", "", 0.38, 25_010, "karpathy_test", "open_clip_retrieval"),
    (KEY, "cue_conflict", "n_shape", "", 600, 1200, "16way_80_templates", "vlm_shapebias"),
    (KEY, "cue_conflict", "n_texture", "", 400, 1200, "16way_80_templates", "vlm_shapebias"),
    (KEY, "cue_conflict", "n_conflict", "", 1200, 1200, "16way_80_templates", "vlm_shapebias"),
    ("other", "imagenet_val", "accuracy", "", 0.10, 50_000, "1000_way", "open_clip"),
]
MODEL = {"model": "ours", "title": "CLIP ViT-B/16", "group": "clip_zero_shot", "family": "vit", "published": KEY,
         "architecture": "ViT-B-16", "preprocess": "resize(224,bicubic)", "image_size": 224.0}  # fmt: skip


def measured(dataset, value, convention="1000_way", n=10_000, metric="accuracy", **more):
    low, high = (float(x) for x in statistics.clopper_pearson(value * n, n))
    return {"study": "test", "model": "ours", "dataset": dataset, "metric": metric, "slice": "", "value": value,
            "low": low, "high": high, "n": n, "convention": convention, "source": "measured"} | more  # fmt: skip


@pytest.fixture
def compare(tmp_path):
    """compare(measured row, ...) -> the table; keyword arguments change the model, or how the study embedded."""
    folder = tmp_path / "published"
    folder.mkdir()
    columns = ["model", "dataset", "metric", "slice", "value", "n", "convention", "source"]
    pd.DataFrame(PUBLISHED, columns=columns, dtype=object).to_csv(folder / "numbers.csv", index=False)
    there = pd.DataFrame({"model": [KEY, "other"], "image_size": [224, 224]})
    there.to_csv(folder / "models.csv", index=False)

    def run(*rows, precision="fp32", pillow="12.1.0", **model):
        pd.DataFrame([MODEL | model]).to_parquet(tmp_path / "models.parquet")
        pd.DataFrame(rows).to_parquet(tmp_path / "accuracy.parquet")
        tables, out = [tmp_path / "accuracy.parquet"], tmp_path / "reproduction.parquet"
        reproduction.compare_published(tables, tmp_path / "models.parquet", folder, out, precision, pillow=pillow)
        assert len(pd.read_csv(out.with_suffix(".csv"))) == len(pd.read_parquet(out))
        return pd.read_parquet(out)

    return run


def test_difference_interval_and_flag(compare):
    table = compare(measured("imagenet_val", 0.6729, n=50_000), measured("imagenet_v2", 0.6031))
    assert list(table["difference"]) == pytest.approx([0.0031, 0.0029])  # imagenet_v2, imagenet_val
    assert list(table["flagged"]) == [True, False]
    # Both proportions' errors in squares: 1.96 * sqrt(0.603 * 0.397 / 10,000 + 0.6 * 0.4 / 10,000).
    assert table["high"][0] - table["difference"][0] == pytest.approx(0.0136, abs=2e-4)
    assert table["difference"][0] - table["low"][0] == pytest.approx(0.0136, abs=2e-4)


@pytest.mark.parametrize(
    ("row", "published", "convention", "reason"),
    [
        (measured("imagenet_v2", 0.6), 0.60, "1000_way", ""),  # not the re-encoded images, as there are both
        (measured("objectnet", 0.5, "113_way", 18_574), 0.51, "113_own_names", "class names"),
        (measured("coco", 0.38, "own_captions", 25_010, "image_recall@1"), 0.38, "karpathy_test", ""),
        (measured("cue_conflict", 0.61, "16_way", 990, "shape_bias"), 0.60, "16way_80_templates", ""),
        (measured("cue_conflict", 0.83, "16_way", 1200, "cue_accuracy"), 1000 / 1200, "16way_80_templates", ""),
    ],
)
def test_a_number_meets_the_convention_that_corresponds(row, published, convention, reason, compare):
    [found] = compare(row).to_dict("records")
    assert (found["published"], found["published_convention"]) == (pytest.approx(published), convention)
    assert found["reasons"].startswith(reason) and bool(found["reasons"]) == bool(reason)


@pytest.mark.parametrize(
    "row",
    [
        measured("imagenet_val", 0.67, "200_way"),
        measured("imagenet_r", 0.78, "1000_way"),
        measured("coco", 0.38, "duplicates_positive", metric="image_recall@1"),
        measured("imagenet_val", 0.67, metric="ece"),
        measured("imagenet_val", 0.67, source="open_clip"),
    ],
)
def test_what_does_not_correspond_is_not_compared(row, compare):
    assert not len(compare(row))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"preprocess": "resize(224,bilinear)"}, "interpolation (bilinear here, bicubic there)"),
        ({"architecture": "ViT-B-16-quickgelu"}, "activation (QuickGELU here or there, not both)"),
        ({"image_size": 240.0}, "evaluation size (240 px here, 224 px there)"),
        ({"precision": "bf16"}, "precision (bf16)"),
        ({"pillow": "13.0.0"}, "resampling (Pillow 13 filters tall images in another order)"),
        ({}, ""),
    ],
)
def test_known_reasons_are_named_where_they_hold(changes, reason, compare):
    assert list(compare(measured("imagenet_val", 0.66, n=50_000), **changes)["reasons"]) == [reason]


def test_another_number_of_images_is_a_reason(compare):
    [reasons] = compare(measured("imagenet_val", 0.67, n=49_999))["reasons"]
    assert reasons == "number of images (49,999 here, 50,000 there)"


def test_an_unknown_n_gives_a_difference_without_interval(compare):
    [found] = compare(measured("imagenet_r", 0.79, "200_way", 30_000)).to_dict("records")
    assert found["difference"] == pytest.approx(0.01) and found["flagged"] and not found["reasons"]
    assert pd.isna(found["low"]) and pd.isna(found["published_n"])


def test_models_without_a_published_key_have_nothing_to_compare(compare):
    table = compare(measured("imagenet_val", 0.67), published="")
    assert list(table.columns) == list(reproduction.COLUMNS) and not len(table)
    drawn = figure.draw({"reproduction": table})
    assert any("nothing to compare" in text.get_text() for text in drawn.axes[0].texts)


def test_a_wrong_key_is_named(compare):
    with pytest.raises(InputError, match=r"'open_clip\.vit' is no model of"):
        compare(measured("imagenet_val", 0.67), published="open_clip.vit")


def test_the_projects_own_published_numbers_are_read(tmp_path):
    """A model that measures what was published differs from it by nothing, whatever the source's convention is."""
    key = "timm.vit_large_patch14_clip_224.openai_ft_in1k"
    pd.DataFrame([MODEL | {"published": key}]).to_parquet(tmp_path / "models.parquet")
    numbers = pd.read_csv(ROOT / "config" / "published" / "timm.csv").query(f"model == '{key}'")
    rows = [measured(r.dataset, r.value, r.convention, r.n, r.metric) for r in numbers.itertuples()]
    pd.DataFrame(rows).to_parquet(tmp_path / "accuracy.parquet")
    cues = [measured("cue_conflict", 0.4321, "1000_way_mean_probability", 942, "shape_bias")]
    pd.DataFrame(cues).to_parquet(tmp_path / "shape_bias.parquet")
    out, tables = (
        tmp_path / "reproduction.parquet",
        [tmp_path / f"{name}.parquet" for name in ("accuracy", "shape_bias")],
    )
    reproduction.compare_published(tables, tmp_path / "models.parquet", ROOT / "config" / "published", out)
    table = pd.read_parquet(out)
    assert {"imagenet_val", "imagenet_v2", "imagenet_r", "imagenet_sketch", "cue_conflict"} <= set(table["dataset"])
    assert table["difference"].abs().max() < 1e-4 and not table["flagged"].any()


def test_figure_and_caption_count_what_is_flagged(compare):
    rows = [measured("imagenet_val", 0.60, n=50_000), measured("imagenet_v2", 0.601)]
    table = compare(*rows, image_size=240.0)
    drawn = figure.draw({"reproduction": table, "models": pd.DataFrame([MODEL])})
    words = [text.get_text() for text in drawn.axes[0].texts]
    assert words.count("1 of 1") == words.count("0 of 1") == 1 and "CLIP ViT-B/16" in words
    numbers = reproduction.caption_numbers(table)
    assert numbers == {"compared": "2", "flagged": "1", "compared_models": "1", "suspects": "evaluation size (1)"}
    template = (ROOT / "report" / "captions" / "reproduction.rst").read_text(encoding="utf-8")
    assert all(f"${name}" in template for name in numbers)
    assert set(reproduction.caption_numbers(table.iloc[:0]).values()) == {"0", "none"}
