"""Zero-shot retrieval against zero-shot classification, by training source."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import frames, strips, style

TABLES = ("retrieval", "accuracy", "models")
# Where captions are few distinct sentences, only duplicates_positive asks for what can be known.
_CONVENTIONS = ("karpathy_test", "duplicates_positive", "own_captions")
_DIRECTIONS = {"image": "text to image", "text": "image to text"}  # {direction}_recall@k names what is found
_DEPTHS = {1: "black", 5: "#999999", 10: "white"}
_MARKERS = "os^DvP*X<p>h8"
_LEAST = 0.5  # below this accuracy recall and accuracy are both near the floor
_MOST_SETS = 3


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Recall at 1 (y) against zero-shot accuracy (x) on each data set, residuals by source, correlations.

    Left: one point a model, colour by group, marker by training source; the line is least squares over the
    models above 50 % accuracy (all, when these are fewer than three), r is Pearson's over the same n models;
    others are not shown. Right: each source's mean distance from the first panel's line, in points, with a
    95 % bootstrap interval over its models; below it r for recall at 1, 5 and 10, with Fisher's 95 % interval.
    Answers the retrieval section of Tu et al. (arXiv 2410.01534; finding F8).
    """
    retrieval, accuracy, models = (frames.table(tables, name) for name in TABLES)
    points = _points(retrieval, accuracy, models)
    sets = frames.dataset_order(points["dataset"])[:_MOST_SETS] or [""]
    sources = sorted(set(points["training"]), key=lambda name: (name.casefold(), name))
    home = frames.in_distribution(accuracy)
    home_title = f"{frames.dataset_title(home)} accuracy (%)" if home in frames.NAMED else "ID accuracy (%)"
    figure = style.figure(style.DOUBLE, max(1.95 * len(sets) + 0.3, 4.1 if len(sources) > 6 else 3.2))
    halves = figure.add_gridspec(1, 2, width_ratios=[2, 1.05])
    grid = halves[0].subgridspec(len(sets), 2)
    for row, dataset in enumerate(sets):
        for column, direction in enumerate(_DIRECTIONS):
            axes = figure.add_subplot(grid[row, column])
            _panel(axes, _of(points, dataset, direction), sources, _title(dataset, direction))
            if len(points):
                axes.set_xlabel(home_title)
                axes.set_ylabel("Recall@1 (%)" if column == 0 else "")
    lines = 0.45 + 0.16 * 2 * len(sets)
    total = 0.45 + 0.16 * max(len(set(_fitted(_of(points, sets[0], "image"))[0]["training"])), 2)
    cells = halves[1].subgridspec(2, 1, height_ratios=[total, lines])
    _residuals(figure.add_subplot(cells[0]), _of(points, sets[0], "image"), sources, _title(sets[0], "image"))
    _correlations(figure.add_subplot(cells[1]), points, sets)
    depths = [
        Line2D([], [], linestyle="none", marker="o", markersize=3.6, color=face, markeredgecolor="black",
               markeredgewidth=0.6, label=f"r of recall@{depth}")
        for depth, face in _DEPTHS.items() if points["metric"].str.endswith(f"@{depth}").any()
    ]  # fmt: skip
    style.legend(figure, style.group_handles(points["group"]) + depths, columns=7)
    return figure


def _points(retrieval: pd.DataFrame, accuracy: pd.DataFrame, models: pd.DataFrame) -> pd.DataFrame:
    """One row a model, data set and metric: x accuracy, y recall; one convention a data set."""
    home = frames.in_distribution(accuracy)
    x = frames.pick(accuracy, metric="accuracy", dataset=home, slice="")[["model", "value"]]
    metrics = [f"{direction}_recall@{depth}" for direction in _DIRECTIONS for depth in _DEPTHS]
    rows = frames.pick(retrieval[retrieval["convention"].isin(_shown(retrieval))], metric=metrics, slice="")
    points = rows.rename(columns={"value": "y"}).merge(x.rename(columns={"value": "x"}), on="model")
    points = frames.describe(points.dropna(subset=["x", "y"]), models)
    return points.assign(training=points["training"].map(frames.source_title))


def _shown(retrieval: pd.DataFrame) -> list[str]:
    """The conventions shown; a data set whose results have several is shown under the first of _CONVENTIONS."""
    kept = [frames.one_convention(some, _CONVENTIONS) for _, some in retrieval.groupby("dataset", sort=True)]
    return sorted({name for some in kept for name in some["convention"]})


