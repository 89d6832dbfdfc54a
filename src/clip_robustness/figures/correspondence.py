"""Recall of dense correspondence by viewpoint, and against accuracy in distribution."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import frames, labels, strips, style

TABLES = ("correspondence", "accuracy", "models")
_PROTOCOL = "probe3d"
_UNITS = {"cm": "cm", "px": "px", "": "of the box"}
_DASHES: dict[str, Any] = {
    "vit": "-",
    "resnet": "--",
    "convnext": ":",
    "other": "-.",
}  # several families share a group's colour
_FEW = 16  # models whose points are named, and whose own lines are drawn


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """One row a data set: recall by viewpoint (left) and overall against accuracy in distribution (right).

    Left: the mean over the models of a group and family, with a 95 % bootstrap interval over its models, or a single
    model's own interval over pairs; each model's own line behind it, where there are few. Right: a point a model, its
    interval over pairs, Pearson's r. Answers the correspondence part of Tu et al. (arXiv 2410.01534; finding F9).
    """
    correspondence, accuracy, models = (frames.table(tables, name) for name in TABLES)
    values = _shown(frames.describe(correspondence[correspondence["metric"] == "recall"], models))
    sets = frames.dataset_order(values["dataset"])
    if not sets:
        return style.unmeasured("Correspondence")
    home = frames.in_distribution(accuracy)
    x = frames.pick(accuracy, metric="accuracy", dataset=home, slice="")[["model", "value"]]
    figure = style.figure(style.DOUBLE, min(2.15 * len(sets) + 0.45, style.PAGE))
    grid = figure.add_gridspec(len(sets), 2)
    for number, dataset in enumerate(sets):
        some = values[values["dataset"] == dataset]
        threshold = _binned(some)
        left, right = (figure.add_subplot(grid[number, column]) for column in (0, 1))
        _by_viewpoint(left, some[some["slice"].str.startswith(f"{threshold}:")], frames.dataset_title(dataset))
        overall = some[some["slice"] == threshold]
        points = overall.rename(columns={"value": "y"}).merge(x.rename(columns={"value": "x"}), on="model")
        _against_accuracy(right, points.dropna(subset=["x", "y"]), frames.dataset_title(dataset))
        left.set_ylabel(f"Recall at {_spoken(threshold)} (%)")
        if number == len(sets) - 1 and len(points):
            right.set_xlabel(
                f"{frames.dataset_title(home)} accuracy (%)" if home in frames.NAMED else "ID accuracy (%)"
            )
    style.legend(figure, _handles(values), columns=4)
    return labels.finish(figure)


def _shown(values: pd.DataFrame) -> pd.DataFrame:
    """One convention a model and data set: Probe3D's own before others, and with it convolutional maps resized."""
    rank = [
        (not name.startswith(_PROTOCOL), name.endswith("normed"), "to" not in name.rpartition("stride")[2], name)
        for name in values["convention"]
    ]
    order = [name for *_, name in sorted(set(rank))]
    kept = values.assign(_rank=values["convention"].map({name: place for place, name in enumerate(order)}))
    best = kept.groupby(["model", "dataset"])["_rank"].transform("min")
    return kept[kept["_rank"] == best].sort_values(["dataset", "model", "slice"], kind="stable")


def _binned(values: pd.DataFrame) -> str:
    """The threshold whose recall is also given by viewpoint, else the first ("" if there is none)."""
    names = sorted(set(values["slice"]))
    by_viewpoint = [name.partition(":")[0] for name in names if ":" in name]
    return (by_viewpoint or names or [""])[0]


def _spoken(threshold: str) -> str:
    number = threshold.rstrip("cmpx")
    return f"{number} {_UNITS.get(threshold.removeprefix(number), '')}"


def _looks(values: pd.DataFrame) -> list[tuple[str, str]]:
    """(group, family) of the models, in the order of the legends."""
    present = set(zip(values["group"], values["family"], strict=True))
    return [(group, family) for group in style.GROUPS for family in style.FAMILIES if (group, family) in present]


