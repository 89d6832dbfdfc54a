"""The figure of correspondence: what it draws, of which convention, and what it says when there is nothing."""

import functools

import numpy as np
import pandas as pd
import pytest

from clip_robustness.figures import style
from tests.unit.figure_tables import crowd, draw, measure, study, texts
from tests.unit.test_figures import assert_apart, pixels

BINS = {"mini_pairs": ("2px", ("0-15", "15-30", "60-180")), "spair": ("0.10", ("0", "1", "2"))}


@functools.cache
def _tables(base=study):
    tables = dict(base())
    models = tables["models"]
    rows = []
    for number, row in enumerate(models[models["group"] != "human"][:: 1 + len(models) // 80].itertuples()):
        own = "probe3d-stride16" if row.family == "vit" else "probe3d-stride32to16"
        for dataset, (threshold, bins) in BINS.items():
            for convention, share in (
                (own, 1.0),
                ("probe3d-stride32", 0.5),
                (f"{own}-normed", 0.4),
                ("a-stride16", 0.3),
            ):
                value = share * (0.3 + 0.4 * (number % 11) / 11)
                rows.append(measure(row.model, dataset, "recall", value, threshold, 100, convention))
                rows.append(measure(row.model, dataset, "recall", value / 2, "1px", 100, convention))
                for place, name in enumerate(bins):
                    part = measure(
                        row.model, dataset, "recall", value / (1 + place), f"{threshold}:{name}", 30, convention
                    )
                    rows.append(part)
    return tables | {"correspondence": pd.DataFrame(rows)}


def lines(axes):
    return [line for line in axes.lines if line.get_gid()]


def test_recall_of_probe3ds_convention_is_drawn():
    tables = _tables()
    figure = draw("correspondence", tables)
    left, right = figure.axes[2:]
    titles = ["SPair-71k", "SPair-71k", "Pairs of views", "Pairs of views"]
    assert [axes.get_title().partition(":")[0] for axes in figure.axes] == titles
    assert left.get_ylabel() == "Recall at 2 px (%)"
    assert figure.axes[0].get_ylabel() == "Recall at 0.10 of the box (%)"
    shown = tables["correspondence"].query("dataset == 'mini_pairs' and slice == '2px'")
    shown = shown[shown["convention"].isin(["probe3d-stride16", "probe3d-stride32to16"])].set_index("model")["value"]
    accuracy = tables["accuracy"].query("dataset == 'mini_val' and metric == 'accuracy'").set_index("model")["value"]
    drawn = np.concatenate([line.get_xydata() for line in lines(right)])
    expected = np.stack([accuracy[shown.index], shown], axis=1)
    np.testing.assert_allclose(drawn[np.lexsort(drawn.T)], expected[np.lexsort(expected.T)])
    assert right.get_title().endswith(f"n = {len(shown)} models")


def test_lines_are_means_of_a_group_and_family():
    tables = _tables()
    figure = draw("correspondence", tables)
    known = tables["models"].set_index("model")
    rows = tables["correspondence"].query("dataset == 'mini_pairs' and slice == '2px:15-30'")
    rows = rows[rows["convention"].isin(["probe3d-stride16", "probe3d-stride32to16"])]
    groups = rows.groupby([rows["model"].map(known["group"]), rows["model"].map(known["family"])])["value"].mean()
    drawn = {(line.get_gid()[6:], line.get_marker()): line.get_ydata()[1] for line in lines(figure.axes[2])}
    assert drawn == {(g, style.marker(f)): pytest.approx(value) for (g, f), value in groups.items()}
    assert figure.axes[2].get_xticklabels()[0].get_text() == "0-15°\n30 pairs"
    assert figure.axes[0].get_xticklabels()[0].get_text() == "0\n30 pairs"


@pytest.mark.parametrize("base", (study, crowd))
def test_nothing_overlaps(base):
    figure = draw("correspondence", _tables(base))
    assert figure.get_figwidth() <= style.DOUBLE and figure.get_figheight() <= style.PAGE
    assert_apart(figure)


def test_the_order_of_rows_does_not_matter():
    tables = _tables()
    shuffled = {name: table.sample(frac=1, random_state=3) for name, table in tables.items()}
    assert np.array_equal(pixels(draw("correspondence", tables)), pixels(draw("correspondence", shuffled)))


def degenerate():
    tables = _tables()
    own = {name: tables[name] for name in ("correspondence", "accuracy", "models")}
    table = own["correspondence"]
    return {
        "no table": ({}, True),
        "empty": ({name: some.iloc[:0] for name, some in own.items()}, True),
        "one model": ({name: some[some["model"] == "clip_a"] for name, some in own.items()}, False),
        "no accuracy": (own | {"accuracy": own["accuracy"].iloc[:0]}, True),
        "no bins": (own | {"correspondence": table[~table["slice"].str.contains(":")]}, True),
        "no models table": (own | {"models": own["models"].iloc[:0]}, False),
        "no intervals": (own | {"correspondence": table.drop(columns=["low", "high", "n"])}, False),
        "a bin that a model lacks": (own | {"correspondence": table.drop(table.index[2])}, False),
    }


@pytest.mark.parametrize("case", degenerate())
def test_degenerate_tables(case):
    tables, unmeasured = degenerate()[case]
    figure = draw("correspondence", tables)
    assert pixels(figure).std() > 0
    assert any("not measured" in text.replace("\n", " ") for text in texts(figure)) == unmeasured
