"""Zero-shot retrieval against zero-shot classification, by training source."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clip_robustness.core import statistics
from clip_robustness.figures import frames, style

TABLES = ("retrieval", "accuracy", "models")
_PANELS = (
    ("coco", "image_recall@1", "COCO, text to image"),
    ("coco", "text_recall@1", "COCO, image to text"),
    ("flickr30k", "image_recall@1", "Flickr30k, text to image"),
    ("flickr30k", "text_recall@1", "Flickr30k, image to text"),
)
_MARKERS = "os^DvP*X<p>h8"
_LEAST = 0.5  # below this ImageNet accuracy recall and accuracy are both near the floor


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Recall at 1 on COCO and Flickr30k (y) against ImageNet accuracy (x), and residuals by training source.

    Left: one point a model, colour by group, marker by training source; the line is least squares over the
    models above 50 % ImageNet accuracy, r is Pearson's over the same n models; weaker models are not shown.
    Right: each source's mean distance from the line for COCO text-to-image, in points, with a 95 % bootstrap
    interval over its models. Answers the retrieval section of Tu et al. (arXiv 2410.01534; finding F8).
    """
    retrieval, accuracy, models = (frames.table(tables, name) for name in TABLES)
    home = frames.in_distribution(accuracy)
    x = frames.pick(accuracy, metric="accuracy", dataset=home, slice="")[["model", "value"]]
    rows = frames.pick(retrieval, metric=["image_recall@1", "text_recall@1"], slice="")
    points = rows.rename(columns={"value": "y"}).merge(x.rename(columns={"value": "x"}), on="model")
    points = frames.describe(points.dropna(subset=["x", "y"]), models)
    points = points.assign(training=points["training"].where(points["training"] != "", "unknown"))
    sources = sorted(set(points["training"]), key=lambda name: (name.casefold(), name))
    figure = style.figure(style.DOUBLE, 4.1)
    grid = figure.add_gridspec(2, 3, width_ratios=[1, 1, 0.95])
    for position, (dataset, metric, title) in enumerate(_PANELS):
        axes = figure.add_subplot(grid[position // 2, position % 2])
        some = points[(points["dataset"] == dataset) & (points["metric"] == metric)]
        _panel(axes, some, sources, title)
        if position % 2 == 0 and len(some):
            axes.set_ylabel("Recall@1 (%)")
    _residuals(figure.add_subplot(grid[:, 2]), points, sources)
    style.legend(figure, style.group_handles(points["group"]), columns=6)
    return figure


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
    axes.set_xlabel("ImageNet accuracy (%)")


def _residuals(axes: Axes, points: pd.DataFrame, sources: list[str]) -> None:
    dataset, metric, title = _PANELS[0]
    axes.set_title(f"Residual by training source\n({title})")
    inside, line = _fitted(points[(points["dataset"] == dataset) & (points["metric"] == metric)])
    if line is None:
        style.empty(axes)
        return
    inside = inside.assign(residual=100 * statistics.effective_robustness(line, inside["x"], inside["y"]))
    means = inside.groupby("training")["residual"].mean().reset_index().sort_values(["residual", "training"])
    labels = []
    for place, source in enumerate(means["training"]):
        some = inside[inside["training"] == source].sort_values(["group", "model"])
        values, group = some["residual"].to_numpy(), str(some["group"].mode().iloc[0])
        axes.plot(values, np.full(len(values), place), linestyle="none", marker="o", markersize=2, zorder=2,
                  color=style.color(group), alpha=0.3, markeredgewidth=0)  # fmt: skip
        if len(values) > 1:
            axes.hlines(place, *statistics.bootstrap_mean(values), color=style.color(group), linewidth=1.2, zorder=3)
        (dot,) = axes.plot(values.mean(), place, linestyle="none", markersize=4.6, zorder=4,
                           **_look(str(source), sources, group))  # fmt: skip
        style.mark_group(dot, group)
        labels.append(f"{style.short(str(source), 20)} ({len(values)})")
    axes.axvline(0, color="black", linewidth=0.7, zorder=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.7, len(labels) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel("Recall@1 above the line (points)")
