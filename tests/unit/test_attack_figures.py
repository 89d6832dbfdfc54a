"""The figures of attacks and printed words: their numbers, and legibility with few and with many models."""

import importlib
import itertools
import string
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from clip_robustness.core import statistics
from clip_robustness.figures import adversarial, style
from tests.unit.figure_tables import draw, texts
from tests.unit.figure_tables_attacks import crowd, study
from tests.unit.test_figure_contents import panel, points, values
from tests.unit.test_figures import assert_apart, pixels

FIGURES = ("adversarial", "typographic")
CAPTIONS = Path(__file__).parents[2] / "report" / "captions"
SIX = ("clip_a", "clip_rn", "tuned", "rn", "vit", "cnx")


def few():
    return {name: table[table["model"].isin(SIX)] for name, table in study().items() if "model" in table}


def degenerate():
    tables = study()
    kept = {name: tables[name] for name in (*FIGURES, "models")}
    return {
        "nothing": {},
        "empty": {name: table.iloc[:0] for name, table in kept.items()},
        "one model": {name: table[table["model"] == "clip_a"] for name, table in kept.items()},
        "no intervals": {n: t.assign(low=np.nan, high=np.nan) if n != "models" else t for n, t in kept.items()},
        "no models table": {name: kept[name] for name in FIGURES},
        "all zero": {n: t.assign(value=0.0) if n != "models" else t for n, t in kept.items()},
        "no clean accuracy": {
            n: t[~t["metric"].str.startswith(("clean_", "accuracy_drop"))] if n != "models" else t
            for n, t in kept.items()
        },
        "odd names": kept | {"models": kept["models"].assign(title=r"$\frac$ <b>&" + 60 * "é", group="new", family="")},
    }


DEGENERATE = degenerate()


