"""Accuracy under adversarial attack against the budget, attack by attack, and the smallest perturbations."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from clip_robustness.core import statistics
from clip_robustness.figures import frames, style

TABLES = ("adversarial", "models")
ATTACKS = {  # the eleven, a row of panels a kind of access
    "fgsm": "FGSM",
    "bim": "BIM",
    "mim": "MIM",
    "dim": "DIM",
    "deepfool": "DeepFool",
    "fgsm_transfer": "FGSM, transfer",
    "bim_transfer": "BIM, transfer",
    "mim_transfer": "MIM, transfer",
    "dim_transfer": "DIM, transfer",
    "nes": "NES",
    "spsa": "SPSA",
}
YARDSTICKS = {"pgd": ("PGD", (0, (4, 1.5))), "noise": ("Noise", (0, (1, 1.2)))}
_CLEAN = 0.0  # the budget of no attack
_FEW = 8  # more models are drawn as the mean of each group
_MOST_TICKS = 6


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """One panel an attack: accuracy (y) against the L-inf budget in 255ths of the pixel range (x); then medians.

    Up to eight models: a line a model with 95 % Clopper-Pearson bars. More: each group's mean with a 95 % bootstrap
    band over its models. Thin lines: the group's mean under the yardsticks, a strong PGD and random signs, which have
    a panel of their own. Last panel: the median minimum perturbation, a dot a model (a triangle at the largest budget
    where it lies beyond), and the group's median with a 95 % bootstrap interval over models. 0 is no attack.
    Answers the attacks of RoZ (arXiv 2403.10499; findings F3 and F4). Shows the data set with most models.
    """
    adversarial, models = (frames.table(tables, name) for name in TABLES)
    rows = _rows(adversarial)
    curves = frames.describe(_curves(rows), models)
    if not len(curves):
        return style.unmeasured("Adversarial attacks")
    figure = style.figure(style.DOUBLE, 5.3)
    parts = figure.add_gridspec(2, 1, height_ratios=[2, 1.05])
    above, below = parts[0].subgridspec(2, 5), parts[1].subgridspec(1, 2, width_ratios=[2, 3.1])
    by_scores = below[0].subgridspec(1, 2)
    cells = [*(above[place] for place in range(9)), by_scores[0], by_scores[1]]
    reported = _reported(rows)
    for (name, title), cell in zip(ATTACKS.items(), cells, strict=True):
        axes = figure.add_subplot(cell)
        _panel(axes, curves, name, title, reported.get(name))
        _faults(axes, rows[(rows["metric"] == "faults") & (rows["slice"] == name)])
    _yardsticks(figure.add_subplot(above[9]), curves)
    for row in (figure.axes[:5], [*figure.axes[5:9], figure.axes[11]], figure.axes[9:11]):
        _name_axes(row)
    _medians(figure, below[1], frames.describe(_distances(rows), models), rows)
    handles = style.group_handles(curves["group"])
    if curves["model"].nunique() <= _FEW:
        handles += style.family_handles(curves["family"])
    handles += [
        Line2D([], [], color="#555555", linewidth=0.9, linestyle=dashes, label=f"{title}, mean of the group")
        for name, (title, dashes) in YARDSTICKS.items() if (curves["attack"] == name).any()
    ]  # fmt: skip
    style.legend(figure, handles, columns=6)
    return figure


def _name_axes(row: Sequence[Axes]) -> None:
    """Axis titles of a row of panels; what its panels share stands at the first that shows anything."""
    drawn = [axes for axes in row if axes.lines]
    for axes in drawn:
        axes.set_xlabel("eps (1/255)", labelpad=1.5, fontsize=6)
        axes.tick_params(axis="y", labelleft=axes is drawn[0])
    if drawn:
        drawn[0].set_ylabel("Accuracy (%)")


def _rows(adversarial: pd.DataFrame) -> pd.DataFrame:
    """The rows of the data set that most models were attacked on, budgets in pixels before others."""
    measured = adversarial[adversarial["metric"].isin(["accuracy", "accuracy_at", "median_distance"])]
    if not len(measured):
        return measured
    counts = measured.groupby("dataset")["model"].nunique()
    dataset = min(frames.dataset_order(counts.index), key=lambda name: -counts[name])
    return adversarial[adversarial["dataset"] == dataset]


def _curves(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a model, attack and budget (`eps`, 255ths), the one without attack at _CLEAN; fractions."""
    at = frames.split_slice(frames.pick(_linf(rows), metric="accuracy_at"), "attack", "eps")
    at = at.assign(eps=pd.to_numeric(at["eps"], errors="coerce")).dropna(subset=["eps", "value"])
    at = at[at["attack"].isin([*ATTACKS, *YARDSTICKS])]
    clean = frames.pick(rows, metric="clean_accuracy", slice="").dropna(subset=["value"])
    clean = clean.drop(columns="slice").merge(at[["model", "attack"]].drop_duplicates(), on="model")
    both = pd.concat([clean.assign(eps=_CLEAN), at], ignore_index=True) if len(clean) else at
    return both.sort_values(["attack", "model", "eps"], kind="stable").reset_index(drop=True)


