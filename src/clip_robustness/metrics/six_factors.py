"""Six factors: what each does to every axis of robustness, from matched pairs of models (see `matched_pairs`).

Both sides of a pair are read on the same data sets and under the same convention; what only one side has is left out.
Models that are one side together are averaged. The sixth factor, prompts, compares each model with itself.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from clip_robustness.core import io, statistics
from clip_robustness.core.statistics import RESAMPLES
from clip_robustness.metrics.effective_robustness import SEVEN_SHIFTS
from clip_robustness.metrics.gather import write_table
from clip_robustness.metrics.matched_pairs import (
    Pair,
    Pairs,
    clip_facts,
    cluster_interval,
    clusters,
    holm,
    matched_pairs,
    sign_flip,
)

COLUMNS = (
    *("study", "axis", "metric", "factor", "contrast", "effect", "low", "high", "interval", "low_images"),
    *("high_images", "n", "clusters", "models", "unit", "convention", "p", "p_holm", "comparisons", "pairs"),
)
FACTORS = ("architecture", "source", "size", "finetuning", "loss", "prompts")
AXES = (
    *("clean_accuracy", "effective_robustness", "factor_robustness", "shape_bias", "ood_auroc", "retrieval"),
    *(f"{metric}_{where}" for metric in ("ece", "nll") for where in ("id", "id_scaled", "shifts", "shifts_scaled")),
)
# With fewer clusters of pairs, a bootstrap over them and a test say nothing: the interval is then over images.
FEWEST = 5

Tables = Mapping[str, pd.DataFrame]


def six_factors(
    tables: Path,
    out: Path,
    reference: str | None = None,
    natural: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> None:
    """Write `out` (.parquet, with a .csv beside it; COLUMNS) from those of a study's tables that `tables` holds.

    reference: the in-distribution data set (default: the one whose name ends in `_val`). natural: the shifts that are
    averaged, as of `fit_baselines_file`. A row: the mean difference of the pairs (for size: per factor of ten) with

    low, high: over pairs, a bootstrap of clusters (pairs that share a model, directly or through others, are drawn
        together), with percentiles expanded for few clusters (Hesterberg 2015); with fewer than FEWEST clusters over
        images only. `interval` (pairs, images) says which.
    low_images, high_images: over images, from the models' own intervals (MOVER; Zou and Donner 2008). Each model
        counts with its net weight over all pairs. Models are taken as independent, which is safe: they see the same
        images, and an error that they share cancels in a difference.
    p: sign-flip permutation test over clusters; none where there are fewer than FEWEST. p_holm: corrected after Holm
        for all `comparisons`, the tests made in this table. Intervals are not corrected: one in twenty misses.
    """
    names = "models accuracy effective_robustness shape_bias ood calibration factor_robustness retrieval prompts"
    paths = {name: tables / f"{name}.parquet" for name in (*names.split(), "baselines", "factor_fits")}
    known = {name: pd.DataFrame(io.read_parquet(path)) for name, path in paths.items() if path.is_file()}
    found = effects(known, reference, natural, seed, resamples)
    write_table(out, {name: [row[name] for row in found] for name in COLUMNS})


def effects(
    tables: Tables,
    reference: str | None = None,
    natural: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> list[dict[str, Any]]:
    """The rows that `six_factors` writes, from tables by name, any of which may be missing."""
    datasets = set(_table(tables, "accuracy")["dataset"]) | set(_table(tables, "calibration")["dataset"])
    reference = reference or next((name for name in sorted(datasets) if name.endswith("_val")), "")
    if natural is None:
        robust = set(_table(tables, "effective_robustness")["dataset"]) - {"natural_average"}
        natural = SEVEN_SHIFTS if reference == "imagenet_val" else sorted(robust | datasets - {reference})
    models = tables.get("models", pd.DataFrame({"model": []}))
    by_prompts = _tables_by_prompts(tables, reference)
    found = []
    for pairs, scores in (
        (matched_pairs(models), axis_scores(tables, reference, natural)),
        (_prompt_pairs(by_prompts, models), axis_scores(by_prompts, reference, natural)),
    ):
        for axis, rows in scores.items():
            for (factor, contrast), some in pairs.items():
                row = _effect(some, rows, seed, resamples)
                if row:
                    unit = "nats" if axis.startswith("nll") else "fraction"
                    unit += " per factor of ten" if factor == "size" else ""
                    where = {"axis": axis, "metric": rows["metric"].iloc[0], "factor": factor, "contrast": contrast}
                    found.append({**where, "unit": unit, **row})
    found.sort(key=lambda row: (AXES.index(row["axis"]), FACTORS.index(row["factor"])))
    tested = [row for row in found if row["p"] is not None]
    for row, corrected in zip(tested, holm([row["p"] for row in tested]), strict=True):
        row["p_holm"] = corrected
    study = "+".join(sorted({str(s) for t in tables.values() if "study" in t for s in t["study"].unique()}))
    return [{"study": study, "p_holm": None, **row, "comparisons": len(tested)} for row in found]


def _prompt_pairs(tables: Tables, models: pd.DataFrame) -> Pairs:
    """Each CLIP model with its largest prompt set and with each smaller one (sets are named {name}_{templates})."""
    clip = set(clip_facts(models)["model"])
    sets: dict[str, dict[int, str]] = defaultdict(dict)
    for name in sorted({name for table in tables.values() for name in table["model"]}):
        size = re.search(r"_(\d+)$", name)
        if size and name.split("\t")[0] in clip:
            sets[name.split("\t")[0]][int(size[1])] = name
    pairs: Pairs = defaultdict(list)
    for own in sets.values():
        most = max(own)
        for few in sorted(own, reverse=True)[1:]:
            pairs["prompts", f"{most} → {few} template{'s'[: few > 1]}"].append(Pair((own[most],), (own[few],)))
    return dict(pairs)


def axis_scores(tables: Tables, reference: str, natural: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Axis -> rows model, metric, unit, part, convention, rank, value, low, high, in the order of the figure.

    An axis is the mean over its units (data sets, factors), and a unit that of its parts. Of several conventions the
    one of the lowest rank is preferred. An axis without rows is left out.
    """
    shift_of = {part: shift for shift in natural for part in shift.split("+")}
    accuracy = _pick(tables, "accuracy", ["accuracy"], slice="", dataset=[reference])
    robust = _pick(tables, "effective_robustness", ["effective_robustness"], dataset=list(shift_of))
    robust["convention"] = robust["slice"] + " " + robust["convention"]
    factors = _pick(tables, "factor_robustness", ["effective_robustness"])
    factors["part"] = factors["dataset"] + ":" + factors["slice"]
    ood = _pick(tables, "ood", ["auroc"])
    ood["convention"] = ood["slice"]
    retrieval = _pick(tables, "retrieval", ["image_recall@1", "text_recall@1"])
    retrieval = retrieval.assign(part=retrieval["dataset"] + ":" + retrieval["metric"], metric="recall@1")
    axes = {
        "clean_accuracy": (accuracy, ()),
        "effective_robustness": (robust, ("class_subset logit-ols", "val logit-ols")),
        "factor_robustness": (factors, ("top-logit-huber",)),
        "shape_bias": (_pick(tables, "shape_bias", ["shape_bias"], slice=""), ()),
        "ood_auroc": (ood, ("mcm_t1", "msp")),
        "retrieval": (retrieval, ("duplicates_positive", "own_captions")),
    }
    for metric in ("ece", "nll"):
        for where, names in (("id", [reference]), ("shifts", list(shift_of))):
            for state, suffix in (("before", ""), ("after", "_scaled")):
                rows = _pick(tables, "calibration", [metric], slice=state, dataset=names)
                axes[f"{metric}_{where}{suffix}"] = rows, ("15_equal_width",)
    found = {}
    for axis, (rows, prefer) in axes.items():
        cover = rows.groupby("convention")["model"].nunique()
        order = sorted(cover.index, key=lambda c: (prefer.index(c) if c in prefer else len(prefer), -cover[c], c))
        rank = {convention: position for position, convention in enumerate(order)}
        unit = rows["part"].map(lambda part: shift_of.get(part, part))
        if len(rows):
            found[axis] = rows.assign(rank=rows["convention"].map(rank), unit=unit).reset_index(drop=True)
    return found


