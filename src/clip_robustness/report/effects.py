"""The statistics that claims are tested by, each with an interval: see `claims` for what the kinds are.

    effect = KINDS["mean"]({"of": quantity, "models": {"group": "clip_zero_shot"}}, frames)

A quantity is {table, metric, dataset, slice or slices, convention, over}; see `_cells`. `frames` are the study's tables
by name. A value of a selection, a data set, a slice or a convention may hold the wildcard *.

Intervals have a level of 95 %. With FEW models or more they are over models: a percentile bootstrap, widened for
small samples (Hesterberg 2015, section 3.2). With fewer they are over images, and speak of these models only: limits
of the models are averaged, as if their errors went together, which is the worst case. Two groups' distances from
limit to value add in squares (MOVER; Zou and Donner 2008).
"""

import math
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from clip_robustness.core import statistics

FEW = 6
RESAMPLES = 2000
_LIMITS = ["value", "low", "high"]

Frames = Mapping[str, pd.DataFrame]


class Effect(NamedTuple):
    """A statistic with its 95 % interval; n models (or pairs); what the interval is over."""

    value: float
    low: float
    high: float
    n: int
    unit: str


class Lacking(Exception):
    """What the study would need to test a claim."""


def _matches(value: Any, wanted: Any) -> bool:
    return any(fnmatchcase(_text(value), _text(one)) for one in _listed(wanted))


def _text(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, int | float) else str(value)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _select(selection: Any, frames: Frames) -> set[str]:
    """Names of the models that meet one of the conditions, each a mapping from column to the values it may have."""
    if "models" not in frames:
        raise Lacking("table models")
    models = frames["models"]
    chosen: set[str] = set()
    for condition in _listed(selection):
        kept = models
        for column, wanted in condition.items():
            present = kept[column].astype(object) if column in kept else pd.Series("", index=kept.index)
            kept = kept[_among(present.where(present.notna(), ""), wanted)]
        chosen |= set(kept["model"])
    if not chosen:
        raise Lacking(f"models: {_words(selection)}")
    return chosen


def _words(selection: Any) -> str:
    first, *others = _listed(selection)
    parts = [f"{column} {'/'.join(map(str, _listed(wanted)[:3]))}" for column, wanted in first.items()]
    return " and ".join(parts).removeprefix("model ") + (" or others" if others else "")


def _cells(quantity: Mapping[str, Any], frames: Frames) -> pd.DataFrame:
    """value, low, high by (model, cell), one row each; a cell is (data set, slice).

    `dataset`: names, any of which may be absent. `slices`: every one must be there, and is a cell. `slice` (default:
    the whole data set): in order of preference, and each model has the first that it was measured on. `convention`:
    in order of preference too; where none is named, the one that covers most models. Measured rows come first.
    """
    table, metric = quantity["table"], quantity["metric"]
    if table not in frames:
        raise Lacking(f"table {table}")
    rows = frames[table]
    rows = rows[rows["metric"] == metric]
    if not len(rows):
        raise Lacking(f"metric {metric} in table {table}")
    rows = rows[_among(rows["dataset"], quantity["dataset"])]
    if not len(rows):
        raise Lacking(f"{metric} on {' or '.join(_listed(quantity['dataset']))}")
    wanted = _listed(quantity.get("slices", quantity.get("slice", "")))
    absent = [name for name in wanted if not _among(rows["slice"], name).any()]
    if absent and ("slices" in quantity or len(absent) == len(wanted)):
        raise Lacking(f"{metric} of slice {', '.join(absent)}" if any(absent) else f"{metric} over a whole data set")
    rows = rows[_among(rows["slice"], wanted)]
    conventions = quantity.get("convention", _by_cover(rows))
    rows = rows[_among(rows["convention"], conventions)]
    if not len(rows):
        raise Lacking(f"{metric} by convention {' or '.join(map(str, _listed(conventions)))}")
    rank = rows.assign(
        _slice=_rank(rows["slice"], wanted) if "slices" not in quantity else 0,
        _convention=_rank(rows["convention"], conventions),
        _published=rows["source"] != "measured",
    )
    cell = rows["dataset"] + (":" + rows["slice"] if "slices" in quantity else "")
    order = ["_slice", "_convention", "_published", "source"]
    kept = rank.assign(cell=cell).sort_values(order, kind="stable").drop_duplicates(["model", "cell"])
    found = kept.set_index(["model", "cell"])[_LIMITS].astype(float)
    return found if "over" not in quantity else _ratio(found, _cells(quantity["over"], frames))


def _among(values: pd.Series, wanted: Any) -> pd.Series:
    known = {value: _matches(value, wanted) for value in values.unique()}
    return values.map(known).astype(bool)


def _rank(values: pd.Series, wanted: Any) -> pd.Series:
    order = {v: next(i for i, one in enumerate(_listed(wanted)) if _matches(v, one)) for v in values.unique()}
    return values.map(order)


