"""Natural shifts as RoZ counts them: effective robustness by shift, and videos from one frame to twenty."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import frames, labels, strips, style
from clip_robustness.figures.effective_robustness import NOT_NATURAL, draw_baseline

TABLES = ("accuracy", "effective_robustness", "synthetic", "models")
_AVERAGE = "natural_average"
_MOST_VIDEOS = 2


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """CLIPs against supervised models of their architecture families, on the shifts that all of them were measured on.

    Left: accuracy above the baseline of standard models (effective robustness, points), with the shift's own classes
    as reference where it has fewer; a dot a model, the mean of a look with a 95 % bootstrap interval over its models,
    or the model's own interval. Right: pm-10 against pm-0 accuracy of the video sets on logit axes, with the line
    through the standard models; the numbers are the CLIPs' points above it. Answers the natural-shift figures of Wang
    et al. (arXiv 2403.10499; findings F1 and F8); figure effective_robustness has the panels behind the left part.
    """
    accuracy, robustness, synthetic, models = (frames.table(tables, name) for name in TABLES)
    values = frames.describe(_robustness(robustness, _others(accuracy, synthetic)), models)
    shifts, shown = frames.dataset_order(values["dataset"]), strips.looks(values)
    videos = _videos(accuracy, models)
    figure = style.figure(style.DOUBLE, float(np.clip(0.3 * len(shifts) + 1.0, 3.6, 6.0)))
    grid = figure.add_gridspec(_MOST_VIDEOS, 2, width_ratios=[1.7, 1])
    _shifts(figure.add_subplot(grid[:, 0]), values, shifts, shown)
    for place in range(_MOST_VIDEOS if len(videos) != 1 else 1):
        axes = figure.add_subplot(grid[place if len(videos) > 1 else slice(None), 1])
        if not videos:
            axes.set_title("Videos: pm-10 against pm-0")
            style.empty(axes)
            break
        _video(axes, *videos[place])
    line = Line2D([], [], color="black", linewidth=1.0, label="Line through standard models")
    handles = strips.look_handles(values, shown)
    if videos:
        seen = pd.concat([points for _, points in videos])
        more = [look for look, _ in style.by_look(seen) if look not in shown]
        handles += [*strips.look_handles(seen, more), line]
    style.legend(figure, handles, columns=4)
    return labels.finish(figure)


def _others(accuracy: pd.DataFrame, synthetic: pd.DataFrame) -> set[str]:
    """Data sets that are no natural shifts: synthetic ones, and those of corruptions, which alone have slices."""
    sliced = accuracy[(accuracy["metric"] == "accuracy") & (accuracy["slice"] != "")]
    return {*synthetic["dataset"], *sliced["dataset"], *NOT_NATURAL}


def _robustness(robustness: pd.DataFrame, others: set[str]) -> pd.DataFrame:
    """One row a model and natural shift, of the models that have the average over all of them, if any has."""
    rows = robustness[robustness["metric"] == "effective_robustness"]
    rows = rows[~rows["dataset"].isin(others)]
    rows = frames.one_convention(rows, [f"{transform}-{estimator}" for transform, estimator in frames.FITS])
    reference = rows.groupby("dataset")["slice"].agg(lambda names: min(names, key=lambda n: (n != "class_subset", n)))
    rows = frames.pick(rows[rows["slice"] == rows["dataset"].map(reference)])
    whole = set(rows.loc[rows["dataset"] == _AVERAGE, "model"])
    return rows[rows["model"].isin(whole)] if whole else rows


def _shifts(axes: Axes, values: pd.DataFrame, shifts: list[str], shown: list[tuple[str, str]]) -> None:
    axes.set_title("Effective robustness by shift")
    if not shown:
        style.empty(axes)
        return
    axes.axvline(0, color="black", linewidth=0.7, zorder=1)
    strips.categories(axes, [frames.dataset_title(shift) for shift in shifts])
    points = values.assign(**{name: 100 * values[name] for name in ("value", "low", "high")})
    strips.rows(axes, points, "dataset", shifts, shown)
    if shifts[-1] == _AVERAGE:
        axes.axhline(len(shifts) - 1.5, color="#666666", linewidth=0.7, zorder=1)
    axes.set_xlabel("Accuracy above the baseline (points)")


def _videos(accuracy: pd.DataFrame, models: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """(title, points) of each video set: x pm-0, y pm-10.

    Both may be metrics of one data set, as measured, or data sets of their own, as published.
    """
    found = []
    anchors = {name: "accuracy" for name in accuracy["dataset"] if name.endswith("_pm0")}
    anchors |= dict.fromkeys(accuracy.loc[accuracy["metric"] == "pm0_accuracy", "dataset"], "pm0_accuracy")
    for dataset in frames.dataset_order(anchors):
        metric = anchors[dataset]
        anchor = frames.pick(accuracy, dataset=dataset, metric=metric, slice="")
        whole = {"dataset": dataset.replace("_pm0", "_pm10"), "metric": metric.replace("pm0", "pm10")}
        points = frames.pick(accuracy, **whole, slice="").rename(columns={"value": "y"})
        points = points.merge(anchor[["model", "value"]].rename(columns={"value": "x"}), on="model")
        points = frames.describe(points.dropna(subset=["x", "y"]), models)
        points = points[points["group"].isin(strips.COUNTERPARTS)]
        if len(points):
            found.append((frames.dataset_title(dataset).removesuffix(", pm-0"), points))
    return found[:_MOST_VIDEOS]


def _video(axes: Axes, title: str, points: pd.DataFrame) -> None:
    axes.set_title(f"{title}: {frames.fmt_n(points)} sets of frames" if frames.fmt_n(points) else title)
    standard = points[points["group"] == "standard"]
    points = points.assign(x=style.drawable(points["x"]), y=style.drawable(points["y"]))
    style.logit_axis(axes, "x", points["x"], most=6)
    style.logit_axis(axes, "y", points["y"], most=6)
    try:
        line = statistics.fit_line(standard["x"], standard["y"])
    except ValueError:  # too few standard models for a line
        line = None
    clip = points[points["group"] == "clip_zero_shot"].sort_values("model")
    if line is not None:
        draw_baseline(axes, line, standard)
        above = 100 * (clip["y"] - line.predict(clip["x"]))
        named = zip(frames.records(clip), above, strict=True)
        texts = [(one.x, one.y, f"{style.short(one.title, 22)}: {by:+.1f}", one.group) for one, by in named]
        labels.label_points(axes, texts[:6])
    style.scatter(axes, points, errors=False)
    axes.set_xlabel("Anchor frame right, pm-0 (%)")
    axes.set_ylabel("All frames right, pm-10 (%)")