def _table(tables: Tables, name: str) -> pd.DataFrame:
    columns = ("model", "dataset", "metric", "slice", "value", "low", "high", "convention", "source")
    return tables.get(name, pd.DataFrame(columns=list(columns))).reindex(columns=list(columns))


def _pick(tables: Tables, name: str, metrics: Sequence[str], slice: str | None = None, dataset: Any = None) -> Any:
    """Rows of a table with complete intervals; what was reported more than once is measured, or first by source."""
    rows = _table(tables, name)
    rows = rows[rows["metric"].isin(metrics)].dropna(subset=["value", "low", "high"])
    if slice is not None:
        rows = rows[rows["slice"] == slice]
    if dataset is not None:
        rows = rows[rows["dataset"].isin(dataset)]
    rows = rows.assign(other=rows["source"] != "measured").sort_values(["other", "source"], kind="stable")
    rows = rows.drop_duplicates(["model", "dataset", "metric", "slice", "convention"])
    return rows.assign(part=rows["dataset"])


def _tables_by_prompts(tables: Tables, reference: str) -> dict[str, pd.DataFrame]:
    """The `prompts` table as if each model with each prompt set were a model, named {model}TAB{prompt set}."""
    rows = _table(tables, "prompts")
    if not len(rows):
        return {}
    name = rows["slice"].str.partition(":")
    rows = rows.assign(model=rows["model"] + "\t" + name[0], slice=name[2])
    calibration = rows[rows["metric"].isin(["ece", "nll"])]
    accuracy = rows[(rows["metric"] == "accuracy") & (rows["slice"] == "")]
    x = accuracy.loc[accuracy["dataset"] == reference]
    lines = tables.get("baselines", pd.DataFrame(columns=["dataset", "reference"]))
    fits = tables.get("factor_fits", pd.DataFrame(columns=["dataset", "slice", "convention"]))
    shifts = accuracy[accuracy["dataset"] != reference].drop(columns="slice")
    robust = _above(shifts, x, lines[lines["reference"] == "val"], ["model"], ["dataset"])
    factor = rows[rows["metric"] == "factor_accuracy"]
    where = ["dataset", "slice", "convention"]
    factor = _above(factor, accuracy, fits, ["model", "dataset", "convention"], where)
    return {
        "accuracy": accuracy,
        "calibration": calibration.assign(slice=calibration["slice"].replace("", "before")),
        "ood": rows,
        "effective_robustness": robust.assign(slice="val", convention=robust["fit"]),
        "factor_robustness": factor.assign(convention=factor["convention"] + "-" + factor["fit"]),
    }


