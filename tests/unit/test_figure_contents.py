"""What single figures show: the numbers of the tables, of the right convention, where they belong."""

import numpy as np
import pytest

from clip_robustness.figures import strips
from tests.unit.figure_tables import crowd, draw, study, texts


def panel(figure, title):
    """The axes of that title, without its second line."""
    return next(axes for axes in figure.axes if axes.get_title().split("\n")[0] == title)


def points(axes):
    """Where models are drawn, by group, each sorted by x."""
    found = {}
    for line in axes.lines:
        if line.get_gid():
            found.setdefault(line.get_gid()[6:], []).append(line.get_xydata())
    return {group: np.array(sorted(np.concatenate(places).tolist())) for group, places in found.items()}


def values(table, **equal):
    """The values of the rows that equal this, by model."""
    for column, wanted in equal.items():
        table = table[table[column] == wanted]
    return table.set_index("model")["value"]


def test_shape_bias_marks_twins_read_out_differently():
    tables = study()
    one = tables["shape_bias"].assign(convention="16_way")
    assert not any(text.endswith(" *") for text in texts(draw("shape_bias", tables | {"shape_bias": one})))
    one.loc[one["model"] == "tuned", "convention"] = "1000_way_mean_probability"
    figure = draw("shape_bias", tables | {"shape_bias": one})
    marked = [text for text in texts(figure) if text.endswith(" *")]
    assert len(marked) == 1 and marked[0].startswith("CLIP ViT, fine-tuned")
    hollow = [line for line in panel(figure, "All models").lines if line.get_markerfacecolor() == "white"]
    value = values(one, slice="")["tuned"]
    assert [line.get_xydata().tolist()[0][0] for line in hollow] == [value]
    assert {"16 way", "1000 way mean probability"} <= {text.get_text() for text in figure.legends[0].texts}


def test_shape_bias_joins_models_that_differ_in_their_source_only():
    tables = study()
    axes = panel(draw("shape_bias", tables), "Training source")
    bias = values(tables["shape_bias"], slice="")
    joined = {tuple(np.round(line.get_xdata(), 9)) for line in axes.lines if line.get_linewidth() == 0.7}
    assert joined == {tuple(np.round(bias[list(pair)], 9)) for pair in (("clip_a", "clip_b"), ("tuned", "tuned_b"))}


def test_shape_bias_by_class_is_the_mean_of_a_group():
    tables = study()
    bias, strip = tables["shape_bias"], draw("shape_bias", tables).axes[-1]
    assert strip.get_title().startswith("By shape class")
    rows = [label.get_text() for label in strip.get_yticklabels()]
    columns = [label.get_text() for label in strip.get_xticklabels()]
    standard = strip.images[0].get_array()[rows.index("Standard (4)")]
    expected = [values(bias, slice=name)[["rn", "vit", "cnx", "small"]].mean() for name in columns]
    assert sorted(columns) == ["cone", "cube"] and np.allclose(standard, expected)


def test_the_human_reference_is_the_measured_one():
    tables = study()
    entries = [[t.get_text() for t in draw("shape_bias", some).legends[0].texts] for some in (
        tables, tables | {"shape_bias": tables["shape_bias"].query("model != 'person'")})]  # fmt: skip
    assert "Human observers, 95 %" in entries[0]
    assert "Human observers, photographs, 96 %" in entries[1]


def test_ood_detection_draws_the_default_score_of_each_model():
    tables = study()
    figure, ood = draw("ood_detection", tables), tables["ood"]
    accuracy = values(tables["accuracy"], dataset="mini_val")
    drawn = points(panel(figure, "Unseen"))
    for group, models, score in (("clip_zero_shot", ["clip_third", "clip_rn", "clip_b", "clip_a"], "mcm_t1"),
                                 ("standard", ["small", "vit", "cnx", "rn"], "msp")):  # fmt: skip
        auroc = values(ood, dataset="mini_unseen", metric="auroc", slice=score)
        assert np.allclose(drawn[group], np.column_stack([accuracy[models], auroc[models]]))
    mean = points(panel(figure, "Mean of 2 sets"))["clip_finetuned"][:, 1]
    auroc = ood[ood["metric"] == "auroc"].groupby("model")["value"].mean()
    assert np.allclose(mean, auroc[["tuned_b", "tuned"]])


def test_ood_detection_shows_one_convention_of_fpr95():
    drawn = np.concatenate([*points([a for a in draw("ood_detection", study()).axes if a.get_title() == "Unseen"][-1])
                            .values()])  # fmt: skip
    assert not np.any(drawn[:, 1] == 0.5)  # what the tables hold under ood_recall_at_least


