"""What a wrong word printed on an image does: accuracy without and with it, and how often the word is answered."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import frames, strips, style

TABLES = ("typographic", "models")
_ENDS = ("clean_accuracy", "accuracy")  # without and with the word
_STRIPS = {"accuracy_drop": "Accuracy lost to the word (points)", "attack_success_rate": "Answered the word (%)"}
_WITHOUT = "clean_success_rate"
_FEW = 16  # more models are shown by group
_MOST_SETS = 3
_TITLES = {"imagenet_t": "ImageNet-T", "cifar10_t": "CIFAR-10-T"}


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """A row of panels a data set: accuracy without and with the word, what is lost, and the attack success rate.

    Left: a line a model; beyond sixteen models thin lines, and each group's mean with a 95 % bootstrap interval over
    its models in front. Right: a row a model with its 95 % interval over images; beyond sixteen a row a group, a dot a
    model and the mean as on the left. Hollow: how often the same class is answered without the word.
    Answers the typographic attack of RoZ (arXiv 2403.10499; finding F5).
    """
    typographic, models = (frames.table(tables, name) for name in TABLES)
    shown = frames.pick(typographic, metric=[*_ENDS, *_STRIPS, _WITHOUT], slice="").dropna(subset=["value"])
    points = frames.describe(shown, models)
    found = frames.dataset_order(points["dataset"])
    sets = [*(n for n in _TITLES if n in found), *(n for n in found if n not in _TITLES)][:_MOST_SETS]
    if not sets:
        return style.unmeasured("Typographic attacks")
    few = points["model"].nunique() <= _FEW
    kept = {name: points[points["dataset"] == name] for name in sets}
    heights = [0.75 + 0.17 * max(some["model" if few else "group"].nunique(), 6) for some in kept.values()]
    figure = style.figure(style.DOUBLE, sum(heights) + 0.35)
    grid = figure.add_gridspec(len(sets), 3, width_ratios=[1, 1.1, 1.1], height_ratios=heights)
    for row, (name, some) in enumerate(kept.items()):
        images = frames.fmt_n(some[some["metric"] == "accuracy"])
        title = _TITLES.get(name) or frames.dataset_title(name)
        _slopes(figure.add_subplot(grid[row, 0]), some, f"{title}{f', n = {images}' if images else ''}", few)
        named, order = _rows(some, few)
        for column, metric in enumerate(_STRIPS, 1):
            _strip(figure.add_subplot(grid[row, column]), some, metric, named, order if column == 1 else None)
    handles = style.group_handles(points["group"])
    handles += style.family_handles(points["family"]) if few else []
    if (points["metric"] == _WITHOUT).any():
        handles.append(Line2D([], [], linestyle="none", marker="o", markersize=3.6, color="white",
                              markeredgecolor="#333333", markeredgewidth=0.8,
                              label="The same class, without the word"))  # fmt: skip
    style.legend(figure, handles, columns=6)
    return figure


def _rows(points: pd.DataFrame, few: bool) -> tuple[list[list[str]], list[str]]:
    """The models of each row of the strips, and the rows' titles: a model, or a group with its number of models."""
    rank = {group: place for place, group in enumerate(style.GROUPS)}
    rate = points[points["metric"] == "attack_success_rate"].set_index("model")["value"]
    known = points.drop_duplicates("model").sort_values("model")
    known = known.assign(_group=known["group"].map(rank), _rate=-known["model"].map(rate).astype(float))
    known = known.sort_values(["_group", "_rate", "model"], kind="stable")
    if few:
        return [[name] for name in known["model"]], [style.short(title, 26) for title in known["title"]]
    groups = {str(group): list(some["model"]) for group, some in known.groupby("group", sort=False)}
    return list(groups.values()), [f"{style.GROUPS[group][0]} ({len(some)})" for group, some in groups.items()]


def _slopes(axes: Axes, points: pd.DataFrame, title: str, few: bool) -> None:
    axes.set_title(title)
    ends = points[points["metric"].isin(_ENDS)]
    if not len(ends):
        style.empty(axes)
        return
    ends = ends.assign(place=ends["metric"].map(list(_ENDS).index))
    for name in sorted(set(ends["model"])):
        some = ends[ends["model"] == name].sort_values("place")
        colour, shape = style.color(some["group"].iloc[0]), style.marker(some["family"].iloc[0])
        alone = few or len(some) == 1  # a model without the images' sources has only one end
        (line,) = axes.plot(some["place"], 100 * some["value"], color=colour, linewidth=0.9, zorder=2,
                            marker=shape if alone else "", markersize=3, markeredgecolor="white",
                            markeredgewidth=0.25, alpha=0.9 if few else 0.15)  # fmt: skip
        style.mark_group(line, str(some["group"].iloc[0]))
    for group, some in ends.groupby("group") if not few else ():
        _mean(axes, some, str(group))
    axes.set_xticks([0, 1], ["without word", "with word"])
    axes.set_xlim(-0.25, 1.25)
    axes.grid(False, axis="x")
    axes.set_ylabel("Accuracy (%)")


def _mean(axes: Axes, points: pd.DataFrame, group: str) -> None:
    places = sorted(set(points["place"]))
    values = [100 * points.loc[points["place"] == place, "value"].sort_values().to_numpy() for place in places]
    colour, rank = style.color(group), list(style.GROUPS).index(group)
    x = [place + 0.025 * (rank - 2) for place in places]  # beside each other, whose intervals they would hide
    for at, some in zip(x, values, strict=True):
        if len(some) > 1:
            axes.vlines(at, *statistics.bootstrap_mean(some), color=colour, linewidth=1.4, zorder=4)
    (line,) = axes.plot(x, [some.mean() for some in values], color=colour, linewidth=1.6, marker="o", markersize=3.5,
                        zorder=5)  # fmt: skip
    line.set_path_effects(style.OUTLINE)
    style.mark_group(line, group)


def _strip(
    axes: Axes, points: pd.DataFrame, metric: str, rows: Sequence[Sequence[str]], titles: Sequence[str] | None
) -> None:
    """One metric by the models of each row; without `titles` the rows are those of the panel at the left."""
    axes.set_title(_STRIPS[metric])
    measured = points[points["metric"] == metric].set_index("model")
    without = points[points["metric"] == _WITHOUT].set_index("model")
    if not len(measured):
        style.empty(axes)
        return
    for place, names in enumerate(rows):
        some = measured[measured.index.isin(list(names))]
        if not len(some):
            continue
        group, one = str(some["group"].iloc[0]), some.iloc[0]
        look: dict[str, Any] = {"marker": style.marker(one["family"])} if len(names) == 1 else {}
        interval = (100 * float(one["low"]), 100 * float(one["high"]))
        strips.mean(axes, 100 * some["value"].to_numpy(), place, group, interval, room=0.5, **look)
        base = without[without.index.isin(list(some.index))]["value"]
        if metric == "attack_success_rate" and len(base):
            axes.plot([100 * base.mean()], [place], linestyle="none", marker="o", markersize=3.6, color="white",
                      markeredgecolor=style.color(group), markeredgewidth=0.8, zorder=3.5)  # fmt: skip
    strips.categories(axes, titles or [""] * len(rows))
    low = float(np.nanmin([0, *(100 * measured["value"])]))
    axes.set_xlim(left=low - 1.5)
    axes.axvline(0, color="black", linewidth=0.7, zorder=1)
