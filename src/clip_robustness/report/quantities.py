"""Quantities: everything that a study measured of its models, as columns that pages and cards can compare.

A quantity is one metric of one table on one data set, slice and convention: a value a model, with its interval and n.
Two conventions of a metric are two quantities. What has a row for each bin or severity is left to the tables.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import pandas as pd

from clip_robustness.core.names import FAMILIES, GROUPS, NAMED, dataset_title

PERCENT, POINTS, NUMBER = "percent", "points", "number"

# Metric -> (what it is called, its unit, which way is better: 1 up, -1 down, 0 neither).
METRICS: dict[str, tuple[str, str, int]] = {
    "accuracy": ("accuracy", PERCENT, 1),
    "pm0_accuracy": ("pm-0 accuracy", PERCENT, 1),
    "pm10_accuracy": ("pm-10 accuracy", PERCENT, 1),
    "reference_accuracy": ("in-distribution accuracy on its classes", PERCENT, 1),
    "clean_accuracy": ("accuracy without attack", PERCENT, 1),
    "effective_robustness": ("effective robustness", POINTS, 1),
    "retention": ("retention", PERCENT, 1),
    "mce": ("mean corruption error", PERCENT, -1),
    "relative_mce": ("relative mean corruption error", PERCENT, -1),
    "factor_accuracy": ("accuracy", PERCENT, 1),
    "shape_bias": ("shape bias", PERCENT, 1),
    "cue_accuracy": ("share of decisions for either cue", PERCENT, 1),
    "ece": ("ECE", PERCENT, -1),
    "adaptive_ece": ("adaptive ECE", PERCENT, -1),
    "nll": ("NLL", NUMBER, -1),
    "brier": ("Brier score", NUMBER, -1),
    "temperature": ("temperature", NUMBER, 0),
    "auroc": ("AUROC", PERCENT, 1),
    "aupr_in": ("AUPR, ID positive", PERCENT, 1),
    "aupr_out": ("AUPR, OOD positive", PERCENT, 1),
    "fpr95": ("FPR95", PERCENT, -1),
    **{f"image_recall@{k}": (f"image recall@{k}", PERCENT, 1) for k in (1, 5, 10)},
    **{f"text_recall@{k}": (f"text recall@{k}", PERCENT, 1) for k in (1, 5, 10)},
    "recall": ("recall", PERCENT, 1),
    "median_distance": ("smallest perturbation, median", NUMBER, 1),
    "accuracy_drop": ("drop of accuracy", POINTS, -1),
    "attack_success_rate": ("answers with the printed word", PERCENT, -1),
    "clean_success_rate": ("the same without the word", PERCENT, 0),
    "accuracy_difference": ("difference of accuracy", POINTS, 0),
    "ece_difference": ("difference of ECE", POINTS, 0),
    "auroc_difference": ("difference of AUROC", POINTS, 0),
    "gain": ("gain", POINTS, 0),
    "overlap_share": ("share found in a corpus", PERCENT, 0),
    "params_m": ("parameters, millions", NUMBER, 0),
    "gflops": ("GFLOPs an image", NUMBER, 0),
    "train_images": ("training images", NUMBER, 0),
    "image_size": ("image size, pixels", NUMBER, 0),
}
ONE_VALUE, NO_BINS, ANY = r"", r"[^:]*", r".*"


@dataclasses.dataclass(frozen=True)
class Kind:
    """What of a table is shown: its metrics (patterns; none: all), slices (a regular expression) and conventions."""

    table: str
    axis: str
    metrics: tuple[str, ...] = ("*",)
    slices: str = ONE_VALUE
    conventions: tuple[str, ...] = ("*",)


KINDS = (
    Kind("accuracy", "Accuracy", ("*accuracy",)),
    Kind("effective_robustness", "Effective robustness", ("effective_robustness",), NO_BINS, ("logit-ols",)),
    Kind("effective_robustness", "Accuracy", ("accuracy",)),
    Kind("synthetic", "Synthetic shifts", ("retention", "mce", "relative_mce")),
    Kind("synthetic", "Synthetic shifts", ("effective_robustness",), NO_BINS),
    Kind("factors", "Visual factors", ("factor_accuracy",), NO_BINS),
    Kind("factor_robustness", "Visual factors", ("effective_robustness",), NO_BINS, ("*-logit-ols",)),
    Kind("shape_bias", "Shape bias"),
    Kind("calibration", "Calibration", ("ece", "adaptive_ece", "nll", "brier", "temperature"), NO_BINS),
    Kind("ood", "OOD detection", ("auroc", "aupr_*"), NO_BINS),
    Kind("ood", "OOD detection", ("fpr95",), NO_BINS, ("id_recall_at_least",)),
    Kind("retrieval", "Retrieval"),
    Kind("correspondence", "Correspondence", ("recall",), NO_BINS),
    Kind("choice", "Two-way questions", ("accuracy",), ANY),
    Kind("adversarial", "Adversarial attacks", ("accuracy", "clean_accuracy", "median_distance"), NO_BINS),
    Kind("typographic", "Printed words"),
    Kind("prompts", "Prompts", ("*_difference",), NO_BINS),
    Kind("data_overlap", "Data overlap", ("gain", "overlap_share", "accuracy_difference")),
)
_FACTS = ("params_m", "gflops", "train_images", "image_size")
_KEY = ["metric", "dataset", "slice", "convention"]
MODEL_AXIS = "Model"


@dataclasses.dataclass(frozen=True)
class Quantity:
    """Rows: model, value, low, high, n, one a model; low, high and n may be missing."""

    key: str
    axis: str
    metric: str
    dataset: str
    slice: str
    convention: str
    rows: pd.DataFrame

    @property
    def title(self) -> str:
        name = METRICS.get(self.metric, (self.metric.replace("_", " "), "", 0))[0]
        where = dataset_title(self.dataset) if self.dataset else ""
        return ", ".join(part for part in (where, name, self.slice.replace("_", " ")) if part)

    @property
    def unit(self) -> str:
        if self.metric in METRICS:
            return METRICS[self.metric][1]
        if self.metric.endswith("_difference"):
            return POINTS
        return PERCENT if self.rows["value"].between(0, 1).all() else NUMBER

    @property
    def better(self) -> int:
        return METRICS.get(self.metric, ("", "", 0))[2]


def known_models(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a model, by name: model, title, group, family, and what else the models table tells.

    Models that are measured and not listed are there too, in the group `unlisted`.
    """
    listed = frames.get("models", pd.DataFrame(columns=["model"])).drop_duplicates("model")
    tables = [frames[kind.table]["model"] for kind in KINDS if len(frames.get(kind.table, ()))]
    names = sorted({str(name) for column in [listed["model"], *tables] for name in column.dropna()})
    models = pd.DataFrame({"model": names}).merge(listed.astype({"model": str}), on="model", how="left")
    columns = {name: models.get(name, pd.Series("", models.index)).fillna("") for name in ("title", "group", "family")}
    family = columns["family"].replace({"eva": "vit", "deit": "vit", "beit": "vit"})
    return models.assign(
        title=columns["title"].where(columns["title"] != "", models["model"]),
        group=columns["group"].where(columns["group"].isin(list(GROUPS)), "unlisted"),
        family=family.where(family.isin(list(FAMILIES)), "other"),
    )


