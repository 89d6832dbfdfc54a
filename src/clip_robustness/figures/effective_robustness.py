"""Accuracy under natural shift against accuracy without it, and what lies above the baseline."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import frames, labels, style

TABLES = ("accuracy", "baselines", "effective_robustness", "models")
# Synthetic shifts and relabelled sets, which have baselines too but belong to other figures.
NOT_NATURAL = ("imagenet_c", "imagenet_greyscale", "imagenet_pgd", "imagenet_real", "stylized_imagenet")
_LEAST = 0.4  # a few models near chance would take half of each axis: they are left outside the panels


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """One panel a natural shift, and a strip with effective robustness by group.

    Panels: accuracy on the shift (y, Clopper-Pearson 95 % bars) against accuracy on its in-distribution
    partner (x), both on logit axes; the baseline fitted on standard models with its 95 % bootstrap band over
    those models; y = x dashed. Strip: effective robustness in points, one dot a model, and each group's mean
    with a 95 % bootstrap interval over its models. Answers Taori et al. (2020), figures 1 and 2, and the
    natural-shift figures of RoZ (arXiv 2403.10499); the Tu papers build on the same axes.
    """
    accuracy, baselines, robustness, models = (frames.table(tables, name) for name in TABLES)
    # The mean over the shifts is computed with the fits and stands beside them.
    accuracy = pd.concat([accuracy, robustness[robustness["metric"] != "effective_robustness"]], ignore_index=True)
    named = baselines["dataset"].tolist() or accuracy.query("metric == 'reference_accuracy'")["dataset"].tolist()
    shifts = frames.dataset_order(set(named) - set(NOT_NATURAL))
    fits = {shift: frames.chosen_fit(baselines, accuracy, shift) for shift in shifts}
    # An average that is known only as effective robustness has its place in the strip, but no panel.
    with_points = set(accuracy.loc[accuracy["metric"] == "accuracy", "dataset"])
    panels = [shift for shift in shifts if shift in with_points]
    columns = 5 if len(panels) > 8 else 4
    rows = max(1, -(-len(panels) // columns))
    figure = style.figure(style.DOUBLE, (1.62 if columns == 4 else 1.45) * rows + 2.15)
    grid = figure.add_gridspec(rows + 1, columns, height_ratios=[1] * rows + [1.0])
    if not panels:
        style.empty(figure.add_subplot(grid[0, :]))
    seen: list[pd.DataFrame] = []
    for position, shift in enumerate(panels):
        axes = figure.add_subplot(grid[position // columns, position % columns])
        seen.append(_panel(axes, accuracy, models, shift, fits[shift], first=position % columns == 0))
    _strip(figure.add_subplot(grid[rows, :]), robustness, fits, models)
    points = pd.concat(seen) if seen else pd.DataFrame({"group": [], "family": []})
    lines = [
        Line2D([], [], color="black", linewidth=1.0, label="Baseline, 95 % band"),
        Line2D([], [], color="#999999", linewidth=0.8, linestyle=(0, (4, 3)), label="y = x"),
    ]
    handles = style.group_handles(points["group"]) + style.family_handles(points["family"])
    style.legend(figure, handles + lines if len(points) else [], columns=6)
    return labels.finish(figure)


def _panel(
    axes: Axes, accuracy: pd.DataFrame, models: pd.DataFrame, shift: str, fit: pd.Series | None, first: bool
) -> pd.DataFrame:
    reference = "" if fit is None else str(fit["reference"])
    points = frames.describe(frames.against_reference(accuracy, shift, reference), models)
    axes.set_title(frames.dataset_title(shift))
    if not len(points):
        style.empty(axes)
        return points
    fitted = points if fit is None else _population(points, fit)
    if (points["x"] >= _LEAST).mean() >= 0.8:
        points = points[points["x"] >= _LEAST]
    points = points.assign(x=style.drawable(points["x"]), y=style.drawable(points["y"]))
    style.logit_axis(axes, "x", points["x"], most=5)
    style.logit_axis(axes, "y", points["y"], most=6)
    ends = np.array([max(axes.get_xlim()[0], axes.get_ylim()[0]), min(axes.get_xlim()[1], axes.get_ylim()[1])])
    if ends[0] < ends[1]:
        axes.plot(ends, ends, color="#999999", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    if fit is not None:
        line = statistics.Line(*fit[["slope", "intercept", "r", "n", "transform", "estimator"]])
        draw_baseline(axes, line, fitted)
        points = points.assign(above=points["y"] - line.predict(points["x"]))
        labels.label_points(axes, _worth_naming(points))
    style.scatter(axes, points, errors=len(points) <= 150)
    axes.set_xlabel("ID accuracy (%)" + (",\nthe shift's classes" if reference == "class_subset" else ""))
    if first:
        axes.set_ylabel("Accuracy on the shift (%)")
    return points


def _population(points: pd.DataFrame, fit: pd.Series) -> pd.DataFrame:
    """The models that the baseline was fitted on, known by their number; none when no subset has it.

    A band around a line that was fitted on other models would be wrong, so it is then left out.
    """
    standard = points[points["group"] == "standard"]
    usable = standard[standard["x"].between(0, 1, "neither") & standard["y"].between(0, 1, "neither")]
    same_source = usable[usable["source"] == fit["source"]]
    for some in (usable, same_source, usable[usable["x"] >= 0.55], same_source[same_source["x"] >= 0.55]):
        if len(some) == fit["n"]:
            return some
    return standard.iloc[:0]


def draw_baseline(axes: Axes, line: statistics.Line, standard: pd.DataFrame) -> None:
    """The line over the x axis' limits, and its bootstrap band over the models `standard` that it was fitted on."""
    low, high = axes.get_xlim()
    grid = statistics.inverse_transform(np.linspace(style.logit(low), style.logit(high), 60))
    axes.plot(grid, line.predict(grid), color="black", linewidth=0.9, zorder=2.5, scaley=False)
    if len(standard) >= 3 and standard["x"].nunique() > 1:
        band = statistics.baseline_band(standard["x"], standard["y"], grid, line.transform, line.estimator)
        axes.fill_between(grid, *band, color="black", alpha=0.14, linewidth=0, zorder=1.5)