def _of(points: pd.DataFrame, dataset: str, direction: str, depth: int = 1) -> pd.DataFrame:
    return points[(points["dataset"] == dataset) & (points["metric"] == f"{direction}_recall@{depth}")]


def _title(dataset: str, direction: str) -> str:
    name = frames.dataset_title(dataset)
    return f"{name}, {_DIRECTIONS[direction]}" if name else _DIRECTIONS[direction].capitalize()


def _look(source: str, sources: list[str], group: str) -> dict:
    """Marker and face of a training source; hollow once the shapes are used up. The edge tells the group."""
    position = sources.index(source)
    hollow = position >= len(_MARKERS) or position % 2 == 1
    colour = style.color(group)
    return {"marker": _MARKERS[position % len(_MARKERS)], "color": colour, "markeredgecolor": colour,
            "markerfacecolor": "white" if hollow else colour, "markeredgewidth": 0.7}  # fmt: skip


def _fitted(points: pd.DataFrame) -> tuple[pd.DataFrame, statistics.Line | None]:
    inside = points[points["x"] >= _LEAST]
    inside = inside if len(inside) >= 3 else points
    if len(inside) < 3 or inside["x"].nunique() < 2:
        return inside, None
    return inside, statistics.fit_line(inside["x"], inside["y"], "linear", "ols")


def _panel(axes: Axes, points: pd.DataFrame, sources: list[str], title: str) -> None:
    axes.set_title(title)
    if not len(points):
        style.empty(axes)
        return
    inside, line = _fitted(points)
    if len(inside) <= 60:
        axes.vlines(inside["x"], inside["low"], inside["high"], color="#999999", linewidth=0.5, zorder=2)
    for (source, group), some in inside.groupby(["training", "group"], sort=True):
        (dots,) = axes.plot(some["x"], some["y"], linestyle="none", markersize=3.2, alpha=0.85, zorder=3,
                            **_look(str(source), sources, str(group)))  # fmt: skip
        style.mark_group(dots, str(group))
    if line is not None:
        ends = np.array([inside["x"].min(), inside["x"].max()])
        axes.plot(ends, line.predict(ends), color="black", linewidth=0.9, zorder=2)
        axes.set_title(f"{title}\nr = {line.r:.3f}, n = {line.n} models")
    style.percent_axis(axes, "x")
    style.percent_axis(axes, "y")


def _residuals(axes: Axes, points: pd.DataFrame, sources: list[str], title: str) -> None:
    axes.set_title(f"Residual by source\n({title})")
    inside, line = _fitted(points)
    if line is None:
        style.empty(axes)
        return
    inside = inside.assign(residual=100 * statistics.effective_robustness(line, inside["x"], inside["y"]))
    means = inside.groupby("training")["residual"].mean().reset_index()
    means = means.sort_values(["residual", "training"], ascending=[False, True], kind="stable")
    labels = []
    for place, source in enumerate(means["training"]):
        some = inside[inside["training"] == source].sort_values(["group", "model"])
        group = str(some["group"].mode().iloc[0])
        look = _look(str(source), sources, group)
        del look["color"]
        strips.mean(axes, some["residual"].to_numpy(), place, group, room=0.3, **look)
        labels.append(f"{style.short(str(source), 20)} ({len(some)})")
    axes.axvline(0, color="black", linewidth=0.7, zorder=1)
    strips.categories(axes, labels)
    axes.set_xlabel("Above the line (points)")


def _correlations(axes: Axes, points: pd.DataFrame, sets: list[str]) -> None:
    axes.set_title("r with accuracy")
    titles: list[str] = []
    lowest = 1.0
    for dataset in sets:
        for direction in _DIRECTIONS:
            at, found = len(titles), False
            for number, (depth, face) in enumerate(_DEPTHS.items()):
                _, line = _fitted(_of(points, dataset, direction, depth))
                if line is None:
                    continue
                found, place = True, at + 0.24 * (number - 1)
                low, high = strips.pearson_interval(line.r, line.n)
                axes.hlines(place, low, high, color="#555555", linewidth=0.9, zorder=2)
                axes.plot(line.r, place, linestyle="none", marker="o", markersize=3.4, color=face,
                          markeredgecolor="black", markeredgewidth=0.6, zorder=3)  # fmt: skip
                lowest = min(lowest, low)
            if found:
                titles.append(_title(dataset, direction))
    if not titles:
        style.empty(axes)
        return
    strips.categories(axes, titles)
    axes.set_xlim(max(-1.05, lowest - 0.05), 1.02)
    axes.set_xlabel("Pearson's r")
