"""How far confidence and accuracy part, before and after temperature scaling, at home and under shift."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import frames, strips, style

TABLES = ("calibration", "accuracy", "models")
_METRICS = {"ece": "ECE (%)", "nll": "NLL (nats)"}
_WIDTH = "15_equal_width"  # the binning that the literature means by ECE
_STATES = ["before", "after"]
_DIAGRAMS = (2, 6)  # rows and columns of reliability diagrams
_LEAST = 10  # a bin with fewer images says nothing: its interval spans most of the axis
_DASHED = (0, (4, 3))


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Calibration against accuracy on each data set, transfer of the temperature, reliability of each model.

    Panels: expected calibration error (15 equal-width bins on the top confidence) and negative log likelihood
    (y) against accuracy (x), one stroke a model: hollow before, filled after one temperature that was fitted
    on half of the in-distribution set is applied. Then the change of ECE by data set (mean of a group, 95 %
    interval over its models), and where measured the Brier score and ECE in adaptive bins. Bottom: accuracy by
    confidence bin in distribution (Clopper-Pearson 95 %); of more than 12 models the best of each group, and
    all in the last diagram. Answers figure 4 of Tu et al. (NeurIPS 2023, arXiv 2402.07410; finding F7).
    """
    calibration, accuracy, models = (frames.table(tables, name) for name in TABLES)
    home = _home(calibration, accuracy)
    names = frames.dataset_order(calibration.loc[calibration["metric"].isin(list(_METRICS)), "dataset"])
    names = [name for name in names if name == home] + [name for name in names if name != home]
    if not names:
        return style.unmeasured("Calibration")
    bins = frames.describe(_bins(calibration, home), models)
    columns = 5 if len(names) > 8 else min(4, len(names))
    blocks = -(-len(names) // columns)
    diagrams = min(_DIAGRAMS[0], max(1, -(-bins["model"].nunique() // _DIAGRAMS[1])))
    heights = [1.28 * blocks + 0.05, 1.28 * blocks + 0.05, 1.35, 1.2 * diagrams]
    figure = style.figure(style.DOUBLE, min(sum(heights) + 0.5, style.PAGE))
    parts = figure.add_gridspec(4, 1, height_ratios=heights)
    seen = []
    for number, metric in enumerate(_METRICS):
        grid = parts[number].subgridspec(blocks, columns)
        for position, name in enumerate(names):
            axes = figure.add_subplot(grid[position // columns, position % columns])
            seen.append(_points(calibration, accuracy, models, name, metric))
            title = style.wrap(_title(name, home), 18 if columns > 4 else 30)
            _scaling(axes, seen[-1], metric, title, position // columns == blocks - 1)
            if position % columns == 0 and len(seen[-1]):
                axes.set_ylabel(_METRICS[metric])
    _summary(figure, parts[2], calibration, accuracy, models, names, home)
    _reliability(figure, parts[3].subgridspec(diagrams, _DIAGRAMS[1]), diagrams, bins, accuracy, home)
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


def _title(name: str, home: str) -> str:
    return frames.dataset_title(name) + (" (ID)" if name == home else "")


def _states(calibration: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row a model and data set: before, after."""
    rows = frames.pick(calibration, prefer=[_WIDTH], metric=metric, slice=_STATES)
    wide = rows.pivot(index=["dataset", "model"], columns="slice", values="value").reindex(columns=_STATES)
    return wide.reset_index()


def _points(
    calibration: pd.DataFrame, accuracy: pd.DataFrame, models: pd.DataFrame, name: str, metric: str
) -> pd.DataFrame:
    """One row a model: x accuracy, before, after."""
    x = frames.pick(accuracy, metric="accuracy", dataset=name, slice="")[["model", "value"]]
    states = _states(calibration[calibration["dataset"] == name], metric).drop(columns="dataset")
    joined = x.rename(columns={"value": "x"}).merge(states, on="model")
    return frames.describe(joined.dropna(subset=["x"]), models)


def _scaling(axes: Axes, points: pd.DataFrame, metric: str, title: str, last: bool = True) -> None:
    axes.set_title(title)
    if not len(points):
        style.empty(axes)
        return
    unit = 100 if metric == "ece" else 1
    crowded = len(points) > 60
    for (group, family), some in style.by_look(points):
        colour, shape = style.color(group), style.marker(family)
        both = some.dropna(subset=_STATES)
        axes.vlines(both["x"], unit * both["before"], unit * both["after"], color=colour, linewidth=0.5,
                    alpha=0.25 if crowded else 0.5, zorder=2)  # fmt: skip
        for state, fill, depth in (("before", "white", 3), ("after", colour, 4)):
            (dots,) = axes.plot(some["x"], unit * some[state], linestyle="none", marker=shape, zorder=depth,
                                markersize=2.2 if crowded else 3.6, color=colour, markerfacecolor=fill,
                                markeredgecolor=colour, markeredgewidth=0.4 if crowded else 0.7,
                                alpha=0.7 if crowded else 1.0)  # fmt: skip
            style.mark_group(dots, group)
    axes.set_ylim(0, 1.06 * axes.get_ylim()[1])
    axes.locator_params(nbins=5)
    style.percent_axis(axes, "x")
    if last:
        axes.set_xlabel("Accuracy (%)")


def _summary(
    figure: Figure,
    cell,
    calibration: pd.DataFrame,
    accuracy: pd.DataFrame,
    models: pd.DataFrame,
    names: list[str],
    home: str,
) -> None:
    """How the temperature transfers; beside it the Brier score in distribution, and ECE in adaptive bins."""
    brier = _points(calibration, accuracy, models, home, "brier")
    adaptive = _adaptive(calibration, models)
    beside = [name for name, points in (("brier", brier), ("adaptive", adaptive)) if len(points)]
    widths = [6.6 - 1.2 * len(beside)] + [1.2] * len(beside)
    grid = cell.subgridspec(1, len(widths), width_ratios=widths)
    change = _states(calibration, "ece")
    change = change.assign(value=100 * (change["after"] - change["before"])).dropna(subset=["value"])
    _transfer(figure.add_subplot(grid[0, 0]), frames.describe(change, models), names, home)
    if "brier" in beside:
        axes = figure.add_subplot(grid[0, 1])
        _scaling(axes, brier, "brier", f"Brier score,\n{_title(home, home)}")
    if "adaptive" in beside:
        _compare_bins(figure.add_subplot(grid[0, len(beside)]), adaptive)


def _transfer(axes: Axes, change: pd.DataFrame, names: list[str], home: str) -> None:
    axes.set_title("Change of ECE by the ID temperature")
    if not len(change):
        style.empty(axes)
        return
    groups = [group for group in style.GROUPS if group in set(change["group"])]
    step = 0.8 / len(groups)
    for place, name in enumerate(names):
        for number, group in enumerate(groups):
            some = change[(change["dataset"] == name) & (change["group"] == group)]
            if len(some):
                at = place - 0.4 + step * (number + 0.5)
                strips.mean(axes, some["value"].to_numpy(), at, group, room=0.7 * step, across=False, markersize=3.6)
        if place:
            axes.axvline(place - 0.5, color="#E6E6E6", linewidth=0.5, zorder=0)
    axes.axhline(0, color="black", linewidth=0.7, zorder=1)
    axes.set_xlim(-0.5, len(names) - 0.5)
    titles = [_title(name, home) for name in names]
    if len(names) > 7:
        titles = [style.wrap(title.removeprefix("ImageNet-").replace("threshold ", ">"), 9) for title in titles]
    axes.set_xticks(range(len(names)), [style.wrap(title, 14) for title in titles] if len(names) <= 7 else titles,
                    fontsize=6 if len(names) <= 7 else 5.3)  # fmt: skip
    axes.tick_params(axis="x", length=0)
    axes.grid(False, axis="x")
    axes.set_ylabel("ECE after − before\n(points)")


def _adaptive(calibration: pd.DataFrame, models: pd.DataFrame) -> pd.DataFrame:
    """One row a model, data set and state: x ECE in equal-width bins, y in adaptive bins."""
    long = [_states(calibration, metric).melt(["dataset", "model"], _STATES, "state") for metric in
            ("ece", "adaptive_ece")]  # fmt: skip
    both = long[0].merge(long[1], on=["dataset", "model", "state"], suffixes=("_x", "_y"))
    both = both.rename(columns={"value_x": "x", "value_y": "y"}).dropna(subset=["x", "y"])
    return frames.describe(both, models).assign(low=np.nan, high=np.nan)


def _compare_bins(axes: Axes, points: pd.DataFrame) -> None:
    axes.set_title("Adaptive bins,\nall sets")
    style.scatter(axes, points, errors=False)
    top = 1.05 * points[["x", "y"]].to_numpy().max()
    axes.plot([0, top], [0, top], color="#999999", linewidth=0.8, linestyle=_DASHED, zorder=1)
    axes.locator_params(nbins=4)
    style.percent_axis(axes, "x")
    style.percent_axis(axes, "y")
    axes.set_xlabel("Equal width (%)")
    axes.set_ylabel("Adaptive (%)")


def _bins(calibration: pd.DataFrame, home: str) -> pd.DataFrame:
    """One row a model, state and bin of the in-distribution set: bin_confidence, bin_accuracy, n."""
    rows = frames.pick(calibration, prefer=[_WIDTH], metric=["bin_accuracy", "bin_confidence"], dataset=home)
    rows = frames.split_slice(rows, "state", "bin")
    wide = rows.pivot(index=["model", "state", "bin"], columns="metric", values="value")
    wide = wide.reindex(columns=["bin_confidence", "bin_accuracy"]).dropna()
    n = rows[rows["metric"] == "bin_accuracy"].set_index(["model", "state", "bin"])["n"].reindex(wide.index)
    wide = wide.assign(n=n.fillna(0)).reset_index()
    return wide[(wide["n"] >= _LEAST) & wide["state"].isin(_STATES)]


def _reliability(figure: Figure, grid, rows: int, bins: pd.DataFrame, accuracy: pd.DataFrame, home: str) -> None:
    if not len(bins):
        axes = figure.add_subplot(grid[0, :])
        axes.set_title("Reliability")
        style.empty(axes)
        return
    ranked = _examples(bins, accuracy, home)
    cells = rows * _DIAGRAMS[1]
    chosen = ranked if len(ranked) <= cells else ranked[: cells - 1]
    for position in range(min(len(ranked), cells)):
        row, column = divmod(position, _DIAGRAMS[1])
        axes = figure.add_subplot(grid[row, column])
        if position < len(chosen):
            some = bins[bins["model"] == chosen[position]]
            group = str(some["group"].iloc[0])
            axes.set_title(style.wrap(style.short(str(some["title"].iloc[0]), 34), 20), fontsize=5.8,
                           color=style.color(group))  # fmt: skip
            _diagram(axes, some, group)
        else:
            axes.set_title(f"All {len(ranked):,} models,\nafter scaling", fontsize=5.8)
            _all(axes, bins[bins["state"] == "after"])
        _frame(axes)
        if column == 0:
            axes.set_ylabel("Accuracy (%)")
        else:
            axes.tick_params(labelleft=False)
        if row == rows - 1:
            axes.set_xlabel("Confidence (%)")


def _examples(bins: pd.DataFrame, accuracy: pd.DataFrame, home: str) -> list[str]:
    """Models by round: the most accurate of each group in the order of GROUPS, then each group's next."""
    scores = frames.pick(accuracy, metric="accuracy", dataset=home, slice="").set_index("model")["value"]
    known = bins.drop_duplicates("model")[["model", "group"]]
    known = known.assign(score=known["model"].map(scores).fillna(-1.0))
    known = known.sort_values(["score", "model"], ascending=[False, True], kind="stable")
    order = list(style.GROUPS)
    known = known.assign(round=known.groupby("group").cumcount(), place=known["group"].map(order.index))
    return known.sort_values(["round", "place"], kind="stable")["model"].tolist()


def _diagram(axes: Axes, bins: pd.DataFrame, group: str) -> None:
    colour = style.color(group)
    for state, fill in (("before", "white"), ("after", colour)):
        some = bins[bins["state"] == state].sort_values("bin")
        if not len(some):
            continue
        low, high = statistics.clopper_pearson((some["bin_accuracy"] * some["n"]).clip(0, some["n"]), some["n"])
        axes.vlines(some["bin_confidence"], low, high, color=colour, linewidth=0.5, alpha=0.5)
        (dots,) = axes.plot(some["bin_confidence"], some["bin_accuracy"], marker="o", markersize=2.0, linewidth=0.7,
                            zorder=3, color=colour, markerfacecolor=fill, markeredgewidth=0.6,
                            linestyle="-" if state == "after" else ":")  # fmt: skip
        style.mark_group(dots, group)
        if state == "after":
            axes.bar(some["bin_confidence"], 0.22 * some["n"] / some["n"].max(), width=0.03, color=colour,
                     alpha=0.25, linewidth=0, zorder=0.5)  # fmt: skip


def _all(axes: Axes, bins: pd.DataFrame) -> None:
    for (group, _), some in bins.sort_values("bin").groupby(["group", "model"], sort=True):
        (line,) = axes.plot(some["bin_confidence"], some["bin_accuracy"], color=style.color(str(group)),
                            linewidth=0.5, alpha=0.5)  # fmt: skip
        style.mark_group(line, str(group))


def _frame(axes: Axes) -> None:
    axes.plot([0, 1], [0, 1], color="#999999", linewidth=0.8, linestyle=_DASHED, zorder=1)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    ticks = np.linspace(0, 1, 3)
    axes.set_xticks(ticks)
    axes.set_yticks(ticks)
    style.percent_axis(axes, "x")
    style.percent_axis(axes, "y")
