"""Small drawings of model cards, as SVG in the page: a model within its group, and reliability."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from clip_robustness.report.markup import Markup

_WIDTH, _HEIGHT, _EDGE = 150, 18, 4
_SIDE, _MARGIN = 260, 34


def strip(row: Mapping[str, Any]) -> Markup:
    """The range of the model's group as a line, its median as a tick, the model as a dot with its interval.

    row: value, low, high, and least, median and most of the group.
    """
    shown = [row[name] for name in ("value", "low", "high", "least", "most") if pd.notna(row[name])]
    low, span = min(shown), max(shown) - min(shown) or 1.0

    def x(value: float) -> str:
        return f"{_EDGE + (_WIDTH - 2 * _EDGE) * (value - low) / span:.1f}"

    y = _HEIGHT / 2
    parts = [_line(x(row["least"]), x(row["most"]), y, "range"), _tick(x(row["median"]), y)]
    if pd.notna(row["low"]) and pd.notna(row["high"]):
        parts.append(_line(x(row["low"]), x(row["high"]), y, "interval"))
    parts.append(f'<circle cx="{x(row["value"])}" cy="{y:g}" r="3.5" class="dot"/>')
    return Markup(
        f'<svg class="strip" width="{_WIDTH}" height="{_HEIGHT}" viewBox="0 0 {_WIDTH} {_HEIGHT}" aria-hidden="true">'
        f"{''.join(parts)}</svg>"
    )


def _line(left: str, right: str, y: float, kind: str) -> str:
    return f'<line x1="{left}" x2="{right}" y1="{y:g}" y2="{y:g}" class="{kind}"/>'


def _tick(x: str, y: float) -> str:
    return f'<line x1="{x}" x2="{x}" y1="{y - 5:g}" y2="{y + 5:g}" class="range"/>'


def reliability(bins: pd.DataFrame) -> Markup:
    """Accuracy against confidence. bins: when (before or after), confidence, value, low, high, n."""

    def x(value: float) -> str:
        return f"{_MARGIN + _SIDE * value:.1f}"

    def y(value: float) -> str:
        return f"{10 + _SIDE * (1 - value):.1f}"

    parts = [f'<rect x="{_MARGIN}" y="10" width="{_SIDE}" height="{_SIDE}" class="frame"/>']
    parts.append(f'<line x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}" class="range"/>')
    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<text x="{x(value)}" y="{_SIDE + 26}" text-anchor="middle">{100 * value:g}</text>')
        parts.append(f'<text x="{_MARGIN - 5}" y="{y(value)}" text-anchor="end" dy="4">{100 * value:g}</text>')
    total = bins.groupby("when")["n"].sum()
    for row in bins.sort_values(["when", "confidence"], ascending=[False, True]).to_dict("records"):
        radius = 2 + 9 * math.sqrt(row["n"] / total[row["when"]])
        at = x(row["confidence"])
        if pd.notna(row["low"]):
            parts.append(f'<line x1="{at}" x2="{at}" y1="{y(row["low"])}" y2="{y(row["high"])}" class="interval"/>')
        kind = "hollow" if row["when"] == "before" else "dot"
        parts.append(f'<circle cx="{at}" cy="{y(row["value"])}" r="{radius:.1f}" class="{kind}"/>')
    width, height = _SIDE + _MARGIN + 14, _SIDE + 48
    parts.append(f'<text x="{_MARGIN + _SIDE / 2}" y="{height - 4}" text-anchor="middle">confidence, %</text>')
    return Markup(
        f'<svg class="reliability" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        'aria-label="Accuracy in per cent against confidence; the numbers stand in the table below">'
        f"{''.join(parts)}</svg>"
    )
