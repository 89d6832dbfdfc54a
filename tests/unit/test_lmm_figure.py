"""The figure of vision-language models: the numbers of the table, where they belong; degenerate tables; legibility."""

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from clip_robustness.figures import lmm, style
from tests.unit.figure_tables import texts
from tests.unit.test_figures import assert_apart, pixels

CATEGORIES = {"": 4835, "background": 3500, "material": 800, "texture": 535}
SLICES = CATEGORIES | {"selector_right": 1500, "selector_wrong": 3335}
SELECTORS = {"clip": "clip_a", "resnet50": "rn"}
LLAVAS = ("LLaVA-1.5 7B", "LLaVA-1.5 13B", "LLaVA-1.6 Vicuna 7B", "LLaVA-1.6 Hermes-Yi 34B")


def study(llavas=LLAVAS, others=3, dataset="imagenet_d"):
    """Tables with `llavas`, the two selectors and as many further CLIPs and classifiers."""
    rng, rows = np.random.default_rng(0), []
    models = [(f"llava_{i}", title, "vlm", "vit") for i, title in enumerate(llavas)]
    models += [("clip_a", "CLIP ViT-L/14 (WIT)", "clip_zero_shot", "vit"), ("rn", "ResNet-50", "standard", "resnet")]
    models += [
        (f"m{i}", f"Model {i}", ("clip_zero_shot", "standard", "more_data")[i % 3], "vit") for i in range(others)
    ]

    def put(model, metric, name, value, convention):
        rows.append({
            "study": "test", "model": model, "dataset": dataset, "metric": metric, "slice": name, "value": value,
            "low": value - 0.02, "high": value + 0.02, "n": SLICES[name], "convention": convention,
            "source": "measured",
        })  # fmt: skip

    for selector, itself in SELECTORS.items():
        for name in SLICES:
            for model, _, group, _ in models:
                if group == "vlm":
                    for how in ("likelihood", "likelihood_per_token", "greedy", "greedy_all", "greedy_swapped"):
                        put(model, "accuracy", name, rng.uniform(0.6, 0.9), f"{selector}:{how}")
                    put(model, "dropped", name, 0.034, f"{selector}:greedy")
                    for reference in ("clip_a", "rn"):
                        own = "_own" if reference == itself else ""
                        gain = f"{selector}:likelihood-two_way{own}:{reference}"
                        put(model, "gain", name, rng.uniform(-0.1, 0.4), gain)
                    continue
                own = "_own" if model == itself else ""
                forced = {"selector_right": 1.0, "selector_wrong": 0.0}.get(name, 0.3) if own else rng.uniform(0.4, 0.8)
                put(model, "accuracy", name, forced, f"{selector}:two_way{own}")
    table = pd.DataFrame(models, columns=["model", "title", "group", "family"])
    return {"choice": pd.DataFrame(rows), "models": table}


def marks(axes):
    """(x, y, whether hollow, colour) of each large mark."""
    lines = [line for line in axes.lines if str(line.get_gid()).startswith("group:")]
    return [(*line.get_xydata()[0], line.get_markerfacecolor() == "white", to_hex(line.get_color())) for line in lines]


def test_draws_and_saves_the_same_bytes(tmp_path):
    contents = []
    for run in ("one", "two"):
        figure = lmm.draw(study())
        style.save(figure, tmp_path / f"{run}.pdf", tmp_path / f"{run}.png", title="lmm", study="test")
        contents.append((tmp_path / f"{run}.pdf").read_bytes() + (tmp_path / f"{run}.png").read_bytes())
    assert contents[0] == contents[1]
    assert not any("not measured" in text for text in texts(figure))


def test_a_row_for_each_selector_and_its_numbers():
    tables = study(llavas=LLAVAS[:1], others=0)
    figure, choice = lmm.draw(tables), tables["choice"]
    titles = [axes.get_title() for axes in figure.axes]
    assert [title for title in titles if title.startswith("Accuracy")] == [
        "Accuracy,\nwrong class chosen by clip",
        "Accuracy,\nwrong class chosen by resnet50",
    ]
    accuracy, gain, reading = figure.axes[:3]
    labels = [label.get_text() for label in accuracy.get_yticklabels()]
    assert labels == ["All (4,835)", "Background (3,500)", "Material (800)", "Texture (535)", "clip right (1,500)",
                      "clip wrong (3,335)"]  # fmt: skip
    drawn = {(round(x, 9), to_hex(style.color(group))) for group in ("vlm", "clip_zero_shot", "standard")
             for x, _, _, colour in marks(accuracy) if colour == to_hex(style.color(group))}  # fmt: skip
    hows = choice["convention"].isin(["clip:likelihood", "clip:two_way", "clip:two_way_own"])
    rows = choice[hows & (choice["metric"] == "accuracy")].merge(tables["models"], on="model")
    assert drawn == {(round(row.value, 9), to_hex(style.color(row.group))) for row in rows.itertuples()}
    gains = choice[(choice["metric"] == "gain") & choice["convention"].str.startswith("clip:")]["value"]
    assert np.allclose(sorted(x for x, *_ in marks(gain)), sorted(100 * gains))
    assert [label.get_text() for label in reading.get_yticklabels()] == ["LLaVA-1.5 7B\n(3.4 %)"]
    overall = choice[(choice["model"] == "llava_0") & (choice["metric"] == "accuracy") & (choice["slice"] == "")]
    overall = overall[overall["convention"].str.startswith("clip:")]["value"]
    assert np.allclose(sorted(x for x, *_ in marks(reading)), sorted(overall))