def _above(y: pd.DataFrame, x: pd.DataFrame, lines: pd.DataFrame, same: list[str], where: list[str]) -> pd.DataFrame:
    """Effective robustness of rows y at the accuracies x of the `same` model, over the lines of `where`.

    Intervals are over images; the line is the same for all that are compared.
    """
    at = x[[*same, "value", "low", "high"]]
    rows = y.merge(at, on=same, suffixes=("", "_x")).merge(lines, on=where, suffixes=("", "_line"))
    found = []
    for row in rows.to_dict("records"):
        line = statistics.Line(*(row[name] for name in ("slope", "intercept", "r", "n", "transform", "estimator")))
        numbers = row["value_x"], row["value"], (row["low_x"], row["high_x"]), (row["low"], row["high"])
        band = (line.predict(row["value_x"]),) * 2
        low, high = statistics.effective_robustness_interval(line, *numbers, band)
        value = float(statistics.effective_robustness(line, row["value_x"], row["value"]))
        found.append({**row, "value": value, "low": float(low), "high": float(high)})
    made = pd.DataFrame(found, columns=[*rows.columns])
    return made.assign(metric="effective_robustness", fit=made.get("transform", "") + "-" + made.get("estimator", ""))


def _effect(pairs: Sequence[Pair], scores: pd.DataFrame, seed: int, resamples: int) -> dict[str, Any] | None:
    """One row's numbers; None when no pair has scores."""
    index = _index(scores)
    weights = {pair: _weights(pair, index, len(scores)) for pair in pairs}
    pairs = [pair for pair in pairs if weights[pair].any()]
    if not pairs:
        return None
    matrix = np.stack([weights[pair] for pair in pairs])
    value, low, high = (scores[name].to_numpy(float) for name in ("value", "low", "high"))
    step = np.array([pair.step for pair in pairs])
    effect = float((matrix @ value).sum() / step.sum())
    net = matrix.sum(axis=0) / step.sum()
    below = float(np.sqrt(((net * np.where(net > 0, value - low, high - value)) ** 2).sum()))
    above = float(np.sqrt(((net * np.where(net > 0, high - value, value - low)) ** 2).sum()))
    cluster = clusters([(*pair.before, *pair.after) for pair in pairs])
    count = int(cluster.max()) + 1
    images = effect - below, effect + above
    sums = np.stack([np.bincount(cluster, matrix @ value), np.bincount(cluster, step)], axis=1)
    enough = count >= FEWEST
    own = cluster_interval(sums, resamples, seed) if enough else images
    used = scores.loc[(matrix != 0).any(axis=0)]
    return {
        "effect": effect,
        "low": min(own[0], effect),
        "high": max(own[1], effect),
        "interval": "pairs" if enough else "images",
        "low_images": images[0],
        "high_images": images[1],
        "n": len(pairs),
        "clusters": count,
        "models": len({name.split("\t")[0] for pair in pairs for name in (*pair.before, *pair.after)}),
        "convention": "+".join(sorted(set(used["convention"]) - {""})),
        "p": sign_flip(sums[:, 0], seed) if enough else None,
        "pairs": "; ".join(f"{'+'.join(p.before)} > {'+'.join(p.after)}".replace("\t", " ") for p in pairs),
    }


