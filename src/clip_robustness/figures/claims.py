"""The claims ledger as a figure: a row a claim, its effect against what was claimed, its verdict."""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from clip_robustness.figures import frames, style

TABLES = ("claims",)
# Verdict -> its mark, hollow or filled, and colour (Okabe and Ito): told apart by shape and word, too.
VERDICTS = {
    "reproduced": ("o", True, "#009E73"),
    "contradicted": ("X", True, "#D55E00"),
    "undecided": ("D", False, "#666666"),
    "not measured here": ("_", True, "#999999"),
}
_HEADINGS = {
    "tu": "Tu, Deng and Gedeon: A Closer Look (2023), Toward a Holistic Evaluation (2024)",
    "roz": "Wang, Jia, Liu and Song: Benchmarking Zero-Shot Robustness (2024)",
}
_COLUMNS = (
    *("id", "finding", "expected", "edge_low", "edge_high", "inside", "value", "low", "high", "n", "unit", "scale"),
    *("verdict", "verdict_holm", "missing"),
)
# Inches from the left: id, finding, the strip of effects, value, n, verdict.
_ID, _FINDING, _STRIP, _VALUE, _N, _VERDICT = 0.06, 0.42, (3.32, 4.2), 4.28, 5.56, 6.04
_WIDTH = 65  # characters of a line of a finding
_LINE, _GAP = 0.098, 0.045  # inches
_SIZE = 5.6


@style.styled
def draw(tables: Mapping[str, pd.DataFrame]) -> Figure:
    """Every claim of the ledger: id, finding, effect with its 95 % interval, value, n and verdict.

    The strip: right of its line is where the claim says that the effect lies, and the line is the edge of that
    region. Each row has its own unit, so that its interval fills the strip. An asterisk marks a verdict that does
    not outlast Holm's correction.
    """
    table = tables.get("claims")
    if table is None or not len(table):
        figure = style.figure(style.DOUBLE, 1.2)
        style.empty(figure.add_subplot())
        return figure
    table = table.reindex(columns=list(_COLUMNS))
    table = table.assign(_order=table["id"].map(_natural)).sort_values("_order", kind="stable")
    # Top of each row, in inches from the top.
    top, rows, headings = 0.5, [], []
    for prefix, some in table.groupby(table["id"].str.partition(".")[0], sort=False):
        headings.append((top, _HEADINGS.get(str(prefix), str(prefix))))
        top += 0.2
        for claim in frames.records(some):
            lines = 1 + max(_finding(claim).count("\n"), _missing(claim).count("\n"))
            rows.append((top, lines, claim))
            top += lines * _LINE + _GAP
        top += 0.12
    figure = style.figure(style.DOUBLE, top)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, style.DOUBLE), ylim=(top, 0))
    _head(axes, table)
    for place, heading in headings:
        axes.text(_ID, place + 0.02, heading, va="top", fontsize=7, fontweight="bold")
    for number, (place, lines, claim) in enumerate(rows):
        _row(axes, place, lines * _LINE, claim, shaded=number % 2 == 0)
    return figure


def _natural(name: str) -> tuple[Any, ...]:
    prefix, _, rest = name.partition(".")
    known = list(_HEADINGS)
    position = known.index(prefix) if prefix in known else len(known)
    number = re.search(r"\d+", rest)
    return position, prefix, int(number[0]) if number else 0, rest


def _head(axes: Axes, table: pd.DataFrame) -> None:
    counts = table["verdict"].value_counts()
    x = _ID
    for name, _ in VERDICTS.items():
        _mark(axes, x + 0.04, 0.1, name)
        axes.text(x + 0.12, 0.1, f"{name}: {counts.get(name, 0)}", va="center", fontsize=6.5)
        x += 1.25
    for place, text in ((_FINDING, "Finding"), (_VALUE, "Value [95 %], points"), (_N, "n"), (_VERDICT, "Verdict")):
        axes.text(place, 0.34, text, va="center", fontsize=6, color="#555555")
    for place, text, side in ((_STRIP[0], "against", "left"), (_STRIP[1], "as claimed", "right")):
        axes.text(place, 0.34, text, va="center", ha=side, fontsize=6, color="#555555")


