"""Strips: a group's models and their mean at one place of an axis of categories."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import style


def mean(
    axes: Axes,
    values: np.ndarray,
    at: float,
    group: str,
    interval: tuple[float, float] | None = None,
    room: float = 0.6,
    across: bool = True,
    **look: Any,
) -> None:
    """One small dot a model and their mean with a 95 % interval, at place `at` of the axis of categories.

    interval: of a single model, its own; of several, the bootstrap over models. room: how far the dots may
    spread, in categories. across: values run along x. look: of the mean's dot, as for `Axes.plot`.
    """
    values, colour = np.sort(np.asarray(values, float)), style.color(group)
    spread = ((np.arange(len(values)) * 0.618) % 1 - 0.5) * room if len(values) > 1 else np.zeros(1)
    low, high = statistics.bootstrap_mean(values) if len(values) > 1 else interval or (np.nan, np.nan)

    def draw(along: Any, places: Any, **how: Any) -> Line2D:
        return axes.plot(*((along, places) if across else (places, along)), **how)[0]

    if len(values) > 1:
        alpha = float(np.interp(len(values), [5, 40, 100], [0.6, 0.3, 0.15]))
        draw(values, at + spread, linestyle="none", marker="o", markersize=1.9, color=colour, alpha=alpha,
             markeredgewidth=0, zorder=2)  # fmt: skip
    draw([low, high], [at, at], color=colour, linewidth=1.5, zorder=3, solid_capstyle="butt")
    look = {"marker": "o", "markersize": 4.2, "markeredgecolor": "black", "markeredgewidth": 0.6, **look}
    style.mark_group(draw([values.mean()], [at], linestyle="none", color=colour, zorder=4, **look), group)


def categories(axes: Axes, titles: Sequence[str], places: Sequence[float] = (), end: float | None = None) -> None:
    """Name places of the y axis (default 0, 1, ...), the first at the top; `end`: the last place drawn at."""
    axes.set_yticks(places or range(len(titles)), titles)
    axes.set_ylim((len(titles) - 1 if end is None else end) + 0.6, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")


def pearson_interval(r: float, n: int) -> tuple[float, float]:
    """Fisher's 95 % interval of Pearson's `r` over `n` models; the whole range up to three models."""
    if n <= 3:
        return -1.0, 1.0
    middle, half = np.arctanh(np.clip(r, -0.9999, 0.9999)), 1.96 / np.sqrt(n - 3)
    return float(np.tanh(middle - half)), float(np.tanh(middle + half))
