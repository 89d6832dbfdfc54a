"""Recall of dense correspondence: the share of a pair's matches whose error is below a threshold, over pairs.

Source: El Banani et al. 2024 (Probe3D), sections 3.2 and 4.2. Objects and scenes: the mean over pairs of each pair's
recall. Keypoints: the recall of each category over all its keypoints, then the mean over categories.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import io, statistics
from clip_robustness.core.io import InputError
from clip_robustness.metrics.rows import Row, row

KINDS = ("cm", "px", "box")
NORMED = "-normed"  # features after the tower's final norm


def measure_correspondence(matches: Path, out: Path, resamples: int = statistics.RESAMPLES, seed: int = 0) -> None:
    """Write the rows `recall` of one model on one data set to `out` (.json).

    matches: the table of `match_pairs`, its manifest beside it. Slices: a threshold, such as ``2cm``, ``10px`` or
    ``0.10`` (of the box), and one of them by viewpoint, such as ``2cm:30-60`` (degrees) or ``0.10:1`` (SPair's class
    of variation). n is the number of pairs. Convention: that of the errors, the stride of the features, and NORMED.
    Errors: `InputError` for files that are missing, damaged or hold no match.
    """
    columns, manifest = io.read_parquet(matches), io.read_json(matches.with_suffix(".json"))
    try:
        who = {name: manifest[name] for name in ("model", "dataset")} | {"source": "measured"}
        rows = correspondence_rows(columns, manifest["protocol"], resamples, seed)
    except KeyError as missing:
        raise InputError(f"{matches}: no {missing} in it or its manifest; match the pairs again") from None
    if not rows:
        raise InputError(f"{matches}: no pair has a match; index the data set again")
    pairs = len(set(columns["pair"].tolist()))
    unmatched = pairs - len(set(columns["pair"][_lengths(columns) > 0].tolist()))
    facts = {name: manifest[name] for name in ("model", "dataset", "index", "norm")}
    facts |= {"pairs": pairs, "unmatched": unmatched}
    rows = [{**who, **found, "convention": found["convention"] + NORMED * manifest["norm"]} for found in rows]
    io.write_json(out, {"manifest": facts, "rows": rows})


def correspondence_rows(
    columns: Mapping[str, np.ndarray],
    protocol: Mapping[str, Any],
    resamples: int = statistics.RESAMPLES,
    seed: int = 0,
) -> list[Row]:
    """Rows of a table of matches. protocol: `what`, `scored`, `binned` and `bins`, as the job's manifest has them.

    Intervals: a percentile bootstrap over objects or scenes, with all their pairs, or over the pairs where these have
    but one; of keypoints over the pairs of each category. Pairs without a match are left out.
    """
    keypoints = protocol["what"] == "keypoints"
    recall = _keypoint_recall if keypoints else _pair_recall
    found = []
    for convention in sorted(set(columns["convention"])):
        for kind, threshold in protocol["scored"]:
            counted, hits, matches = _hits(columns, convention, kind, threshold)
            if not len(hits):
                continue
            cluster, viewpoint, overall = (columns[n][counted] for n in ("cluster", "viewpoint", "overall"))
            slices = {"": overall.astype(bool)}
            if [kind, threshold] == list(protocol["binned"]):
                slices |= _by_viewpoint(viewpoint, protocol["bins"])
            for part, some in slices.items():
                if some.any():
                    value, low, high = recall(hits[some], matches[some], cluster[some], resamples, seed)
                    name = _threshold_name(kind, threshold) + (f":{part}" if part else "")
                    found.append(row("recall", value, low, high, int(some.sum()), name, convention))
    return found


def _hits(
    columns: Mapping[str, np.ndarray], convention: str, kind: str, threshold: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of a convention that have errors of a kind; of each, how many are below the threshold, and of how many."""
    rows = np.flatnonzero((columns["convention"] == convention) & (_lengths(columns, (kind,)) > 0))
    errors = [np.asarray(columns[kind][i]) for i in rows]
    hits = np.array([np.count_nonzero(some < threshold) for some in errors], float)
    return rows, hits, np.array([len(some) for some in errors], float)


def _lengths(columns: Mapping[str, np.ndarray], kinds: Sequence[str] = KINDS) -> np.ndarray:
    """Number of matches of each row."""
    lists = (columns[kind] for kind in kinds)
    return np.max([[0 if some is None else len(some) for some in column] for column in lists], axis=0)


def _by_viewpoint(viewpoint: np.ndarray, bins: Sequence[float]) -> dict[str, np.ndarray]:
    """Bins of degrees, the upper end outside except for the last; classes where there are no bins."""
    if not bins:
        return {f"{value:g}": viewpoint == value for value in np.unique(viewpoint)}
    ends = [*bins[:-1], np.nextafter(bins[-1], np.inf)]
    spans = zip(bins[:-1], bins[1:], ends[1:], strict=True)
    return {f"{low:g}-{high:g}": (viewpoint >= low) & (viewpoint < end) for low, high, end in spans}


def _threshold_name(kind: str, threshold: float) -> str:
    return f"{threshold:.2f}" if kind == "box" else f"{threshold:g}{kind}"


def _pair_recall(
    hits: np.ndarray, matches: np.ndarray, cluster: np.ndarray, resamples: int, seed: int
) -> tuple[float, float, float]:
    """The mean over pairs of a pair's recall, with its interval."""
    each = hits / matches
    _, group = np.unique(cluster, return_inverse=True)
    if group.max() == 0:  # a single cluster tells nothing about others
        group = np.arange(len(each))
    sums, counts = np.bincount(group, each), np.bincount(group)
    value = float(each.mean())
    low, high = statistics.bootstrap_ratio(sums, counts, resamples, seed)
    return value, min(low, value), max(high, value)


def _keypoint_recall(
    hits: np.ndarray, matches: np.ndarray, category: np.ndarray, resamples: int, seed: int
) -> tuple[float, float, float]:
    """The mean over categories of a category's recall over its keypoints, with its interval."""
    values, draws = [], []
    for k, name in enumerate(np.unique(category)):
        some = category == name
        values.append(hits[some].sum() / matches[some].sum())
        sums = statistics.bootstrap_sums(np.column_stack([hits[some], matches[some]]), resamples, seed + k)
        draws.append(sums[:, 0] / sums[:, 1])
    value = float(np.mean(values))
    low, high = statistics.percentile_interval(np.mean(draws, axis=0))
    return value, min(float(low), value), max(float(high), value)