def _handles(values: pd.DataFrame) -> list[Line2D]:
    count = values.groupby(["group", "family"])["model"].nunique()
    return [
        Line2D([], [], marker=style.marker(family), markersize=4, color=style.color(group), linewidth=1.1,
               linestyle=_DASHES[family],
               markeredgecolor="black", markeredgewidth=0.5,
               label=f"{style.GROUPS[group][0]}, {style.FAMILIES[family][0]} ({count[group, family]})")
        for group, family in _looks(values)
    ]  # fmt: skip


def _by_viewpoint(axes: Axes, values: pd.DataFrame, title: str) -> None:
    axes.set_title(title)
    if not len(values):
        style.empty(axes)
        return
    values = frames.split_slice(values, "threshold", "bin")
    bins = sorted(set(values["bin"]), key=lambda name: float(name.partition("-")[0]))
    places = values.assign(place=values["bin"].map({name: place for place, name in enumerate(bins)}))
    shown = _looks(values)
    for number, (group, family) in enumerate(shown):
        some = places[(places["group"] == group) & (places["family"] == family)]
        shift = 0.3 * ((number + 0.5) / len(shown) - 0.5)
        _line(axes, some, shift, group, family, values["model"].nunique() <= _FEW)
    degrees = any("-" in name for name in bins)
    n = {name: frames.fmt_n(values[values["bin"] == name]) for name in bins}
    axes.set_xticks(range(len(bins)), [f"{name}{'°' if degrees else ''}\n{n[name]} pairs" for name in bins])
    axes.set_xlabel("Angle between the views" if degrees else "Viewpoint variation")
    axes.set_ylim(bottom=0)
    axes.grid(False, axis="x")
    style.percent_axis(axes, "y")


def _line(axes: Axes, values: pd.DataFrame, shift: float, group: str, family: str, few: bool) -> None:
    """The mean of the models of one look along the bins, and each model's own line where they are `few`."""
    table = values.pivot_table(index="model", columns="place", values="value").sort_index()
    colour, at = style.color(group), table.columns.to_numpy() + shift
    if few and len(table) > 1:
        for own in table.to_numpy():
            axes.plot(at, own, color=colour, linewidth=0.5, alpha=0.4, zorder=2)
    if len(table) > 1:
        spans = [statistics.bootstrap_mean(column[~np.isnan(column)]) for column in table.to_numpy().T]
    else:
        known = values.set_index("place").loc[table.columns]
        spans = list(zip(known["low"], known["high"], strict=True))
    low, high = np.array(spans, float).T
    axes.vlines(at, low, high, color=colour, linewidth=1.1, zorder=3)
    (line,) = axes.plot(at, table.mean(axis=0), color=colour, linewidth=1.1, linestyle=_DASHES[family],
                        marker=style.marker(family), markersize=3.8, markeredgecolor="black", markeredgewidth=0.5,
                        zorder=4)  # fmt: skip
    style.mark_group(line, group)


def _against_accuracy(axes: Axes, points: pd.DataFrame, title: str) -> None:
    axes.set_title(title)
    if not len(points):
        style.empty(axes)
        return
    style.scatter(axes, points)
    if len(points) >= 3 and points["x"].nunique() > 1:
        r = statistics.pearson(points["x"], points["y"])
        low, high = strips.pearson_interval(r, len(points))
        axes.set_title(f"{title}: r = {r:.2f} [{low:.2f}, {high:.2f}], n = {len(points)} models")
    style.percent_axis(axes, "x")
    style.percent_axis(axes, "y")
    axes.margins(x=0.08, y=0.12)
    if len(points) <= _FEW:
        labels.label_points(axes, _named(points))


def _named(points: pd.DataFrame) -> Sequence[tuple[float, float, str, str]]:
    ordered = points.sort_values(["y", "model"], ascending=[False, True])
    return [(row.x, row.y, style.short(row.title, 26), row.group) for row in frames.records(ordered)]
