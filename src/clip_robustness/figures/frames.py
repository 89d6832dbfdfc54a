"""Selecting from the tidy tables what a figure shows; every function copes with a table that is empty."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from clip_robustness.core.names import NAMED, dataset_title, source_title  # noqa: F401
from clip_robustness.core.tables import MEASUREMENT
from clip_robustness.figures import style

_MODELS = [
    "model",
    "title",
    "architecture",
    "group",
    "family",
    "source",
    "train_images",
    "finetuning",
    "loss",
    "params_m",
    "parent",
    "image_size",
]
_BASELINES = ["dataset", "reference", "transform", "estimator", "slope", "intercept", "r", "n", "source"]
_FACTOR_FITS = [*_BASELINES[:1], "slice", "convention", *_BASELINES[2:]]
_NUMBERS = ("value", "low", "high", "n", "slope", "intercept", "r", "train_images", "params_m", "image_size")

# The fit that a figure shows when a table holds several: that of Taori et al. (2020), then what is nearest.
FITS = (("logit", "ols"), ("logit", "huber"), ("probit", "ols"), ("probit", "huber"), ("linear", "ols"))


def table(tables: Mapping[str, pd.DataFrame], name: str) -> pd.DataFrame:
    """The table `name` with all columns of its contract; empty when the study does not have it."""
    others = {"models": _MODELS, "baselines": _BASELINES, "factor_fits": _FACTOR_FITS}
    columns = others.get(name, list(MEASUREMENT))
    given = tables.get(name)
    frame = pd.DataFrame(columns=columns) if given is None else given.reset_index(drop=True)
    missing = [column for column in columns if column not in frame]
    frame = frame.assign(**{column: np.nan if column in _NUMBERS else "" for column in missing})
    numbers = {column: pd.to_numeric(frame[column], errors="coerce") for column in columns if column in _NUMBERS}
    words = {column: frame[column].fillna("").astype(str) for column in columns if column not in _NUMBERS}
    return frame.assign(**numbers, **words)


def pick(rows: pd.DataFrame, prefer: Sequence[str] = (), **equal: str | Sequence[str]) -> pd.DataFrame:
    """Rows whose columns equal the given values, one for each (model, dataset, metric, slice).

    Where several conventions or sources report the same quantity, the one named first in `prefer` is
    kept, then the convention that covers most models, then the first by name.
    """
    for column, wanted in equal.items():
        values = [wanted] if isinstance(wanted, str) else list(wanted)
        rows = rows[rows[column].isin(values)]
    cover = rows.groupby("convention")["model"].nunique()
    ranked = sorted(cover.index, key=lambda c: (prefer.index(c) if c in prefer else len(prefer), -cover[c], c))
    rank = {convention: position for position, convention in enumerate(ranked)}
    order = rows.assign(_rank=rows["convention"].map(rank)).sort_values(["_rank", "source"], kind="stable")
    kept = order.drop_duplicates(["model", "dataset", "metric", "slice"]).drop(columns="_rank")
    return kept.sort_values(["dataset", "metric", "slice", "model"], kind="stable").reset_index(drop=True)


def one_convention(rows: pd.DataFrame, prefer: Sequence[str] = ()) -> pd.DataFrame:
    """Rows of one convention only: the first of `prefer` that there is, else the one that covers most models.

    Two conventions of a metric are two quantities, which one panel must not mix.
    """
    cover = rows.groupby("convention")["model"].nunique()
    wanted = [name for name in prefer if name in cover.index]
    wanted += sorted(cover.index, key=lambda name: (-cover[name], name))
    return rows[rows["convention"] == wanted[0]] if wanted else rows


def split_slice(rows: pd.DataFrame, first: str, second: str) -> pd.DataFrame:
    """Add both halves of a slice such as `before:07` as the columns `first` and `second`."""
    halves = [str(name).partition(":") for name in rows["slice"]]
    return rows.assign(**{first: [half[0] for half in halves], second: [half[2] for half in halves]})


def describe(rows: pd.DataFrame, models: pd.DataFrame) -> pd.DataFrame:
    """Add what the models table knows about each row's model; a model that is not listed keeps its name."""
    facts = models.drop_duplicates("model").rename(columns={"source": "training"})
    facts = facts[["training" if name == "source" else name for name in _MODELS]]
    joined = rows.merge(facts, on="model", how="left")
    group = joined["group"].where(joined["group"].isin(list(style.GROUPS)), "unlisted")
    family = joined["family"].replace({"eva": "vit", "deit": "vit", "beit": "vit"})
    family = family.where(family.isin(list(style.FAMILIES)), "other")
    title = joined["title"].where(joined["title"].fillna("") != "", joined["model"])
    words = {name: joined[name].fillna("") for name in ("training", "parent", "finetuning", "architecture", "loss")}
    return joined.assign(group=group, family=family, title=title, **words)


