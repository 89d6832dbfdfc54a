"""Data overlap (Radford et al. 2021, section 5 and appendix C): a test set without its near-duplicates.

    overlap   images whose nearest reference is at least as similar as the threshold; clean: the others
    share     |overlap| / |all|
    gain      accuracy(all) - accuracy(clean) = share x (accuracy(overlap) - accuracy(clean))
    p         P(X >= right on overlap), X binomial with accuracy(clean): one-sided

The threshold is chosen on labelled pairs: a copy and its source are duplicates; a copy and the most similar other
source are not.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_robustness.core import features, io, statistics
from clip_robustness.core.io import InputError
from clip_robustness.metrics.rows import Row, proportion_row, row

COPIES = 1024  # compared with all sources at a time
HELD_OUT = "held_out_half"
CONTROLS = ("", "planted", "disjoint")


class Pairs(NamedTuple):
    """Similarities of each copy [n] with its source and with the most similar other source, and what it is."""

    duplicate: np.ndarray
    other: np.ndarray
    source: np.ndarray  # position
    transform: np.ndarray


def similar_pairs(copies: np.ndarray, sources: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosines [n] of each copy with its source and with the most similar other one; unit rows [n, d] and [s, d]."""
    duplicate, other = np.empty(len(copies), np.float32), np.empty(len(copies), np.float32)
    for start in range(0, len(copies), COPIES):
        part = slice(start, start + COPIES)
        cosines = copies[part] @ sources.T
        own = np.arange(len(cosines)), source[part]
        duplicate[part], cosines[own] = cosines[own], -np.inf
        other[part] = cosines.max(axis=1)
    return duplicate, other


def smallest_threshold(others: np.ndarray, false_positives: float) -> float:
    """The smallest float32 t such that at most this share of `others` [n] is >= t."""
    allowed = int(false_positives * len(others) + 1e-9)
    if allowed >= len(others):
        return -1.0
    return float(np.nextafter(np.sort(others)[::-1][allowed], np.float32(np.inf), dtype=np.float32))


def choose_threshold(
    copies: Path,
    copies_index: Path,
    sources: Path,
    sources_index: Path,
    out: Path,
    false_positives: float = 0.001,
    seed: int = 0,
) -> None:
    """Write the smallest similarity at which at most `false_positives` of the negative pairs pass, and what it does.

    copies, sources: features by the detector (.npy, manifest beside them). The index of the copies has the columns
    `source` (image id of the source) and `transform`. The sources are halved by `seed`, with their copies: the
    threshold is chosen on one half, all rates are of the other one, and no pair joins the two.
    Rows: `threshold` (n: negative pairs that it was chosen on); `false_positive_rate`; `precision`, with as many
    negative pairs as positive ones; `recall` overall and by transform. Copies of one source are not independent, so
    that the intervals (Clopper-Pearson) count every source once: they are as wide as if its copies were one image. The
    false-positive rate is of a search among as many references as a half has sources, and grows with the corpus.
    Errors: `InputError` when files do not fit together, a half has fewer than two sources, or nothing is found.
    """
    about, about_sources = features.read_manifest(copies), features.read_manifest(sources)
    features.check_detector(copies, about, sources, about_sources)
    if not 0 <= false_positives < 1:
        raise InputError(f"false_positives is {false_positives}, expected a share from 0 to below 1")
    table = features.read_index(copies_index, about, ("source", "transform"))
    ids = features.read_index(sources_index, about_sources)["image_id"]
    source = _positions(table["source"], ids, copies_index, sources_index)
    lost = np.isin(ids, list(about_sources.get("masked") or ()))
    kept = ~np.isin(table["image_id"], list(about.get("masked") or ())) & ~lost[source]
    halves = np.array_split(np.random.default_rng(seed).permutation(np.flatnonzero(~lost)), 2)
    rows, unit = features.unit_rows(copies), features.unit_rows(sources)
    chosen, held_out = (_pairs(rows, unit, source, table["transform"], kept, np.sort(half)) for half in halves)
    if min(len(set(pairs.source.tolist())) for pairs in (chosen, held_out)) < 2:
        raise InputError(f"{copies_index}: a half has fewer than two sources with copies; make more copies")
    threshold = smallest_threshold(chosen.other, false_positives)
    if not (chosen.duplicate >= threshold).any():
        raise InputError(
            f"{copies}: no copy is as similar to its source as {threshold:.4f}, which other images reach; "
            f"take another detector, or more false positives than {false_positives:g}"
        )
    convention = f"false_positives_{false_positives:g}"
    found = [row("threshold", threshold, threshold, threshold, len(chosen.other), "", convention)]
    found += detection_rows(held_out, threshold)
    who = {"model": about["model"], "dataset": about["dataset"], "source": "measured"}
    manifest = {name: about.get(name) for name in ("model", "dataset", "ids_sha256", *features.DETECTOR)}
    facts = {"seed": seed, "threshold": threshold, "false_positives": false_positives, "references": len(halves[1])}
    io.write_json(out, {"manifest": {**manifest, **facts}, "rows": [{**who, **one} for one in found]})


