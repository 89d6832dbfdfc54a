"""Vision-language models against CLIP on two-way questions, by category and by who chose the wrong class."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D

from clip_robustness.figures import frames, strips, style

TABLES = ("choice", "models")
TITLE = "Vision-language models on two-way questions"
# How an answer is read -> its title, marker and whether the marker is filled; the first is the default.
READINGS = {
    "likelihood": ("likelihood", "o", True),
    "likelihood_per_token": ("likelihood per token", "d", True),
    "greedy": ("greedy text", "s", True),
    "greedy_all": ("greedy text, dropped = wrong", "s", False),
    "greedy_swapped": ("greedy text, options swapped", "^", True),
}
_OPPONENTS = ("two_way", "two_way_own")
_REFERENCES = "DvP*X"
_MOST_ROWS, _MOST_MODELS = 4, 12
_AROUND = 0.55  # inches of a panel's titles and labels


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """One row a selector, the model that chose the wrong option of each question.

    Left: accuracy by category; a small dot a model, the large one the mean of its group. Middle: gain of the
    vision-language models over a CLIP or classifier on the same questions, in points, a marker a reference. Hollow:
    the reference is the selector itself, which is wrong by construction wherever its top-1 was. Right: accuracy of
    each vision-language model by how its answer is read, and the share of greedy answers that are dropped. Bars are
    95 % intervals. Answers the section on multimodal models of Tu et al. (arXiv 2410.01534; finding F10).
    """
    rows = _rows(frames.table(tables, "choice"), frames.table(tables, "models"))
    parts = sorted(set(zip(rows["dataset"], rows["selector"], strict=True)))[:_MOST_ROWS]
    if not parts:
        return style.unmeasured(TITLE)
    heights = [_height(_of(rows, *part)) for part in parts]
    figure = style.figure(style.DOUBLE, min(sum(heights) + 0.75, style.PAGE))
    grid = figure.add_gridspec(len(parts), 1, height_ratios=heights)
    several = len({dataset for dataset, _ in parts}) > 1
    for number, (dataset, selector) in enumerate(parts):
        where = f"{frames.dataset_title(dataset)}, " if several else ""
        _row(figure, grid[number], _of(rows, dataset, selector), f"{where}wrong class chosen by {selector}")
        _gain_legend(figure.axes[-2], _of(rows, dataset, selector), heights[number])
    style.legend(figure, _handles(rows), columns=4)
    return figure


def _rows(choice: pd.DataFrame, models: pd.DataFrame) -> pd.DataFrame:
    """The table with its conventions in parts: selector, how, and of a gain its reference."""
    parts = [[*str(name).split(":", 2), "", ""] for name in choice["convention"]]
    columns = {name: [part[i] for part in parts] for i, name in enumerate(("selector", "how", "reference"))}
    kept = choice.assign(**columns).dropna(subset=["value"])
    return frames.describe(kept.drop_duplicates(["model", "dataset", "metric", "slice", "convention"]), models)


def _of(rows: pd.DataFrame, dataset: str, selector: str) -> pd.DataFrame:
    some = rows[(rows["dataset"] == dataset) & (rows["selector"] == selector)]
    return some.sort_values(["metric", "how", "reference", "slice", "model"], kind="stable")


def _height(rows: pd.DataFrame) -> float:
    """Inches that the panels of a selector need."""
    accuracy = rows[(rows["metric"] == "accuracy")]
    groups = max(accuracy["group"].nunique(), 1)
    answering = accuracy[accuracy["how"].isin(list(READINGS))]["model"].nunique()
    by_category = max(accuracy["slice"].nunique(), 2) * (0.2 + 0.055 * groups)
    return max(by_category, 0.3 * min(answering, _MOST_MODELS), 1.3) + _AROUND


def _row(figure: Figure, cell: SubplotSpec, rows: pd.DataFrame, title: str) -> None:
    panels = cell.subgridspec(1, 3, width_ratios=[1.15, 1, 1])
    slices = _slices(rows)
    accuracy, gain, reading = (figure.add_subplot(panels[i]) for i in range(3))
    accuracy.set_title(f"Accuracy,\n{title}")
    gain.set_title("Gain over one model\non the same questions")
    reading.set_title("By how the answer is read\n(in brackets: dropped)")
    _accuracies(accuracy, rows[rows["metric"] == "accuracy"], slices)
    _gains(gain, rows[rows["metric"] == "gain"], slices)
    _readings(reading, rows[rows["slice"] == ""])


def _slices(rows: pd.DataFrame) -> dict[str, str]:
    """Slice -> title with its number of questions: all, the categories, where the selector was right and wrong."""
    names = set(rows["slice"])
    halves = [name for name in ("selector_right", "selector_wrong") if name in names]
    order = [name for name in ("", *sorted(names - {"", *halves}), *halves) if name in names]
    selector = str(rows["selector"].iloc[0]) if len(rows) else ""
    titles = {"": "All", "selector_right": f"{selector} right", "selector_wrong": f"{selector} wrong"}
    shown = {}
    for name in order:
        some = rows[(rows["slice"] == name) & rows["how"].isin(["likelihood", *_OPPONENTS])]
        count = frames.fmt_n(some if len(some) else rows[rows["slice"] == name])
        shown[name] = titles.get(name, name[:1].upper() + name[1:].replace("_", " ")) + (f" ({count})" if count else "")
    return shown


def _accuracies(axes: Axes, rows: pd.DataFrame, slices: Mapping[str, str]) -> None:
    shown = rows[rows["how"].isin(["likelihood", *_OPPONENTS])]
    if not len(shown):
        style.empty(axes)
        return
    groups = [group for group in style.GROUPS if group in set(shown["group"])]
    for place, name in enumerate(slices):
        for at, group in zip(_places(place, len(groups)), groups, strict=True):
            some = shown[(shown["slice"] == name) & (shown["group"] == group)]
            own = some["how"] == "two_way_own"
            if len(fair := some[~own]):
                interval = (float(fair["low"].iloc[0]), float(fair["high"].iloc[0]))
                strips.mean(axes, fair["value"].to_numpy(), at, group, interval, room=0.5 / len(groups))
            for one in frames.records(some[own]):
                strips.mean(axes, np.array([one.value]), at, group, (one.low, one.high), markerfacecolor="white")
    axes.axvline(0.5, color="#999999", linewidth=0.8, linestyle=":", zorder=1)
    strips.categories(axes, list(slices.values()))
    style.percent_axis(axes, "x")
    axes.set_xlabel("Accuracy (%), dotted: chance")


def _gains(axes: Axes, rows: pd.DataFrame, slices: Mapping[str, str]) -> None:
    if not len(rows):
        style.empty(axes)
        return
    references = _references(rows)
    for place, name in enumerate(slices):
        for at, reference in zip(_places(place, len(references)), references, strict=True):
            some = rows[(rows["slice"] == name) & (rows["reference"] == reference[0])]
            for group, members in some.groupby("group", sort=True):
                interval = (100 * float(members["low"].iloc[0]), 100 * float(members["high"].iloc[0]))
                strips.mean(axes, 100 * members["value"].to_numpy(), at, str(group), interval,
                            room=0.5 / len(references), **_look(reference, references, str(group)))  # fmt: skip
    axes.axvline(0, color="black", linewidth=0.7, zorder=1)
    strips.categories(axes, [""] * len(slices))
    axes.set_xlabel("Gain (points)")


def _gain_legend(axes: Axes, rows: pd.DataFrame, height: float) -> None:
    """The references, below the panel of gains, which is about `height` less its titles and labels high."""
    references = _references(rows[rows["metric"] == "gain"])
    handles = [
        Line2D([], [], linestyle="none", markersize=4, markeredgewidth=0.6, label=_reference_title(rows, *reference),
               **{**_look(reference, references, "vlm"), "markeredgecolor": "black"})
        for reference in references
    ]  # fmt: skip
    if handles:
        below = -0.36 / (height - _AROUND)
        axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, below), fontsize=6, borderpad=0)


def _references(rows: pd.DataFrame) -> list[tuple[str, bool]]:
    """(reference, whether it is the selector itself), the fair ones first."""
    pairs = {(str(r), str(how).endswith("_own")) for r, how in zip(rows["reference"], rows["how"], strict=True)}
    return sorted(pairs, key=lambda pair: (pair[1], pair[0]))[: len(_REFERENCES)]


def _look(reference: tuple[str, bool], references: Sequence[tuple[str, bool]], group: str) -> dict[str, Any]:
    face = "white" if reference[1] else style.color(group)
    return {"marker": _REFERENCES[references.index(reference)], "markerfacecolor": face}


def _reference_title(rows: pd.DataFrame, reference: str, own: bool) -> str:
    titles = rows.loc[rows["model"] == reference, "title"]
    title = style.short(str(titles.iloc[0]) if len(titles) else reference, 26)
    return f"over {title}{', which chose' if own else ''}"


def _readings(axes: Axes, rows: pd.DataFrame) -> None:
    accuracy = rows[(rows["metric"] == "accuracy") & rows["how"].isin(list(READINGS))]
    if not len(accuracy):
        style.empty(axes)
        return
    named = accuracy.drop_duplicates("model").sort_values(["title", "model"], kind="stable")
    models = list(named["model"])[:_MOST_MODELS]
    titles = []
    for place, model in enumerate(models):
        some = accuracy[accuracy["model"] == model]
        hows = [how for how in READINGS if how in set(some["how"])]
        for at, how in zip(_places(place, len(hows)), hows, strict=True):
            one = some[some["how"] == how].iloc[0]
            _, marker, filled = READINGS[how]
            face = style.color(one["group"]) if filled else "white"
            interval = (float(one["low"]), float(one["high"]))
            strips.mean(axes, np.array([one["value"]]), at, one["group"], interval, marker=marker, markersize=3.4,
                        markerfacecolor=face)  # fmt: skip
        dropped = rows[(rows["metric"] == "dropped") & (rows["model"] == model) & (rows["how"] == "greedy")]
        share = f"\n({100 * float(dropped['value'].iloc[0]):.1f} %)" if len(dropped) else ""
        titles.append(style.wrap(style.short(str(some["title"].iloc[0]), 24), 15) + share)
    axes.axvline(0.5, color="#999999", linewidth=0.8, linestyle=":", zorder=1)
    strips.categories(axes, titles)
    style.percent_axis(axes, "x")
    axes.set_xlabel("Accuracy (%)")


def _places(centre: float, count: int) -> list[float]:
    """`count` places around `centre`, within a category's share of the axis."""
    step = min(0.7 / max(count, 1), 0.22)
    return [centre + step * (i - (count - 1) / 2) for i in range(count)]


def _handles(rows: pd.DataFrame) -> list[Line2D]:
    own = rows["how"].astype(str).str.endswith("two_way_own").any()
    handles = style.group_handles(rows["group"])
    look: dict[str, Any] = {"linestyle": "none", "markersize": 4, "markeredgecolor": "black", "markeredgewidth": 0.6}
    if own:
        handles.append(Line2D([], [], marker="o", color="white", label="the model that chose the wrong class", **look))
    hows = set(rows.loc[rows["metric"] == "accuracy", "how"])
    for how, (title, marker, filled) in READINGS.items():
        if how in hows:
            face = style.color("vlm") if filled else "white"
            handles.append(Line2D([], [], marker=marker, color=face, label=title, **look))
    return handles
