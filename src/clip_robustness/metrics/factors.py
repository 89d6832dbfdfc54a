"""Visual factors (ImageNet-X, Idrissi et al. 2022): accuracy where one thing about an image is unusual.

A factor table (parquet) has a row for each annotated image: image_id, label, top_factor ("": none), prototype
(one of the images that the others were compared with), and one bool column a factor. Two conventions:

    top     the images whose most important deviation is the factor
    multi   the images that deviate in the factor at all, among others perhaps

Both leave the prototypes out; `top_with_prototypes` and `multi_with_prototypes` do not. Factor-level effective
robustness (Tu et al. 2023, section 4) is a model's accuracy on a factor's images minus what a line through the
comparison group's models predicts from the accuracy on all annotated images.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import io, statistics
from clip_robustness.core.io import InputError
from clip_robustness.core.tables import KEY, MEASUREMENT
from clip_robustness.metrics.effective_robustness import fit_baselines
from clip_robustness.metrics.gather import write_table
from clip_robustness.metrics.rows import Row, proportion_row

# The ten factors of the Tu papers are those of ImageNet-X that at least so many images have as their top factor.
FEWEST = 150
FIT_COLUMNS = (
    *("dataset", "slice", "convention", "transform", "estimator"),
    *("slope", "intercept", "r", "n", "source"),
)
_OVERALL = ""  # as a data set of the fits: all images, beside one data set for each factor
_NOT_FACTORS = ("image_id", "label", "top_factor", "prototype")


def factor_rows(
    correct: np.ndarray, top: np.ndarray, multi: Mapping[str, np.ndarray], prototype: np.ndarray, prototypes: bool
) -> list[Row]:
    """Rows `accuracy` (all images) and `factor_accuracy` (slice: factor) under `top` and under `multi`.

    correct: bool [n]; top: name of each image's top factor [n]; multi: factor -> bool [n], the factors to report;
    prototype: bool [n], left out unless `prototypes`. A factor without images has no row. Intervals: Clopper-Pearson.
    """
    kept = np.full(len(correct), True) if prototypes else ~prototype
    rows = []
    for convention in ("top", "multi"):
        images = {"": kept} | {f: kept & (top == f if convention == "top" else has) for f, has in multi.items()}
        for name, chosen in images.items():
            n, hits = int(chosen.sum()), int((correct & chosen).sum())
            if n:
                metric = "factor_accuracy" if name else "accuracy"
                suffix = "_with_prototypes" if prototypes else ""
                rows.append(proportion_row(metric, hits, n, name, convention + suffix))
    return rows


def measure_factors(
    predictions: Path, factors: Path, out: Path, prototypes: bool = False, fewest: int = FEWEST
) -> None:
    """Write `factor_rows` of one model to `out` (.json), from its `predictions` and the factor table `factors`.

    prototypes: write the `_with_prototypes` conventions too. fewest: only factors that so many of the table's images
    (prototypes aside) have as their top factor; 1 gives all. Annotated images without a prediction (masked when they
    were embedded) are left out, and counted in the manifest.
    Errors: `InputError` for a file that is missing or lacks a column, for an image whose label differs, and when no
    annotated image was predicted or no factor has `fewest` images.
    """
    table, predicted = io.read_parquet(factors), io.read_parquet(predictions)
    _need(table, _NOT_FACTORS, factors)
    _need(predicted, ("image_id", "label", "prediction"), predictions)
    counted = table["top_factor"][~table["prototype"]]
    names = [name for name in table if name not in _NOT_FACTORS and (counted == name).sum() >= fewest]
    if not names:
        raise InputError(f"{factors}: no factor is the top factor of {fewest} images or more; lower `fewest`")
    row_of = {image_id: row for row, image_id in enumerate(predicted["image_id"])}
    found = np.array([row_of.get(image_id, -1) for image_id in table["image_id"]], np.int64)
    there, rows = found >= 0, found[found >= 0]
    if not len(rows):
        raise InputError(f"{predictions}: has none of the images of {factors}; give the annotated set's predictions")
    differs = np.flatnonzero(table["label"][there] != predicted["label"][rows])
    if len(differs):
        image_id = table["image_id"][there][differs[0]]
        raise InputError(f"{predictions}: label of '{image_id}' differs from {factors}; index and annotate anew")
    correct = predicted["prediction"][rows] == predicted["label"][rows]
    annotated = (table["top_factor"][there], {name: table[name][there] for name in names}, table["prototype"][there])
    measured = factor_rows(correct, *annotated, prototypes=False)
    if prototypes:
        measured += factor_rows(correct, *annotated, prototypes=True)
    manifest = {
        "ids_sha256": io.ids_digest(table["image_id"]),
        "n": len(there),
        "masked": int((~there).sum()),
        "prototypes": int(table["prototype"].sum()),
        "factors": names,
    }
    io.write_json(out, {"manifest": manifest, "rows": [{**row, "source": "measured"} for row in measured]})


def fit_factors(
    factors: Path,
    models: Path,
    fits: Path,
    out: Path,
    population: str = "standard",
    only: Sequence[str] = (),
    without: Sequence[str] = (),
    seed: int = 0,
    resamples: int = statistics.RESAMPLES,
    *,
    transforms: Sequence[str] = ("logit", "linear"),
    estimators: Sequence[str] = ("huber", "ols"),
) -> None:
    """Fit factor accuracy on overall accuracy over the comparison group; effective robustness of every model.

    factors, models: tables (.parquet). The group: models of group `population` whose names match one of the patterns
    `only` (default: any) and none of `without`. Writes `fits` (FIT_COLUMNS; slice = factor, n = models) and `out`:
    measurement rows `effective_robustness`, slice = factor, convention = e.g. `top-logit-huber`, a fraction.

    Intervals: see `statistics.effective_robustness_interval`. It takes the errors of factor accuracy and overall
    accuracy as independent; the factor's images are some of all, so errors partly cancel and the interval is a
    little too wide rather than too narrow. What has no fit is said on standard error.
    """
    columns = io.read_parquet(factors)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    known = io.read_parquet(models, ["model", "group"])
    groups = {
        model: group
        for model, group in zip(known["model"], known["group"], strict=True)
        if (not only or _matches(model, only)) and not _matches(model, without)
    }
    study = "+".join(sorted({str(row["study"]) for row in rows}))
    lines: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for dataset, convention, names, points in _populations(rows):
        fitted = fit_baselines(
            points, groups, names, _OVERALL, population, None, transforms, estimators, resamples, seed
        )
        where = {"dataset": dataset, "convention": convention}
        lines += [{**line, "slice": line["dataset"], **where} for line in fitted.baselines]
        for row in fitted.rows:
            named = {"slice": row["dataset"], "convention": f"{convention}-{row['convention']}"}
            found.append({**row, **named, "study": study, "dataset": dataset})
        for note in fitted.notes:
            print(f"{dataset} {convention}: {note}", file=sys.stderr)
    found.sort(key=lambda row: [row[name] for name in KEY])
    write_table(fits, {name: [line[name] for line in lines] for name in FIT_COLUMNS})
    write_table(out, {name: [row[name] for row in found] for name in MEASUREMENT})


def _populations(rows: Iterable[Row]) -> Iterator[tuple[str, str, list[str], list[Row]]]:
    """(data set, convention, factors, rows): the factors as if each were a shift of the set of all images."""
    parts: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row["metric"] == "factor_accuracy" or (row["metric"] == "accuracy" and row["slice"] == ""):
            point = {**row, "metric": "accuracy", "dataset": row["slice"] or _OVERALL, "slice": ""}
            parts.setdefault((row["dataset"], row["convention"]), []).append(point)
    for (dataset, convention), points in sorted(parts.items()):
        yield dataset, convention, sorted({str(p["dataset"]) for p in points} - {_OVERALL}), points


def _matches(model: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(model, pattern) for pattern in patterns)


def _need(table: Mapping[str, Any], columns: Sequence[str], path: Path) -> None:
    lacking = [name for name in columns if name not in table]
    if lacking:
        raise InputError(f"{path}: no column '{lacking[0]}', expected {', '.join(columns)}; delete it and run again")
