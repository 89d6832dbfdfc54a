"""The figure of 3D corruptions: what it shows, from tables like the mini study's, like the papers', and degenerate."""

import functools

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from clip_robustness.core import statistics
from clip_robustness.figures import corruption_3d, frames, style
from tests.unit.figure_tables import MODELS, measure, texts
from tests.unit.test_figure_contents import panel
from tests.unit.test_figures import assert_apart, pixels

SIX = ("near_focus", "far_focus", "xy_motion_blur", "z_motion_blur", "fog_3d", "flash")
MORE = ("low_light", "iso_noise", "color_quant", "bit_error", "h265_abr", "h265_crf")
TITLES = ("Near focus", "Far focus", "XY-motion blur", "Z-motion blur", "Fog 3D", "Flash")
MORE_TITLES = ("Low light", "ISO noise", "Color quant", "Bit error", "H.265 ABR", "H.265 CRF")
COLUMNS = ["model", "title", "architecture", "group", "family", "source", "train_images", "parent", "score"]


def rows_of(model, dataset, score, types, rng):
    """Rows as the corruption metric writes them: of each setting, of each type, of all."""
    rows, means = [], []
    for number, name in enumerate(types):
        odds = np.log(score / (1 - score)) - (0.5 + 0.05 * number) * np.arange(1, 6) + 0.1 * rng.normal(size=5)
        values = (1 / (1 + np.exp(-odds))).tolist()
        rows += [measure(model, dataset, "accuracy", v, f"{name}:{s}", 72, "12_way") for s, v in enumerate(values, 1)]
        rows.append(measure(model, dataset, "accuracy", np.mean(values), name, 72, "12_way"))
        means.append(np.mean(values))
    return [*rows, measure(model, dataset, "accuracy", np.mean(means), "", 72, "12_way")]


def tables_of(models, home, three_d, video):
    """A clean set, a natural shift, ImageNet-C, and the 3D corruptions in one or two data sets."""
    rng, accuracy = np.random.default_rng(0), []
    for row in models.itertuples():
        accuracy.append(measure(row.model, home, "accuracy", row.score))
        accuracy.append(measure(row.model, "imagenet_r", "accuracy", row.score - 0.2))
        accuracy.append(measure(row.model, "imagenet_r", "reference_accuracy", row.score))
        accuracy.append(measure(row.model, "imagenet_c_noise", "accuracy", row.score - 0.3, "fog:3"))
        accuracy += rows_of(row.model, three_d, row.score, SIX, rng)
        if video:
            accuracy += rows_of(row.model, video, row.score - 0.05, MORE, rng)
    return {"models": models.drop(columns="score"), "accuracy": pd.DataFrame(accuracy)}


@functools.cache
def _study():
    models = pd.DataFrame([row for row in MODELS if row[3] != "human"], columns=COLUMNS)
    return tables_of(models, "mini_val", "mini_3dcc", "mini_3dcc_video")


@functools.cache
def _crowd():
    """84 CLIPs and 127 others, with the six geometric types only."""
    rng, rows = np.random.default_rng(3), []
    for number in range(211):
        clip = number < 84
        group = "clip_zero_shot" if clip else ("clip_finetuned", "standard", "more_data", "self_supervised")[number % 4]
        family = ("vit", "vit", "vit", "convnext", "vit", "resnet")[number % 6]
        rows.append((f"model_{number:03d}", f"{family}_large_patch14_clip_336.laion2b_{number}", "a", group, family,
                     "LAION-2B", 2e9, "", float(rng.uniform(0.58, 0.84) + 0.05 * (not clip))))  # fmt: skip
    return tables_of(pd.DataFrame(rows, columns=COLUMNS), "imagenet_val", "imagenet_3dcc", "")


def study():
    return dict(_study())


def crowd():
    return dict(_crowd())


def draw(tables):
    return corruption_3d.draw(tables)


def test_draws_and_saves_the_same_bytes(tmp_path):
    contents = []
    for run in ("one", "two"):
        tables = {name: table.sample(frac=1, random_state=len(run)) for name, table in study().items()}
        paths = tmp_path / f"{run}.pdf", tmp_path / f"{run}.png"
        style.save(draw(tables), *paths, title="corruption_3d", study="test")
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("tables", [study, crowd])
def test_fits_the_page_and_labels_do_not_overlap(tables):
    figure = draw(tables())
    assert figure.get_figwidth() <= style.DOUBLE and figure.get_figheight() <= style.PAGE
    assert not any("not measured" in text for text in texts(figure))
    assert_apart(figure)
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
            box = label.get_window_extent(renderer)
            assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0


def test_a_panel_a_type_the_geometric_ones_first():
    shown = [axes.get_title() for axes in draw(study()).axes]
    assert shown[:12] == [*TITLES, *MORE_TITLES]
    shown = [axes.get_title() for axes in draw(crowd()).axes]
    assert shown[:6] == list(TITLES) and not set(MORE_TITLES) & set(shown)
    assert shown[6:9] == ["Severity 1", "Severity 3", "Severity 5"]


def curve(axes, group, shape):
    lines = [line for line in axes.lines if line.get_gid() == f"group:{group}" and line.get_marker() == shape]
    assert len(lines) == 1
    return lines[0].get_ydata()