def records(frame: pd.DataFrame) -> list[Any]:
    """Rows as named tuples, whose fields pandas cannot give types to."""
    return list(frame.itertuples())


def dataset_order(names: Iterable[str]) -> list[str]:
    """Known data sets in a fixed order, then the others by name, an average over several last."""
    known = list(NAMED)
    return sorted(set(names), key=lambda n: (n == "natural_average", known.index(n) if n in known else 99, n))


def in_distribution(accuracy: pd.DataFrame) -> str:
    """The data set that accuracies are compared with: the one that is nobody's shift ("" if there is none).

    A shift has `reference_accuracy` rows; the reference itself has none.
    """
    names = set(accuracy.loc[accuracy["metric"] == "accuracy", "dataset"])
    shifts = set(accuracy.loc[accuracy["metric"] == "reference_accuracy", "dataset"])
    candidates = [name for name in dataset_order(names - shifts) if name != "natural_average"]
    named = [name for name in candidates if name in ("imagenet", "imagenet_val") or name.endswith("val")]
    return (named or candidates or [""])[0]


def against_reference(accuracy: pd.DataFrame, dataset: str, reference: str = "") -> pd.DataFrame:
    """One row a model: y, low, high, n on `dataset`, and x on its in-distribution partner.

    `reference` says what x is: `class_subset`, the shift's own `reference_accuracy`, or `val`, the accuracy
    on the whole in-distribution set, which also stands in where a shift has no reference of its own.
    """
    y = pick(accuracy, metric="accuracy", dataset=dataset, slice="")
    x = pick(accuracy, metric="reference_accuracy", dataset=dataset, slice="")
    if reference == "val" or not len(x):
        whole = pick(accuracy, metric="accuracy", dataset=in_distribution(accuracy), slice="")
        x = whole if len(whole) else x
    paired = y.merge(x[["model", "value"]].rename(columns={"value": "x"}), on="model")
    return paired.rename(columns={"value": "y"}).dropna(subset=["x", "y"]).reset_index(drop=True)


def chosen_fit(baselines: pd.DataFrame, accuracy: pd.DataFrame, dataset: str) -> pd.Series | None:
    """The baseline of `dataset` to show: by the x that nearly all models have, then the first of FITS.

    Of two x that (within 5 %) as many models have, a partner with the shift's own classes is the fairer.
    """
    rows = baselines[baselines["dataset"] == dataset]
    count = {name: len(against_reference(accuracy, dataset, name)) for name in sorted(set(rows["reference"]))}
    most = 0.95 * max(count.values(), default=0)
    for reference in sorted(count, key=lambda name: (count[name] < most, name != "class_subset", name)):
        for transform, estimator in FITS:
            match = rows[
                (rows["reference"] == reference) & (rows["transform"] == transform) & (rows["estimator"] == estimator)
            ]
            if len(match):
                return match.sort_values("source", kind="stable").iloc[0]
    return None


def fmt_n(rows: pd.DataFrame) -> str:
    """The number of images behind rows: "1,200", or "1,150 to 1,200" when models differ ("" if unknown)."""
    counts = rows["n"].dropna()
    if not len(counts):
        return ""
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"
