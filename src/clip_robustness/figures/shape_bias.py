"""Which cue decides when shape and texture disagree: shape bias by model, by class, and between twins."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clip_robustness.core import statistics
from clip_robustness.figures import frames, style

TABLES = ("shape_bias", "models")
_NAMED_BY_CLASS = ("human", "clip_zero_shot", "clip_finetuned", "standard")
_ROW = 0.105  # inches a model: 70 models fill one page


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Shape bias, the share of shape decisions among shape and texture decisions on cue-conflict images.

    Left: every model with its 95 % interval, sorted within its group; a line marks the human reference. Top
    right: the share by shape class for the most shape-biased model of a few groups. Bottom right: child minus
    parent for models that differ in one cause (the models table's `parent`), interval over images. Answers
    Geirhos et al. (2019), figure 4, and the shape-bias section of the Tu papers (findings F4).
    """
    bias, models = (frames.table(tables, name) for name in TABLES)
    rows = frames.pick(bias, metric="shape_bias")
    overall = frames.describe(rows[rows["slice"] == ""], models)
    classes = frames.describe(rows[rows["slice"] != ""], models)
    height = float(np.clip(0.9 + _ROW * (len(overall) + overall["group"].nunique()), 4.0, style.PAGE))
    figure = style.figure(style.DOUBLE, height)
    columns = figure.add_gridspec(1, 2)
    left, right = columns[0], columns[1]
    pairs = _twins(overall)
    lower_height = 0.9 + 0.2 * min(max(len(pairs), 3), 12)
    upper_height = max(height - lower_height, 1.8) if len(classes) else 1.0
    rest = max(height - upper_height - lower_height, 0.001)
    cells = right.subgridspec(3, 1, height_ratios=[upper_height, lower_height, rest])
    _overall(figure.add_subplot(left), overall)
    _by_class(figure.add_subplot(cells[0]), overall, classes)
    _differences(figure.add_subplot(cells[1]), pairs)
    style.legend(figure, style.group_handles(overall["group"]), columns=4)
    return figure


def _overall(axes: Axes, overall: pd.DataFrame) -> None:
    axes.set_title("All models")
    if not len(overall):
        style.empty(axes)
        return
    order = {group: position for position, group in enumerate(style.GROUPS)}
    ordered = overall.assign(_group=overall["group"].map(order))
    ordered = ordered.sort_values(["_group", "value", "model"], ascending=[True, False, True], kind="stable")
    place, labels, places = 0.0, [], []
    for group, some in ordered.groupby("group", sort=False):
        at = place + np.arange(len(some))
        colour = style.color(str(group))
        axes.hlines(at, some["low"], some["high"], color=colour, linewidth=1.0, alpha=0.6, zorder=2)
        for family, members in some.assign(_at=at).groupby("family", sort=True):
            (dots,) = axes.plot(members["value"], members["_at"], linestyle="none", color=colour,
                                marker=style.marker(str(family)), markersize=3.6, markeredgecolor="white",
                                markeredgewidth=0.3, zorder=3)  # fmt: skip
            style.mark_group(dots, str(group))
        labels += [style.short(title, 46) for title in some["title"]]
        places += list(at)
        place = at[-1] + 2
    for value in overall.loc[overall["group"] == "human", "value"]:
        axes.axvline(value, color=style.color("human"), linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    axes.set_yticks(places, labels, fontsize=float(np.interp(len(labels), [20, 80], [6.5, 5.0])))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(place - 1, -1)
    axes.grid(False, axis="y")
    spread = overall[["value", "low", "high"]].to_numpy(dtype=float)
    axes.set_xlim(max(0, np.nanmin(spread) - 0.05), min(1.0, np.nanmax(spread) + 0.05))
    style.percent_axis(axes, "x")
    images = frames.fmt_n(overall)
    axes.set_xlabel("Shape bias (%)" + (f", n = {images} decisions" if images else ""))


def _by_class(axes: Axes, overall: pd.DataFrame, classes: pd.DataFrame) -> None:
    axes.set_title("By shape class", pad=4 + 8.2 * min(classes["group"].nunique(), 4) if len(classes) else None)
    if not len(classes):
        style.empty(axes)
        return
    known = overall[overall["model"].isin(set(classes["model"]))].sort_values(["value", "model"], kind="stable")
    best = known.drop_duplicates("group", keep="last").set_index("group")
    groups = [group for group in _NAMED_BY_CLASS if group in best.index] or list(best.index[:4])
    chosen = [best.loc[group, "model"] for group in groups]
    lead = classes[classes["model"] == chosen[0]].sort_values(["value", "slice"], kind="stable")
    names = [*lead["slice"], *sorted(set(classes["slice"]) - set(lead["slice"]))]
    for number, (group, model) in enumerate(zip(groups, chosen, strict=True)):
        some = classes[classes["model"] == model]
        shift = (number - (len(chosen) - 1) / 2) * 0.16
        at = np.array([names.index(name) for name in some["slice"]]) + shift
        axes.hlines(at, some["low"], some["high"], color=style.color(group), linewidth=0.6, alpha=0.5, zorder=2)
        name, shape = style.short(some["title"].iloc[0], 34), style.marker(some["family"].iloc[0])
        (dots,) = axes.plot(some["value"], at, linestyle="none", marker=shape, markersize=3.6, label=name,
                            color=style.color(group), markeredgecolor="white", markeredgewidth=0.3,
                            zorder=3)  # fmt: skip
        style.mark_group(dots, group)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(-0.03, 1.03)
    style.percent_axis(axes, "x")
    axes.set_xlabel("Shape decisions (%)")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), fontsize=5.8, borderaxespad=0.2, labelspacing=0.3)