def _index(scores: pd.DataFrame) -> dict[str, dict[tuple[str, str, int], int]]:
    """Model -> (unit, part, rank of the convention) -> row of `scores`."""
    index: dict[str, dict[tuple[str, str, int], int]] = defaultdict(dict)
    keys = (scores[name].tolist() for name in ("model", "unit", "part", "rank"))
    for number, (name, unit, part, rank) in enumerate(zip(*keys, strict=True)):
        index[name][unit, part, rank] = number
    return index


def _weights(pair: Pair, index: Mapping[str, Mapping[tuple[str, str, int], int]], size: int) -> np.ndarray:
    """The weight [size] of each score in the pair's difference, after - before; all 0 when nothing is shared."""
    sides: list[dict[tuple[str, str, int], list[int]]] = [defaultdict(list), defaultdict(list)]
    for side, names in zip(sides, (pair.before, pair.after), strict=True):
        for name in names:
            for key, number in index.get(name, {}).items():
                side[key].append(number)
    shared = sorted(sides[0].keys() & sides[1].keys(), reverse=True)
    best = {(unit, part): rank for unit, part, rank in shared}  # the lowest rank comes last, and stays
    parts = Counter(unit for unit, _ in best)
    weights = np.zeros(size)
    for (unit, part), rank in best.items():
        for side, sign in zip(sides, (-1, 1), strict=True):
            numbers = side[unit, part, rank]
            weights[numbers] += sign / len(numbers) / parts[unit] / len(parts)
    return weights