def _by_cover(rows: pd.DataFrame) -> list[str]:
    cover = rows.groupby("convention")["model"].nunique()
    return sorted(cover.index, key=lambda name: (-cover[name], name))


def _ratio(top: pd.DataFrame, bottom: pd.DataFrame) -> pd.DataFrame:
    """`top` relative to the mean of the model's `bottom`; limits: relative distances add in squares."""
    below = bottom.groupby("model").mean().reindex(top.index.get_level_values("model")).set_index(top.index)
    value = top["value"] / below["value"]
    down = np.hypot(1 - top["low"] / top["value"], below["high"] / below["value"] - 1)
    up = np.hypot(top["high"] / top["value"] - 1, 1 - below["low"] / below["value"])
    return pd.DataFrame({"value": value, "low": value * (1 - down), "high": value * (1 + up)}).dropna()


def _scores(quantity: Mapping[str, Any], frames: Frames, *selections: Any) -> list[pd.DataFrame]:
    """For each selection, value, low and high by model: the mean over the cells that all selections have."""
    cells = _cells(quantity, frames)
    names = cells.index.get_level_values("model")
    chosen = [(selection, cells[names.isin(_select(selection, frames))]) for selection in selections]
    common = set.intersection(*(set(some.index.get_level_values("cell")) for _, some in chosen))
    found = []
    for selection, some in chosen:
        some = some[some.index.get_level_values("cell").isin(common)]
        counts = some.groupby("model")["value"].transform("size")
        means = some[counts == len(common)].groupby("model").mean()
        if not len(means):
            raise Lacking(f"models in table {quantity['table']}: {_words(selection)}")
        found.append(means)
    return found


def _center(scores: pd.DataFrame) -> Effect:
    """Mean over models: the bootstrap over models, or with few of them their mean limits over images."""
    value, n = float(scores["value"].mean()), len(scores)
    if n < FEW:
        low, high = float(scores["low"].mean(skipna=False)), float(scores["high"].mean(skipna=False))
        if not math.isfinite(low + high):
            raise Lacking(f"interval: {n} models, whose n of images is not known")
        return Effect(value, low, high, n, "images")
    draws = statistics.bootstrap_sums(scores["value"].to_numpy(), RESAMPLES)[:, 0] / n
    return Effect(value, *_widened(value, draws, n), n, "models")


def _widened(value: float, draws: np.ndarray, n: int) -> tuple[float, float]:
    """Percentile interval of `draws`, its distances from `value` widened as Student's t is against the normal."""
    from scipy.special import stdtrit

    low, high = statistics.percentile_interval(draws)
    factor = stdtrit(n - 1, 0.975) / 1.959964 * math.sqrt(n / (n - 1))
    return min(value, value + factor * (float(low) - value)), max(value, value + factor * (float(high) - value))


def _minus(a: Effect, b: Effect) -> Effect:
    value = a.value - b.value
    low = value - math.hypot(a.value - a.low, b.high - b.value)
    high = value + math.hypot(a.high - a.value, b.value - b.low)
    unit = a.unit if a.unit == b.unit else "models and images"
    return Effect(value, low, high, a.n + b.n, unit)


def _mean(statistic: Mapping[str, Any], frames: Frames) -> Effect:
    return _center(_scores(statistic["of"], frames, statistic["models"])[0])


def _difference(statistic: Mapping[str, Any], frames: Frames) -> Effect:
    of, models = statistic["of"], statistic["models"]
    if "minus_models" in statistic:
        return _minus(*map(_center, _scores(of, frames, models, statistic["minus_models"])))
    [own] = _scores(of, frames, models)
    if "minus" in statistic:
        [other] = _scores(statistic["minus"], frames, models)
    else:
        listed = frames["models"].set_index("model")
        parents = listed["parent"] if "parent" in listed else pd.Series("", index=listed.index)
        [known] = _scores(of, frames, {"model": sorted(set(parents[own.index].fillna("")) - {""}) or ["-"]})
        other = known.reindex(parents[own.index]).set_index(own.index)
    both = own.join(other.add_suffix("_other"), how="inner").dropna(subset=["value", "value_other"])
    if not len(both):
        raise Lacking(f"{of['metric']} of both halves of a pair")
    value = both["value"] - both["value_other"]
    down = np.hypot(both["value"] - both["low"], both["high_other"] - both["value_other"])
    up = np.hypot(both["high"] - both["value"], both["value_other"] - both["low_other"])
    effect = _center(pd.DataFrame({"value": value, "low": value - down, "high": value + up}))
    return effect._replace(unit="pairs" if effect.unit == "models" else effect.unit)


