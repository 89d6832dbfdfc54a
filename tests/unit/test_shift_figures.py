"""The figures of natural and synthetic shifts: what they show, from small, crowded and degenerate tables."""

import importlib

import numpy as np
import pytest
from matplotlib.colors import to_hex

from clip_robustness.core import statistics
from clip_robustness.figures import strips, style
from tests.unit.figure_tables import draw, measure, texts
from tests.unit.figure_tables_shifts import CORRUPTIONS, crowd, study
from tests.unit.test_figure_contents import panel, points
from tests.unit.test_figures import assert_apart, pixels

FIGURES = ("natural_shifts", "synthetic_shifts")


@pytest.mark.parametrize("name", FIGURES)
def test_draws_and_saves_the_same_bytes(name, tmp_path):
    module = importlib.import_module(f"clip_robustness.figures.{name}")
    contents = []
    for run in ("one", "two"):
        tables = {table: study()[table].sample(frac=1, random_state=len(run)) for table in module.TABLES}
        figure, png = module.draw(tables), tmp_path / f"{run}.png"
        style.save(figure, tmp_path / f"{run}.pdf", png, title=name, study="test")
        contents.append(((tmp_path / f"{run}.pdf").read_bytes(), png.read_bytes()))
        assert not any("not measured" in text for text in texts(figure))
    assert contents[0] == contents[1]


@pytest.mark.parametrize("tables", (study, crowd))
@pytest.mark.parametrize("name", FIGURES)
def test_fits_the_page_and_labels_do_not_overlap(name, tables):
    figure = draw(name, tables())
    assert figure.get_figwidth() <= style.DOUBLE and figure.get_figheight() <= style.PAGE
    assert_apart(figure)
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        for label in (label for label in (axes.xaxis.label, axes.yaxis.label) if label.get_text()):
            box = label.get_window_extent(renderer)
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def degenerate():
    tables = study()
    kept = tables["models"]["model"].isin(["clip_a"])
    return {
        "nothing": {},
        "empty": {name: table.iloc[:0] for name, table in tables.items()},
        "one model": {name: table[table["model"] == "clip_a"] for name, table in tables.items()},
        "no intervals": {n: t.assign(low=np.nan, high=np.nan) if "low" in t else t for n, t in tables.items()},
        "no models table": {name: table for name, table in tables.items() if name != "models"},
        "no CLIP": tables | {"models": tables["models"].query("group != 'clip_zero_shot'")},
        "no standard models": tables | {"models": tables["models"].query("group != 'standard'")},
        "no average": tables
        | {"effective_robustness": tables["effective_robustness"].query("dataset != 'natural_average'")},
        "an accuracy of zero": {
            n: t.assign(value=t["value"].where(t["model"] != "clip_b", 0.0)) if "value" in t else t
            for n, t in tables.items()
        },
        "odd names": tables | {"models": tables["models"].assign(title=r"$\frac$ <b>&" + 60 * "é", family="")},
        "only one in the models table": tables | {"models": tables["models"][kept]},
    }


DEGENERATE = degenerate()


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", FIGURES)
def test_degenerate_tables(name, case):
    figure = draw(name, DEGENERATE[case])
    assert pixels(figure).std() > 0
    if case in ("nothing", "empty"):
        assert any("not measured" in text for text in texts(figure))


@pytest.mark.parametrize("name", FIGURES)
def test_colours_are_the_groups(name):
    colours = {
        (line.get_gid()[6:], to_hex(line.get_color()).upper())
        for axes in draw(name, study()).axes for line in axes.lines if line.get_gid()
    }  # fmt: skip
    assert {group for group, _ in colours} == {"clip_zero_shot", "standard"}
    assert all(colour == style.color(group).upper() for group, colour in colours)


def rows_of(axes):
    return [label.get_text().replace("\n", " ") for label in axes.get_yticklabels()]


def means(axes, group, shape):
    """Where the mean marks of a look stand: x by row."""
    found = {}
    for line in axes.lines:
        if line.get_gid() == f"group:{group}" and line.get_marker() == shape:
            found[rows_of(axes)[round(float(line.get_ydata()[0]))]] = float(line.get_xdata()[0])
    return found


def test_natural_shifts_are_the_means_of_the_table():
    tables = study()
    axes = panel(draw("natural_shifts", tables), "Effective robustness by shift")
    assert rows_of(axes) == ["Pose", "Sketch", "Video", "Natural average"]
    robust = tables["effective_robustness"].query("metric == 'effective_robustness' and slice == 'class_subset'")
    for group, shape, members in (
        ("clip_zero_shot", "o", ["clip_a", "clip_b", "clip_third"]),
        ("clip_zero_shot", "s", ["clip_rn"]),
        ("standard", "s", ["rn", "small"]),
        ("standard", "o", ["vit"]),
    ):
        mean = robust[robust["model"].isin(members)].groupby("dataset")["value"].mean()
        found = means(axes, group, shape)
        assert found["Sketch"] == pytest.approx(100 * mean["mini_sketch"])
        assert found["Natural average"] == pytest.approx(100 * mean["natural_average"])
    # No CLIP of the study is a ConvNeXt.
    assert not means(axes, "standard", "^")


