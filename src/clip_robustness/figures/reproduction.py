"""Measured minus published, a dot a number: what agrees within 0.3 points, and what does not."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clip_robustness.figures import frames, style

TABLES = ("reproduction", "models")
BAND = 0.3  # points
_METRICS = {
    "accuracy": "",
    "reference_accuracy": ", same classes of ImageNet",
    "factor_accuracy": ", by factor",
    "shape_bias": ", shape bias",
    "cue_accuracy": ", cue accuracy",
    "image_recall": ", text to image",
    "text_recall": ", image to text",
}
_COLUMNS = ("model", "dataset", "metric", "slice", "difference", "flagged")


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Differences in points by data set and metric; grey: within 0.3 points; the farthest on either side is named."""
    table = tables.get("reproduction")
    rows = pd.DataFrame(columns=list(_COLUMNS)) if table is None else table.reindex(columns=list(_COLUMNS))
    rows = rows.dropna(subset=["difference"])
    if not len(rows):
        figure = style.figure(style.DOUBLE, 1.2)
        style.empty(figure.add_subplot(), "nothing to compare: what others published was not measured in this study")
        return figure
    models = frames.table(tables, "models").drop_duplicates("model").set_index("model")
    known = models.reindex(rows["model"])
    group = known["group"].where(known["group"].isin(list(style.GROUPS)), "unlisted").to_numpy()
    title = known["title"].where(known["title"].fillna("") != "", known.index.to_series()).to_numpy()
    rows = rows.assign(group=group, title=title, points=100 * rows["difference"].astype(float))
    rows = rows.assign(kind=rows["metric"].str.partition("@")[0])
    rows = rows.sort_values(["dataset", "kind", "model", "metric", "slice"], kind="stable")
    order = {name: place for place, name in enumerate(frames.dataset_order(rows["dataset"]))}
    kinds = sorted(set(zip(rows["dataset"], rows["kind"], strict=True)), key=lambda k: (order[k[0]], k[1]))
    figure = style.figure(style.DOUBLE, min(0.9 + 0.34 * len(kinds), style.PAGE))
    axes = figure.add_subplot()
    names = [frames.dataset_title(d) + _METRICS.get(k, f", {k.replace('_', ' ')}") for d, k in kinds]
    _frame(axes, names, rows)
    for place, (dataset, kind) in enumerate(kinds):
        _one(axes, place, rows[(rows["dataset"] == dataset) & (rows["kind"] == kind)])
    style.legend(figure, style.group_handles(rows["group"]), columns=5)
    return figure


def _one(axes: Axes, place: int, some: pd.DataFrame) -> None:
    # Spread over the row's height in the order of models, so that equal differences stay apart.
    at = place + np.linspace(-0.28, 0.28, len(some)) if len(some) > 1 else np.array([float(place)])
    some = some.assign(at=at)
    for group, members in some.groupby("group", sort=True):
        flagged = members["flagged"].astype(bool)
        for shown, size, alpha in ((members[~flagged], 2.6, 0.6), (members[flagged], 3.8, 0.95)):
            (dots,) = axes.plot(shown["points"], shown["at"], linestyle="none", marker="o", markersize=size,
                                color=style.color(str(group)), alpha=alpha, markeredgecolor="white",
                                markeredgewidth=0.25)  # fmt: skip
            style.mark_group(dots, str(group))
    for side in (-1, 1):
        far = some[some["flagged"].astype(bool) & (side * some["points"] > 0)]
        if len(far):
            _name(axes, frames.records(far)[int((side * far["points"]).argmax())], side)
    text = f"{int(some['flagged'].sum()):,} of {len(some):,}"
    axes.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=6, color="#333333")


def _name(axes: Axes, one: Any, side: int) -> None:
    """Write a model's name beside its dot: inwards where the dot lies in the outer half of the axis, else outwards."""
    edge = axes.transData.transform((axes.get_xlim()[1], 0))[0]
    middle = axes.transData.transform((0, 0))[0]
    inwards = abs(axes.transData.transform((one.points, 0))[0] - middle) > (edge - middle) / 2
    to = -side if inwards else side
    note = axes.annotate(style.short(one.title, 26), (one.points, one.at), xytext=(4 * to, 0), fontsize=5.5,
                         textcoords="offset points", va="center", ha="left" if to > 0 else "right",
                         color=style.color(one.group), zorder=6)  # fmt: skip
    note.set_path_effects(style.OUTLINE)


def _frame(axes: Axes, names: list[str], rows: pd.DataFrame) -> None:
    axes.axvspan(-BAND, BAND, color="#E4E4E4", linewidth=0, zorder=0)
    axes.axvline(0, color="black", linewidth=0.6, zorder=1)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    widest = max(1.25 * float(rows["points"].abs().max()), 2 * BAND)
    if widest > 10 * BAND:  # a few far ones must not squeeze the others into a line
        axes.set_xscale("symlog", linthresh=BAND, linscale=1.0)
        ticks = [tick for tick in (0.3, 1, 3, 10, 30, 100) if tick <= widest]
        axes.set_xticks([*(-t for t in reversed(ticks)), 0, *ticks])
        axes.set_xticklabels([f"{t:g}".replace("-", "−") for t in axes.get_xticks()])
        axes.minorticks_off()
    axes.set_xlim(-widest, widest)
    axes.set_xlabel("Measured − published (points)")
    axes.annotate("beyond 0.3", (1.01, -0.5), xycoords=("axes fraction", "data"), va="bottom", fontsize=6,
                  color="#555555")  # fmt: skip
