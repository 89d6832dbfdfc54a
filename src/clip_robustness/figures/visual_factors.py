"""Accuracy where one visual factor is unusual, against accuracy overall (ImageNet-X)."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import frames, strips, style

TABLES = ("factors", "factor_fits", "factor_robustness", "models")
_CONVENTION = "top"
_FITS = (("logit", "huber"), ("logit", "ols"), ("linear", "huber"), ("linear", "ols"))  # the first that there is
_LEAST = 0.4  # far below the CLIP models lie half-trained networks: fitted on, but left outside the panels
_COLUMNS = 5
_MOST = 10
_MOST_SOURCES = 4
_LEAST_BAND = 5  # a bootstrap over fewer models is no band


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Factor accuracy against overall accuracy, and factor-level effective robustness by group.

    Upper panels, the ten factors with the most images: accuracy on a factor's images (y) against accuracy on
    all annotated images (x), in per cent; the line is the table `factor_fits`' (Huber's loss on logit axes,
    fitted on the comparison group), with a 95 % bootstrap band over those models. Lower panels: what lies
    above it, in points, mean of a group with a 95 % interval over its models. Answers figure 1 of Tu et al.
    (NeurIPS 2023, arXiv 2402.07410; findings F1 to F3).
    """
    factors, fits, robustness, models = (frames.table(tables, name) for name in TABLES)
    factors = factors[factors["dataset"] == _dataset(factors)]
    convention, points = _points(factors, models)
    fits, robustness = (t[t["dataset"].isin(set(factors["dataset"]))] for t in (fits, robustness))
    fit = _chosen_fit(fits[fits["convention"] == convention])
    wanted = _largest(points) or [""]
    count = -(-len(wanted) // _COLUMNS)
    lower = 0.62 + 0.145 * max(len(wanted), 4)
    figure = style.figure(style.DOUBLE, 1.62 * count + lower + 0.5)
    halves = figure.add_gridspec(2, 1, height_ratios=[1.62 * count, lower])
    grid = halves[0].subgridspec(count, min(_COLUMNS, len(wanted)))
    for position, factor in enumerate(wanted):
        axes = figure.add_subplot(grid[position // _COLUMNS, position % _COLUMNS])
        _panel(axes, points[points["slice"] == factor], factor, points, fit[fit["slice"] == factor])
        if position % _COLUMNS == 0 and len(points):
            axes.set_ylabel("Accuracy on the factor (%)")
    name = f"{convention}-{fit['transform'].iloc[0]}-{fit['estimator'].iloc[0]}" if len(fit) else ""
    above = robustness[robustness["convention"] == name] if name else robustness
    _robustness(figure, halves[1], frames.describe(_above(above), models), wanted)
    line = Line2D([], [], color="black", linewidth=0.9, label="Baseline, 95 % band")
    handles = style.group_handles(points["group"]) + style.family_handles(points["family"])
    style.legend(figure, handles + [line] * bool(len(fit)) if len(points) else [], columns=6)
    return figure


def _dataset(factors: pd.DataFrame) -> str:
    """The annotated data set that covers most models."""
    count = factors.groupby("dataset")["model"].nunique()
    return min(count.index, key=lambda name: (-count[name], name)) if len(count) else ""


def _points(factors: pd.DataFrame, models: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """The annotation convention shown, and one row a model and factor: y on the factor, x overall."""
    rows = frames.one_convention(factors[factors["metric"] == "factor_accuracy"], [_CONVENTION])
    convention = str(rows["convention"].iloc[0]) if len(rows) else _CONVENTION
    overall = frames.pick(factors, metric="accuracy", slice="", convention=convention)
    x = overall.drop_duplicates("model")[["model", "value"]].rename(columns={"value": "x"})
    points = frames.pick(rows).rename(columns={"value": "y"}).merge(x, on="model").dropna(subset=["x", "y"])
    return convention, frames.describe(points, models)


def _largest(points: pd.DataFrame) -> list[str]:
    """The factors with the most images, the largest first: below 150 images an accuracy says little."""
    images = points.groupby("slice")["n"].max().fillna(0)
    return sorted(images.index, key=lambda factor: (-images[factor], factor))[:_MOST]


def _chosen_fit(fits: pd.DataFrame) -> pd.DataFrame:
    for transform, estimator in _FITS:
        rows = fits[(fits["transform"] == transform) & (fits["estimator"] == estimator)]
        if len(rows):
            return rows.sort_values(["slice", "source"], kind="stable").drop_duplicates("slice")
    return fits.iloc[:0]


def _above(robustness: pd.DataFrame) -> pd.DataFrame:
    rows = robustness[robustness["metric"] == "effective_robustness"].dropna(subset=["value"])
    return frames.pick(frames.one_convention(rows))


def _title(factor: str) -> str:
    return factor.replace("_", " ").capitalize()


def _panel(axes: Axes, points: pd.DataFrame, factor: str, everything: pd.DataFrame, fit: pd.DataFrame) -> None:
    images = frames.fmt_n(points)
    axes.set_title(f"{_title(factor)}\nn = {images}" if images else _title(factor))
    if not len(points):
        style.empty(axes)
        return
    least = _LEAST if (everything["x"] >= _LEAST).mean() >= 0.8 else 0.0
    shown = points[points["x"] >= least] if (points["x"] >= least).any() else points
    axes.set_xlim(*_padded(everything.loc[everything["x"] >= min(least, shown["x"].min()), "x"]))
    axes.set_ylim(*_padded(shown["y"]))
    if len(fit):
        _draw_line(axes, fit.iloc[0], points[points["group"] == "standard"])
    style.scatter(axes, shown, errors=len(shown) <= 40)
    style.percent_axis(axes, "x")
    style.percent_axis(axes, "y")
    axes.locator_params(nbins=5)
    axes.set_xlabel("Overall (%)")


def _draw_line(axes: Axes, fit: pd.Series, standard: pd.DataFrame) -> None:
    line = statistics.Line(*fit[["slope", "intercept", "r", "n", "transform", "estimator"]])
    left, right = np.clip(axes.get_xlim(), 0.001, 0.999)
    grid = np.linspace(left, right, 60)
    axes.plot(grid, line.predict(grid), color="black", linewidth=0.9, zorder=2.5, scaley=False)
    usable = standard[standard["x"].between(0, 1, "neither") & standard["y"].between(0, 1, "neither")]
    # A band from other models than the line's own would be wrong: they are known by their number.
    if len(usable) == line.n >= _LEAST_BAND and usable["x"].nunique() > 1:
        band = statistics.baseline_band(usable["x"], usable["y"], grid, line.transform, line.estimator, resamples=400)
        axes.fill_between(grid, *band, color="black", alpha=0.14, linewidth=0, zorder=1.5)


def _padded(values: pd.Series) -> tuple[float, float]:
    pad = 0.06 * (values.max() - values.min()) + 0.01
    return values.min() - pad, values.max() + pad


def _columns_of(values: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(title, group, rows): the zero-shot CLIPs by training source, the largest first, then the other groups."""
    clip = values[values["group"] == "clip_zero_shot"]
    count = clip.groupby("training")["model"].nunique()
    sources = sorted(count.index, key=lambda name: (-count[name], name))
    if len(sources) > _MOST_SOURCES:
        sources = sources[: _MOST_SOURCES - 1]
    parts = [(f"Zero-shot,\n{frames.source_title(s)}", "clip_zero_shot", clip[clip["training"] == s]) for s in sources]
    rest = clip[~clip["training"].isin(sources)]
    parts.append(("Zero-shot,\nother sources", "clip_zero_shot", rest))
    for group in ("clip_finetuned", "more_data", "self_supervised"):
        title = style.GROUPS[group][0].replace(", ", ",\n")
        parts.append((title, group, values[values["group"] == group]))
    return [part for part in parts if len(part[2])][:6]


def _robustness(figure: Figure, cell, values: pd.DataFrame, factors: list[str]) -> None:
    values = values[values["slice"].isin(factors)]
    parts = _columns_of(values)
    if not parts:
        axes = figure.add_subplot(cell)
        axes.set_title("Factor-level effective robustness")
        style.empty(axes)
        return
    grid = cell.subgridspec(1, len(parts))
    first: Axes | None = None
    for column, (title, group, rows) in enumerate(parts):
        axes = figure.add_subplot(grid[0, column], sharex=first, sharey=first)
        axes.set_title(f"{title} ({rows['model'].nunique()})")
        axes.axvline(0, color="black", linewidth=0.7, zorder=1)
        strips.categories(axes, [_title(factor) for factor in factors])
        for place, factor in enumerate(factors):
            some = rows[rows["slice"] == factor]
            if len(some):
                own = tuple(100 * some[["low", "high"]].iloc[0])
                strips.mean(axes, 100 * some["value"].to_numpy(), place, group, own)
        if first is None:
            first = axes
        else:
            axes.tick_params(axis="y", labelleft=False)
        axes.set_xlabel("Eff. rob. (points)")
    assert first is not None
    first.margins(x=0.05)