@pytest.mark.parametrize("name", FIGURES)
def test_draws_and_saves_the_same_bytes_whatever_the_order_of_rows(name, tmp_path):
    module = importlib.import_module(f"clip_robustness.figures.{name}")
    tables = {table: few()[table] for table in module.TABLES}
    shuffled = {table: rows.sample(frac=1, random_state=3) for table, rows in tables.items()}
    for folder, some in (("one", tables), ("two", shuffled)):
        figure = module.draw(some)
        style.save(figure, tmp_path / folder / "a.pdf", tmp_path / folder / "a.png", title=name, study="test")
    for file in ("a.pdf", "a.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert not any("not measured" in text for text in texts(figure))


@pytest.mark.parametrize("tables", (few, study, crowd))
@pytest.mark.parametrize("name", FIGURES)
def test_labels_do_not_overlap_and_colours_are_those_of_the_groups(name, tables):
    figure = draw(name, tables())
    assert figure.get_figwidth() <= style.DOUBLE and figure.get_figheight() <= style.PAGE
    assert_apart(figure)
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [tick.get_window_extent(renderer) for tick in ticks if tick.get_text() and tick.get_visible()]
            assert not any(one.overlaps(other) for one, other in itertools.pairwise(boxes))
    legend = figure.legends[0].get_window_extent(renderer)
    assert legend.x0 >= 0 and legend.x1 <= figure.bbox.x1
    marked = {
        (line.get_gid()[6:], to_hex(line.get_color()).upper())
        for a in figure.axes
        for line in a.lines
        if line.get_gid()
    }
    assert marked == {(group, style.color(group).upper()) for group, _ in marked} and len(marked) >= 3


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", FIGURES)
def test_degenerate_tables(name, case):
    figure = draw(name, DEGENERATE[case])
    assert pixels(figure).std() > 0
    if case in ("nothing", "empty"):
        assert any("not measured" in text for text in texts(figure))


@pytest.mark.parametrize("name", FIGURES)
def test_a_caption_has_only_places_that_are_known(name):
    text = (CAPTIONS / f"{name}.rst").read_text()
    known = {"study", "models", "datasets", "images", "groups", "conventions", "fits"}
    assert {"study", "models", "images", "conventions"} <= set(string.Template(text).get_identifiers()) <= known


def test_a_line_a_model_shows_the_table():
    tables = few()
    rows = tables["adversarial"]
    drawn = points(panel(draw("adversarial", tables), "MIM, transfer"))["clip_finetuned"]
    expected = [values(rows, metric="clean_accuracy")["tuned"]]
    budgets = (0.5, 1, 2, 4, 8, 16)
    expected += [values(rows, metric="accuracy_at", slice=f"mim_transfer:{eps:g}")["tuned"] for eps in budgets]
    assert np.allclose(drawn, np.column_stack([[0.25, *budgets], 100 * np.array(expected)]))


def test_many_models_are_shown_as_the_mean_of_their_group():
    tables = study()
    axes = panel(draw("adversarial", tables), "NES")
    at = values(tables["adversarial"], metric="accuracy_at", slice="nes:1")[
        ["clip_a", "clip_b", "clip_rn", "clip_third"]
    ]
    drawn = points(axes)["clip_zero_shot"]
    assert drawn[drawn[:, 0] == 1, 1] == pytest.approx(100 * at.mean())
    paths = [band.get_paths()[0].vertices for band in axes.collections if band.get_facecolor()[0, 2] > 0.65]
    low, high = 100 * np.array(statistics.bootstrap_mean(np.sort(at)))
    edges = np.concatenate(paths)[:, 1][np.concatenate(paths)[:, 0] == 1]
    assert np.isclose(edges, low).any() and np.isclose(edges, high).any()


def test_the_yardsticks_are_thin_lines_in_every_panel():
    tables = study()
    figure, rows = draw("adversarial", tables), tables["adversarial"]
    models = ["rn", "vit", "cnx", "small"]
    mean = 100 * values(rows, metric="accuracy_at", slice="pgd:0.5")[models].mean()
    for title in ("FGSM", "BIM, transfer", "SPSA"):
        thin = [line.get_xydata() for line in panel(figure, title).lines if line.get_linewidth() == 0.6]
        assert len(thin) == 2 * 3  # yardsticks times groups
        assert any(np.isclose(line[line[:, 0] == 0.5, 1], mean).all() for line in thin)
    without = rows[~rows["slice"].str.split(":").str[0].isin(list(adversarial.YARDSTICKS))]
    figure = draw("adversarial", tables | {"adversarial": without})
    assert not [line for line in panel(figure, "FGSM").lines if line.get_linewidth() == 0.6]
    assert "PGD, mean of the group" not in {text.get_text() for text in figure.legends[0].texts}


def test_the_reported_budget_is_marked():
    axes = panel(draw("adversarial", few()), "BIM")
    assert [list(line.get_xdata()) for line in axes.lines if list(line.get_ydata()) == [0, 1]] == [[2, 2]]


def test_medians_are_drawn_in_255ths_and_censored_ones_as_triangles():
    tables = few()
    axes = next(a for a in draw("adversarial", tables).axes if a.get_title().startswith("Median minimum"))
    assert axes.get_title().endswith("(Val, n = 200 images)")
    rows = tables["adversarial"].query("metric == 'median_distance'")
    names = [label.get_text().replace("\n", " ") for label in axes.get_xticklabels()]
    assert names[:6] == ["FGSM", "BIM", "MIM", "DIM", "Deep- Fool", "FGSM transf."]
    assert names[9:] == ["NES", "SPSA", "PGD", "Noise"]
    for place, (attack, shape) in {1: ("bim", "o"), 12: ("noise", "^")}.items():
        own = [line for line in axes.lines if line.get_gid() and abs(line.get_xdata()[0] - place) < 0.5]
        assert len(own) == 3 and {line.get_marker() for line in own} == {shape}
        value = 255 * values(rows, slice=attack)
        expected = [np.median(value[["clip_a", "clip_rn"]]), value["tuned"], np.median(value[["rn", "vit", "cnx"]])]
        assert sorted(line.get_ydata()[0] for line in own) == pytest.approx(sorted(expected))


def test_a_median_of_zero_has_a_place_that_says_so():
    tables = few()
    rows = tables["adversarial"]
    none = (rows["metric"] == "median_distance") & (rows["model"] == "tuned")
    axes = draw("adversarial", tables | {"adversarial": rows.assign(value=rows["value"].mask(none, 0.0))}).axes[-1]
    lowest = min(line.get_ydata()[0] for line in axes.lines if line.get_gid())
    assert dict(zip(axes.get_yticks(), (t.get_text() for t in axes.get_yticklabels()), strict=True))[lowest] == "0"


def test_faults_are_named_where_there_are_any():
    tables = few()
    rows = tables["adversarial"]
    some = (rows["metric"] == "faults") & (rows["slice"] == "bim") & (rows["model"] == "rn")
    figure = draw("adversarial", tables | {"adversarial": rows.assign(value=rows["value"].mask(some, 0.125))})
    assert [text.get_text() for text in panel(figure, "BIM").texts] == ["faults: up to 12 %"]
    assert not panel(figure, "MIM").texts


def test_attacks_that_were_not_made_are_named():
    tables = few()
    rows = tables["adversarial"]
    figure = draw("adversarial", tables | {"adversarial": rows[~rows["slice"].str.startswith(("spsa", "fgsm"))]})
    assert "not measured" in panel(figure, "SPSA").texts[0].get_text()
    assert panel(figure, "NES").lines and panel(figure, "BIM").get_ylabel() == "Accuracy (%)"


def test_the_data_set_of_most_models_and_budgets_in_pixels_are_shown():
    tables = few()
    rows = tables["adversarial"]
    other = rows[rows["model"] == "rn"].assign(dataset="cifar10", value=0.0)
    normalised = rows[rows["metric"] == "accuracy_at"].assign(convention="linf_normalized", value=0.0)
    both = pd.concat([other, normalised, rows], ignore_index=True)
    assert np.array_equal(
        pixels(draw("adversarial", tables | {"adversarial": both})), pixels(draw("adversarial", tables))
    )


def test_printed_words_a_line_and_a_row_a_model():
    tables = study()
    figure, rows = draw("typographic", tables), tables["typographic"]
    slopes = {tuple(np.round(line.get_ydata(), 6)) for line in figure.axes[0].lines}
    ends = [100 * values(rows, metric=metric) for metric in ("clean_accuracy", "accuracy")]
    assert slopes == {tuple(np.round([ends[0][m], ends[1][m]], 6)) for m in ends[0].index} and len(slopes) == 10
    assert figure.axes[0].get_title() == "Typographic, n = 400"
    order = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    rate = 100 * values(rows, metric="attack_success_rate")
    place = order.index("ConvNeXt, supervised")
    drawn = points(panel(figure, "Answered the word (%)"))["standard"]
    assert drawn[drawn[:, 1] == place, 0] == pytest.approx(rate["cnx"])
    assert order[0].startswith("CLIP") and drawn[:, 1].min() > 5  # by group, the most misled first
    hollow = [line for line in panel(figure, "Answered the word (%)").lines if line.get_color() == "white"]
    clean = 100 * values(rows, metric="clean_success_rate")
    assert sorted(line.get_xdata()[0] for line in hollow) == pytest.approx(sorted(clean))


def test_printed_words_by_group_of_many_models():
    tables = crowd()
    figure, rows = draw("typographic", tables), tables["typographic"].query("dataset == 'imagenet_t'")
    assert [axes.get_title() for axes in figure.axes[::3]] == ["ImageNet-T, n = 49,727", "CIFAR-10-T, n = 10,000"]
    groups = tables["models"].set_index("model")["group"]
    lost = 100 * values(rows, metric="accuracy_drop")
    drawn = points(panel(figure, "Accuracy lost to the word (points)"))
    names = [label.get_text() for label in figure.axes[1].get_yticklabels()]
    assert names[:3] == ["CLIP, zero-shot (84)", "CLIP, fine-tuned (44)", "Standard (80)"]
    for place, group in enumerate(("clip_zero_shot", "clip_finetuned", "standard")):
        assert drawn[group].tolist() == [[pytest.approx(lost[groups[lost.index] == group].mean()), place]]
