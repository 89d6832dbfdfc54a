"""The explorer of a report: its markup, its data and its scripts. What it does is in explorer.js and plot.js."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from clip_robustness.core.names import GROUPS
from clip_robustness.report import markup
from clip_robustness.report.quantities import MODEL_AXIS, Quantity, encode, known_models, quantities

_FEWEST = 2  # models that a plot needs
# What stands for its axis, before all others: metrics, slices, data sets in distribution, the average of shifts.
_FIRST = ("effective_robustness", "factor_accuracy", "retention", "shape_bias", "ece", "auroc", "text_recall@1")
_LAST = ("clean_accuracy", "reference_accuracy")
_SLICES = ("", "before", "msp")
_HOME = ("imagenet", "imagenet_val", "mini_val")
_AVERAGE = "natural_average"


def section(frames: Mapping[str, pd.DataFrame], cards: Mapping[str, str]) -> list[str]:
    """Markup of the explorer; nothing where there are not two models to compare. `cards`: model -> address."""
    found = [quantity for quantity in quantities(frames) if len(quantity.rows) >= _FEWEST]
    if not any(quantity.axis != MODEL_AXIS for quantity in found):
        return []
    return [markup.resource("explorer.html"), markup.data("explorer-data", contents(frames, found, cards))]


def scripts() -> list[str]:
    return [markup.resource(name) for name in ("chart.umd.min.js", "plot.js", "explorer.js")]


def contents(frames: Mapping[str, pd.DataFrame], found: list[Quantity], cards: Mapping[str, str]) -> dict[str, Any]:
    """What explorer.js reads: groups, models, quantities, one that stands for each axis, and what is shown first."""
    models = known_models(frames)
    places = {name: place for place, name in enumerate(models["model"])}
    groups = [name for name in GROUPS if (models["group"] == name).any()]
    accuracies = [q for q in found if q.metric == "accuracy" and q.axis == "Accuracy"]
    x = _headline(accuracies or found, _HOME)
    others = [quantity for quantity in accuracies if quantity is not x]
    y = _headline(others or [quantity for quantity in found if quantity is not x] or found, (_AVERAGE,))
    axes = list(dict.fromkeys(quantity.axis for quantity in found))
    shown = (_AVERAGE, *_HOME)
    panels = [_headline((q for q in found if q.axis == axis), shown) for axis in axes if axis != MODEL_AXIS]
    return {
        "groups": [GROUPS[name] for name in groups],
        "models": {
            "id": list(models["model"]),
            "title": list(models["title"]),
            "group": [groups.index(name) for name in models["group"]],
            "family": list(models["family"]),
            "card": [cards.get(name, "") for name in models["model"]],
        },
        "axes": axes,
        "quantities": [encode(quantity, places) for quantity in found],
        "panels": [y.key if panel.axis == y.axis else panel.key for panel in panels],
        "start": {"x": x.key, "y": y.key},
    }


def _headline(some: Iterable[Quantity], datasets: tuple[str, ...]) -> Quantity:
    """The quantity that stands for several: by the metrics of _FIRST, the data sets named, then by most models."""

    def rank(quantity: Quantity) -> tuple[int, ...]:
        known = (*_FIRST, "", *_LAST)  # what is not named stands between
        metric = known.index(quantity.metric if quantity.metric in known else "")
        other = quantity.dataset not in datasets
        return metric, other, quantity.slice not in _SLICES, -len(quantity.rows)

    return min(some, key=rank)