def _row(axes: Axes, place: float, height: float, claim: Any, shaded: bool) -> None:
    if shaded:
        axes.axhspan(place - _GAP / 2, place + height + _GAP / 2, color="#F6F6F4", linewidth=0, zorder=0)
    middle = place + height / 2
    measured = claim.verdict != "not measured here"
    ink = "#111111" if measured else "#777777"
    code = str(claim.id).partition(".")[2]
    axes.text(_ID, middle, code, va="center", fontsize=_SIZE, color=ink)
    axes.text(_FINDING, middle, _finding(claim), va="center", fontsize=_SIZE, color=ink, linespacing=1.1)
    if measured and np.isfinite([claim.value, claim.low, claim.high]).all():
        _effect(axes, middle, claim)
        axes.text(_VALUE, middle, _number(claim), va="center", fontsize=_SIZE, color=ink)
        axes.text(_N, middle, _models(claim), va="center", fontsize=_SIZE, color=ink)
    elif not measured:
        axes.text(_STRIP[0], middle, _missing(claim), va="center", fontsize=_SIZE, color=ink, style="italic",
                  linespacing=1.1)  # fmt: skip
    _mark(axes, _VERDICT + 0.03, middle, claim.verdict)
    star = "" if claim.verdict == claim.verdict_holm else " *"
    word = style.short(str(claim.verdict), 18).replace(" here", "")
    axes.text(_VERDICT + 0.1, middle, word + star, va="center", fontsize=_SIZE,
              color=VERDICTS.get(claim.verdict, ("", True, ink))[2])  # fmt: skip


def _finding(claim: Any) -> str:
    text = str(claim.finding)
    return style.wrap(text[:1].upper() + text[1:], _WIDTH)


def _missing(claim: Any) -> str:
    if claim.verdict != "not measured here":
        return ""
    return style.wrap(style.short(f"no {claim.missing}".replace("/", " / "), 2 * _WIDTH - 30), _WIDTH - 10)


def _mark(axes: Axes, x: float, y: float, name: str) -> None:
    shape, filled, colour = VERDICTS.get(name, ("_", True, "#999999"))
    axes.plot([x], [y], marker=shape, markersize=3.6, color=colour, markerfacecolor=colour if filled else "white",
              markeredgewidth=0.8)  # fmt: skip


def claimed_side(claim: Any) -> tuple[float, float, float]:
    """value, low, high as distances into the claimed region (below 0: outside of it), the worst limit first.

    Of an interval across the middle of a region with two edges, the best limit is the middle.
    """
    edges = [edge for edge in (claim.edge_low, claim.edge_high) if np.isfinite(edge)]
    sign = 1 if claim.inside else -1

    def depth(x: float) -> float:
        into = [x - claim.edge_low if edge == claim.edge_low else claim.edge_high - x for edge in edges]
        return sign * min(into)

    ends = [depth(claim.low), depth(claim.high), depth(claim.value)]
    if len(edges) == 2 and claim.low < np.mean(edges) < claim.high:
        ends.append(depth(float(np.mean(edges))))
    return ends[2], min(ends), max(ends)


def _effect(axes: Axes, y: float, claim: Any) -> None:
    value, low, high = claimed_side(claim)
    half = (_STRIP[1] - _STRIP[0]) / 2
    centre, scale = _STRIP[0] + half, half / (1.05 * max(abs(low), abs(high), 1e-12))
    colour = VERDICTS.get(claim.verdict, VERDICTS["undecided"])[2]
    axes.plot([centre, centre], [y - 0.055, y + 0.055], color="#999999", linewidth=0.7, zorder=1)
    axes.plot([centre + scale * low, centre + scale * high], [y, y], color=colour, linewidth=1.1, zorder=2)
    axes.plot([centre + scale * value], [y], marker="|", color=colour, markersize=5, markeredgewidth=1.2, zorder=3)


def _number(claim: Any) -> str:
    factor, digits, unit = (100, 1, "") if claim.scale == "points" else (1, 3, f" {claim.scale}")
    value, low, high = (f"{factor * x:.{digits}f}".replace("-", "−") for x in (claim.value, claim.low, claim.high))
    return f"{value} [{low}, {high}]{unit}"


def _models(claim: Any) -> str:
    """A dagger marks intervals that are not over models."""
    count = "" if pd.isna(claim.n) else f"{claim.n:,.0f}"
    return count if claim.unit in ("models", "pairs") else f"{count} †"
