"""Direct labels: the names of a few models beside their points, never one over another."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from clip_robustness.figures import style

_DIRECTIONS = ((1, 0.6), (-1, 0.6), (1, -0.6), (-1, -0.6), (0.1, 1), (0.1, -1), (1.2, 0), (-1.2, 0))
_OFFSETS = [(r * dx, r * dy) for r in (5, 8, 12, 17, 23, 30, 40, 52, 66) for dx, dy in _DIRECTIONS]  # points


def label_points(axes: Axes, labels: Sequence[tuple[float, float, str, str]]) -> None:
    """Remember (x, y, text, group) to be written beside its point by `finish`, once the layout is known."""
    pending = axes.__dict__.setdefault("_direct_labels", [])
    pending.extend(labels)


def finish(figure: Figure) -> Figure:
    """Fix the layout, then write each direct label at the first free place around its point.

    A place is free when it lies inside the axes, off all other labels, and over as few points as possible;
    a label without a free place is left out rather than written over another.
    """
    if not any(axes.__dict__.get("_direct_labels") for axes in figure.axes):
        return figure
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined]
    for axes in figure.axes:
        taken = [text.get_window_extent(renderer) for text in axes.texts]
        points = [axes.transData.transform(line.get_xydata()) for line in axes.lines if line.get_gid()]
        crowd = np.concatenate(points) if points else np.empty((0, 2))
        for x, y, text, group in axes.__dict__.pop("_direct_labels", []):
            note = axes.annotate(text, (x, y), xytext=(0, 0), textcoords="offset points", fontsize=5.5,
                                 color=style.color(group), ha="center", va="center", zorder=6,
                                 arrowprops={"arrowstyle": "-", "color": style.color(group), "linewidth": 0.4,
                                             "shrinkA": 0, "shrinkB": 1.5})  # fmt: skip
            note.set_in_layout(False)
            note.set_path_effects(style.OUTLINE)
            if not _place(note, axes.bbox, taken, crowd, renderer):
                note.remove()
    return figure


def _place(note: Annotation, inside: Bbox, taken: list[Bbox], crowd: np.ndarray, renderer: Any) -> bool:
    """Move `note` to the best place around its point; False when every place is taken."""
    scale = renderer.points_to_pixels(1.0)
    anchor = _axes_of(note).transData.transform(note.xy)
    own = Text.get_window_extent(note, renderer)  # without the arrow, which an annotation's extent includes
    width, height = own.width, own.height
    best: tuple[float, tuple[float, float], Bbox] | None = None
    for order, (dx, dy) in enumerate(_OFFSETS):
        beside = width / scale / 2 if abs(dx) > 1 else 0.0
        shift = (float(dx + np.sign(dx) * beside), float(dy + np.sign(dy) * height / scale / 2))
        x, y = anchor + np.array(shift) * scale
        place = Bbox.from_extents(x - width / 2, y - height / 2, x + width / 2, y + height / 2).padded(1.5)
        low, high = np.array(place.min), np.array(place.max)
        if np.any(low < inside.min) or np.any(high > inside.max):
            continue
        if any(place.overlaps(other) for other in taken):
            continue
        covered = int(np.sum(np.all((crowd >= low - 5) & (crowd <= high + 5), axis=1)))
        cost = covered * 20.0 + order * 0.25
        if best is None or cost < best[0]:
            best = (cost, shift, place)
    if best is None:
        return False
    note.set_position(best[1])
    taken.append(best[2])
    return True


def _axes_of(note: Annotation) -> Axes:
    assert isinstance(note.axes, Axes)
    return note.axes
