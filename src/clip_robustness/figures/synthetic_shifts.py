"""Synthetic shifts by three measures side by side, since the verdict on CLIP depends on which is taken."""

from collections.abc import Mapping, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clip_robustness.core import statistics
from clip_robustness.figures import frames, strips, style

TABLES = ("synthetic", "models")
_MEASURES = (
    ("accuracy", "Accuracy", "Accuracy on the shift (%)"),
    ("retention", "Retention", "Accuracy / in-distribution accuracy (%)"),
    ("effective_robustness", "Effective robustness", "Accuracy above the baseline (points)"),
)


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """CLIPs against supervised models of their architecture families.

    Upper panels, one row a shift: accuracy, its ratio to in-distribution accuracy, and what lies above the baseline of
    standard models; a dot a model, the mean of a look with a 95 % bootstrap interval over its models, or the model's
    own interval. Lower panels, for the corruptions with most models: accuracy by severity, retention by corruption and
    the mean corruption error. Answers the synthetic-shift figures of Wang et al. (arXiv 2403.10499; finding F2).
    """
    table, models = (frames.table(tables, name) for name in TABLES)
    values = frames.describe(table, models)
    for name in ("value", "low", "high"):
        values[name] = 100 * values[name]
    shifts = frames.dataset_order(values["dataset"])
    shown = strips.looks(values)
    corrupted = values[values["dataset"] == _corruptions(values)]
    names = sorted({text for text in corrupted.loc[corrupted["metric"] == "retention", "slice"] if text})
    measured = set(zip(corrupted["group"], corrupted["family"], strict=True))
    of_these = [look for look in shown if look in measured]
    upper = 0.5 + max(0.36, 0.085 * len(shown)) * max(len(shifts), 2)
    lower = 0.55 + max(0.15, 0.055 * len(of_these)) * max(len(names), 8)
    figure = style.figure(style.DOUBLE, min(upper + (lower if names else 0) + 0.5, style.PAGE))
    halves = figure.add_gridspec(2 if names else 1, 1, height_ratios=[upper, lower] if names else [1])
    top = halves[0].subgridspec(1, 3)
    for column, (metric, title, label) in enumerate(_MEASURES):
        axes = figure.add_subplot(top[0, column])
        some = _whole(values, metric)
        axes.set_title(title)
        if not len(some) or not shown:
            style.empty(axes)
            continue
        strips.categories(axes, [frames.dataset_title(shift) for shift in shifts])
        axes.tick_params(axis="y", labelleft=column == 0)
        strips.rows(axes, some, "dataset", shifts, shown)
        if column == 0:
            _mark_unmeasured(axes, some, shifts, shown)
        axes.axvline(0, color="black", linewidth=0.7, zorder=1)
        axes.set_xlabel(label)
    if names:
        _lower(figure, halves[1], corrupted, names, of_these)
    style.legend(figure, strips.look_handles(values, shown), columns=4)
    return figure


def _whole(values: pd.DataFrame, metric: str) -> pd.DataFrame:
    """A measure of whole shifts; of effective robustness, by the shift's own classes where it has fewer."""
    rows = values[values["metric"] == metric]
    if metric != "effective_robustness":
        return rows[rows["slice"] == ""]
    return rows.sort_values(["slice", "model"]).drop_duplicates(["model", "dataset"])


def _mark_unmeasured(axes: Axes, values: pd.DataFrame, shifts: Sequence[str], shown: Sequence[object]) -> None:
    """Say so in the CLIPs' own place: one that is absent could be taken for one that others hide."""
    clip = set(values.loc[values["group"] == "clip_zero_shot", "dataset"])
    for place, shift in enumerate(shifts):
        if shift not in clip:
            first = place - 0.42 + 0.42 / len(shown)
            axes.text(0.98, first, "CLIP not measured", transform=axes.get_yaxis_transform(), ha="right", va="center",
                      fontsize=5.5, color="#666666", style="italic", path_effects=style.OUTLINE)  # fmt: skip


def _corruptions(values: pd.DataFrame) -> str:
    """The data set of corruptions that covers most models ("" if there is none)."""
    rows = values[values["slice"].str.startswith("severity:")]
    count = rows.groupby("dataset")["model"].nunique()
    return min(count.index, key=lambda name: (-count[name], name)) if len(count) else ""


def _lower(figure: Figure, cell, values: pd.DataFrame, names: Sequence[str], shown: Sequence[tuple[str, str]]) -> None:
    grid = cell.subgridspec(1, 3, width_ratios=[1, 1.15, 0.85])
    title = frames.dataset_title(values["dataset"].iloc[0])
    axes = figure.add_subplot(grid[0, 0])
    axes.set_title(f"{title}: by severity")
    _severities(axes, values[values["metric"] == "accuracy"], shown)
    axes = figure.add_subplot(grid[0, 1])
    axes.set_title(f"{title}: by corruption")
    strips.categories(axes, [_title(name) for name in names])
    strips.rows(axes, values[values["metric"] == "retention"], "slice", names, shown)
    axes.set_xlabel("Retention (%)")
    axes = figure.add_subplot(grid[0, 2])
    errors = values[values["metric"].isin(["mce", "relative_mce"])]
    axes.set_title(f"{title}: errors")
    if not len(errors):
        style.empty(axes)
        return
    strips.categories(axes, ["mCE", "Relative\nmCE"])
    strips.rows(axes, errors, "metric", ["mce", "relative_mce"], shown)
    axes.axvline(100, color="black", linewidth=0.7, zorder=1)
    axes.set_xlabel(f"% of the errors of\n{style.short(errors['convention'].iloc[0], 20)}")


def _title(corruption: str) -> str:
    return corruption.replace("_", " ").capitalize().replace("Jpeg", "JPEG")


def _severities(axes: Axes, values: pd.DataFrame, shown: Sequence[tuple[str, str]]) -> None:
    rows = values[values["slice"].str.startswith("severity:")]
    levels = sorted(set(rows["slice"]), key=lambda text: float(text.partition(":")[2]))
    for number, (group, family) in enumerate(shown):
        some = rows[(rows["group"] == group) & (rows["family"] == family)]
        points = [some.loc[some["slice"] == level].sort_values("model") for level in levels]
        if not all(len(own) for own in points):
            continue
        shift = 0.3 * ((number + 0.5) / len(shown) - 0.5)
        (line,) = axes.plot([place + shift for place in range(len(levels))], [own["value"].mean() for own in points],
                            color=style.color(group), marker=style.marker(family), markersize=3.5, linewidth=1.0,
                            markeredgecolor="white", markeredgewidth=0.25)  # fmt: skip
        style.mark_group(line, group)
        for place, own in enumerate(points):
            limits = (own["low"].iloc[0], own["high"].iloc[0])
            low, high = statistics.bootstrap_mean(own["value"]) if len(own) > 1 else limits
            axes.vlines(place + shift, low, high, color=style.color(group), linewidth=0.8)
    axes.set_xticks(range(len(levels)), [level.partition(":")[2] for level in levels])
    axes.grid(False, axis="x")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Severity")
    axes.set_ylabel("Accuracy (%)")