def _linf(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows under L-inf; of budgets in pixels where there are any, whose unit others do not share."""
    norms = rows["convention"].str.removesuffix("_censored")
    shown = next((norm for norm in ("linf", "linf_normalized", "") if (norms == norm).any()), "")
    return rows[norms == shown]


def _distances(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a model and attack: the median minimum perturbation in 255ths; `censored` where it lies beyond."""
    medians = frames.pick(_linf(rows[rows["metric"] == "median_distance"])).dropna(subset=["value"])
    medians = medians[medians["slice"].isin([*ATTACKS, *YARDSTICKS])]
    scaled = {name: 255 * medians[name] for name in ("value", "low", "high")}
    return medians.assign(censored=medians["convention"].str.endswith("_censored"), **scaled)


def _reported(rows: pd.DataFrame) -> dict[str, float]:
    """Attack -> the budget at which its accuracy is quoted: `linf_2` is 2 / 255."""
    quoted = frames.pick(rows, metric="accuracy")
    budgets = pd.to_numeric(quoted["convention"].str.removeprefix("linf_"), errors="coerce")
    found = quoted.assign(eps=budgets).dropna(subset=["eps"])
    return {str(name): float(eps) for name, eps in found.groupby("slice")["eps"].min().items()}


def _panel(axes: Axes, curves: pd.DataFrame, name: str, title: str, reported: float | None) -> None:
    axes.set_title(title)
    points = curves[curves["attack"] == name]
    if not len(points):
        style.empty(axes)
        return
    places = _axis(axes, points["eps"])
    if reported in places:
        axes.axvline(places[reported], color="#BBBBBB", linewidth=0.8, zorder=1)
    _curves_of(axes, points, places)
    for yardstick, (_, dashes) in YARDSTICKS.items():
        others = curves[(curves["attack"] == yardstick) & curves["eps"].isin(list(places))]
        for group, some in others.groupby("group", sort=True):
            means = some.groupby("eps")["value"].mean()
            axes.plot([places[eps] for eps in means.index], 100 * means, color=style.color(str(group)), linewidth=0.6,
                      linestyle=dashes, zorder=2, alpha=0.8)  # fmt: skip


def _faults(axes: Axes, rows: pd.DataFrame) -> None:
    """Say where images could not be attacked, for what is drawn is over the others."""
    most = rows["value"].max() if len(rows) else 0.0
    if most > 0 and axes.lines:
        note = axes.text(0.04, 0.05, f"faults: up to {100 * most:.2g} %", transform=axes.transAxes, fontsize=5.5,
                         color="#444444", style="italic", zorder=6)  # fmt: skip
        note.set_path_effects(style.OUTLINE)


def _curves_of(axes: Axes, points: pd.DataFrame, places: Mapping[float, float], **look: Any) -> None:
    """A line a model, or, of more than a few models, one a group."""
    few = points["model"].nunique() <= _FEW
    for _, some in points.groupby("model" if few else "group", sort=True):
        (_line if few else _mean)(axes, some, places, **look)


def _axis(axes: Axes, budgets: pd.Series) -> dict[float, float]:
    """A log axis of the budgets, and where each is drawn: no attack half a step below the smallest."""
    known = sorted(set(budgets) - {_CLEAN})
    start = known[0] / 2 if known else 1.0
    places = {_CLEAN: start} | {eps: eps for eps in known}
    step = -(-len(known) // _MOST_TICKS)
    ticks = [start, *known[::-1][::step][::-1]]
    axes.set_xscale("log")
    axes.set_xlim(start / 1.25, (known or [start])[-1] * 1.25)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter(["0", *(f"{eps:g}".removeprefix("0") for eps in ticks[1:])]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_ylim(-3, 103)
    axes.set_yticks(range(0, 101, 25))
    axes.tick_params(axis="x", labelsize=6)
    return places


def _line(axes: Axes, points: pd.DataFrame, places: Mapping[float, float], **look: Any) -> None:
    x, group = points["eps"].map(places), str(points["group"].iloc[0])
    colour = style.color(group)
    look = {"linewidth": 0.9, "marker": style.marker(points["family"].iloc[0]), **look}
    (line,) = axes.plot(x, 100 * points["value"], color=colour, markersize=2.8, alpha=0.9, zorder=3,
                        markeredgecolor="white", markeredgewidth=0.25, **look)  # fmt: skip
    style.mark_group(line, group)
    axes.vlines(x, 100 * points["low"], 100 * points["high"], color=colour, linewidth=0.5, alpha=0.5, zorder=2.5)


def _mean(axes: Axes, points: pd.DataFrame, places: Mapping[float, float], **look: Any) -> None:
    budgets, group = sorted(set(points["eps"])), str(points["group"].iloc[0])
    values = [points[points["eps"] == eps].sort_values(["value", "model"], kind="stable") for eps in budgets]
    x, colour = [places[eps] for eps in budgets], style.color(group)
    limits = [
        statistics.bootstrap_mean(some["value"]) if len(some) > 1 else tuple(some[["low", "high"]].iloc[0])
        for some in values
    ]
    low, high = 100 * np.transpose(np.array(limits, float))
    axes.fill_between(x, low, high, color=colour, alpha=0.22, linewidth=0, zorder=2)
    look = {"linewidth": 1.2, "marker": "o", "markersize": 2.4, "markeredgewidth": 0, **look}
    (line,) = axes.plot(x, [100 * some["value"].mean() for some in values], color=colour, zorder=3, **look)
    style.mark_group(line, group)


def _yardsticks(axes: Axes, curves: pd.DataFrame) -> None:
    axes.set_title("PGD and noise")
    points = curves[curves["attack"].isin(list(YARDSTICKS))]
    if not len(points):
        style.empty(axes)
        return
    places = _axis(axes, points["eps"])
    for name, (_, dashes) in YARDSTICKS.items():
        _curves_of(axes, points[points["attack"] == name], places, linestyle=dashes, marker="", linewidth=1.0)


def _medians(figure: Figure, cell: SubplotSpec, points: pd.DataFrame, rows: pd.DataFrame) -> None:
    axes = figure.add_subplot(cell)
    images = frames.fmt_n(rows[rows["metric"] == "clean_accuracy"])
    named = f"{frames.dataset_title(str(rows['dataset'].iloc[0]))}{f', n = {images} images' if images else ''}"
    axes.set_title(f"Median minimum perturbation ({named})")
    names = [name for name in (*ATTACKS, *YARDSTICKS) if (points["slice"] == name).any()]
    if not names:
        style.empty(axes)
        return
    positive = points.loc[points["value"] > 0, "value"]
    floor = float(positive.min() if len(positive) else 0.1) / 2
    top = max(points["value"].max(), points["high"].max(), 2 * floor)
    groups = [group for group in style.GROUPS if (points["group"] == group).any()]
    for place, name in enumerate(names):
        if place % 2:
            axes.axvspan(place - 0.5, place + 0.5, color="#F5F5F5", linewidth=0, zorder=0)
        for number, group in enumerate(groups):
            some = points[(points["slice"] == name) & (points["group"] == group)]
            at = place + 0.84 * ((number + 0.5) / len(groups) - 0.5)
            _median(axes, some.assign(value=some["value"].clip(lower=floor)), at, group, 0.5 / len(groups), floor)
    _distance_axis(axes, floor, top, zero=bool((points["value"] <= 0).any()))
    titles = [ATTACKS.get(name) or YARDSTICKS[name][0] for name in names]
    titles = [title.replace(", transfer", "\ntransf.").replace("Deep", "Deep-\n") for title in titles]
    axes.set_xticks(range(len(names)), titles)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.tick_params(axis="x", length=0, labelsize=5.8)
    axes.grid(False, axis="x")
    axes.set_ylabel("L-inf distance / 255")


def _median(axes: Axes, points: pd.DataFrame, at: float, group: str, room: float, floor: float) -> None:
    """A dot a model, a triangle where the median is only known to be larger; their median with its interval."""
    if not len(points):
        return
    points, colour = points.sort_values(["value", "model"], kind="stable"), style.color(group)
    spread = ((np.arange(len(points)) * 0.618) % 1 - 0.5) * room if len(points) > 1 else np.zeros(1)
    alpha = float(np.interp(len(points), [5, 40, 100], [0.7, 0.4, 0.25]))
    for censored, shape, size in ((False, "o", 1.8), (True, "^", 2.6)):
        some = (points["censored"] == censored).to_numpy()
        axes.plot(at + spread[some], points["value"][some], linestyle="none", marker=shape, markersize=size,
                  color=colour, alpha=alpha, markeredgewidth=0, zorder=2)  # fmt: skip
    values = points["value"].to_numpy(float)
    if len(values) > 1:
        draws = np.random.default_rng(0).choice(values, (statistics.RESAMPLES, len(values)))
        low, high = statistics.percentile_interval(np.median(draws, axis=1))
    else:
        low, high = points["low"].clip(lower=floor).iloc[0], points["high"].iloc[0]
    axes.plot([at, at], [low, high], color=colour, linewidth=1.3, zorder=3, solid_capstyle="butt")
    beyond = points["censored"].mean() > 0.5
    (line,) = axes.plot([at], [np.median(values)], linestyle="none", marker="^" if beyond else "o", markersize=3.2,
                        color=colour, markeredgecolor="black", markeredgewidth=0.5, zorder=4)  # fmt: skip
    style.mark_group(line, group)


def _distance_axis(axes: Axes, floor: float, top: float, zero: bool) -> None:
    """A log axis of distances; `zero`: medians of 0 are drawn at `floor`, whose tick then says so."""
    axes.set_yscale("log")
    axes.set_ylim(floor / 1.3, top * 1.4)
    steps = (1, 3) if top / floor < 1000 else (1,)
    ticks = [step * 10.0**power for power in range(-6, 4) for step in steps]
    ticks = [tick for tick in ticks if floor * (1.5 if zero else 1) < tick <= top * 1.4]
    axes.yaxis.set_major_locator(FixedLocator([floor] * zero + ticks))
    axes.yaxis.set_major_formatter(FixedFormatter(["0"] * zero + [f"{tick:g}" for tick in ticks]))
    axes.yaxis.set_minor_locator(NullLocator())