def test_ood_detection_fits_each_source_by_itself():
    tables = study()
    axes = panel(draw("ood_detection", tables), "Unseen")
    (line,) = [line for line in axes.lines if not line.get_gid() and len(line.get_xdata()) == 2]
    x = values(tables["accuracy"], dataset="mini_val")[["clip_a", "clip_rn", "clip_third"]]
    y = values(tables["ood"], dataset="mini_unseen", metric="auroc", slice="mcm_t1")[x.index]
    slope, intercept = np.polyfit(x, y, 1)
    ends = np.array([x.min(), x.max()])
    assert np.allclose(line.get_xydata(), np.column_stack([ends, intercept + slope * ends]))


def test_ood_histograms_have_their_own_limits():
    figure = draw("ood_detection", study())
    steps = panel(figure, "CLIP ViT, world A").patches[0].get_data()
    assert steps.edges[0] == pytest.approx(0.00101) and steps.edges[-1] == pytest.approx(0.00132)
    assert len(steps.values) == 40 and steps.values.sum() == pytest.approx(100)


def test_visual_factors_draw_the_table_of_fits():
    tables = study()
    tables["factor_fits"] = tables["factor_fits"].assign(slope=0.0, intercept=0.0)
    axes = panel(draw("visual_factors", tables), "Pose")
    assert any(np.allclose(line.get_ydata(), 0.5) for line in axes.lines if not line.get_gid())
    del tables["factor_fits"]
    assert not [line for line in panel(draw("visual_factors", tables), "Pose").lines if not line.get_gid()]


def test_visual_factors_show_the_ten_with_most_images():
    titles = [axes.get_title().split("\n")[0] for axes in draw("visual_factors", crowd()).axes][:11]
    assert titles[:3] == ["Pose", "Background", "Color"] and titles[9] == "Larger" and titles[10] == "Zero-shot,"


def test_factor_robustness_is_the_mean_of_a_group():
    tables = study()
    figure = draw("visual_factors", tables)
    axes = next(a for a in figure.axes if "fine-tuned" in a.get_title())
    rows = [label.get_text() for label in panel(figure, "Zero-shot,").get_yticklabels()]
    means = {rows[int(line.get_ydata()[0])]: line.get_xdata()[0] for line in axes.lines if line.get_gid()}
    table = tables["factor_robustness"]
    expected = values(table, slice="pose")[["tuned", "tuned_b"]].mean()
    assert rows == ["Pose", "Texture", "Larger"] and means["Pose"] == pytest.approx(100 * expected)


def test_calibration_summarises_more_than_twelve_models():
    titles = [axes.get_title() for axes in draw("calibration", crowd()).axes]
    assert sum("All 284 models" in title for title in titles) == 1
    assert len(draw("calibration", study()).axes) == 6 + 3 + len(study()["models"])


def test_calibration_without_brier_and_adaptive_ece():
    tables = study()
    some = tables["calibration"].query("metric not in ('brier', 'adaptive_ece')")
    count = [len(draw("calibration", t).axes) for t in (tables, tables | {"calibration": some})]
    assert count[0] - count[1] == 2


def test_transfer_is_the_mean_change_of_a_group():
    tables = study()
    axes = panel(draw("calibration", tables), "Change of ECE by the ID temperature")
    names = [label.get_text() for label in axes.get_xticklabels()]
    ece = tables["calibration"].query("metric == 'ece' and dataset == 'mini_pose'")
    change = 100 * (values(ece, slice="after") - values(ece, slice="before"))[["tuned", "tuned_b"]].mean()
    places = points(axes)["clip_finetuned"]
    assert places[names.index("Pose"), 1] == pytest.approx(change)


def test_retrieval_shows_one_convention_a_data_set():
    tables = study()
    rows = tables["retrieval"]
    lower = rows.assign(value=rows["value"].where(rows["convention"] == "duplicates_positive", 0.1))
    drawn = points(panel(draw("retrieval", tables | {"retrieval": lower}), "Val, text to image"))["clip_zero_shot"]
    expected = values(rows, metric="image_recall@1", convention="duplicates_positive")
    assert np.allclose(sorted(drawn[:, 1]), sorted(expected))


def test_interval_of_a_correlation():
    low, high = strips.pearson_interval(0.9, 28)  # by hand: tanh(1.47222 -+ 1.96 / 5)
    assert (low, high) == (pytest.approx(0.79328, abs=1e-5), pytest.approx(0.95307, abs=1e-5))
    assert strips.pearson_interval(0.9, 3) == (-1, 1)