def test_a_line_is_the_mean_of_its_models_by_severity():
    tables = study()
    figure, accuracy = draw(tables), tables["accuracy"]
    for name, title in (("near_focus", "Near focus"), ("h265_crf", "H.265 CRF")):
        for group, shape, members in (
            ("clip_zero_shot", "o", ["clip_a", "clip_b", "clip_third"]),
            ("clip_zero_shot", "s", ["clip_rn"]),
            ("standard", "s", ["rn", "small"]),
        ):
            own = accuracy[accuracy["model"].isin(members)]
            expected = [100 * own.loc[own["slice"] == f"{name}:{s}", "value"].mean() for s in range(1, 6)]
            assert curve(panel(figure, title), group, shape) == pytest.approx(expected)
    assert [label.get_text() for label in panel(figure, "H.265 CRF").get_xticklabels()] == list("12345")


def settings(accuracy, severity, types=SIX):
    own = accuracy[accuracy["slice"].isin([f"{name}:{severity}" for name in types])]
    return own.groupby("model")["value"].mean()


@pytest.mark.parametrize("tables", [study, crowd])
def test_against_clean_accuracy_is_the_mean_over_the_six(tables):
    tables = tables()
    figure, accuracy = draw(tables), tables["accuracy"]
    home = next(name for name in accuracy["dataset"] if name.endswith("val"))
    clean = accuracy[accuracy["dataset"] == home].set_index("model")["value"]
    for severity in (1, 3, 5):
        axes = panel(figure, f"Severity {severity}")
        drawn = np.concatenate([line.get_xydata() for line in axes.lines if line.get_gid()])
        y = settings(accuracy, severity)
        expected = np.column_stack([clean[y.index], y])
        np.testing.assert_allclose(drawn[np.lexsort(drawn.T)], expected[np.lexsort(expected.T)], atol=1e-9)


def test_other_clips_stand_above_the_line_of_the_vits():
    tables = crowd()
    accuracy, models = tables["accuracy"], tables["models"]
    clip = models[models["group"] == "clip_zero_shot"].set_index("model")["family"]
    clean = accuracy[accuracy["dataset"] == "imagenet_val"].set_index("model")["value"]
    axes = panel(draw(tables), "Other CLIPs above the line")
    for shape, family in (("s", "resnet"), ("^", "convnext")):
        means = [line for line in axes.lines if line.get_gid() and line.get_marker() == shape]
        drawn = [float(line.get_ydata()[0]) for line in sorted(means, key=lambda line: line.get_xdata()[0])]
        expected = []
        for severity in range(1, 6):
            y = settings(accuracy, severity)
            vit, own = (clip.index[clip == name] for name in ("vit", family))
            line = statistics.fit_line(clean[vit], y[vit])
            expected.append(100 * float(np.mean(y[own] - line.predict(clean[own].to_numpy()))))
        assert drawn == pytest.approx(expected)


def test_a_model_without_all_six_is_in_no_mean():
    tables = study()
    accuracy = tables["accuracy"]
    tables["accuracy"] = accuracy[~((accuracy["model"] == "rn") & (accuracy["slice"] == "flash:5"))]
    figure = draw(tables)
    counts = [sum(len(line.get_xydata()) for line in panel(figure, f"Severity {s}").lines if line.get_gid())
              for s in (1, 5)]  # fmt: skip
    assert counts == [10, 9]


def test_colours_are_the_groups():
    colours = {(line.get_gid()[6:], to_hex(line.get_color()).upper())
               for axes in draw(crowd()).axes for line in axes.lines if line.get_gid()}  # fmt: skip
    assert {group for group, _ in colours} == set(crowd()["models"]["group"])
    assert all(colour == style.color(group).upper() for group, colour in colours)


def degenerate():
    tables = study()
    accuracy, models = tables["accuracy"], tables["models"]
    one = {name: table[table["model"] == "clip_a"] for name, table in tables.items()}
    return {
        "nothing": {},
        "empty": {name: table.iloc[:0] for name, table in tables.items()},
        "no 3D corruption": tables | {"accuracy": accuracy[~accuracy["dataset"].str.contains("3dcc")]},
        "one model": one,
        "no models table": {"accuracy": accuracy},
        "no clean accuracy": tables | {"accuracy": accuracy[accuracy["dataset"].str.contains("3dcc")]},
        "no CLIP": tables | {"models": models.query("group != 'clip_zero_shot'")},
        "one severity": tables | {"accuracy": accuracy[~accuracy["slice"].str.contains(":[1245]")]},
        "one type": tables | {"accuracy": accuracy[~accuracy["slice"].str.contains(":[2345]|[^h]:")]},
        "other types only": tables | {"accuracy": accuracy[accuracy["dataset"] != "mini_3dcc"]},
        "no intervals": tables | {"accuracy": accuracy.assign(low=np.nan, high=np.nan)},
        "an accuracy of zero": tables
        | {"accuracy": accuracy.assign(value=accuracy["value"].where(accuracy["model"] != "clip_b", 0.0))},
        "odd names": tables | {"models": models.assign(title=r"$\frac$ <b>&" + 60 * "é", family="")},
    }  # fmt: skip


DEGENERATE = degenerate()


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_tables(case):
    figure = draw(DEGENERATE[case])
    assert pixels(figure).std() > 0
    if case in ("nothing", "empty", "no 3D corruption"):
        assert any("not measured" in text for text in texts(figure))
    if case == "one model":
        assert any("fewer than 3 CLIP ViTs" in text for text in texts(figure))


def test_the_clean_set_is_found_beside_corruptions():
    assert frames.in_distribution(frames.table(study(), "accuracy")) == "mini_val"
