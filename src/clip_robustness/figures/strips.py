"""Strips: a group's models and their mean at one place of an axis of categories."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
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


# Zero-shot CLIPs and the classifiers they are compared with.
COUNTERPARTS = ("clip_zero_shot", "standard", "more_data")


def looks(values: pd.DataFrame) -> list[tuple[str, str]]:
    """(group, family) of CLIPs and their supervised counterparts: the models of the same architecture families."""
    present = set(zip(values["group"], values["family"], strict=True))
    families = {family for group, family in present if group == "clip_zero_shot"} or {family for _, family in present}
    return [(g, f) for f in style.FAMILIES if f in families for g in COUNTERPARTS if (g, f) in present]


def rows(axes: Axes, values: pd.DataFrame, column: str, names: Sequence[str], shown: Sequence[tuple[str, str]]) -> None:
    """One place of the y axis for each of `names`, as `column` has them, and in it one `mean` for each look."""
    step = 0.84 / max(len(shown), 1)
    for place, name in enumerate(names):
        for number, (group, family) in enumerate(shown):
            some = values[(values[column] == name) & (values["group"] == group) & (values["family"] == family)]
            if len(some):
                own = tuple(some[["low", "high"]].iloc[0])
                at = place - 0.42 + step * (number + 0.5)
                mean(axes, some["value"].to_numpy(), at, group, own, 0.7 * step, marker=style.marker(family))
    for edge in range(1, len(names)):
        axes.axhline(edge - 0.5, color="#E6E6E6", linewidth=0.5, zorder=0)


def look_handles(values: pd.DataFrame, shown: Sequence[tuple[str, str]]) -> list[Line2D]:
    """Legend entries of looks, with their numbers of models."""
    count = values.groupby(["group", "family"])["model"].nunique()
    return [
        Line2D([], [], linestyle="none", marker=style.marker(family), markersize=4.5, color=style.color(group),
               markeredgecolor="black", markeredgewidth=0.6,
               label=f"{style.GROUPS[group][0]}, {style.FAMILIES[family][0]} ({count[group, family]})")
        for group, family in shown
    ]  # fmt: skip


def pearson_interval(r: float, n: int) -> tuple[float, float]:
    """Fisher's 95 % interval of Pearson's `r` over `n` models; the whole range up to three models."""
    if n <= 3:
        return -1.0, 1.0
    middle, half = np.arctanh(np.clip(r, -0.9999, 0.9999)), 1.96 / np.sqrt(n - 3)
    return float(np.tanh(middle - half)), float(np.tanh(middle + half))