def quantities(frames: Mapping[str, pd.DataFrame]) -> list[Quantity]:
    """All of a study's quantities, in the order of KINDS, data sets in that of NAMED; then facts about models."""
    found = []
    for kind in KINDS:
        frame = frames.get(kind.table, pd.DataFrame())
        if len(frame):
            found += _of_kind(kind, _chosen(kind, frame))
    models = frames.get("models", pd.DataFrame())
    for name in (name for name in _FACTS if name in models):
        rows = models[["model", name]].rename(columns={name: "value"}).assign(low=np.nan, high=np.nan, n=np.nan)
        rows["value"] = pd.to_numeric(rows["value"], errors="coerce")
        found.append(Quantity(f"model.{name}", MODEL_AXIS, name, "", "", "", rows))
    return [q for q in (_finite(quantity) for quantity in found) if len(q.rows)]


def _finite(quantity: Quantity) -> Quantity:
    rows = quantity.rows[np.isfinite(quantity.rows["value"].astype(float))]
    return dataclasses.replace(quantity, rows=rows.drop_duplicates("model").sort_values("model"))


def _chosen(kind: Kind, frame: pd.DataFrame) -> pd.DataFrame:
    words = {name: frame[name].fillna("").astype(str) for name in (*_KEY, "source")}
    kept = (
        words["metric"].map(lambda name: _any(name, kind.metrics))
        & words["slice"].map(lambda name: re.fullmatch(kind.slices, name) is not None)
        & words["convention"].map(lambda name: _any(name, kind.conventions))
    )
    return frame.assign(**words)[kept]


def _any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _of_kind(kind: Kind, rows: pd.DataFrame) -> list[Quantity]:
    known = {name: place for place, name in enumerate(NAMED)}
    found = []
    for names, some in rows.groupby(_KEY, sort=True):
        metric, dataset, slice_, convention = map(str, names)
        key = f"{kind.table}.{metric}.{dataset}.{slice_}.{convention}"
        ordered = some.sort_values(["model", "source"])
        found.append(Quantity(key, kind.axis, metric, dataset, slice_, convention, ordered))
    return sorted(found, key=lambda quantity: (known.get(quantity.dataset, len(known)), quantity.dataset))


def encode(quantity: Quantity, places: Mapping[str, int]) -> dict[str, Any]:
    """A quantity for the page: columns by place of the model, numbers with five digits, n once if all have the same."""
    rows = quantity.rows[quantity.rows["model"].isin(list(places))]
    n = [None if pd.isna(value) else int(value) for value in rows["n"]]
    encoded = {
        "k": quantity.key, "a": quantity.axis, "t": quantity.title, "c": quantity.convention, "u": quantity.unit,
        "m": [places[name] for name in rows["model"]], "v": _numbers(rows["value"]), "n": _one(n),
    }  # fmt: skip
    for name, column in (("l", "low"), ("h", "high")):
        values = _numbers(pd.to_numeric(rows[column], errors="coerce"))
        if any(value is not None for value in values):
            encoded[name] = values
    return encoded


def _numbers(values: pd.Series) -> list[float | int | None]:
    rounded = [float(f"{value:.5g}") if np.isfinite(value) else None for value in values.astype(float)]
    return [int(v) if v is not None and v.is_integer() else v for v in rounded]


def _one(values: list[Any]) -> Any:
    return values[0] if len(set(values)) == 1 else values
