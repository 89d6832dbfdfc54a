"""What each of six factors does to each axis of robustness: one forest plot of matched pairs."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D

from clip_robustness.figures import style

TABLES = ("six_factors",)
# Tol's muted palette, which colour-vision deficiencies leave apart; none is the colour of a group.
FACTORS = {
    "architecture": ("Architecture", "#332288"),
    "source": ("Training distribution", "#AA4499"),
    "size": ("Training-set size", "#117733"),
    "finetuning": ("Fine-tuning", "#882255"),
    "loss": ("Loss", "#999933"),
    "prompts": ("Prompts", "#44AA99"),
}
# Titles of the axes, in rows of panels.
BLOCKS = (
    {
        "clean_accuracy": "Accuracy",
        "effective_robustness": "Effective robustness, natural shifts",
        "factor_robustness": "Effective robustness, visual factors",
        "shape_bias": "Shape bias",
        "ood_auroc": "OOD AUROC",
        "retrieval": "Retrieval R@1",
    },
    {
        "ece_id": "ECE, ID",
        "ece_shifts": "ECE, shifts",
        "ece_shifts_scaled": "ECE, shifts, scaled",
        "nll_id": "NLL, ID",
        "nll_shifts": "NLL, shifts",
        "nll_shifts_scaled": "NLL, shifts, scaled",
    },
)
_ROW = 0.155  # inches
_COLUMNS = ("axis", "factor", "contrast", "effect", "low", "high", "interval", "n", "unit")


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """A panel for each axis, a row for each contrast: mean difference of the matched pairs and its 95 % interval.

    Filled: interval over pairs; hollow: over images only, for want of pairs. The number at the right of a row is that
    of its pairs. Contrasts without a pair and axes without a measurement are left out.
    """
    given = tables.get("six_factors", pd.DataFrame())
    effects = given.reindex(columns=list(_COLUMNS))
    contrasts = _contrasts(effects)
    blocks = [{axis: title for axis, title in block.items() if axis in set(effects["axis"])} for block in BLOCKS]
    blocks = [block for block in blocks if block]
    if not blocks:
        figure = style.figure(style.DOUBLE, 1.2)
        style.empty(figure.add_subplot())
        return figure
    height = _ROW * len(contrasts) + 0.62
    figure = style.figure(style.DOUBLE, height * len(blocks) + 0.45)
    grid = figure.add_gridspec(len(blocks), 1)
    for place, block in enumerate(blocks):
        columns = max(len(block) for block in blocks)
        row = grid[place].subgridspec(1, columns)
        for number, (axis, title) in enumerate(block.items()):
            axes = figure.add_subplot(row[number])
            axes.set_title(style.wrap(title, 84 // columns), fontsize=6.3, pad=3)
            _panel(axes, effects[effects["axis"] == axis], contrasts)
            _name_rows(axes, contrasts if number == 0 else [])
    style.legend(figure, _handles(effects), columns=8)
    missing = [title for block in BLOCKS for axis, title in block.items() if axis not in set(effects["axis"])]
    if missing:
        names = "; ".join(title for title in missing)
        note = style.wrap(f"Without a matched pair in this study, or not measured: {names}.", 150)
        figure.legends[0].set_title(note, prop=FontProperties(size=5.8))
    return figure


def _contrasts(effects: pd.DataFrame) -> list[tuple[str, str]]:
    """(factor, contrast) of the rows from top to bottom: factors in their order, contrasts as in the table."""
    known = effects[["factor", "contrast"]].drop_duplicates()
    return [(factor, contrast) for factor in FACTORS for contrast in known.loc[known["factor"] == factor, "contrast"]]


def _panel(axes: Axes, effects: pd.DataFrame, contrasts: Sequence[tuple[str, str]]) -> None:
    nats = effects["unit"].str.startswith("nats").any()
    scale = 1.0 if nats else 100.0
    place = [contrasts.index(key) for key in zip(effects["factor"], effects["contrast"], strict=True)]
    rows = effects.assign(place=place, **{name: scale * effects[name] for name in ("effect", "low", "high")})
    low, high = _limits(rows)
    axes.axvline(0, color="black", linewidth=0.7, zorder=1)
    for row in rows.to_dict("records"):
        color = FACTORS[row["factor"]][1]
        filled = row["interval"] == "pairs"
        axes.plot([row["low"], row["high"]], [row["place"]] * 2, color=color, linewidth=1.1, zorder=2)
        axes.plot(row["effect"], row["place"], marker="o", markersize=3.4, zorder=3, markeredgewidth=0.9,
                  color=color if filled else "white", markeredgecolor=color, gid=f"factor:{row['factor']}")  # fmt: skip
        axes.annotate(f"{row['n']:.0f}", (1, row["place"]), (-0.5, 0), xycoords=axes.get_yaxis_transform(),
                      textcoords="offset points", ha="right", va="center", fontsize=4.8, color="#555555")  # fmt: skip
    factors = [factor for factor, _ in contrasts]
    for edge in np.flatnonzero([a != b for a, b in itertools.pairwise(factors)]):
        axes.axhline(edge + 0.5, color="#CCCCCC", linewidth=0.5, zorder=0)
    axes.set_xlim(low, high + 0.14 * (high - low))  # the numbers of pairs have a margin of their own
    axes.set_ylim(len(contrasts) - 0.4, -0.6)
    axes.grid(False, axis="y")
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="x", labelsize=5.8, pad=1.5)
    better = ", less is better" if effects["axis"].str.startswith(("ece", "nll")).any() else ""
    axes.set_xlabel(("nats" if nats else "points") + better, fontsize=6, labelpad=1)


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Around all effects and zero; an interval far longer than the others leaves the panel."""
    ends = np.concatenate([rows["low"], rows["high"], [0]])
    effects = np.concatenate([rows["effect"], [0]])
    reach = 1.5 * max(np.ptp(effects), float(np.median(rows["high"] - rows["low"])), 1e-6)
    low, high = max(ends.min(), effects.min() - reach), min(ends.max(), effects.max() + reach)
    return low - 0.06 * (high - low), high + 0.06 * (high - low)


def _name_rows(axes: Axes, contrasts: Sequence[tuple[str, str]]) -> None:
    axes.tick_params(axis="y", length=0)
    axes.set_yticks(range(len(contrasts)), [contrast for _, contrast in contrasts], fontsize=6)
    for label, (factor, _) in zip(axes.get_yticklabels(), contrasts, strict=True):
        label.set_color(FACTORS[factor][1])


def _handles(effects: pd.DataFrame) -> list[Line2D]:
    present = set(effects["factor"])
    handles = [
        Line2D([], [], color=color, marker="o", markersize=3.4, linewidth=1.1, label=title)
        for factor, (title, color) in FACTORS.items()
        if factor in present
    ]
    images = Line2D([], [], color="#555555", marker="o", markersize=3.4, linewidth=1.1, markerfacecolor="white",
                    label="Interval over images only")  # fmt: skip
    return [*handles, images] if (effects["interval"] == "images").any() else handles
