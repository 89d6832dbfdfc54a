"""How far confidence and accuracy part, before and after temperature scaling, at home and under shift."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import frames, style

TABLES = ("calibration", "accuracy", "models")
_COLUMNS = 4
_METRICS = {"ece": "ECE (%)", "nll": "NLL (nats)"}
_LEAST = 10  # a bin with fewer images says nothing: its interval spans most of the axis
_RELIABILITY_GROUPS = (
    "clip_zero_shot",
    "clip_finetuned",
    "standard",
    "more_data",
    "self_supervised",
    "robust",
)


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Calibration against accuracy on each data set, and reliability diagrams of a few models.

    Upper panels: expected calibration error (15 equal-width bins on the top confidence) and negative log
    likelihood (y) against accuracy (x), one arrow a model: hollow before, filled after one temperature that
    was fitted on half of the in-distribution set is applied. Lower panels: accuracy in each confidence bin
    (Clopper-Pearson 95 % bars) for the most accurate model of each group, in distribution, with the share
    of images by bin. Answers figure 4 of Tu et al. (NeurIPS 2023, arXiv 2402.07410; finding F7).
    """
    calibration, accuracy, models = (frames.table(tables, name) for name in TABLES)
    measured = calibration[calibration["metric"].isin(list(_METRICS))]
    home = _home(calibration, accuracy)
    names = frames.dataset_order(measured["dataset"])
    names = [name for name in names if name == home] + [name for name in names if name != home]
    blocks = max(1, -(-len(names) // _COLUMNS))
    figure = style.figure(style.DOUBLE, min(1.45 * 2 * blocks + 2.3, style.PAGE))
    rows = 2 * blocks + 1
    grid = figure.add_gridspec(rows, _COLUMNS, height_ratios=[1] * (rows - 1) + [1.15])
    seen = []
    for number, metric in enumerate(_METRICS):
        for position in range(max(len(names), 1)):
            axes = figure.add_subplot(grid[number * blocks + position // _COLUMNS, position % _COLUMNS])
            name = names[position] if names else ""
            points = _points(measured, accuracy, models, name, metric)
            _scaling(axes, points, metric, frames.dataset_title(name) + (" (ID)" if name == home else ""))
            if position % _COLUMNS == 0 and len(points):
                axes.set_ylabel(_METRICS[metric])
            seen.append(points)
    _reliability(figure, [grid[rows - 1, column] for column in range(_COLUMNS)], calibration, models, accuracy, home)
    points = pd.concat(seen)
    states = [
        Line2D([], [], linestyle="none", marker="o", markersize=4, color=fill, markeredgecolor="#333333",
               markeredgewidth=0.8, label=label)
        for fill, label in (("white", "Before scaling"), ("#333333", "After scaling"))
    ]  # fmt: skip
    handles = style.group_handles(points["group"]) + style.family_handles(points["family"])
    style.legend(figure, handles + states if len(points) else [], columns=6)
    return figure


def _home(calibration: pd.DataFrame, accuracy: pd.DataFrame) -> str:
    """The in-distribution set: the one that temperatures were fitted on."""
    fitted = frames.dataset_order(calibration.loc[calibration["metric"] == "temperature", "dataset"])
    return fitted[0] if fitted else frames.in_distribution(accuracy)


def _points(
    measured: pd.DataFrame, accuracy: pd.DataFrame, models: pd.DataFrame, name: str, metric: str
) -> pd.DataFrame:
    """One row a model: x accuracy, before, after."""
    x = frames.pick(accuracy, metric="accuracy", dataset=name, slice="")[["model", "value"]]
    rows = frames.pick(measured, metric=metric, dataset=name, slice=["before", "after"])
    states = rows.pivot(index="model", columns="slice", values="value").reindex(columns=["before", "after"])
    joined = x.rename(columns={"value": "x"}).merge(states.reset_index(), on="model")
    return frames.describe(joined.dropna(subset=["x"]), models)


def _scaling(axes: Axes, points: pd.DataFrame, metric: str, title: str) -> None:
    axes.set_title(title)
    if not len(points):
        style.empty(axes)
        return
    unit = 100 if metric == "ece" else 1
    crowded = len(points) > 60
    for (group, family), some in style.by_look(points):
        colour, shape = style.color(group), style.marker(family)
        both = some.dropna(subset=["before", "after"])
        axes.vlines(both["x"], unit * both["before"], unit * both["after"], color=colour, linewidth=0.5,
                    alpha=0.25 if crowded else 0.5, zorder=2)  # fmt: skip
        for state, fill, depth in (("before", "white", 3), ("after", colour, 4)):
            (dots,) = axes.plot(some["x"], unit * some[state], linestyle="none", marker=shape, zorder=depth,
                                markersize=2.4 if crowded else 3.6, color=colour, markerfacecolor=fill,
                                markeredgecolor=colour, markeredgewidth=0.7)  # fmt: skip
            style.mark_group(dots, group)
    axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    style.percent_axis(axes, "x")
    axes.set_xlabel("Accuracy (%)")


def _reliability(
    figure: Figure,
    cells: list,
    calibration: pd.DataFrame,
    models: pd.DataFrame,
    accuracy: pd.DataFrame,
    home: str,
) -> None:
    rows = calibration[calibration["dataset"] == home]
    bins = frames.pick(rows, metric=["bin_accuracy", "bin_confidence"])
    bins = frames.describe(bins, models)
    if not len(bins):
        axes = figure.add_subplot(cells[0])
        axes.set_title("Reliability")
        style.empty(axes)
        return
    for position, (model, some) in enumerate(_examples(bins, accuracy, home, len(cells))):
        axes = figure.add_subplot(cells[position])
        group = str(some["group"].iloc[0])
        axes.set_title(style.wrap(style.short(str(some["title"].iloc[0]), 44), 24), color=style.color(group))
        _diagram(axes, some[some["model"] == model], group)
        if position == 0:
            axes.set_ylabel("Accuracy in the bin (%)")


def _examples(bins: pd.DataFrame, accuracy: pd.DataFrame, home: str, most: int) -> list[tuple[str, pd.DataFrame]]:
    """The most accurate model of each group, in a fixed order of groups, filled up with the next best."""
    scores = frames.pick(accuracy, metric="accuracy", dataset=home, slice="").set_index("model")["value"]
    known = bins.drop_duplicates("model")[["model", "group"]]
    known = known.assign(score=known["model"].map(scores).fillna(-1.0))
    known = known.sort_values(["score", "model"], ascending=[False, True], kind="stable")
    best = known.drop_duplicates("group").set_index("group")["model"]
    chosen = [best[group] for group in _RELIABILITY_GROUPS if group in best.index]
    chosen += [model for model in known["model"] if model not in chosen]
    return [(model, bins[bins["model"] == model]) for model in chosen[:most]]


def _diagram(axes: Axes, bins: pd.DataFrame, group: str) -> None:
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    state_and_bin = bins["slice"].str.split(":", expand=True)
    bins = bins.assign(state=state_and_bin[0], bin=state_and_bin.get(1, ""))
    for state, fill in (("before", "white"), ("after", style.color(group))):
        some = bins[bins["state"] == state]
        values = some.pivot(index="bin", columns="metric", values="value")
        values = values.reindex(columns=["bin_confidence", "bin_accuracy"]).dropna().sort_index()
        n = some[some["metric"] == "bin_accuracy"].set_index("bin")["n"].reindex(values.index).fillna(0)
        values, n = values[n >= _LEAST], n[n >= _LEAST]
        if not len(values):
            continue
        low, high = statistics.clopper_pearson((values["bin_accuracy"] * n).clip(0, n), n)
        x, y = values["bin_confidence"], values["bin_accuracy"]
        axes.vlines(x, low, high, color=style.color(group), linewidth=0.5, alpha=0.5)
        (dots,) = axes.plot(x, y, marker="o", markersize=2.8, linewidth=0.7, zorder=3,
                            color=style.color(group), markerfacecolor=fill, markeredgewidth=0.7,
                            linestyle="-" if state == "after" else ":")  # fmt: skip
        style.mark_group(dots, group)
        if state == "after":
            heights = 0.22 * n / n.max()
            axes.bar(x, heights, width=0.03, color=style.color(group), alpha=0.25, linewidth=0, zorder=0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_aspect("equal", adjustable="box")
    ticks = np.linspace(0, 1, 5)
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    style.percent_axis(axes, "x")
    style.percent_axis(axes, "y")
    axes.set_xlabel("Confidence (%)")
