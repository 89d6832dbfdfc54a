"""Corruptions that know the scene's depth: accuracy by type, severity and architecture, and against clean accuracy."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from clip_robustness.core import statistics
from clip_robustness.figures import frames, strips, style
from clip_robustness.figures.effective_robustness import draw_baseline

TABLES = ("accuracy", "models")
# ImageNet-3DCC (Kar et al. 2022): what needs the scene's geometry, then sensors and codecs.
_GEOMETRIC = ("near_focus", "far_focus", "xy_motion_blur", "z_motion_blur", "fog_3d", "flash")
_OTHERS = ("low_light", "iso_noise", "color_quant", "bit_error", "h265_abr", "h265_crf")
_TITLES = {"xy_motion_blur": "XY-motion blur", "z_motion_blur": "Z-motion blur", "fog_3d": "Fog 3D",
           "iso_noise": "ISO noise", "h265_abr": "H.265 ABR", "h265_crf": "H.265 CRF"}  # fmt: skip
_FEW, _BAND = 3, 6  # no line through fewer models, and no band: resamples of fewer are often all alike


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """CLIPs against supervised models of their architecture families under ImageNet-3DCC's corruptions.

    A panel a type, the six geometric ones first and the other six where the study has them: accuracy by severity, the
    mean of a look with a 95 % bootstrap interval over its models, or the model's own. Below: the mean over the
    geometric types (over the others where the study has none of these) against clean accuracy on logit axes, of all
    models, at the first, a middle and the last severity, with the line through the zero-shot CLIP ViTs; and how far
    the other zero-shot CLIPs lie above that line, by severity. Answers the 3D-corruption figures of Tu et al. (arXiv
    2410.01534; finding F9).
    """
    accuracy, models = (frames.table(tables, name) for name in TABLES)
    rows = _settings(accuracy)
    types = [name for name in (*_GEOMETRIC, *_OTHERS) if (rows["type"] == name).any()]
    if not types:
        return style.unmeasured("3D corruptions")
    values = frames.describe(rows, models)
    shown = strips.looks(values)
    counted = [name for name in _GEOMETRIC if name in types] or types
    points = frames.describe(_against_clean(rows, accuracy, counted), models)
    columns = 3 if len(types) <= 6 else 4
    lines = -(-len(types) // columns)
    upper, lower = 1.4 * lines + 0.2, 1.9
    figure = style.figure(style.DOUBLE, upper + lower + 0.16 * -(-len(shown) // 4) + 0.35)
    halves = figure.add_gridspec(2, 1, height_ratios=[upper, lower])
    grid = halves[0].subgridspec(lines, columns)
    severities = sorted(set(values["severity"]))
    top = float(np.clip(100 * values["value"].max() + 4, 10, 102))
    for number, name in enumerate(types):
        axes = figure.add_subplot(grid[number // columns, number % columns])
        axes.set_title(_TITLES.get(name, name.replace("_", " ").capitalize()))
        _severities(axes, values[values["type"] == name], severities, shown)
        axes.set_ylim(0, top)
        if number % columns == 0:
            axes.set_ylabel("Accuracy (%)")
        else:
            axes.tick_params(axis="y", labelleft=False)
        if number + columns < len(types):
            axes.tick_params(axis="x", labelbottom=False)
        else:
            axes.set_xlabel("Severity")
    _lower(figure, halves[1], points, severities)
    style.legend(figure, _handles(values, points, shown), columns=4)
    return figure


def _settings(accuracy: pd.DataFrame) -> pd.DataFrame:
    """The rows of one type at one severity, with the columns `type` and `severity`; one a model and setting."""
    rows = frames.split_slice(accuracy[accuracy["metric"] == "accuracy"], "type", "severity")
    rows = rows[rows["type"].isin([*_GEOMETRIC, *_OTHERS]) & rows["severity"].astype(str).str.fullmatch("[0-9]+")]
    rows = frames.pick(rows.dropna(subset=["value"])).drop_duplicates(["model", "slice"])
    return rows.assign(severity=rows["severity"].astype(int))


def _against_clean(rows: pd.DataFrame, accuracy: pd.DataFrame, types: Sequence[str]) -> pd.DataFrame:
    """x clean accuracy and y the mean over `types`, by model and severity, of models that have them all.

    All types show the same photographs, so limits are averaged too: the worst case.
    """
    clean = frames.pick(accuracy, metric="accuracy", dataset=frames.in_distribution(accuracy), slice="")
    by_setting = rows[rows["type"].isin(types)].groupby(["model", "severity"])
    some = by_setting.agg(y=("value", "mean"), low=("low", "mean"), high=("high", "mean"), types=("value", "size"))
    some = some[some["types"] == len(types)].reset_index()
    return some.merge(clean[["model", "value"]].rename(columns={"value": "x"}), on="model").dropna(subset=["x", "y"])


def _severities(axes: Axes, values: pd.DataFrame, severities: Sequence[int], shown: Sequence[tuple[str, str]]) -> None:
    for number, (group, family) in enumerate(shown):
        some = values[(values["group"] == group) & (values["family"] == family)].sort_values(["severity", "model"])
        if not len(some):
            continue
        shift = 0.34 * ((number + 0.5) / len(shown) - 0.5)
        levels = list(some.groupby("severity"))
        at = [severities.index(level) + shift for level, _ in levels]
        (line,) = axes.plot(
            at, [100 * part["value"].mean() for _, part in levels],
            color=style.color(group), marker=style.marker(family), markersize=3.2, linewidth=0.9,
            markeredgecolor="white", markeredgewidth=0.25, zorder=4 if group == "clip_zero_shot" else 3,
        )  # fmt: skip
        style.mark_group(line, group)
        for place, (_, part) in zip(at, levels, strict=True):
            own = tuple(part[["low", "high"]].iloc[0])
            low, high = statistics.bootstrap_mean(part["value"]) if len(part) > 1 else own
            axes.vlines(place, 100 * low, 100 * high, color=style.color(group), linewidth=0.7)
    axes.set_xticks(range(len(severities)), [str(level) for level in severities])
    axes.grid(False, axis="x")


def _lower(figure: Figure, cell, points: pd.DataFrame, severities: Sequence[int]) -> None:
    chosen = sorted({severities[0], severities[len(severities) // 2], severities[-1]})
    grid = cell.subgridspec(1, len(chosen) + 1, width_ratios=[*[1] * len(chosen), 1.05])
    for place, severity in enumerate(chosen):
        axes = figure.add_subplot(grid[0, place])
        axes.set_title(f"Severity {severity}")
        some = points[points["severity"] == severity]
        if not len(some):
            style.empty(axes)
            continue
        some = some.assign(x=style.drawable(some["x"]), y=style.drawable(some["y"]))
        style.logit_axis(axes, "x", some["x"], most=5)
        style.logit_axis(axes, "y", some["y"], most=6)
        clip, line = _line(some)
        if line is not None:
            draw_baseline(axes, line, clip if len(clip) >= _BAND else clip.iloc[:0])
        style.scatter(axes, some, errors=False)
        axes.set_xlabel("Clean accuracy (%)")
        if place == 0:
            axes.set_ylabel("Accuracy, 3D corruptions (%)")
    axes = figure.add_subplot(grid[0, len(chosen)])
    axes.set_title("Other CLIPs above the line")
    _above(axes, points, severities)


def _line(points: pd.DataFrame) -> tuple[pd.DataFrame, statistics.Line | None]:
    """The zero-shot CLIP ViTs, and the line through them (None of too few)."""
    clip = points[(points["group"] == "clip_zero_shot") & (points["family"] == "vit")]
    if len(clip) < _FEW:
        return clip, None
    try:
        return clip, statistics.fit_line(clip["x"], clip["y"])
    except ValueError:
        return clip, None


def _above(axes: Axes, points: pd.DataFrame, severities: Sequence[int]) -> None:
    """Distances of zero-shot CLIPs that are no ViTs from the line of those that are, in points."""
    points = points.assign(x=style.drawable(points["x"]), y=style.drawable(points["y"]))
    found = []
    for severity, some in points.groupby("severity"):
        _, line = _line(some)
        others = some[(some["group"] == "clip_zero_shot") & (some["family"] != "vit")]
        if line is not None and len(others):
            on_line = line.predict(others["x"])
            limits = {name: 100 * (others[name] - on_line) for name in ("low", "high")}
            found.append(others.assign(above=100 * (others["y"] - on_line), at=severity, **limits))
    if not found:
        style.empty(axes, f"fewer than {_FEW} CLIP ViTs\nor no other CLIP")
        return
    every = pd.concat(found)
    families = [family for family in style.FAMILIES if (every["family"] == family).any()]
    step = 0.8 / len(families)
    for (level, look), some in every.sort_values("model").groupby(["at", "family"]):
        family = str(look)
        at = severities.index(int(str(level))) - 0.4 + step * (families.index(family) + 0.5)
        own = tuple(some[["low", "high"]].iloc[0])
        strips.mean(axes, some["above"].to_numpy(), at, "clip_zero_shot", own, 0.6 * step, across=False,
                    marker=style.marker(family))  # fmt: skip
    axes.axhline(0, color="black", linewidth=0.7, zorder=1)
    axes.set_xticks(range(len(severities)), [str(level) for level in severities])
    axes.grid(False, axis="x")
    axes.set_xlabel("Severity")
    axes.set_ylabel("Points above the line")


def _handles(values: pd.DataFrame, points: pd.DataFrame, shown: Sequence[tuple[str, str]]) -> list[Line2D]:
    handles = strips.look_handles(values, shown)
    if len(points):
        handles += strips.look_handles(points, [look for look, _ in style.by_look(points) if look not in shown])
    if any(_line(some)[1] is not None for _, some in points.groupby("severity")):
        handles.append(Line2D([], [], color="black", linewidth=1.0, label="Line through the CLIP ViTs"))
    return handles
