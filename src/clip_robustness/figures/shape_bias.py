"""Which cue decides when shape and texture disagree: shape bias by architecture, data, size, route and class."""

import re
from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import frames, strips, style

TABLES = ("shape_bias", "models")
# Ten observers, pooled, on the cue-conflict photographs: raw data of bethgelab/model-vs-human (Geirhos et al. 2021).
HUMAN = 0.96
_ROW = 0.105  # inches a model in the list
_LISTED = 45  # names of more models do not fit beside the panels
_SOURCES = 8
_PAIRS = 12
_JOINED = 12  # twins of more models would be a thicket of lines


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Shape bias, the share of shape decisions among shape and texture decisions on cue-conflict images.

    Left, for up to 45 models: each with its 95 % interval, sorted within its group. Panels: by architecture
    family and by training source (mean of a group with a 95 % interval over its models; thin lines join models
    that are the same but for their source), against training images and input resolution; child minus
    parent for models that differ in one cause (the models table's `parent`), interval over images; group
    means by shape class. Hollow: decisions averaged over all classes instead of taken among the categories.
    Answers Geirhos et al. (2019), figure 4, and the shape-bias section of the Tu papers (finding F4).
    """
    bias, models = (frames.table(tables, name) for name in TABLES)
    rows = frames.pick(bias, metric="shape_bias")
    described = frames.describe(rows.dropna(subset=["value"]), models)
    described = described.assign(averaged=described["convention"].str.contains("mean"))
    overall, classes = described[described["slice"] == ""], described[described["slice"] != ""]
    pairs = _twins(overall)
    shown = _most_different(pairs)
    listed = 0 < len(overall) <= _LISTED
    strip = 0.45 + 0.16 * max(classes["group"].nunique(), 1) if len(classes) else 0.6
    heights = [_height(overall, listed), 1.45, 0.55 + 0.2 * max(len(shown), 2)]
    length = 0.9 + _ROW * (len(overall) + overall["group"].nunique()) if listed else 0.0
    heights = [*heights, max(length - sum(heights), 0.001)]
    figure = style.figure(style.DOUBLE, min(sum(heights) + strip + 0.45, style.PAGE))
    halves = figure.add_gridspec(2, 1, height_ratios=[sum(heights), strip])
    body, bottom = halves[0], halves[1]
    if listed:
        parts = body.subgridspec(1, 2, width_ratios=[0.7, 1.4])
        _list(figure.add_subplot(parts[0]), overall)
        body = parts[1]
    cells = body.subgridspec(4, 2, height_ratios=heights)
    people = overall[overall["group"] == "human"]["value"]
    human = float(people.iloc[0]) if len(people) else HUMAN
    observed = "Human observers" if len(people) else "Human observers, photographs"
    others = overall[overall["group"] != "human"]
    _by_category(figure.add_subplot(cells[0, 0]), others, "family", "Architecture", human)
    _by_category(figure.add_subplot(cells[0, 1]), others, "training", "Training source", human)
    _against(figure.add_subplot(cells[1, 0]), others, "train_images", "Training images", human)
    _against(figure.add_subplot(cells[1, 1]), others, "image_size", "Input resolution", human)
    _differences(figure.add_subplot(cells[2, :]), shown, len(pairs))
    _by_class(figure.add_subplot(bottom), classes)
    style.legend(figure, _handles(overall, f"{observed}, {100 * human:.0f} %"), columns=4)
    return figure


def _handles(overall: pd.DataFrame, human: str) -> list[Line2D]:
    if not len(overall):
        return []
    handles = style.group_handles(overall["group"]) + style.family_handles(overall["family"])
    if overall["averaged"].nunique() > 1:
        handles += [
            Line2D([], [], linestyle="none", marker="o", markersize=4, color="white" if averaged else "#333333",
                   markeredgecolor="#333333", markeredgewidth=0.8,
                   label=style.short(", ".join(_conventions(overall[overall["averaged"] == averaged])), 44))
            for averaged in (False, True)
        ]  # fmt: skip
    reference = Line2D([], [], color="black", linewidth=0.8, linestyle=(0, (4, 3)))
    reference.set_label(human)
    return [*handles, reference]


def _conventions(rows: pd.DataFrame) -> list[str]:
    models = rows[~rows["group"].isin(["human", "vlm"])]
    names = sorted(set((models if len(models) else rows)["convention"]))
    return [name.replace("_", " ") or "not stated" for name in names]


def _face(group: str, averaged: bool) -> dict:
    colour = style.color(group)
    return {"markerfacecolor": "white", "markeredgecolor": colour, "markeredgewidth": 0.8} if averaged else {}


def _list(axes: Axes, overall: pd.DataFrame) -> None:
    axes.set_title("All models")
    order = {group: position for position, group in enumerate(style.GROUPS)}
    ordered = overall.assign(_group=overall["group"].map(order))
    ordered = ordered.sort_values(["_group", "value", "model"], ascending=[True, False, True], kind="stable")
    at = np.arange(len(ordered)) + ordered["_group"].ne(ordered["_group"].shift()).cumsum().to_numpy() - 1.0
    for place, row in zip(at, frames.records(ordered), strict=True):
        colour = style.color(row.group)
        axes.hlines(place, row.low, row.high, color=colour, linewidth=1.0, alpha=0.6, zorder=2)
        look = {"markeredgecolor": "white", "markeredgewidth": 0.3, **_face(row.group, row.averaged)}
        (dot,) = axes.plot(row.value, place, marker=style.marker(row.family), markersize=3.6, color=colour,
                           zorder=3, **look)  # fmt: skip
        style.mark_group(dot, row.group)
    names = [style.short(title, 47) for title in ordered["title"]]
    axes.set_yticks(at, names, fontsize=float(np.interp(len(names), [15, 40], [6.2, 5.3])))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(at[-1] + 1, -1)
    axes.grid(False, axis="y")
    style.percent_axis(axes, "x")
    axes.locator_params(axis="x", nbins=5)
    images = frames.fmt_n(overall)
    axes.set_xlabel("Shape bias (%)" + (f"\nn = {images} decisions" if images else ""))


def _height(overall: pd.DataFrame, listed: bool) -> float:
    lines = sum(len(groups) for _, groups in _rows_of(overall[overall["group"] != "human"], "training"))
    return float(np.clip(0.6 + 0.13 * lines, 1.5, 2.6))


def _rows_of(overall: pd.DataFrame, column: str) -> list[tuple[str, list[str]]]:
    """Categories of `column` and the groups in each; of training sources the 8 with most models, CLIPs first."""
    known = overall[overall[column].fillna("") != ""]
    clip = known["group"].str.startswith("clip_")
    count = known.assign(weight=np.where(clip, 1000, 1)).groupby(column)["weight"].sum()
    names = sorted(count.index, key=lambda name: (-count[name], name))[:_SOURCES]
    return [(name, [g for g in style.GROUPS if ((known[column] == name) & (known["group"] == g)).any()])
            for name in names]  # fmt: skip


def _by_category(axes: Axes, overall: pd.DataFrame, column: str, title: str, human: float) -> None:
    axes.set_title(title)
    rows = _rows_of(overall, column)
    if not rows:
        style.empty(axes)
        return
    centres, place, places = [], 0.0, {}
    for name, groups in rows:
        for number, group in enumerate(groups):
            places[name, group] = place + number
            some = overall[(overall[column] == name) & (overall["group"] == group)]
            for averaged, part in some.groupby("averaged", sort=True):
                # Two ways of reading decisions out never share a mean.
                at = place + number + (0.22 if averaged and some["averaged"].nunique() > 1 else 0.0)
                own = tuple(part[["low", "high"]].iloc[0])
                look = _face(group, bool(averaged)) | {"markersize": 3.8}
                if column == "family":
                    look["marker"] = style.marker(name)
                strips.mean(axes, part["value"].to_numpy(), at, group, own, **look)
        centres.append(place + (len(groups) - 1) / 2)
        place += len(groups) + 0.6
    if column == "training":
        _join_twins(axes, overall, places)
    label = (lambda name: style.FAMILIES[name][0]) if column == "family" else frames.source_title
    strips.categories(axes, [style.short(label(name), 18) for name, _ in rows], centres, place - 1.6)
    _reference(axes, human, "x")
    axes.set_xlabel("Shape bias (%)")


def _join_twins(axes: Axes, overall: pd.DataFrame, places: Mapping[tuple[str, str], float]) -> None:
    """A line between models that are the same in all but their training source."""
    facts = ["group", "family", "architecture", "params_m", "finetuning", "loss", "train_images", "image_size"]
    known = overall.dropna(subset=["params_m", "train_images", "image_size"])
    by_facts = known.groupby([*facts, "convention"], sort=True)
    twins = [some for _, some in by_facts if some["training"].nunique() == len(some) > 1]
    for some in twins if len(twins) <= _JOINED else []:
        drawn = [(row.value, places.get((row.training, row.group))) for row in frames.records(some)]
        ends = sorted((at, value) for value, at in drawn if at is not None)
        axes.plot([value for _, value in ends], [at for at, _ in ends], color=style.color(some["group"].iloc[0]),
                  linewidth=0.7, alpha=0.7, zorder=1.8)  # fmt: skip


def _reference(axes: Axes, human: float, which: str) -> None:
    line = axes.axvline if which == "x" else axes.axhline
    line(human, color="black", linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    style.percent_axis(axes, which)


def _against(axes: Axes, overall: pd.DataFrame, column: str, title: str, human: float) -> None:
    axes.set_title(title)
    some = overall.dropna(subset=[column])
    if not len(some) or some[column].nunique() < 2:
        unit = "px" if column == "image_size" else "images"
        only = f"{some[column].iloc[0]:,.0f} {unit} in all models" if len(some) else style.NOT_MEASURED
        style.empty(axes, only)
        return
    crowded = len(some) > 60
    if crowded and column == "image_size":  # few sizes: models would lie over each other
        aside = (np.arange(len(some)) * 0.618) % 1 - 0.5
        some = some.assign(**{column: some[column] + 0.04 * aside * np.ptp(some[column])})
    for (look_group, look_family, averaged), part in some.groupby(["group", "family", "averaged"], sort=True):
        group, family = str(look_group), str(look_family)
        if not crowded:
            axes.vlines(part[column], part["low"], part["high"], color=style.color(group), linewidth=0.6, alpha=0.4)
        look = {"markeredgecolor": "white", "markeredgewidth": 0.3, **_face(group, bool(averaged))}
        (dots,) = axes.plot(part[column], part["value"], linestyle="none", color=style.color(group),
                            marker=style.marker(family), markersize=2.6 if crowded else 3.4,
                            alpha=0.6 if crowded else 0.9, **look)  # fmt: skip
        style.mark_group(dots, group)
    if column == "train_images":
        style.log_axis(axes, "x")
        axes.set_xlabel("Images")
    else:
        axes.locator_params(axis="x", nbins=4)
        axes.set_xlabel("Size (px)")
    axes.set_ylabel("Shape bias (%)")
    _reference(axes, human, "y")


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


def _most_different(pairs: pd.DataFrame) -> pd.DataFrame:
    if len(pairs) <= _PAIRS:
        return pairs
    half = _PAIRS // 2
    return pairs.iloc[[*range(half), *range(len(pairs) - half, len(pairs))]].reset_index(drop=True)


def _differences(axes: Axes, pairs: pd.DataFrame, all_pairs: int) -> None:
    more = f" ({len(pairs)} of {all_pairs})" if len(pairs) < all_pairs else ""
    axes.set_title(f"Fine-tuned: child − parent{more}")
    if not len(pairs):
        style.empty(axes)
        return
    for group, some in pairs.groupby("group", sort=True):
        colour = style.color(str(group))
        axes.hlines(some.index, 100 * some["low"], 100 * some["high"], color=colour, linewidth=1.2)
        (dots,) = axes.plot(100 * some["value"], some.index, linestyle="none", marker="o",
                            markersize=4, color=colour, markeredgecolor="white", markeredgewidth=0.3)  # fmt: skip
        style.mark_group(dots, str(group))
    axes.axvline(0, color="black", linewidth=0.7, zorder=1)
    axes.margins(x=0.08)
    sides = axes.get_yaxis_transform()
    for place, pair in enumerate(frames.records(pairs)):
        text = f"{style.short(str(pair.child), 44)} − {style.short(str(pair.parent), 20)}{pair.mark}"
        note = axes.text(0, place - 0.24, text, transform=sides, fontsize=5.2, va="bottom", color="#333333")
        note.set_in_layout(False)
        note.set_path_effects(style.OUTLINE)
    axes.set_yticks([])
    axes.set_ylim(len(pairs) - 0.6, -0.8)
    axes.tick_params(axis="y", length=0)
    axes.grid(False, axis="y")
    axes.set_xlabel("Difference of shape bias (points)")


def _by_class(axes: Axes, classes: pd.DataFrame) -> None:
    """Group means by shape class as a strip of shades, the class that is most texture-biased first."""
    axes.set_title("By shape class: mean of a group (%)")
    if not len(classes):
        style.empty(axes)
        return
    classes = pd.concat([frames.one_convention(some) for _, some in classes.groupby("group", sort=True)])
    means = classes.pivot_table(index="group", columns="slice", values="value", aggfunc="mean")
    groups = [group for group in style.GROUPS if group in means.index]
    lead = "clip_zero_shot" if "clip_zero_shot" in means.index else groups[0]
    names = means.loc[lead].reset_index().sort_values([lead, "slice"])["slice"].tolist()
    shares = means.loc[groups, names].to_numpy(float)
    axes.imshow(shares, cmap="PuOr", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        if np.isfinite(share):
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=5.5,
                      color="black" if 0.2 < share < 0.8 else "white")  # fmt: skip
    count = classes.groupby("group")["model"].nunique()
    axes.set_yticks(range(len(groups)), [f"{style.GROUPS[group][0]} ({count[group]})" for group in groups])
    axes.set_xticks(range(len(names)), [re.sub(r"[_ -]", "\n", name) for name in names], fontsize=5.5)
    axes.tick_params(length=0)
    axes.grid(False)
    axes.spines[:].set_visible(False)