def _worth_naming(points: pd.DataFrame) -> list[tuple[float, float, str, str]]:
    """The CLIP farthest above the baseline: in one panel there is room for one name."""
    clip = points[points["group"].isin(["clip_zero_shot", "clip_finetuned"])]
    clip = clip.sort_values(["above", "model"], ascending=[False, True], kind="stable").head(1)
    return [(row.x, row.y, style.wrap(style.short(row.title, 34), 19), row.group) for row in frames.records(clip)]


def _strip(axes: Axes, robustness: pd.DataFrame, fits: Mapping[str, pd.Series | None], models: pd.DataFrame) -> None:
    rows, shifts = [], list(fits)
    for shift, fit in fits.items():
        if fit is not None:
            some = robustness[robustness["convention"] == f"{fit['transform']}-{fit['estimator']}"]
            rows.append(frames.pick(some, metric="effective_robustness", dataset=shift, slice=fit["reference"]))
    values = frames.describe(pd.concat(rows), models) if rows else pd.DataFrame()
    axes.set_title("Effective robustness by group: mean over models, 95 % interval")
    if not len(values):
        style.empty(axes)
        return
    groups = [group for group in style.GROUPS if group in set(values["group"])]
    step = 0.8 / len(groups)
    for place, shift in enumerate(shifts):
        for number, group in enumerate(groups):
            some = values[(values["dataset"] == shift) & (values["group"] == group)]
            if not len(some):
                continue
            at = place - 0.4 + step * (number + 0.5)
            points = 100 * some.sort_values("model")["value"].to_numpy()
            spread = (np.arange(len(points)) * 0.618) % 1 * 0.7 - 0.35 if len(points) > 1 else np.zeros(1)
            axes.plot(at + step * spread, points, linestyle="none", marker="o", markersize=2, zorder=2,
                      color=style.color(group), alpha=0.35, markeredgewidth=0)  # fmt: skip
            mean = points.mean()
            low, high = statistics.bootstrap_mean(points) if len(points) > 1 else (np.nan, np.nan)
            if len(points) == 1:
                low, high = 100 * some["low"].iloc[0], 100 * some["high"].iloc[0]
            axes.plot([at, at], [low, high], color="black", linewidth=2.2, zorder=3, solid_capstyle="butt")
            axes.plot([at, at], [low, high], color=style.color(group), linewidth=1.2, zorder=3.1)
            (dot,) = axes.plot(at, mean, linestyle="none", marker="o", markersize=4.5, color=style.color(group),
                               markeredgecolor="black", markeredgewidth=0.6, zorder=4)  # fmt: skip
            style.mark_group(dot, group)
    axes.axhline(0, color="black", linewidth=0.7, zorder=1)
    axes.grid(False, axis="x")
    axes.set_xlim(-0.5, len(shifts) - 0.5)
    for edge in np.arange(len(shifts) - 1) + 0.5:
        axes.axvline(edge, color="#E6E6E6", linewidth=0.5, zorder=0)
    axes.set_xticks(range(len(shifts)), [style.wrap(frames.dataset_title(shift), 12) for shift in shifts])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("Effective robustness\n(points)")
