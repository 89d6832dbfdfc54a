"""Every figure: drawn from small tables and from degenerate ones, reproducible, consistent and legible."""

import importlib
import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from clip_robustness.figures import frames, labels, style
from tests.unit.figure_tables import SHIFTS, crowd, draw, measure, study, texts

FIGURES = ("effective_robustness", "shape_bias", "calibration", "visual_factors", "ood_detection", "retrieval")


@pytest.mark.parametrize("name", FIGURES)
def test_draws_and_saves_the_same_bytes(name, tmp_path):
    module = importlib.import_module(f"clip_robustness.figures.{name}")
    tables = {table: study()[table] for table in module.TABLES}
    contents = []
    for run in ("one", "two"):
        pdf, png = tmp_path / run / f"{name}.pdf", tmp_path / run / f"{name}.png"
        figure = module.draw(tables)
        style.save(figure, pdf, png, title=name, study="test", inputs={"models": "0" * 64})
        contents.append((pdf.read_bytes(), png.read_bytes()))
        assert figure.get_figwidth() <= style.DOUBLE and figure.get_figheight() <= style.PAGE
    assert contents[0] == contents[1]
    pdf, png = contents[0]
    assert pdf.startswith(b"%PDF") and png.startswith(b"\x89PNG")
    assert b"CreationDate" not in pdf and b"models sha256:" + b"0" * 64 in pdf
    assert not any("not measured" in text for text in texts(figure))


def test_bytes_do_not_depend_on_the_hash_seed(tmp_path):
    """A set or dict order that leaks into a figure would differ between processes, not within one."""
    study()["models"].to_parquet(tmp_path / "models.parquet")
    study()["shape_bias"].to_parquet(tmp_path / "shape_bias.parquet")
    code = (
        "import sys, pandas; from clip_robustness.figures import shape_bias, style; folder = sys.argv[1];"
        "t = {n: pandas.read_parquet(f'{folder}/{n}.parquet') for n in shape_bias.TABLES};"
        "style.save(shape_bias.draw(t), f'{folder}/{sys.argv[2]}.pdf', f'{folder}/{sys.argv[2]}.png')"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", code, str(tmp_path), seed], check=True, env=environment)
    assert (tmp_path / "1.pdf").read_bytes() == (tmp_path / "2.pdf").read_bytes()
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()


@pytest.mark.parametrize("name", FIGURES)
def test_the_order_of_rows_does_not_matter(name):
    tables = study()
    shuffled = {name: table.sample(frac=1, random_state=3) for name, table in tables.items()}
    one, two = (pixels(draw(name, some)) for some in (tables, shuffled))
    assert np.array_equal(one, two)


def pixels(figure):
    figure.set_dpi(50)
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())


def degenerate():
    tables = study()
    one = {name: table[table["model"] == "clip_a"] if "model" in table else table for name, table in tables.items()}
    without = {n: t.assign(low=np.nan, high=np.nan) if "low" in t else t for n, t in tables.items()}
    lean = {n: t.drop(columns=["low", "high", "n"], errors="ignore") for n, t in tables.items()}
    extreme = {
        n: t.assign(value=t["value"].where(t["model"] != "clip_b", 0.0)) if "value" in t else t
        for n, t in tables.items()
    }
    return {
        "nothing": {},
        "empty": {name: table.iloc[:0] for name, table in tables.items()},
        "one model": one,
        "no intervals": without,
        "no interval columns": lean,
        "no models table": {name: table for name, table in tables.items() if name != "models"},
        "no standard models": tables | {"models": tables["models"].query("group != 'standard'")},
        "no baselines": tables | {"baselines": tables["baselines"].iloc[:0]},
        "an accuracy of zero": extreme,
        "odd names": tables
        | {"models": tables["models"].assign(title=r"$\frac$ <b>&" + 60 * "é", group="new", family="")},
    }


DEGENERATE = degenerate()


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("name", FIGURES)
def test_degenerate_tables(name, case):
    figure = draw(name, DEGENERATE[case])
    assert pixels(figure).std() > 0
    if case in ("nothing", "empty"):
        assert any("not measured" in text for text in texts(figure))


