"""Calibration: expected calibration error, negative log-likelihood and temperature scaling (Guo et al. 2017).

Bins are equal-width and closed on the right, (lo, hi]: a confidence of exactly 1, which CLIP reaches, belongs
to the last bin, and one of exactly 0 to the first.
"""

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.statistics import RESAMPLES, bootstrap_sums, clopper_pearson, percentile_interval
from clip_robustness.metrics import measure
from clip_robustness.metrics.logits import SMALLEST_EXPONENT, negative_log_likelihood, restriction, top1
from clip_robustness.metrics.rows import Row, row

BINS = 15
TEMPERATURES = (0.01, 100.0)


def bin_index(confidence: np.ndarray, bins: int = BINS) -> np.ndarray:
    """The bin 0..bins-1 of each confidence in [0, 1]; bin b holds (b / bins, (b + 1) / bins]."""
    edges = np.arange(bins + 1) / bins
    return np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, bins - 1)


def expected_calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> float:
    """sum over bins of |accuracy - mean confidence| * share of the images, in 0..1. Needs n > 0."""
    excess = np.bincount(bin_index(confidence, bins), correct - confidence.astype(float), bins)
    return float(np.abs(excess).sum() / len(confidence))


def calibration_rows(
    scores: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    seed: int = 0,
    resamples: int = RESAMPLES,
    convention: str = f"{BINS}_equal_width",
) -> list[Row]:
    """Rows `ece` and `nll` and the bins of the reliability diagram, for each slice (`before`, `after`).

    scores: slice -> (confidence, correct, NLL), each [n] and of the same images; n > 0. Intervals of `ece`
    and `nll` bootstrap the images, the same resamples for every slice. Resampling adds to an ECE, once more,
    the upward bias that binning has given it already; its draws are therefore centred on the estimate.
    Bins: `bin_accuracy` (Clopper-Pearson) and `bin_confidence` (normal interval), slice `before:00`.
    """
    n = len(next(iter(scores.values()))[0])
    width = BINS + 1
    columns = np.zeros((n, width * len(scores)))
    for number, (confidence, correct, nll) in enumerate(scores.values()):
        columns[np.arange(n), number * width + bin_index(confidence)] = correct - confidence.astype(float)
        columns[:, number * width + BINS] = nll
    means = bootstrap_sums(columns, resamples, seed) / n
    rows = []
    for number, (slice, (confidence, correct, nll)) in enumerate(scores.items()):
        draws = means[:, number * width : (number + 1) * width]
        ece = expected_calibration_error(confidence, correct)
        eces = np.abs(draws[:, :BINS]).sum(axis=1)
        ece_low, ece_high = map(float, percentile_interval(eces + ece - eces.mean()))
        nll_low, nll_high = map(float, percentile_interval(draws[:, BINS]))
        ece_low, ece_high = min(max(ece_low, 0.0), ece), min(max(ece_high, ece), 1.0)
        rows.append(row("ece", ece, ece_low, ece_high, n, slice, convention))
        mean = float(nll.mean())
        rows.append(row("nll", mean, min(nll_low, mean), max(nll_high, mean), n, slice, convention))
        rows += _bin_rows(confidence.astype(float), correct, slice, convention)
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
    shifted = logits - logits.max(axis=1, keepdims=True)
    own = shifted[np.arange(len(labels)), labels].astype(float)
    low, high = 1 / bounds[1], 1 / bounds[0]
    beta, last = 1.0, high
    moments = _moments(shifted, own, beta)
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
        moments = _moments(shifted, own, beta)
    nll, score, variance = moments
    spread = math.sqrt(float((score**2).sum())) / float(variance.sum()) / beta if variance.any() else 0.0
    factor = math.exp(min(1.96 * spread, 50))
    interval = (max(1 / beta / factor, bounds[0]), min(1 / beta * factor, bounds[1]))
    return Temperature(1 / beta, *interval, before, float(nll.mean()), len(own))


def _moments(
    shifted: np.ndarray, own: np.ndarray, beta: float, block: int = 256
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """NLL at 1/T = beta, and its first and second derivatives with respect to beta, for each image [n].

    With z the logits, these are -log p(label), E[z] - z(label) and Var[z]. Blocks stay in the cache.
    """
    total, mean, square = (np.empty(len(own)) for _ in range(3))
    buffer = np.empty((block, shifted.shape[1]), np.float32)
    for start in range(0, len(own), block):
        part = shifted[start : start + block]
        rows, weight = slice(start, start + len(part)), buffer[: len(part)]
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
    rows = images.labelled[_fits(images, seed)]
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
    """Write ECE, NLL and reliability bins before and after scaling by the `temperature` that was fitted.

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
        rows = rows[~_fits(images, fit["seed"])]
    if not len(rows):
        raise InputError(f"{index}: no image left to measure calibration on; a class needs at least one")
    scores = {"before": np.empty((3, len(rows))), "after": np.empty((3, len(rows)))}
    restrict = restriction(images.members, images.classes)
    for part, block in images.blocks(rows):
        logits, own = restrict(block), images.labels[rows[part]]
        for when, t in (("before", 1.0), ("after", fitted.value)):
            prediction, confidence = top1(logits, t)
            nll = negative_log_likelihood(logits, own, prediction, confidence, t)
            scores[when][:, part] = confidence, prediction == own, nll
    found = []
    if at_home:
        found = [row("temperature", fitted.value, fitted.low, fitted.high, fitted.n, convention="nll_minimum")]
    found += calibration_rows({when: (s[0], s[1], s[2]) for when, s in scores.items()}, seed, resamples)
    measure.write_rows(out, images, found, measured=len(rows), temperature=fitted.value, seed=seed)


def _fits(images: measure.Images, seed: int) -> np.ndarray:
    rows = images.labelled
    return stratified_half(images.labels[rows], (images.image_ids[i] for i in rows), seed)
