"""Calibration: ECE in bins of equal width and of equal mass, NLL, Brier score; temperature scaling (Guo et al. 2017).

    ece           15 bins of equal width on the top confidence
    adaptive_ece  15 bins of equal mass, as many images in each as ties allow (Nguyen and O'Connor 2015)
    nll           negative log likelihood in nats
    brier         squared error summed over the classes, 0..2 (Brier 1950; others halve it, or average over classes)

Bins are closed on the right, (lo, hi]: a confidence of exactly 1, which CLIP reaches, belongs to the last bin,
and one of exactly 0 to the first.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.statistics import RESAMPLES, bootstrap_sums, clopper_pearson, percentile_interval
from clip_robustness.metrics import measure
from clip_robustness.metrics.logits import (
    SMALLEST_EXPONENT,
    exponentials,
    from_top,
    negative_log_likelihood,
    restriction,
)
from clip_robustness.metrics.rows import Row, row

BINS = 15
TEMPERATURES = (0.01, 100.0)
# The convention and the largest value of each metric.
METRICS = {
    "ece": (f"{BINS}_equal_width", 1.0),
    "adaptive_ece": (f"{BINS}_equal_mass", 1.0),
    "nll": (f"{BINS}_equal_width", math.inf),
    "brier": ("sum_over_classes", 2.0),
}


class Scores(NamedTuple):
    """Of each image: the top confidence, whether it is right (0 or 1), NLL and squared error; float64 [n] each."""

    confidence: np.ndarray
    correct: np.ndarray
    nll: np.ndarray
    brier: np.ndarray


class Draws(NamedTuple):
    """A metric's value, and its bootstrap draws [resamples]."""

    value: float
    draws: np.ndarray


def image_scores(
    logits: np.ndarray,
    labels: np.ndarray,
    temperature: float = 1.0,
    top: tuple[np.ndarray, np.ndarray] | None = None,
) -> Scores:
    """Scores of softmax(logits / temperature), logits [n, K]. Errors: InputError as of `top1`.

    top: `from_top(logits)`, where the caller has it already for another temperature.
    """
    prediction, differences = top or from_top(logits)
    weights = exponentials(differences, temperature)
    confidence = 1 / weights.sum(axis=1)
    nll = negative_log_likelihood(logits, labels, prediction, confidence, temperature)
    confidence = confidence.astype(float)
    squares = np.vecdot(weights, weights) * confidence**2
    brier = np.clip(squares - 2 * np.exp(-nll) + 1, 0, 2)
    return Scores(confidence, (prediction == labels).astype(float), nll, brier)