def test_a_colour_means_the_same_group_everywhere():
    colours: dict[str, set] = {}
    for name in FIGURES:
        for axes in draw(name, study()).axes:
            for line in axes.lines:
                if str(line.get_gid()).startswith("group:"):
                    colours.setdefault(line.get_gid()[6:], set()).add(to_hex(line.get_color()).upper())
    assert set(colours) >= {"clip_zero_shot", "clip_finetuned", "standard", "human"}
    assert colours == {group: {style.color(group).upper()} for group in colours}


def test_group_colours_are_distinct():
    assert len({colour for _, colour in style.GROUPS.values()}) == len(style.GROUPS)


def test_each_model_is_drawn_once_at_its_place():
    tables = study()
    figure = draw("effective_robustness", tables)
    panel = next(axes for axes in figure.axes if axes.get_title() == "Sketch")
    drawn = np.concatenate([line.get_xydata() for line in panel.lines if line.get_gid()])
    accuracy = (
        tables["accuracy"].query("dataset == 'mini_sketch'").pivot(index="model", columns="metric", values="value")
    )
    expected = accuracy[["reference_accuracy", "accuracy"]].to_numpy()
    assert np.allclose(drawn[np.lexsort(drawn.T)], expected[np.lexsort(expected.T)])


def test_the_band_is_left_out_when_the_population_is_unknown():
    tables = study()
    with_band = draw("effective_robustness", tables)
    tables["baselines"] = tables["baselines"].assign(n=99)
    without = draw("effective_robustness", tables)
    count = [sum(len(axes.collections) for axes in figure.axes) for figure in (with_band, without)]
    assert count[0] - count[1] == len(SHIFTS)


def test_direct_labels_do_not_overlap():
    figure = style.figure(style.SINGLE, 2.5)
    axes = figure.add_subplot()
    points = np.random.default_rng(1).uniform(0.3, 0.7, size=(12, 2))
    (line,) = axes.plot(*points.T, "o")
    style.mark_group(line, "standard")
    axes.set(xlim=(0, 1), ylim=(0, 1))
    labels.label_points(axes, [(x, y, f"model number {i}", "standard") for i, (x, y) in enumerate(points)])
    labels.finish(figure)
    assert len(axes.texts) >= 8
    assert_apart(figure)


@pytest.mark.parametrize("tables", (study, crowd))
@pytest.mark.parametrize("name", FIGURES)
def test_labels_of_the_figures_do_not_overlap(name, tables):
    figure = draw(name, tables())
    assert figure.get_figwidth() <= style.DOUBLE and figure.get_figheight() <= style.PAGE
    assert_apart(figure)


def assert_apart(figure):
    from matplotlib.text import Text

    figure.draw_without_rendering()  # an annotation takes its place only when it is drawn
    renderer = figure.canvas.get_renderer()
    boxes = [Text.get_window_extent(text, renderer) for axes in figure.axes for text in axes.texts]
    titles = [axes.title.get_window_extent(renderer) for axes in figure.axes if axes.get_title()]
    everything = boxes + titles
    for i, one in enumerate(everything):
        assert not any(one.overlaps(other) for other in everything[i + 1 :])
        assert one.x0 >= -1 and one.x1 <= figure.bbox.x1 + 1


def test_logit_axis_ticks_are_apart_and_inside():
    for values in ([0.001, 0.5, 0.9], [0.90, 0.92], [0.5], [0.0, 1.0], [0.6, 0.61]):
        axes = style.figure(2, 2).add_subplot()
        style.logit_axis(axes, "x", values)
        ticks, (low, high) = axes.get_xticks(), axes.get_xlim()
        assert 1 <= len(ticks) <= 8 and low < high
        assert np.all((ticks >= low) & (ticks <= high)) and np.all(np.diff(ticks) > 0)


def test_short_keeps_both_ends():
    assert style.short("resnet50", 20) == "resnet50"
    cut = style.short("vit_large_patch14_clip_224.openai_ft_in12k_in1k", 24)
    assert len(cut) <= 24 and cut.startswith("vit_large") and cut.endswith("in12k_in1k")


def test_pick_prefers_the_named_convention_then_coverage():
    rows = [measure("a", "d", "accuracy", 0.1, convention="rare")]
    rows += [measure(m, "d", "accuracy", 0.2, convention="common") for m in "ab"]
    table = frames.table({"accuracy": pd.DataFrame(rows)}, "accuracy")
    assert list(frames.pick(table, metric="accuracy")["value"]) == [0.2, 0.2]
    assert list(frames.pick(table, prefer=["rare"], metric="accuracy")["value"]) == [0.1, 0.2]
