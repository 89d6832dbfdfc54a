"""What near-duplicates of a test set in a reference corpus do to its accuracy, by how many there are."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from clip_robustness.figures import frames, strips, style

TABLES = ("data_overlap", "overlap_thresholds", "models")
_EFFECTS = {
    "accuracy_difference": ("Overlapping against clean", "Accuracy difference (points)"),
    "gain": ("All against clean", "Accuracy gained (points)"),
}
_CONTROLS = {
    "detected": ("o", ""),
    "planted": ("^", "\n(control: copies planted)"),
    "disjoint": ("v", "\n(control: disjoint)"),
}
_ALPHA = 0.05
_ROOM = 0.8  # of a row, shared by its groups
_TICKS = (0, 0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1)
_FALSE = "#E3E3E3"


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Test sets by the share of images that overlap; beside it what that does to accuracy, and the detector's rates.

    Share (per cent, square-root axis): 95 % interval of Clopper and Pearson; grey: up to the upper end of the interval
    of the false-positive rate. Differences of accuracy (points): one symbol a model group, the mean with a 95 %
    bootstrap interval over its models, a small dot each; a single model has its own interval. Filled where at least
    half of the group's models pass the one-sided binomial test at 5 % after Bonferroni. Right: recall by transform,
    precision and false-positive rate of the threshold, on the pairs that did not choose it.
    After figure 17 of Radford et al. (2021, arXiv 2103.00020); answers finding F7 of Wang et al. (arXiv 2403.10499).
    """
    overlap, thresholds, models = (frames.table(tables, name) for name in TABLES)
    points, rates = _points(overlap, models), _rates(thresholds)
    shares = _shares(overlap)
    groups = [group for group in style.GROUPS if group in set(points["group"])]
    rows = max(len(shares), len(rates), 4)
    figure = style.figure(style.DOUBLE, min(0.9 + rows * (0.24 + 0.03 * len(groups)), style.PAGE))
    grid = figure.add_gridspec(1, 4, width_ratios=[0.9, 1.15, 1.15, 0.75])
    _share_panel(figure.add_subplot(grid[0]), shares, rates)
    for column, (metric, (title, unit)) in enumerate(_EFFECTS.items(), start=1):
        axes = figure.add_subplot(grid[column])
        axes.set_title(title)
        _effects(axes, points[points["metric"] == metric], list(shares["dataset"]), groups)
        axes.set_xlabel(unit)
    _detector(figure.add_subplot(grid[3]), rates)
    style.legend(figure, _handles(points, rates), columns=5)
    return figure


def _shares(overlap: pd.DataFrame) -> pd.DataFrame:
    """One row a data set, by the share that overlaps, the largest first; models may differ by unlabelled images."""
    rows = frames.pick(overlap, metric="overlap_share", slice="").dropna(subset=["value"])
    rows = rows.sort_values(["dataset", "model"]).drop_duplicates("dataset")
    return rows.assign(control=_control(rows)).sort_values(["value", "dataset"], ascending=[False, True])


def _control(rows: pd.DataFrame) -> pd.Series:
    return rows["convention"].where(rows["convention"].isin(list(_CONTROLS)), "detected")


def _points(overlap: pd.DataFrame, models: pd.DataFrame) -> pd.DataFrame:
    """Rows of both differences, with the columns control and significant."""
    rows = frames.pick(overlap, metric=list(_EFFECTS), slice="").dropna(subset=["value"])
    tests = overlap[overlap["metric"].eq("binomial_p") & overlap["convention"].str.startswith("one_sided_bonferroni")]
    tests = tests.sort_values(["convention", "source"]).drop_duplicates(["model", "dataset"])
    p = tests.rename(columns={"value": "p"})[["model", "dataset", "p"]]
    rows = rows.merge(p, on=["model", "dataset"], how="left")
    return frames.describe(rows.assign(control=_control(rows), significant=rows["p"] < _ALPHA), models)


def _rates(thresholds: pd.DataFrame) -> pd.DataFrame:
    """The rows of one detector: the first by name, should a study have several."""
    rows = thresholds[thresholds["metric"].isin(["recall", "precision", "false_positive_rate"])].dropna(
        subset=["value"]
    )
    return rows[rows["model"] == rows["model"].min()].sort_values(["metric", "slice"]) if len(rows) else rows


