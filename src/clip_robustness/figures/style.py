"""One look for all figures: sizes in inches, fonts, the colour of a model group, axes, labels, saving.

Figures are built from `matplotlib.figure.Figure`, without pyplot, so that drawing holds no global state.
"""

import functools
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import patheffects
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, LogLocator, NullLocator

from clip_robustness.core import io, statistics
from clip_robustness.core.names import FAMILIES, GROUPS

SINGLE, DOUBLE, PAGE = 3.35, 6.9, 9.0

# A thin white rim keeps a label readable on lines and points.
OUTLINE: list[patheffects.AbstractPathEffect] = [patheffects.withStroke(linewidth=1.4, foreground="white")]
NOT_MEASURED = "not measured in this study"

_RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "legend.handletextpad": 0.3,
    "legend.columnspacing": 1.2,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.5,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.0,
    "figure.dpi": 100,
    "pdf.fonttype": 42,
    "text.parse_math": False,  # a model may have any name, dollar signs included
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Make `draw` use this style whatever the user's matplotlibrc says."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs) -> Figure:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_RC)
            return draw(*args, **kwargs)

    return wrapper


def figure(width: float, height: float) -> Figure:
    """An empty figure of `width` x `height` inches; its layout makes room for legends outside the axes."""
    layout = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.02, hspace=0.03)
    made = Figure(figsize=(width, height), layout=layout)
    FigureCanvasAgg(made)
    return made


def save(
    figure: Figure,
    pdf: str | Path,
    png: str | Path,
    *,
    title: str = "",
    study: str = "",
    inputs: Mapping[str, str] | None = None,
) -> None:
    """Write `figure` as PDF and as PNG (200 dpi), byte for byte reproducible.

    `inputs` maps a table's name to its SHA-256; it goes into both files, so that a figure that has been
    passed on alone can still be traced to its numbers.
    """
    provenance = "; ".join(f"{name} sha256:{digest}" for name, digest in sorted((inputs or {}).items()))
    pdf_metadata = {"Title": title, "Subject": study, "Keywords": provenance, "CreationDate": None}
    png_metadata = {"Title": title, "Source": study, "Comment": provenance, "Software": None}
    with matplotlib.rc_context(_RC):
        _write(pdf, figure, format="pdf", metadata=pdf_metadata)
        _write(png, figure, format="png", dpi=200, metadata=png_metadata)


def _write(path: str | Path, figure: Figure, **options: Any) -> None:
    drawn = BytesIO()  # on a full disk, matplotlib's own writers fail in ways of their own
    figure.savefig(drawn, **options)
    with io.atomic(path) as temporary:
        temporary.write_bytes(drawn.getbuffer())


def color(group: str) -> str:
    return GROUPS.get(group, GROUPS["unlisted"])[1]


def marker(family: str) -> str:
    return FAMILIES.get(family, FAMILIES["other"])[1]


def mark_group(artist: Artist, group: str) -> None:
    """Name the group that an artist shows, so that a test can compare colours across figures."""
    artist.set_gid(f"group:{group}")


def scatter(axes: Axes, points: pd.DataFrame, x: str = "x", y: str = "y", errors: bool = True) -> None:
    """Draw models as points: colour by `group`, marker by `family`, 95 % bars from `low` and `high`.

    Points shrink and become translucent as they grow in number, and those of the background groups lie
    below those of CLIP, so that hundreds of models stay readable.
    """
    crowd = len(points)
    size = float(np.interp(crowd, [15, 60, 300], [4.2, 3.4, 2.5]))
    alpha = float(np.interp(crowd, [30, 150, 400], [0.95, 0.7, 0.5]))
    depth = {group: 3 + position / 100 for position, group in enumerate(reversed(_by_contrast()))}
    members = points.groupby("group")["group"].size()
    for (group, family), some in by_look(points):
        few = (
            crowd > 60 and members[group] <= 20 and group.startswith("clip_")
        )  # a handful of models must not drown among hundreds
        bars = some.dropna(subset=["low", "high"]) if errors else some.iloc[:0]
        zorder = depth.get(group, 3)
        if len(bars):
            span = np.clip(np.stack([bars[y] - bars["low"], bars["high"] - bars[y]]), 0, None)
            axes.errorbar(bars[x], bars[y], span, fmt="none", ecolor=color(group), elinewidth=0.6,
                          alpha=min(alpha, 0.6), zorder=zorder - 0.005)  # fmt: skip
        (line,) = axes.plot(some[x], some[y], linestyle="none", marker=marker(family), color=color(group),
                            markersize=1.5 * size if few else size, alpha=0.95 if few else alpha,
                            markeredgecolor="white", markeredgewidth=0.25, zorder=zorder)  # fmt: skip
        mark_group(line, group)


def by_look(points: pd.DataFrame) -> list[tuple[tuple[str, str], pd.DataFrame]]:
    """Points that share a colour and a marker, by (group, family); the background groups first."""
    looks = [((str(group), str(family)), some) for (group, family), some in points.groupby(["group", "family"])]
    return sorted(looks, key=lambda look: -_by_contrast().index(look[0][0]))


def _by_contrast() -> list[str]:
    """Groups from the one drawn on top to the one drawn below all."""
    front = ["human", "clip_zero_shot", "clip_finetuned", "vlm", "self_supervised", "robust", "more_data"]
    return [*front, "standard", "unlisted"]


