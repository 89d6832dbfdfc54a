"""Effective robustness: accuracy under shift beyond what that in distribution predicts (Taori et al. 2020).

A baseline is a line through the standard models, on logit axes, of accuracy on the shift (y) against one of
two references (x):

    val           top-1 on the whole in-distribution set
    class_subset  the shift's `reference_accuracy`: in distribution, on the shift's own classes

Effective robustness is y - baseline(x), a fraction (0.05 is five points). A data set without any
`reference_accuracy` has all classes; its class-subset reference is its val reference and is not listed twice.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_robustness.core import io, statistics
from clip_robustness.core.io import InputError
from clip_robustness.core.tables import MEASUREMENT
from clip_robustness.metrics.gather import write_table
from clip_robustness.metrics.rows import row

AVERAGE = "natural_average"
# The seven shifts of Radford et al. 2021, section 3.3: each video set is the mean of its two conditions.
SEVEN_SHIFTS = (
    "imagenet_v2",
    "imagenet_sketch",
    "imagenet_r",
    "imagenet_a",
    "objectnet",
    "imagenet_vid_pm0+imagenet_vid_pm10",
    "ytbb_pm0+ytbb_pm10",
)

BASELINE_COLUMNS = (
    "dataset",
    "reference",
    "transform",
    "estimator",
    "slope",
    "intercept",
    "r",
    "n",
    "source",
)

Row = Mapping[str, Any]
Table = dict[tuple[str, str], dict[str, Row]]  # (data set, metric) -> model -> row


class Fits(NamedTuple):
    """Rows of tables/baselines, of tables/effective_robustness, and what could not be computed."""

    baselines: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    notes: list[str]


def fit_baselines(
    rows: Iterable[Row],
    groups: Mapping[str, str],
    shifts: Sequence[str],
    reference: str,
    population: str = "standard",
    sources: Sequence[str] | None = None,
    transforms: Sequence[str] = ("logit",),
    estimators: Sequence[str] = ("ols", "huber"),
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> Fits:
    """Fit every baseline and compute every model's effective robustness.

    rows: accuracy rows (`accuracy` and `reference_accuracy`, no slice; see `natural_average` for the mean of
    the shifts). groups: model -> group. shifts: data sets to fit; reference: the in-distribution data set.
    The line is fitted on the models of group `population` (and, if given, of one of `sources`); a data set
    with fewer than 3 that the fit can use gets no baseline, and a note. Intervals: see
    `statistics.effective_robustness_interval`, with a bootstrap over the population's models.
    """
    table = _table(rows)
    fits = Fits([], [], [])
    for shift in shifts:
        y = table.get((shift, "accuracy"), {})
        conventions = {"val": table.get((reference, "accuracy"), {})}
        if (shift, "reference_accuracy") in table:
            conventions["class_subset"] = table[shift, "reference_accuracy"]
        for name, x in conventions.items():
            models = sorted(set(x) & set(y))
            fitted = [
                model
                for model in models
                if groups.get(model) == population and (sources is None or y[model]["source"] in sources)
            ]
            for transform in transforms:
                for estimator in estimators:
                    _fit_one(fits, shift, name, x, y, models, fitted, transform, estimator, resamples, seed)
    return fits


def _fit_one(
    fits: Fits,
    shift: str,
    reference: str,
    x: Mapping[str, Row],
    y: Mapping[str, Row],
    models: Sequence[str],
    fitted: Sequence[str],
    transform: str,
    estimator: str,
    resamples: int,
    seed: int,
) -> None:
    points = _values(x, fitted, "value"), _values(y, fitted, "value")
    try:
        line = statistics.fit_line(*points, transform, estimator)
    except ValueError as error:
        fits.notes.append(f"{shift} ({reference}, {transform}-{estimator}): no baseline: {error}")
        return
    fits.baselines.append(
        {
            "dataset": shift,
            "reference": reference,
            "transform": transform,
            "estimator": estimator,
            "slope": line.slope,
            "intercept": line.intercept,
            "r": line.r,
            "n": line.n,
            "source": "+".join(sorted({str(y[model]["source"]) for model in fitted})),
        }
    )
    at, value = _values(x, models, "value"), _values(y, models, "value")
    band = statistics.baseline_band(*points, at, transform, estimator, resamples, seed)
    x_interval = _values(x, models, "low"), _values(x, models, "high")
    y_interval = _values(y, models, "low"), _values(y, models, "high")
    robustness = statistics.effective_robustness(line, at, value)
    low, high = statistics.effective_robustness_interval(line, at, value, x_interval, y_interval, band)
    for i, model in enumerate(models):
        measured = row(
            "effective_robustness",
            robustness[i],
            low[i],
            high[i],
            y[model]["n"],
            reference,
            f"{transform}-{estimator}",
        )
        fits.rows.append({"model": model, "dataset": shift, **measured, "source": y[model]["source"]})


def natural_average(rows: Iterable[Row], reference: str, shifts: Sequence[str]) -> list[dict[str, Any]]:
    """Rows `accuracy` and `reference_accuracy` of the data set `natural_average`, for models that have all.

    Each of `shifts` is a data set, or several joined by + that count as their mean. Where a shift has no
    reference accuracy at all, it has all classes and its reference is the accuracy on `reference`.
    Intervals: distances of the limits add in squares (MOVER), the shifts being independent sets of images;
    the reference sets overlap, and their distances add plainly, which is the worst case. n: images in all.
    """
    table = _table(rows)
    weights: dict[str, float] = {}
    for shift in shifts:
        for part in shift.split("+"):
            weights[part] = weights.get(part, 0) + 1 / len(shift.split("+")) / len(shifts)
    found = []
    for metric, power in (("accuracy", 2), ("reference_accuracy", 1)):
        columns = [table.get((shift, metric), {}) for shift in weights]
        if metric == "reference_accuracy":
            val = table.get((reference, "accuracy"), {})
            columns = [column or val for column in columns]
        for model in sorted(set.intersection(*map(set, columns))) if columns else ():
            own = [column[model] for column in columns]
            w = np.array(list(weights.values()))
            value, low, high = (np.array([r[key] for r in own], float) for key in ("value", "low", "high"))
            mean = float(w @ value)
            below = float(((w * (value - low)) ** power).sum() ** (1 / power))
            above = float(((w * (high - value)) ** power).sum() ** (1 / power))
            n = sum(int(r["n"]) for r in own)
            convention = f"mean_of_{len(shifts)}_shifts"
            measured = row(metric, mean, mean - below, mean + above, n, convention=convention)
            source = "+".join(sorted({str(r["source"]) for r in own}))
            found.append({"model": model, "dataset": AVERAGE, **measured, "source": source})
    return found


def fit_baselines_file(
    accuracy: Path,
    models: Path,
    baselines: Path,
    out: Path,
    population: str = "standard",
    sources: Sequence[str] | None = None,
    reference: str | None = None,
    natural: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = statistics.RESAMPLES,
    *,
    transforms: Sequence[str] = ("logit",),
    estimators: Sequence[str] = ("ols", "huber"),
) -> None:
    """Tables accuracy and models (.parquet) to tables `baselines` and `out` (effective robustness).

    reference: the in-distribution data set (default: the only one whose name ends in `_val`). natural: the
    shifts of the average as of `natural_average` (default: `SEVEN_SHIFTS` when it is ImageNet, else every
    other data set); its rows stand in `out` too. Every data set of the accuracy table but the reference is
    fitted, and the average. What has no baseline is said on standard error.
    """
    columns = io.read_parquet(accuracy)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    known = io.read_parquet(models, ["model", "group"])
    groups = dict(zip(known["model"], known["group"], strict=True))
    names = sorted({dataset for dataset, metric in _table(rows) if metric == "accuracy"})
    reference = reference or _reference(names, accuracy)
    shifts = [name for name in names if name != reference]
    if natural is None:
        natural = SEVEN_SHIFTS if reference == "imagenet_val" else shifts
    average = natural_average(rows, reference, natural) if natural else []
    fits = fit_baselines(
        [*rows, *average],
        groups,
        [*shifts, AVERAGE],
        reference,
        population,
        sources,
        transforms,
        estimators,
        resamples,
        seed,
    )
    study = "+".join(sorted({str(r["study"]) for r in rows}))
    write_table(baselines, {name: [r[name] for r in fits.baselines] for name in BASELINE_COLUMNS})
    found = sorted(
        [*fits.rows, *average],
        key=lambda r: [r[name] for name in ("model", "dataset", "metric", "slice", "convention")],
    )
    write_table(out, {name: [{"study": study, **r}[name] for r in found] for name in MEASUREMENT})
    for note in fits.notes:
        print(note, file=sys.stderr)


def _reference(names: Sequence[str], accuracy: Path) -> str:
    candidates = [name for name in names if name.endswith("_val")]
    if len(candidates) != 1:
        raise InputError(
            f"{accuracy}: expected one data set whose name ends in _val, found {candidates or 'none'}; "
            f"name the reference"
        )
    return candidates[0]


def _table(rows: Iterable[Row]) -> Table:
    # A model that was reported more than once keeps its measured row, else the first by source.
    def rank(one: Row) -> tuple[bool, str, str]:
        return one["source"] != "measured", str(one["source"]), str(one["convention"])

    table: Table = {}
    for one in sorted(rows, key=rank):
        if one["slice"] == "" and one["metric"] in ("accuracy", "reference_accuracy"):
            table.setdefault((one["dataset"], one["metric"]), {}).setdefault(one["model"], one)
    return table


def _values(rows: Mapping[str, Row], models: Sequence[str], key: str) -> np.ndarray:
    return np.array([rows[model][key] for model in models], float)