def _twins(overall: pd.DataFrame) -> pd.DataFrame:
    """Child minus parent with a 95 % interval over images, largest drop first."""
    parents = overall.drop_duplicates("model").set_index("model")
    pairs = []
    for child in frames.records(overall):
        if child.parent not in parents.index:
            continue
        parent = parents.loc[child.parent]
        difference, low, high = child.value - parent["value"], np.nan, np.nan
        if child.n > 0 and parent["n"] > 0:
            own = round(child.value * child.n), child.n
            other = round(parent["value"] * parent["n"]), parent["n"]
            difference, low, high = statistics.difference_interval(own, other)
        # Another way of reading decisions out is a second cause: it must show.
        mark = "" if child.convention == parent["convention"] else " *"
        pairs.append((child.model, child.title, parent["title"], child.group, difference, low, high, mark))
    columns = ["model", "child", "parent", "group", "value", "low", "high", "mark"]
    return pd.DataFrame(pairs, columns=columns).sort_values(["value", "model"], kind="stable", ignore_index=True)


def _differences(axes: Axes, pairs: pd.DataFrame) -> None:
    axes.set_title("Twins: child − parent")
    if not len(pairs):
        style.empty(axes)
        return
    if len(pairs) > 12:
        pairs = pairs.iloc[[*range(6), *range(len(pairs) - 6, len(pairs))]].reset_index(drop=True)
    for group, some in pairs.groupby("group", sort=True):
        axes.hlines(some.index, 100 * some["low"], 100 * some["high"], color=style.color(str(group)), linewidth=1.2)
        (dots,) = axes.plot(100 * some["value"], some.index, linestyle="none", marker="o",
                            markersize=4, color=style.color(str(group)), markeredgecolor="white",
                            markeredgewidth=0.3)  # fmt: skip
        style.mark_group(dots, str(group))
    axes.axvline(0, color="black", linewidth=0.7, zorder=1)
    axes.margins(x=0.08)
    sides = axes.get_yaxis_transform()
    for place, pair in enumerate(frames.records(pairs)):
        text = f"{style.short(str(pair.child), 25)} − {style.short(str(pair.parent), 20)}{pair.mark}"
        note = axes.text(0, place - 0.24, text, transform=sides, fontsize=5.2, va="bottom", color="#333333")
        note.set_in_layout(False)
        note.set_path_effects(style.OUTLINE)
    axes.set_yticks([])
    axes.set_ylim(len(pairs) - 0.6, -0.8)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel("Difference of shape bias (points)")