def group_handles(groups: Iterable[str]) -> list[Line2D]:
    """Legend entries of `groups`, in the order of GROUPS."""
    present = set(groups)
    return [
        Line2D([], [], linestyle="none", marker="o", markersize=4.5, color=colour, label=title)
        for group, (title, colour) in GROUPS.items()
        if group in present
    ]


def family_handles(families: Iterable[str]) -> list[Line2D]:
    present = {family if family in FAMILIES else "other" for family in families}
    return [
        Line2D([], [], linestyle="none", marker=shape, markersize=4, color="white", markeredgecolor="#333333",
               markeredgewidth=0.8, label=title)
        for family, (title, shape) in FAMILIES.items() if family in present
    ]  # fmt: skip


def legend(figure: Figure, handles: Sequence[Artist], columns: int = 7) -> None:
    """One legend for the whole figure, below all axes."""
    if handles:
        count = len(handles)
        rows = -(-count // columns)
        figure.legend(handles=handles, loc="outside lower center", ncols=-(-count // rows))


def empty(axes: Axes, text: str = NOT_MEASURED) -> None:
    """Say that there is nothing to show: an empty frame would look like a bug."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_facecolor("#F5F5F5")
    axes.text(0.5, 0.5, text.replace(" in ", "\nin "), transform=axes.transAxes, ha="center", va="center",
              color="#666666", style="italic")  # fmt: skip


def unmeasured(title: str) -> Figure:
    """A whole figure that has nothing to show."""
    made = figure(DOUBLE, 1.2)
    axes = made.add_subplot()
    axes.set_title(title)
    empty(axes)
    return made


def percent_axis(axes: Axes, which: str) -> None:
    """Show fractions as per cent."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}"))


def _count(value: float, _: object) -> str:
    for unit, name in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def log_axis(axes: Axes, which: str) -> None:
    """A log axis of numbers of images, with ticks such as 300 k, 100 M and 2 B."""
    if which == "x":
        axes.set_xscale("log")
    else:
        axes.set_yscale("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    low, high = axis.get_view_interval()
    steps = (1,) if high / low > 1000 else (1, 3) if high / low > 10 else (1, 2, 3, 5, 7)
    axis.set_major_locator(LogLocator(subs=steps, numticks=3))
    axis.set_major_formatter(FuncFormatter(_count))
    axis.set_minor_locator(NullLocator())


_LOGIT_TICKS = np.array([0.1, 0.3, 1, 3, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.7, 99.9]) / 100


def logit(p: np.ndarray | pd.Series | float) -> np.ndarray:
    """Log odds of fractions, which are first kept inside the axes' widest range."""
    return statistics.transform(np.clip(np.asarray(p, dtype=float), 3e-4, 1 - 3e-4), "logit")


def drawable(p: pd.Series) -> pd.Series:
    """Fractions moved inside [0.1 %, 99.9 %], so that a model at 0 or 1 has a place on a logit axis."""
    return p.clip(1e-3, 1 - 1e-3)


def logit_axis(axes: Axes, which: str, values: Iterable[float], most: int = 6) -> None:
    """Scale an axis by log odds around `values` (fractions), with at most `most` ticks at round per cents."""
    points = logit(np.asarray(list(values), dtype=float))
    pad = max(0.06 * np.ptp(points), 0.08)
    low, high = points.min() - pad, points.max() + pad
    ticks = _LOGIT_TICKS[(logit(_LOGIT_TICKS) >= low) & (logit(_LOGIT_TICKS) <= high)]
    if len(ticks) < 3:  # a narrow range: round steps in per cent instead
        low_p, high_p = statistics.inverse_transform(np.array([low, high]))
        steps = np.array([0.001, 0.002, 0.005, 0.01, 0.02, 0.05])
        step = next((s for s in steps if (high_p - low_p) / s <= most), steps[-1])
        ticks = np.arange(np.ceil(low_p / step), np.floor(high_p / step) + 1) * step
    ticks = _spread(ticks, (high - low) / most)
    functions = (logit, statistics.inverse_transform)
    if which == "x":
        axes.set_xscale("function", functions=functions)
        axes.set_xlim(*functions[1](np.array([low, high])))
    else:
        axes.set_yscale("function", functions=functions)
        axes.set_ylim(*functions[1](np.array([low, high])))
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FixedFormatter([f"{100 * tick:.4g}" for tick in ticks]))
    axis.set_minor_locator(NullLocator())


def _spread(ticks: np.ndarray, gap: float) -> np.ndarray:
    """Drop ticks that lie closer than `gap` (in log odds) to one kept, the middle ones first."""
    kept: list[float] = []
    for tick in sorted(ticks, key=lambda t: (abs(float(logit(t))), t)):
        if all(abs(float(logit(tick) - logit(other))) >= gap for other in kept):
            kept.append(float(tick))
    return np.array(sorted(kept))


def short(title: str, most: int = 22) -> str:
    """A model's title cut in the middle to `most` characters, for a label inside a panel."""
    if len(title) <= most:
        return title
    tail = most // 2  # what tells relatives apart often stands at the end: keep both ends
    return title[: most - tail - 1].rstrip(" -_(,.") + "…" + title[len(title) - tail :].lstrip(" -_),.")


def wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width, break_on_hyphens=True)) or text