def bin_index(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The bin 0..bins-1 of each confidence in [0, 1]; bin b holds (b / bins, (b + 1) / bins]."""
    edges = np.arange(bins + 1) / bins
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)


def equal_mass_index(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The bin 0..bins-1 of each confidence: bin b ends at the ceil((b + 1) n / bins)-th smallest one, which it holds.

    Equal confidences share a bin, the first that one of them reaches, so the order of the images decides nothing;
    bins that end at the same confidence are one. Without ties, sizes differ by at most 1. Needs n > 0.
    """
    last = -(-np.arange(1, bins + 1) * len(confidence) // bins) - 1
    return np.searchsorted(np.sort(confidence)[last], confidence, side="left")


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """sum over bins of |accuracy - mean confidence| * share of the images, in 0..1. Needs n > 0."""
    return _binned_error(bin_index(confidence, bins), confidence, correct)


def adaptive_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """`expected_calibration_error` in bins of equal mass (`equal_mass_index`). Needs n > 0."""
    return _binned_error(equal_mass_index(confidence, bins), confidence, correct)


def _binned_error(position: np.ndarray, confidence: np.ndarray, correct: np.ndarray) -> float:
    excess = np.bincount(position, correct - confidence.astype(float))
    return float(np.abs(excess).sum() / len(confidence))


def calibration_draws(
    scores: Mapping[str, Scores], seed: int = 0, resamples: int = RESAMPLES
) -> dict[tuple[str, str], Draws]:
    """(slice, metric) -> Draws, for scores of the same n > 0 images: the same resamples for every slice.

    Images are resampled over the whole set, not within each class: the metrics are means over images, and a resample
    that misses a small class is as good as another. Within a class of m images a bootstrap loses 1 / m of the variance
    (all of it where m is 1), while that between classes, which is kept here, can only widen an interval.
    Bins of equal mass stay those of the whole set. Resampling adds to an ECE, once more, the upward bias that
    binning has given it already; its draws are therefore centred on the estimate.
    """
    n = len(next(iter(scores.values())).nll)
    width = 2 * BINS + 2
    columns = np.zeros((n, width * len(scores)))
    everyone = np.arange(n)
    for number, (confidence, correct, nll, brier) in enumerate(scores.values()):
        part = columns[:, number * width : (number + 1) * width]
        part[everyone, bin_index(confidence)] = correct - confidence
        part[everyone, BINS + equal_mass_index(confidence)] = correct - confidence
        part[:, -2], part[:, -1] = nll, brier
    means = bootstrap_sums(columns, resamples, seed) / n
    found = {}
    for number, (slice, (confidence, correct, nll, brier)) in enumerate(scores.items()):
        drawn = means[:, number * width : (number + 1) * width]
        for metric, value, draws in (
            ("ece", expected_calibration_error(confidence, correct), np.abs(drawn[:, :BINS]).sum(axis=1)),
            ("adaptive_ece", adaptive_calibration_error(confidence, correct), np.abs(drawn[:, BINS:-2]).sum(axis=1)),
        ):
            found[slice, metric] = Draws(value, draws + value - draws.mean())
        found[slice, "nll"] = Draws(float(nll.mean()), drawn[:, -2])
        found[slice, "brier"] = Draws(float(brier.mean()), drawn[:, -1])
    return found


def calibration_rows(scores: Mapping[str, Scores], seed: int = 0, resamples: int = RESAMPLES) -> list[Row]:
    """A row for each of METRICS and the bins of the reliability diagram, for each slice (`before`, `after`).

    Intervals: percentiles of `calibration_draws`. Bins (of equal width): `bin_accuracy` (Clopper-Pearson) and
    `bin_confidence` (normal interval), slice `before:00`.
    """
    n = len(next(iter(scores.values())).nll)
    rows = draw_rows(calibration_draws(scores, seed, resamples), n)
    for slice, (confidence, correct, *_) in scores.items():
        rows += _bin_rows(confidence, correct, slice, METRICS["ece"][0])
    return rows


def draw_rows(draws: Mapping[tuple[str, str], Draws], n: int) -> list[Row]:
    """One row for each of `calibration_draws`, whose interval holds the value."""
    rows = []
    for (slice, metric), (value, drawn) in draws.items():
        convention, most = METRICS[metric]
        low, high = map(float, percentile_interval(drawn))
        rows.append(row(metric, value, min(max(low, 0), value), min(max(high, value), most), n, slice, convention))
    return rows


def _bin_rows(confidence: np.ndarray, correct: np.ndarray, slice: str, convention: str) -> list[Row]:
    position = bin_index(confidence)
    counts = np.bincount(position, minlength=BINS)
    hits = np.bincount(position, correct, BINS)
    means = np.bincount(position, confidence, BINS) / np.maximum(counts, 1)
    squares = np.bincount(position, (confidence - means[position]) ** 2, BINS)
    errors = 1.96 * np.sqrt(squares) / np.maximum(counts, 1)
    lows, highs = clopper_pearson(hits, counts)
    rows = []
    for b in np.flatnonzero(counts):
        name, mean, error = f"{slice}:{b:02d}", means[b], errors[b]
        rows.append(row("bin_accuracy", hits[b] / counts[b], lows[b], highs[b], counts[b], name, convention))
        low, high = max(mean - error, 0), min(mean + error, 1)
        rows.append(row("bin_confidence", mean, low, high, counts[b], name, convention))
    return rows


def stratified_half(labels: np.ndarray, image_ids: Iterable[str], seed: int = 0) -> np.ndarray:
    """Mask [n] of the images that fit the temperature: half of each class, rounded down, by a hash of the id.

    An image's side depends on the seed and on which images its class has, never on the order of the rows.
    Images without a label (-1) are on neither side: exclude them also from the other half.
    """
    prefix = f"{seed}:".encode()
    keys = b"".join(hashlib.blake2b(prefix + i.encode(), digest_size=8).digest() for i in image_ids)
    order = np.lexsort((np.frombuffer(keys, ">u8"), labels))
    counts = np.unique(labels, return_counts=True)[1]
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    mask = np.empty(len(labels), bool)
    mask[order] = rank < np.repeat(counts // 2, counts)
    return mask & (labels >= 0)


@dataclasses.dataclass(frozen=True)
class Temperature:
    """The fitted temperature with its 95 % interval, and the mean NLL in nats at T = 1 and at the fit."""

    value: float
    low: float
    high: float
    nll_before: float
    nll_after: float
    n: int


def fit_temperature(
    logits: np.ndarray,
    labels: np.ndarray,
    bounds: tuple[float, float] = TEMPERATURES,
    tolerance: float = 1e-5,
) -> Temperature:
    """The T within `bounds` that minimises the NLL of softmax(logits / T); logits [n, K], labels [n].

    The NLL is convex in 1/T. The root of its derivative is found by Newton's method inside a bracket that is
    halved (on a log scale) when a Newton step leaves it or is not half as long as the step before, to a
    relative `tolerance`. A minimum beyond a bound gives the bound; where the NLL is flat (one class) T stays
    as it is, at first 1. The interval is the sandwich estimate over images on log T, cut at the bounds.
    Errors: InputError when there is no row.
    """
    if not len(labels):
        raise InputError("fit_temperature: no image to fit to; a class gives one for every two images it has")
    top = logits.max(axis=1, keepdims=True)
    own = (logits[np.arange(len(labels)), labels] - top[:, 0]).astype(float)
    low, high = 1 / bounds[1], 1 / bounds[0]
    beta, last = 1.0, high
    moments = _moments(logits, top, own, beta)
    before = float(moments[0].mean())
    while True:
        gradient, curvature = float(moments[1].mean()), float(moments[2].mean())
        if gradient == 0:
            break
        low, high = (low, beta) if gradient > 0 else (beta, high)
        step = -gradient / curvature if curvature > 0 else math.inf
        if not low < beta + step < high or abs(step) > last / 2:
            step = math.sqrt(low * high) - beta
        beta, last = beta + step, abs(step)
        if last <= tolerance * beta:
            break
        moments = _moments(logits, top, own, beta)
    nll, score, variance = moments
    spread = math.sqrt(float((score**2).sum())) / float(variance.sum()) / beta if variance.any() else 0.0
    factor = math.exp(min(1.96 * spread, 50))
    interval = (max(1 / beta / factor, bounds[0]), min(1 / beta * factor, bounds[1]))
    return Temperature(1 / beta, *interval, before, float(nll.mean()), len(own))


def _moments(
    logits: np.ndarray, top: np.ndarray, own: np.ndarray, beta: float, block: int = 256
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """NLL at 1/T = beta, and its first and second derivatives with respect to beta, for each image [n].

    With z the logits less their `top`, these are -log p(label), E[z] - z(label) and Var[z]; `own` is z(label).
    Blocks stay in the cache.
    """
    total, mean, square = (np.empty(len(own)) for _ in range(3))
    buffers = np.empty((2, block, logits.shape[1]), np.float32)
    for start in range(0, len(own), block):
        rows = slice(start, min(start + block, len(own)))
        part, weight = buffers[:, : rows.stop - start]
        np.subtract(logits[rows], top[rows], out=part)
        np.multiply(part, np.float32(beta), out=weight)
        np.maximum(weight, SMALLEST_EXPONENT, out=weight)
        np.exp(weight, out=weight)
        total[rows] = weight.sum(axis=1)
        weight *= part
        mean[rows] = weight.sum(axis=1)
        square[rows] = np.einsum("ij,ij->i", weight, part)
    mean /= total
    return np.log(total) - beta * own, mean - own, np.maximum(square / total - mean * mean, 0)


def fit_temperature_file(
    embeddings: Path, index: Path, labels: Path, out: Path, head: Path | None = None, seed: int = 0
) -> None:
    """Fit a model's temperature on half of its in-distribution set and write it to `out` (.json).

    `measure_calibration` then reports on the other half. Errors: InputError as of `measure.join`.
    """
    images = measure.join(embeddings, index, labels, head)
    rows = images.labelled[fitting_half(images, seed)]
    logits = np.empty((len(rows), len(images.members)), np.float32)
    restrict = restriction(images.members, images.classes)
    for part, block in images.blocks(rows):
        logits[part] = restrict(block)
    fitted = fit_temperature(logits, images.labels[rows])
    io.write_json(out, {**images.manifest(), "seed": seed, "temperature": dataclasses.asdict(fitted)})


def measure_calibration(
    embeddings: Path,
    index: Path,
    labels: Path,
    temperature: Path,
    out: Path,
    head: Path | None = None,
    held_out: int = 0,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> None:
    """Write METRICS and reliability bins before and after scaling by the `temperature` that was fitted.

    On the very images that the temperature comes from (the same id hash), only the half that did not fit it
    is measured, and a row `temperature` is added; `held_out` asserts that this is so.
    Errors: InputError as of `measure.join`, and for a temperature of another model or other images.
    """
    images, fit = measure.join(embeddings, index, labels, head), io.read_json(temperature)
    if fit.get("model") != images.model:
        raise InputError(f"{temperature}: of model {fit.get('model')!r}, expected {images.model!r}; fit it again")
    at_home = fit["ids_sha256"] == images.ids_sha256
    if held_out and not at_home:
        raise InputError(f"{temperature}: fitted on other images than those of {index}; fit it again")
    rows, fitted = images.labelled, Temperature(**fit["temperature"])
    if at_home:
        rows = rows[~fitting_half(images, fit["seed"])]
    if not len(rows):
        raise InputError(f"{index}: no image left to measure calibration on; a class needs at least one")
    scores = {when: np.empty((len(Scores._fields), len(rows))) for when in ("before", "after")}
    restrict = restriction(images.members, images.classes)
    for part, block in images.blocks(rows):
        logits, own = restrict(block), images.labels[rows[part]]
        top = from_top(logits)
        for when, t in (("before", 1.0), ("after", fitted.value)):
            scores[when][:, part] = image_scores(logits, own, t, top)
    found = []
    if at_home:
        found = [row("temperature", fitted.value, fitted.low, fitted.high, fitted.n, convention="nll_minimum")]
    found += calibration_rows({when: Scores(*s) for when, s in scores.items()}, seed, resamples)
    measure.write_rows(out, images, found, measured=len(rows), temperature=fitted.value, seed=seed)


def fitting_half(images: measure.Images, seed: int) -> np.ndarray:
    """`stratified_half` of the images that have a label and could be read: mask over `images.labelled`."""
    rows = images.labelled
    return stratified_half(images.labels[rows], (images.image_ids[i] for i in rows), seed)
