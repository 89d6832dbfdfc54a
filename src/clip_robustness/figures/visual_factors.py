"""Accuracy where one visual factor is unusual, against accuracy overall (ImageNet-X)."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import frames, style

TABLES = ("factors", "models")
# The ten factors of the Tu papers: those with at least 150 validation images as the top factor.
FACTORS = (
    "pose", "background", "pattern", "color", "smaller",
    "shape", "partial_view", "subcategory", "texture", "larger",
)  # fmt: skip
_CONVENTION = "top"
_LEAST = 0.4  # far below the CLIP models lie half-trained networks: fitted on, but left outside the panels
_COLUMNS = 5


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """One panel a factor: accuracy on its images (y) against accuracy on all of ImageNet-X (x), in per cent.

    The line is fitted on the standard models with Huber's loss on logit axes, and drawn with its 95 %
    bootstrap band over those models; what lies above it is robust to the factor beyond its accuracy.
    Answers figure 1 of Tu et al. (NeurIPS 2023, arXiv 2402.07410; finding F1).
    """
    factors, models = (frames.table(tables, name) for name in TABLES)
    rows = frames.pick(factors, prefer=[_CONVENTION], metric="factor_accuracy")
    overall = frames.pick(factors, prefer=[_CONVENTION], metric="accuracy", slice="")
    x = overall.drop_duplicates("model")[["model", "value"]].rename(columns={"value": "x"})
    points = rows.rename(columns={"value": "y"}).merge(x, on="model").dropna(subset=["x", "y"])
    points = frames.describe(points, models)
    named = [factor for factor in FACTORS if factor in set(points["slice"])] if len(points) else []
    extra = [] if named else sorted(set(points["slice"]))
    wanted = [*(FACTORS if named else extra or ("",))]
    height = 1.72 * -(-len(wanted) // _COLUMNS) + 0.45
    figure = style.figure(style.DOUBLE, max(height, 2.2))
    grid = figure.add_gridspec(-(-len(wanted) // _COLUMNS), _COLUMNS)
    for position, factor in enumerate(wanted):
        axes = figure.add_subplot(grid[position // _COLUMNS, position % _COLUMNS])
        _panel(axes, points[points["slice"] == factor], factor, points)
        if position % _COLUMNS == 0 and len(points):
            axes.set_ylabel("Accuracy on the factor (%)")
    line = Line2D([], [], color="black", linewidth=0.9, label="Standard models, 95 % band")
    handles = style.group_handles(points["group"]) + style.family_handles(points["family"])
    style.legend(figure, [*handles, line] if len(points) else [], columns=8)
    return figure


def _panel(axes: Axes, points: pd.DataFrame, factor: str, everything: pd.DataFrame) -> None:
    images = frames.fmt_n(points)
    title = factor.replace("_", " ").capitalize()
    axes.set_title(f"{title}\nn = {images}" if images else title)
    if not len(points):
        style.empty(axes)
        return
    shown = points[points["x"] >= _LEAST] if (points["x"] >= _LEAST).any() else points
    inside = everything[everything["x"] >= min(_LEAST, shown["x"].min())]
    axes.set_xlim(*_padded(inside["x"]))
    axes.set_ylim(*_padded(shown["y"]))
    standard = points[points["group"] == "standard"]
    if len(standard) >= 3 and standard["x"].nunique() > 1:
        line = statistics.fit_line(standard["x"], standard["y"], "logit", "huber")
        left, right = np.clip(axes.get_xlim(), 0.001, 0.999)
        grid = np.linspace(left, right, 60)
        band = statistics.baseline_band(standard["x"], standard["y"], grid, "logit", "huber", resamples=400)
        axes.plot(grid, line.predict(grid), color="black", linewidth=0.9, zorder=2.5)
        axes.fill_between(grid, *band, color="black", alpha=0.14, linewidth=0, zorder=1.5)
    style.scatter(axes, shown, errors=len(shown) <= 40)
    style.percent_axis(axes, "x")
    style.percent_axis(axes, "y")
    axes.locator_params(nbins=5)
    axes.set_xlabel("Overall (%)")


def _padded(values: pd.Series) -> tuple[float, float]:
    pad = 0.06 * (values.max() - values.min()) + 0.01
    return values.min() - pad, values.max() + pad