def _share_panel(axes: Axes, shares: pd.DataFrame, rates: pd.DataFrame) -> None:
    axes.set_title("Images that overlap")
    if not len(shares):
        style.empty(axes)
        return
    right = max(1.08 * float(np.nanmax(np.sqrt(shares[["value", "high"]].to_numpy(float)))), 0.05)
    false = rates.loc[rates["metric"] == "false_positive_rate", "high"].dropna()
    if len(false):
        axes.axvspan(-right, float(np.sqrt(false.max())), color=_FALSE, linewidth=0, zorder=0)
    for place, row in enumerate(frames.records(shares)):
        axes.plot(np.sqrt([row.low, row.high]), [place, place], color="black", linewidth=1.2)
        axes.plot([np.sqrt(row.value)], [place], marker=_CONTROLS[row.control][0], markersize=4, color="black")
    names = [
        style.wrap(style.short(frames.dataset_title(row.dataset), 28), 18) + _CONTROLS[row.control][1]
        for row in frames.records(shares)
    ]
    strips.categories(axes, names)
    ticks = _ticks(right)
    axes.set_xticks([float(np.sqrt(tick)) for tick in ticks], [f"{100 * tick:g}" for tick in ticks])
    axes.set_xlim(-0.06 * right, right)
    axes.set_xlabel("Share of the test set (%)")


def _effects(axes: Axes, points: pd.DataFrame, datasets: list[str], groups: list[str]) -> None:
    if not len(points):
        style.empty(axes)
        return
    axes.axvline(0, color="black", linewidth=0.7, zorder=1)
    step = _ROOM / len(groups)
    for place, dataset in enumerate(datasets):
        for number, group in enumerate(groups):
            some = points[(points["dataset"] == dataset) & (points["group"] == group)]
            _symbol(axes, some, place + (number + 0.5) * step - _ROOM / 2, 0.7 * step)
    strips.categories(axes, [""] * len(datasets))


def _symbol(axes: Axes, points: pd.DataFrame, at: float, room: float) -> None:
    if not len(points):
        return
    colour, first = style.color(points["group"].iloc[0]), points.iloc[0]
    passed = points["significant"].mean() >= 0.5
    face: dict[str, Any] = {} if passed else {"markerfacecolor": "white", "markeredgecolor": colour}
    strips.mean(axes, 100 * points["value"].to_numpy(), at, first["group"], (100 * first["low"], 100 * first["high"]),
                room=room, marker=_CONTROLS[first["control"]][0], **face)  # fmt: skip


def _ticks(right: float) -> list[float]:
    """Round shares that lie a good part of the axis apart, 0 and then the larger ones first."""
    kept: list[float] = []
    for tick in sorted(_TICKS, key=lambda tick: (tick > 0, -tick)):
        place = np.sqrt(tick)
        if place <= right and all(abs(place - np.sqrt(other)) >= 0.16 * right for other in kept):
            kept.append(tick)
    return sorted(kept)


def _detector(axes: Axes, rates: pd.DataFrame) -> None:
    axes.set_title("Detector")
    if not len(rates):
        style.empty(axes)
        return
    rows = [*frames.records(rates[(rates["metric"] == "recall") & (rates["slice"] != "")])]
    rows += frames.records(rates[(rates["metric"] == "recall") & (rates["slice"] == "")])
    rows += [
        row
        for metric in ("precision", "false_positive_rate")
        for row in frames.records(rates[rates["metric"] == metric])
    ]
    names = {"recall": "Recall", "precision": "Precision", "false_positive_rate": "False positives"}
    for place, row in enumerate(rows):
        axes.plot([100 * row.low, 100 * row.high], [place, place], color="black", linewidth=1.2)
        axes.plot([100 * row.value], [place], marker="o", markersize=3.6, color="black")
    titles = [
        style.short(str(row.slice).replace("_", " ").capitalize(), 16) if row.slice else names[row.metric]
        for row in rows
    ]
    strips.categories(axes, titles)
    axes.set_xlim(-4, 104)
    axes.set_xlabel("Held-out pairs (%)")


def _handles(points: pd.DataFrame, rates: pd.DataFrame) -> list[Any]:
    if not len(points):
        return []
    look: dict[str, Any] = {"linestyle": "none", "markersize": 4.2, "color": "#777777"}
    handles: list[Any] = style.group_handles(points["group"])
    handles.append(Line2D([], [], marker="o", markeredgecolor="black", label="p < 0.05 after Bonferroni", **look))
    handles.append(Line2D([], [], marker="o", markerfacecolor="white", label="Not significant", **look))
    if (rates["metric"] == "false_positive_rate").any():
        handles.append(Patch(color=_FALSE, label="Range of false positives"))
    return handles