def _sign_share(statistic: Mapping[str, Any], frames: Frames) -> Effect:
    """The interval counts the cells that are surely positive, and those that may be."""
    selections = [statistic[name] for name in ("models", "minus_models") if name in statistic]
    cells = _cells(statistic["of"], frames)
    effects = []
    for _, some in cells.groupby(level="cell"):
        sides = [some[some.index.get_level_values("model").isin(_select(s, frames))] for s in selections]
        if all(len(side) for side in sides):
            centers = [_center(side.droplevel("cell")) for side in sides]
            effects.append(_minus(*centers) if len(centers) == 2 else centers[0])
    if not effects:
        raise Lacking(f"models in table {statistic['of']['table']}: {' and '.join(map(_words, selections))}")
    value, low, high = (np.array([effect[:3] for effect in effects]) > 0).mean(axis=0).tolist()
    smallest = min(effects, key=lambda effect: effect.n)
    return Effect(value, low, high, smallest.n, smallest.unit)


def _xy(statistic: Mapping[str, Any], frames: Frames, selection: Any) -> pd.DataFrame:
    [x], [y] = (_scores(statistic[axis], frames, selection) for axis in ("x", "y"))
    both = y.join(x.add_suffix("_x"), how="inner").dropna(subset=["value", "value_x"])
    return both[both["value_x"] > statistic.get("above_x", -math.inf)]


def _correlation(statistic: Mapping[str, Any], frames: Frames) -> Effect:
    points = _xy(statistic, frames, statistic["models"])
    groups = pd.Series("", index=points.index)
    if "within" in statistic:
        column = frames["models"].set_index("model")[statistic["within"]]
        groups = column.reindex(points.index).fillna("").astype(str)
        groups = groups[groups.groupby(groups).transform("size") >= 3]
        points = points.loc[groups.index]
    n = len(points)
    if n < FEW:
        raise Lacking(f"{FEW} models with both quantities, but {n}")
    x, y = points["value_x"].to_numpy(), points["value"].to_numpy()
    members = [np.flatnonzero(groups == name) for name in sorted(set(groups))]
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES).astype(float)
    [value] = _pooled_r(x, y, members, np.ones((1, n)))
    low, high = _widened(float(value), _pooled_r(x, y, members, counts), n)
    return Effect(float(value), max(low, -1.0), min(high, 1.0), n, "models")


def _pooled_r(x: np.ndarray, y: np.ndarray, members: Iterable[np.ndarray], counts: np.ndarray) -> np.ndarray:
    """Pearson's r [B] of points counted `counts` [B, n] times, each group centred on its own means."""
    sums = np.zeros((3, len(counts)))
    for group in members:
        w, a, b = counts[:, group], x[group] - x[group].mean(), y[group] - y[group].mean()
        total = np.maximum(w.sum(axis=1), 1)
        ma, mb = w @ a / total, w @ b / total
        sums += np.stack([w @ (a * b) - total * ma * mb, w @ a**2 - total * ma**2, w @ b**2 - total * mb**2])
    norm = np.sqrt(np.maximum(sums[1] * sums[2], 0))
    return np.divide(sums[0], norm, out=np.zeros_like(norm), where=norm > 0)


def _offset(statistic: Mapping[str, Any], frames: Frames) -> Effect:
    """The line's own error is its bootstrap band at the models' mean x; it adds in squares."""
    points, others = (_xy(statistic, frames, statistic[name]) for name in ("models", "line"))
    others = others[~others.index.isin(points.index)]
    if not len(points) or len(others) < FEW:
        raise Lacking(f"{FEW} models for the line and one beside it, but {len(others)} and {len(points)}")
    name, known = statistic["transform"], (others["value_x"].to_numpy(), others["value"].to_numpy())
    try:
        line = statistics.fit_line(*known, transform=name)
    except ValueError as error:
        raise Lacking(str(error)) from None
    x = points["value_x"].to_numpy()
    ends = np.stack([line.predict(points[f"{which}_x"].to_numpy()) for which in ("low", "high")])
    off = points["value"] - line.predict(x)
    down = np.hypot(points["value"] - points["low"], ends.max(axis=0) - line.predict(x))
    up = np.hypot(points["high"] - points["value"], line.predict(x) - ends.min(axis=0))
    own = _center(pd.DataFrame({"value": off, "low": off - down, "high": off + up}))
    [band_low], [band_high] = statistics.baseline_band(*known, [x.mean()], transform=name, resamples=RESAMPLES)
    middle = float(line.predict(x.mean()))
    below = math.hypot(own.value - own.low, max(band_high - middle, 0))
    above = math.hypot(own.high - own.value, max(middle - band_low, 0))
    return own._replace(low=own.value - below, high=own.value + above)


# A claim's statistic and the study's tables -> its effect. Raises `Lacking`.
KINDS: Mapping[str, Callable[[Mapping[str, Any], Frames], Effect]] = {
    "mean": _mean,
    "difference": _difference,
    "correlation": _correlation,
    "sign_share": _sign_share,
    "offset": _offset,
}
