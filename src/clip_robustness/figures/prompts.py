"""What a zero-shot model gains or loses with fewer prompts: accuracy, calibration, factors, OOD detection."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import frames, style

TABLES = ("prompts", "models")
# Metric, temperature scaling, title (with the direction that is better), unit of the axis.
_PANELS = (
    ("accuracy", "", "Accuracy ↑", "points"),
    ("ece", "", "ECE ↓", "points"),
    ("ece", "after", "ECE, scaled ↓", "points"),
    ("nll", "", "NLL (nats) ↓", "nats"),
    ("factor_gap", "", "Factor gap ↑", "points"),
)
_OOD = ("auroc", "", "AUROC, {} ↑", "points")
_COLUMNS = 4
_FEW = 12  # more models are drawn as thin lines without intervals, and each group's mean in front


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """One panel a metric: its difference to the largest prompt set (y) by the number of templates (x), a line a model.

    Bars: 95 % intervals of the paired comparison on the same images; beyond a dozen models thin lines, and each
    group's mean with a 95 % bootstrap interval over its models. Accuracy, calibration in distribution; factor gap:
    mean accuracy on the factors' images minus accuracy on all; AUROC: one panel an OOD set, MCM at temperature 1.
    Answers the prompt section of Tu et al. (NeurIPS 2023, arXiv 2402.07410, section 7; finding F12).
    """
    prompts, models = (frames.table(tables, name) for name in TABLES)
    points = _points(prompts, models)
    home = _home(prompts)
    panels = []
    for metric, scaled, title, unit in _PANELS:
        some = points[(points["metric"] == metric) & (points["scaled"] == scaled)]
        panels.append((title, unit, some if metric == "factor_gap" else some[some["dataset"] == home]))
    metric, _, title, unit = _OOD
    outside = points[points["metric"] == metric]
    for dataset in frames.dataset_order(outside["dataset"]) or [""]:
        name = style.short(frames.dataset_title(dataset), 16) if dataset else "OOD set"
        panels.append((title.format(name), unit, outside[outside["dataset"] == dataset]))
    rows = -(-len(panels) // _COLUMNS)
    figure = style.figure(style.DOUBLE, 1.55 * rows + 0.45)
    grid = figure.add_gridspec(rows, _COLUMNS)
    sizes = points.drop_duplicates("set").sort_values(["templates", "set"])[["set", "templates"]]
    for position, (title, unit, some) in enumerate(panels):
        axes = figure.add_subplot(grid[position // _COLUMNS, position % _COLUMNS])
        _panel(axes, some, sizes, title, unit)
        if position % _COLUMNS == 0 and len(some):
            axes.set_ylabel(f"Against {sizes['templates'].iloc[-1]:.0f} templates\n({unit})")
    handles = style.group_handles(points["group"]) + style.family_handles(points["family"])
    if points["model"].nunique() > _FEW:
        handles.append(Line2D([], [], color="#333333", linewidth=1.8, label="Mean of a group"))
    style.legend(figure, handles, columns=8)
    return figure


def _home(prompts: pd.DataFrame) -> str:
    """The in-distribution set: the one that temperatures were fitted on."""
    fitted = frames.dataset_order(prompts.loc[prompts["metric"] == "temperature", "dataset"])
    return (fitted or frames.dataset_order(prompts.loc[prompts["metric"] == "accuracy", "dataset"]) or [""])[0]


def _points(prompts: pd.DataFrame, models: pd.DataFrame) -> pd.DataFrame:
    """Differences to the largest prompt set, which itself is at 0: with the columns metric, scaled, set, templates."""
    rows = prompts[prompts["metric"].str.endswith("_difference")]
    rows = rows.assign(
        metric=rows["metric"].str.removesuffix("_difference"),
        set=rows["slice"].str.split(":").str[0],
        scaled=rows["slice"].str.split(":").str[1].fillna(""),
    )
    rows = rows[rows["metric"].isin([metric for metric, *_ in (*_PANELS, _OOD)]) & rows["scaled"].isin(["", "after"])]
    sizes = prompts[prompts["metric"] == "templates"].rename(columns={"slice": "set", "value": "templates"})
    sizes = sizes[["model", "dataset", "set", "templates"]].drop_duplicates()
    largest = sizes.sort_values("templates").drop_duplicates(["model", "dataset"], keep="last")
    ends = rows.drop(columns="set").drop_duplicates(["model", "dataset", "metric", "scaled"])
    ends = ends.merge(largest, on=["model", "dataset"]).assign(value=0.0, low=np.nan, high=np.nan)
    points = pd.concat([rows.merge(sizes, on=["model", "dataset", "set"]), ends], ignore_index=True)
    return frames.describe(points.sort_values(["model", "dataset", "metric", "scaled", "templates"]), models)


def _panel(axes: Axes, points: pd.DataFrame, sizes: pd.DataFrame, title: str, unit: str) -> None:
    axes.set_title(title)
    if not len(points):
        style.empty(axes)
        return
    factor = 100 if unit == "points" else 1
    points = points.assign(place=points["set"].map({name: place for place, name in enumerate(sizes["set"])}))
    points = points.assign(**{name: factor * points[name] for name in ("value", "low", "high")})
    axes.axhline(0, color="black", linewidth=0.7, zorder=1)
    names = sorted(set(points["model"]))
    few = len(names) <= _FEW
    for number, name in enumerate(names):
        _line(axes, points[points["model"] == name], (number + 0.5) / len(names) - 0.5 if few else None)
    if not few:
        for group, some in points.groupby("group"):
            _mean(axes, some, str(group))
    counts = [f"{count:.0f}" for count in sizes["templates"]]
    axes.set_xticks(range(len(counts)), counts)
    axes.set_xlim(-0.45, len(counts) - 0.55)
    axes.grid(False, axis="x")
    axes.locator_params(axis="y", nbins=6)
    axes.set_xlabel("Templates")


def _line(axes: Axes, points: pd.DataFrame, beside: float | None) -> None:
    """One model; `beside` (-0.5..0.5) moves it apart from the others, whose bars it would hide."""
    points = points.sort_values("place")
    colour, shape = style.color(points["group"].iloc[0]), style.marker(points["family"].iloc[0])
    x = points["place"] + 0.35 * (beside or 0) * points["low"].notna()
    look = {"linewidth": 0.5, "alpha": 0.2} if beside is None else {"linewidth": 0.8, "marker": shape, "markersize": 3}
    (line,) = axes.plot(x, points["value"], color=colour, markeredgecolor="white", markeredgewidth=0.25, **look)
    style.mark_group(line, points["group"].iloc[0])
    if beside is not None:
        axes.vlines(x, points["low"], points["high"], color=colour, linewidth=0.6, alpha=0.6)


def _mean(axes: Axes, points: pd.DataFrame, group: str) -> None:
    places = sorted(set(points["place"]))
    values = [points.loc[points["place"] == place, "value"].sort_values().to_numpy() for place in places]
    colour = style.color(group)
    for place, some in zip(places, values, strict=True):
        if len(some) > 1:
            axes.vlines(place, *statistics.bootstrap_mean(some), color=colour, linewidth=1.4, zorder=4)
    means = [some.mean() for some in values]
    (line,) = axes.plot(places, means, color=colour, linewidth=1.8, marker="o", markersize=3.5, zorder=5)
    line.set_path_effects(style.OUTLINE)
    style.mark_group(line, group)
