"""The overlap figure: its numbers are the tables', and it draws whatever a study has."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from clip_robustness.figures import style
from tests.unit import figure_tables_overlap as sample
from tests.unit.figure_tables import draw, texts
from tests.unit.test_figures import assert_apart, pixels

CASES = {
    "nothing": lambda t: {},
    "empty": lambda t: {name: table.iloc[:0] for name, table in t.items()},
    "one model": lambda t: t | {"data_overlap": t["data_overlap"].query("model == 'clip_a'")},
    "no thresholds": lambda t: {name: t[name] for name in ("data_overlap", "models")},
    "no models table": lambda t: {name: t[name] for name in ("data_overlap", "overlap_thresholds")},
    "no intervals": lambda t: {n: x.assign(low=np.nan, high=np.nan) if "low" in x else x for n, x in t.items()},
    "no overlap at all": lambda t: t | {"data_overlap": t["data_overlap"].query("dataset == 'mini_sketch'")},
    "no tests": lambda t: t | {"data_overlap": t["data_overlap"].query("metric != 'binomial_p'")},
    "odd names": lambda t: t | {"data_overlap": t["data_overlap"].assign(dataset=r"$\frac$ <b>&" + 60 * "é")},
}


def panel(figure, title):
    return next(axes for axes in figure.axes if axes.get_title() == title)


def symbols(axes):
    """(row, group) -> (value, filled) of the large symbols."""
    found = {}
    for line in axes.lines:
        if line.get_gid():
            (value,), (place,) = line.get_xdata(), line.get_ydata()
            found[round(float(place)), line.get_gid()[6:]] = value, to_hex(line.get_markerfacecolor()) != "#ffffff"
    return found


def names(figure):
    return [text.get_text() for text in panel(figure, "Images that overlap").get_yticklabels()]


@pytest.mark.parametrize(
    ("title", "metric"), [("Overlapping against clean", "accuracy_difference"), ("All against clean", "gain")]
)
def test_symbols_are_the_means_of_groups_and_filled_where_significant(title, metric):
    tables = sample.small()
    figure = draw("data_overlap", tables)
    drawn, rows = symbols(panel(figure, title)), tables["data_overlap"].merge(tables["models"][["model", "group"]])
    order = ["mini_planted", "mini_val", "mini_disjoint", "mini_sketch"]
    assert [name.split("\n")[0] for name in names(figure)] == ["Planted", "Val", "Disjoint", "Sketch"]
    p = rows[rows["convention"] == "one_sided_bonferroni_4"]
    expected = {}
    for (dataset, group), some in rows[rows["metric"] == metric].groupby(["dataset", "group"]):
        passed = (p[(p["dataset"] == dataset) & (p["group"] == group)]["value"] < 0.05).sum() * 2 >= len(some)
        expected[order.index(dataset), group] = pytest.approx(100 * some["value"].mean()), passed
    assert drawn == expected
    assert {filled for _, filled in drawn.values()} == {True, False}


def test_controls_are_labelled():
    figure = draw("data_overlap", sample.small())
    assert (
        names(figure)[0] == "Planted\n(control: copies planted)" and names(figure)[2] == "Disjoint\n(control: disjoint)"
    )
    markers = {line.get_marker() for line in panel(figure, "All against clean").lines if line.get_gid()}
    assert markers == {"^", "v", "o"}


def test_shares_lie_at_their_place_and_false_positives_behind_them():
    tables = sample.small()
    axes = panel(draw("data_overlap", tables), "Images that overlap")
    drawn = [line.get_xdata()[0] ** 2 for line in axes.lines if line.get_marker() != "None"]
    assert np.allclose(drawn, [0.3, 0.03, round(0.001 * 1500) / 1500, 0])
    ticks = dict(zip(axes.get_xticks(), (text.get_text() for text in axes.get_xticklabels()), strict=True))
    assert all(100 * place**2 == pytest.approx(float(text)) for place, text in ticks.items()) and len(ticks) > 2
    rates = tables["overlap_thresholds"].query("metric == 'false_positive_rate'")
    assert axes.patches[0].get_x() + axes.patches[0].get_width() == pytest.approx(rates["high"].iloc[0] ** 0.5)


def test_the_detector_is_shown_by_transform():
    tables = sample.small()
    axes = panel(draw("data_overlap", tables), "Detector")
    titles = [text.get_text() for text in axes.get_yticklabels()]
    assert titles == ["Cropped", "Mirrored", "Recompressed", "Resized", "Recall", "Precision", "False positives"]
    drawn = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "o"]
    rows = tables["overlap_thresholds"].set_index(["metric", "slice"])["value"]
    keys = [("recall", name.lower()) for name in titles[:4]] + [("recall", ""), ("precision", "")]
    assert np.allclose(drawn, 100 * rows[[*keys, ("false_positive_rate", "")]])


@pytest.mark.parametrize("case", CASES)
def test_it_draws_what_a_study_has(case):
    figure = draw("data_overlap", CASES[case](sample.small()))
    assert pixels(figure).std() > 0
    assert any("not measured" in text for text in texts(figure)) == (
        case in ("nothing", "empty", "no thresholds", "no overlap at all")
    )


def test_it_fits_a_page_and_saves_the_same_bytes(tmp_path):
    tables = sample.large()
    shuffled = {name: table.sample(frac=1, random_state=3) for name, table in tables.items()}
    for name, some in (("one", tables), ("two", shuffled)):
        figure = draw("data_overlap", some)
        assert figure.get_figwidth() <= style.DOUBLE and figure.get_figheight() <= style.PAGE
        style.save(figure, tmp_path / f"{name}.pdf", tmp_path / f"{name}.png")
    assert (tmp_path / "one.pdf").read_bytes() == (tmp_path / "two.pdf").read_bytes()
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize("tables", (sample.small, sample.large))
def test_labels_do_not_overlap_and_colours_are_those_of_the_groups(tables):
    figure = draw("data_overlap", tables())
    assert_apart(figure)
    drawn = {
        (line.get_gid()[6:], to_hex(line.get_color()).upper())
        for a in figure.axes
        for line in a.lines
        if line.get_gid()
    }
    assert drawn == {(group, style.color(group).upper()) for group, _ in drawn} and len(drawn) >= 3