def _positions(wanted: np.ndarray, ids: np.ndarray, copies_index: Path, sources_index: Path) -> np.ndarray:
    place = {image_id: position for position, image_id in enumerate(ids)}
    unknown = [image_id for image_id in wanted if image_id not in place]
    if unknown:
        raise InputError(f"{copies_index}: source {unknown[0]!r} is no image of {sources_index}; index both again")
    return np.array([place[image_id] for image_id in wanted], np.int64)


def _pairs(
    copies: np.ndarray,
    sources: np.ndarray,
    source: np.ndarray,
    transform: np.ndarray,
    kept: np.ndarray,
    half: np.ndarray,
) -> Pairs:
    mine = np.flatnonzero(kept & np.isin(source, half))
    pairs = similar_pairs(copies[mine], sources[half], np.searchsorted(half, source[mine]))
    return Pairs(*pairs, source[mine], transform[mine])


def detection_rows(pairs: Pairs, threshold: float) -> list[Row]:
    """False-positive rate, precision (none when nothing passes) and recall of `threshold` on labelled pairs."""
    hit, false = pairs.duplicate >= threshold, pairs.other >= threshold
    passing = np.concatenate([hit, false])
    right = np.repeat([True, False], len(hit))[passing]
    rows = [_rate("false_positive_rate", false, pairs.source)]
    if len(right):
        rows.append(_rate("precision", right, np.tile(pairs.source, 2)[passing]))
    rows.append(_rate("recall", hit, pairs.source))
    for name in sorted(set(pairs.transform)):
        some = pairs.transform == name
        rows.append(_rate("recall", hit[some], pairs.source[some], str(name)))
    return rows


def _rate(metric: str, hit: np.ndarray, source: np.ndarray, slice: str = "") -> Row:
    rate, independent = hit.mean(), len(np.unique(source))
    low, high = statistics.clopper_pearson(rate * independent, independent)
    return row(metric, rate, float(low), float(high), len(hit), slice, HELD_OUT)


def binomial_p(successes: int, n: int, p0: float) -> float:
    """P(X >= successes) for X of `n` trials at `p0`: the p value of a one-sided exact binomial test."""
    from scipy.special import betainc

    return 1.0 if successes == 0 else float(betainc(successes, n - successes + 1, p0))