def test_natural_shifts_show_models_with_every_shift_and_no_synthetic_set():
    tables = study()
    robust = tables["effective_robustness"]
    tables["effective_robustness"] = robust[~((robust["model"] == "clip_a") & (robust["dataset"] == "natural_average"))]
    extra = [measure("clip_b", d, "effective_robustness", 0.9, "val", convention="logit-ols") for d in (
        "mini_stylized", "imagenet_c_noise")]  # fmt: skip
    tables["effective_robustness"] = type(robust)([*tables["effective_robustness"].to_dict("records"), *extra])
    sliced = measure("clip_b", "imagenet_c_noise", "accuracy", 0.4, "shot_noise")
    tables["accuracy"] = type(robust)([*tables["accuracy"].to_dict("records"), sliced])
    figure = draw("natural_shifts", tables)
    axes = panel(figure, "Effective robustness by shift")
    assert rows_of(axes) == ["Pose", "Sketch", "Video", "Natural average"]
    assert "CLIP, zero-shot, ViT (2)" in [text.get_text() for text in figure.legends[0].texts]


@pytest.mark.parametrize(("tables", "title", "sets", "metrics"), [
    (study, "Video: 1,000 sets of frames", ("mini_video", "mini_video"), ("pm0_accuracy", "pm10_accuracy")),
    (crowd, "YTBB: 1,000 sets of frames", ("ytbb_pm0", "ytbb_pm10"), ("accuracy", "accuracy")),
])  # fmt: skip
def test_videos_from_one_frame_to_twenty(tables, title, sets, metrics):
    tables = tables()
    figure = draw("natural_shifts", tables)
    axes = panel(figure, title)
    drawn = points(axes)
    accuracy = tables["accuracy"]
    x, y = (
        accuracy[(accuracy["dataset"] == name) & (accuracy["metric"] == metric)].set_index("model")["value"]
        for name, metric in zip(sets, metrics, strict=True)
    )
    by_group = tables["models"].groupby("group")["model"].agg(list)
    for group in ("clip_zero_shot", "standard"):
        expected = sorted(np.column_stack([x[by_group[group]], y[by_group[group]]]).tolist())
        assert np.allclose(drawn[group], expected)
    assert set(drawn) <= set(strips.COUNTERPARTS)
    standard = by_group["standard"]
    line = statistics.fit_line(x[standard], y[standard])
    for model in by_group["clip_zero_shot"][:2]:
        name = tables["models"].set_index("model").loc[model, "title"]
        above = 100 * (y[model] - line.predict(x[model]))
        assert any(text.get_text() == f"{style.short(name, 22)}: {above:+.1f}" for text in axes.texts) or len(x) < 20
    assert any(text.get_text().split(": ")[-1].startswith("-") for text in axes.texts)


@pytest.mark.parametrize(("title", "metric", "slice_"), [
    ("Accuracy", "accuracy", ""),
    ("Retention", "retention", ""),
    ("Effective robustness", "effective_robustness", "val"),
])  # fmt: skip
def test_synthetic_shifts_show_three_measures(title, metric, slice_):
    tables = study()
    figure = draw("synthetic_shifts", tables)
    axes = panel(figure, title)
    assert rows_of(panel(figure, "Accuracy")) == ["Corruptions", "PGD", "Stylized"]
    table = tables["synthetic"]
    own = table[(table["metric"] == metric) & (table["slice"] == slice_)]
    for group, shape, members in (
        ("clip_zero_shot", "o", ["clip_a", "clip_b", "clip_third"]),
        ("standard", "o", ["vit"]),
    ):
        mean = own[own["model"].isin(members)].groupby("dataset")["value"].mean()
        found = {round(line.get_ydata()[0]): line.get_xdata()[0] for line in axes.lines
                 if line.get_gid() == f"group:{group}" and line.get_marker() == shape}  # fmt: skip
        expected = [100 * mean[name] for name in ("mini_c", "mini_pgd", "mini_stylized")]
        assert [found[place] for place in range(3)] == pytest.approx(expected)


def test_corruptions_by_severity_and_by_kind():
    tables = study()
    figure, table = draw("synthetic_shifts", tables), tables["synthetic"]
    axes = panel(figure, "Corruptions: by severity")
    curve = {line.get_marker(): line.get_ydata() for line in axes.lines if line.get_gid() == "group:clip_zero_shot"}
    rows = table[(table["metric"] == "accuracy") & table["slice"].str.startswith("severity:")]
    assert curve["s"] == pytest.approx(100 * rows[rows["model"] == "clip_rn"].sort_values("slice")["value"].to_numpy())
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "3", "5"]
    assert rows_of(panel(figure, "Corruptions: by corruption")) == ["Blur", "JPEG compression", "Noise"]
    assert len(CORRUPTIONS) == 3
    errors = panel(figure, "Corruptions: errors")
    assert errors.get_xlabel().split("\n")[1] == "rn"
    own = table[(table["metric"] == "mce") & (table["model"] == "clip_rn")]["value"].item()
    assert means(errors, "clip_zero_shot", "s")["mCE"] == pytest.approx(100 * own)


def test_shifts_without_a_clip_say_so():
    figure = draw("synthetic_shifts", crowd())
    assert texts(figure).count("CLIP not measured") == 2
    assert texts(draw("synthetic_shifts", study())).count("CLIP not measured") == 0
    without = {name: table[table["slice"].str.find(":") < 0] if name == "synthetic" else table
               for name, table in study().items()}  # fmt: skip
    assert [axes.get_title() for axes in draw("synthetic_shifts", without).axes] == [
        "Accuracy", "Retention", "Effective robustness",
    ]  # fmt: skip