def test_the_selector_is_hollow_and_not_in_its_groups_mean():
    tables = study(others=3)
    figure, choice = lmm.draw(tables), tables["choice"]
    accuracy, gain = figure.axes[:2]
    hollow = sorted(x for x, _, empty, _ in marks(accuracy) if empty)
    own = choice[choice["convention"] == "clip:two_way_own"]["value"]
    assert np.allclose(hollow, sorted(own)) and {0.0, 1.0} <= set(hollow)
    fair = choice[(choice["model"] == "m0") & (choice["convention"] == "clip:two_way") & (choice["slice"] == "")]
    colour = to_hex(style.color("clip_zero_shot"))
    blue = [x for x, y, empty, own in marks(accuracy) if not empty and own == colour and y < 0.5]
    assert blue == pytest.approx(fair["value"].tolist())
    entries = [text.get_text() for text in gain.get_legend().get_texts()]
    assert entries == ["over ResNet-50", "over CLIP ViT-L/14 (WIT), which chose"]
    means = choice[choice["convention"] == "clip:likelihood-two_way_own:clip_a"].groupby("slice")["value"].mean()
    assert np.allclose(sorted(x for x, _, empty, _ in marks(gain) if empty), sorted(100 * means))


def test_the_order_of_rows_does_not_matter():
    tables = study()
    shuffled = {name: table.sample(frac=1, random_state=3) for name, table in tables.items()}
    assert np.array_equal(pixels(lmm.draw(tables)), pixels(lmm.draw(shuffled)))


def degenerate():
    tables = study()
    choice = tables["choice"]
    answers = choice["model"].str.startswith("llava")
    return {
        "nothing": {},
        "empty": {name: table.iloc[:0] for name, table in tables.items()},
        "no vision-language model": tables | {"choice": choice[~answers]},
        "no opponent": tables | {"choice": choice[answers & (choice["metric"] != "gain")]},
        "one model": tables | {"choice": choice[choice["model"] == "llava_0"]},
        "no categories": tables | {"choice": choice[choice["slice"] == ""]},
        "no text": tables | {"choice": choice[~choice["convention"].str.contains("greedy")]},
        "no intervals": tables | {"choice": choice.assign(low=np.nan, high=np.nan)},
        "no models table": {"choice": choice},
        "only dropped": tables | {"choice": choice[choice["metric"] == "dropped"]},
        "odd names": tables | {"models": tables["models"].assign(title=r"$\frac$ <b>&" + 60 * "é", group="new")},
        "no convention": tables | {"choice": choice.assign(convention="")},
    }


DEGENERATE = degenerate()


@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_tables(case):
    figure = lmm.draw(DEGENERATE[case])
    assert pixels(figure).std() > 0
    missing = any("not measured" in text for text in texts(figure))
    assert missing == (case in ("nothing", "empty", "no vision-language model", "no opponent", "only dropped",
                                "no convention"))  # fmt: skip


@pytest.mark.parametrize("others", [0, 200])
def test_it_is_legible(others):
    figure = lmm.draw(study(others=others))
    assert figure.get_figwidth() <= style.DOUBLE and figure.get_figheight() <= style.PAGE
    assert_apart(figure)
    renderer = figure.canvas.get_renderer()
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()] + figure.legends
    labels = [label for axes in figure.axes for label in [*axes.get_yticklabels(), axes.xaxis.label, axes.title]]
    boxes = [part.get_window_extent(renderer) for part in [*legends, *labels]]
    boxes = [box for box in boxes if box.width > 1]
    for i, one in enumerate(boxes):
        assert not any(one.overlaps(other) for other in boxes[i + 1 :])
        assert one.x0 >= -1 and one.x1 <= figure.bbox.x1 + 1 and one.y0 >= -1


def test_data_sets_have_rows_of_their_own():
    one, two = study(others=0), study(others=0, dataset="mini_d")
    figure = lmm.draw(one | {"choice": pd.concat([one["choice"], two["choice"]])})
    titles = [axes.get_title() for axes in figure.axes if axes.get_title().startswith("Accuracy")]
    assert len(titles) == 4 and sum("\nD, wrong class" in title for title in titles) == 2
    assert figure.get_figheight() <= style.PAGE