def overlap_rows(
    correct: np.ndarray, overlap: np.ndarray, tests: int = 1, seed: int = 0, convention: str = ""
) -> list[Row]:
    """Rows of one model on one test set; `correct` and `overlap` [n] are bool.

    `accuracy` slices all, clean, overlap and `overlap_share`: Clopper-Pearson. `accuracy_difference` (overlap - clean)
    and `gain`: a parametric bootstrap (`statistics.difference_interval`), which does not collapse where all of a few
    overlapping images are right; it takes the share as given. `binomial_p` under the conventions `one_sided` and
    `one_sided_bonferroni_{tests}` (times `tests`, at most 1), n = images that overlap.
    What is undefined has no row: without overlap the gain is exactly 0, and there is no p; without a clean image
    there is neither.
    """
    n, shared = len(correct), int(overlap.sum())
    right, both = int(correct.sum()), int((correct & overlap).sum())
    counts = {"all": (right, n), "clean": (right - both, n - shared), "overlap": (both, shared)}
    rows = [proportion_row("accuracy", k, m, name, convention) for name, (k, m) in counts.items() if m]
    rows.append(proportion_row("overlap_share", shared, n, convention=convention))
    if not shared:
        return [*rows, row("gain", 0, 0, 0, n, convention=convention)]
    if shared == n:
        return rows
    value, low, high = statistics.difference_interval(counts["overlap"], counts["clean"], seed=seed)
    rows.append(row("accuracy_difference", value, low, high, shared, convention=convention))
    share = shared / n
    rows.append(row("gain", share * value, share * low, share * high, n, convention=convention))
    p = binomial_p(both, shared, (right - both) / (n - shared))
    for name, factor in (("one_sided", 1), (f"one_sided_bonferroni_{tests}", tests)):
        corrected = min(1.0, p * factor)
        rows.append(row("binomial_p", corrected, corrected, corrected, shared, convention=name))
    return rows


def measure_overlap(
    predictions: Path,
    matches: Path,
    threshold: Path,
    out: Path,
    tests: int = 1,
    seed: int = 0,
    control: str = "",
    copies_index: Path | None = None,
) -> None:
    """Write `overlap_rows` of one model on one test set to `out` ({model}/{data set}.json).

    predictions: as `measure_accuracy` writes them; matches: as `find_duplicates`, manifest beside it; threshold: as
    `choose_threshold`; tests: how many tests are made side by side (Bonferroni). control: `planted` for a test set
    whose copies are in the corpus, `disjoint` for one that has none there; it becomes the rows' convention (else
    `detected`), so that a figure can tell them apart. With `copies_index` (the planted copies, column `source`) also
    `detected_recall` and `detected_precision` of the whole search, by which images have a copy in the corpus.
    Errors: `InputError` for a threshold of another detector, an image without a match, or no labelled image.
    """
    if control not in CONTROLS or (copies_index is not None and control != "planted"):
        raise InputError(f"control is {control!r}; expected planted, disjoint or none, and planted with copies_index")
    if tests < 1:
        raise InputError(f"tests is {tests}, expected 1 or more")
    chosen, searched = io.read_json(threshold)["manifest"], io.read_json(matches.with_suffix(".json"))
    features.check_detector(matches, searched, threshold, chosen)
    table = io.read_parquet(predictions, ["image_id", "label", "prediction"])
    labelled = table["label"] >= 0
    if not labelled.any():
        raise InputError(f"{predictions}: no image has a label; overlap is about accuracy")
    ids = table["image_id"][labelled]
    overlap = _overlap(ids, matches, chosen["threshold"], predictions)
    correct = (table["prediction"] == table["label"])[labelled]
    rows = overlap_rows(correct, overlap, tests, seed, control or "detected")
    if copies_index is not None:
        planted = np.isin(ids, io.read_parquet(copies_index, ["source"])["source"])
        for metric, given in (("detected_recall", planted), ("detected_precision", overlap)):
            if given.any():
                both = int((planted & overlap).sum())
                rows.append(proportion_row(metric, both, int(given.sum()), convention=control))
    facts = {"detector": searched["model"], "threshold": chosen["threshold"], "references": searched["references"]}
    manifest: dict[str, Any] = {**facts, "dataset": searched["dataset"], "ids_sha256": searched["ids_sha256"]}
    io.write_json(out, {"manifest": {**manifest, "tests": tests, "measured": len(ids)}, "rows": rows})


def _overlap(ids: np.ndarray, matches: Path, threshold: float, predictions: Path) -> np.ndarray:
    table = io.read_parquet(matches, ["image_id", "similarity"])
    similarity = dict(zip(table["image_id"], table["similarity"], strict=True))
    missing = [image_id for image_id in ids if image_id not in similarity]
    if missing:
        raise InputError(f"{matches}: no match for {len(missing):,} images of {predictions}, such as {missing[0]!r}")
    return np.array([similarity[image_id] for image_id in ids], np.float32) >= np.float32(threshold)
