"""Out-of-distribution detection: how well one score an image tells OOD images from those of the ID set.

Every score is high for ID. With z the logits and cos the cosines to the class embeddings, an image's score is

    mcm_t1     max softmax(cos)             zero-shot models only: MCM at temperature 1 (Ming et al. 2022)
    msp        max softmax(z)               Hendrycks and Gimpel 2017; of a zero-shot model: MCM at its own scale
    energy     log sum exp(z)               Liu et al. 2020, the negative free energy
    max_logit  max z                        Hendrycks et al. 2022

The default is the first that a model has: `mcm_t1` for zero-shot models, `msp` for classifiers.
"""

from pathlib import Path

import numpy as np

from clip_robustness.core.io import InputError
from clip_robustness.core.statistics import RESAMPLES, clopper_pearson, percentile_interval
from clip_robustness.metrics import measure
from clip_robustness.metrics.logits import exponentials, from_top, restriction
from clip_robustness.metrics.rows import Row, proportion_row, row

# The scores by kind of embeddings, the default first.
SCORES = {"features": ("mcm_t1", "msp", "energy", "max_logit"), "logits": ("msp", "energy", "max_logit")}
# The metric and the convention of what `areas` returns.
AREAS = (("auroc", "id_positive"), ("aupr_in", "average_precision"), ("aupr_out", "average_precision"))
RECALL = 0.95
HISTOGRAM_BINS = 40
# Neighbouring scores are resampled as one where they hold less than 1 / GROUPS of each set.
GROUPS = 200
# Resamples at a time: small enough for the caches.
CHUNK = 100


def detection_scores(logits: np.ndarray, scale: float | None = None) -> dict[str, np.ndarray]:
    """The scores of each image, float32 [n], from logits [n, K]; `scale`: that of a zero-shot model's logits.

    Dividing by the scale gives back the cosines up to a constant (bias / scale), which no softmax sees.
    In float32 a large margin gives an `msp` of exactly 1: such images are tied, as in the field's own code.
    Errors: InputError as of `top1`.
    """
    top, (_, differences) = logits.max(axis=1), from_top(logits)
    confidence = 1 / exponentials(differences).sum(axis=1)
    scores = {"msp": confidence, "energy": top - np.log(confidence), "max_logit": top}
    return scores if scale is None else {"mcm_t1": 1 / exponentials(differences, scale).sum(axis=1), **scores}


def count_scores(id_scores: np.ndarray, ood_scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many ID and OOD images have each distinct score, ascending -> two int64 [m]."""
    values, position = np.unique(np.concatenate([id_scores, ood_scores]), return_inverse=True)
    split = len(id_scores)
    return np.bincount(position[:split], minlength=len(values)), np.bincount(position[split:], minlength=len(values))


def areas(id_counts: np.ndarray, ood_counts: np.ndarray) -> np.ndarray:
    """AUROC and the two AUPR, [..., 3], of ID and OOD counts [..., m] at ascending scores (`count_scores`).

    AUROC is the chance that an ID image scores above an OOD image, where a tie counts one half (Mann and
    Whitney). AUPR is the average precision: the sum over thresholds of the precision times the gain in recall,
    once with ID and once with OOD as the positive class. The trapezoid under the same curve, which OpenOOD and
    pytorch-ood take, is too optimistic (Davis and Goadrich 2006). Both sets need an image.
    """
    n_id, n_ood = id_counts.sum(axis=-1), ood_counts.sum(axis=-1)
    id_below, ood_below = id_counts.cumsum(axis=-1), ood_counts.cumsum(axis=-1)
    id_above = n_id[..., None] - id_below + id_counts
    ood_above = n_ood[..., None] - ood_below + ood_counts
    wins = (id_counts * (ood_below - ood_counts / 2)).sum(axis=-1)
    # A resample may leave nothing at or beyond a score; then there is also no gain in recall.
    precision_in = id_above / np.maximum(id_above + ood_above, 1)
    precision_out = ood_below / np.maximum(id_below + ood_below, 1)
    average_in, average_out = (id_counts * precision_in).sum(axis=-1), (ood_counts * precision_out).sum(axis=-1)
    return np.stack([wins / (n_id * n_ood), average_in / n_id, average_out / n_ood], axis=-1)


def false_positive_rates(positive: np.ndarray, negative: np.ndarray) -> tuple[float, float]:
    """The FPR where recall is first at least 0.95, and where it is closest to 0.95.

    Counts [m] at the distinct scores, the most positive first; every threshold is one of these scores. Of two
    that are equally close, or have the same recall below 1, the laxer counts, as in the code of MCM.
    """
    recall, rate = positive.cumsum() / positive.sum(), negative.cumsum() / negative.sum()
    complete = int((recall == 1).argmax())
    distance = np.abs(recall[: complete + 1] - RECALL)
    return float(rate[(recall >= RECALL).argmax()]), float(rate[complete - distance[::-1].argmin()])


def detection_rows(
    id_scores: np.ndarray, ood_scores: np.ndarray, score: str, seed: int = 0, resamples: int = RESAMPLES
) -> list[Row]:
    """Rows `auroc`, `aupr_in`, `aupr_out` and three `fpr95`, with slice `score` and n = ID + OOD images.

    What `fpr95` is depends on the convention, and the three are different quantities:
      id_recall_at_least   share of OOD accepted where ID recall is first at least 0.95: this project's
      id_recall_closest    share of OOD accepted where ID recall is closest to 0.95: MCM and its heirs
      ood_recall_at_least  share of ID flagged where OOD recall is first at least 0.95: OpenOOD, pytorch-ood
    Values are exact; intervals bootstrap the images of both sets, which need one each. Where the sets separate
    perfectly, or all scores are equal, no resample differs; AUROC has then the Clopper-Pearson interval of
    min(ID, OOD) independent pairs, while that of AUPR is a point. The interval of `fpr95` contains the
    Clopper-Pearson interval at a fixed threshold; that of id_recall_closest has the spread of
    id_recall_at_least, from which it differs by one ID image where scores are not tied.
    """
    counts = id_counts, ood_counts = count_scores(id_scores, ood_scores)
    values, (lows, highs) = areas(*counts), percentile_interval(_area_draws(*counts, seed, resamples))
    if values[0] in (0, 1) or len(id_counts) == 1:
        pairs = min(len(id_scores), len(ood_scores))
        lows[0], highs[0] = clopper_pearson(values[0] * pairs, pairs)
    found = [(*name, *numbers) for name, *numbers in zip(AREAS, values, lows, highs, strict=True)]
    for conventions, positive, negative in (
        (("id_recall_at_least", "id_recall_closest"), id_counts[::-1], ood_counts[::-1]),
        (("ood_recall_at_least",), ood_counts, id_counts),
    ):
        rates, n = false_positive_rates(positive, negative), negative.sum()
        errors = percentile_interval(_rate_draws(positive, negative, seed, resamples) - rates[0])
        for convention, rate in zip(conventions, rates, strict=False):
            low, high = clopper_pearson(rate * n, n)
            found.append(("fpr95", convention, rate, min(low, rate + errors[0]), max(high, rate + errors[1])))
    n = len(id_scores) + len(ood_scores)
    return [
        row(metric, value, max(min(low, value), 0), min(max(high, value), 1), n, score, convention)
        for metric, convention, value, low, high in found
    ]


def _area_draws(id_counts: np.ndarray, ood_counts: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """`areas` of bootstrap resamples of the images -> [resamples, 3].

    Large sets are resampled in groups of neighbouring scores (a group ends where the cumulative share of either
    set passes a multiple of 1 / GROUPS), which changes the draws' spread little and their level not at all.
    """
    new = np.ones(len(id_counts), bool)
    steps = [np.diff(counts.cumsum() * GROUPS // counts.sum()) for counts in (id_counts, ood_counts)]
    new[1:] = (steps[0] > 0) | (steps[1] > 0)
    groups = [np.add.reduceat(counts, np.flatnonzero(new)) for counts in (id_counts, ood_counts)]
    shift = areas(id_counts, ood_counts) - areas(*groups)
    rng = np.random.default_rng(seed)
    draws = np.empty((resamples, 3))
    for start in range(0, resamples, CHUNK):
        part = draws[start : start + CHUNK]
        part[:] = areas(*(rng.multinomial(c.sum(), c / c.sum(), size=len(part)) for c in groups)) + shift
    return draws


def _rate_draws(positive: np.ndarray, negative: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    """The first of `false_positive_rates` in bootstrap resamples of the images -> [resamples].

    The threshold of a resample is its k-th positive, k = 95 % of n. Of n uniform numbers the k-th follows
    Beta(k, n - k + 1), so its rank among the n images can be drawn at once, and with it the negatives' binomial.
    """
    n, rng = int(positive.sum()), np.random.default_rng(seed)
    k = int((np.arange(n + 1) / n >= RECALL).argmax())
    ranks = np.ceil(n * rng.beta(k, n - k + 1, size=resamples))
    threshold = np.searchsorted(positive.cumsum(), ranks)
    rate = negative.cumsum()[threshold] / negative.sum()
    return rng.binomial(negative.sum(), rate) / negative.sum()


def histogram_rows(id_scores: np.ndarray, ood_scores: np.ndarray, score: str) -> list[Row]:
    """Rows `score_histogram_id` and `score_histogram_ood` (share of the set, Clopper-Pearson), slice `{score}:00`.

    HISTOGRAM_BINS bins of equal width lie between the rows `score_minimum` and `score_maximum` of both sets
    together; these two are limits of the data and have no interval.
    """
    both = np.concatenate([id_scores, ood_scores]).astype(float)
    low, high, n = both.min(), both.max(), len(both)
    rows = [row("score_minimum", low, low, low, n, score), row("score_maximum", high, high, high, n, score)]
    for side, scores in (("id", id_scores), ("ood", ood_scores)):
        position = (scores.astype(float) - low) / ((high - low) or 1) * HISTOGRAM_BINS
        counts = np.bincount(np.minimum(position.astype(int), HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)
        rows += [
            proportion_row(f"score_histogram_{side}", int(count), len(scores), f"{score}:{b:02d}")
            for b, count in enumerate(counts)
        ]
    return rows


def measure_ood(
    embeddings: Path,
    index: Path,
    labels: Path,
    out: Path,
    reference_embeddings: Path,
    reference_index: Path,
    head: Path | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> None:
    """Write the rows of `detection_rows` for every score, and of `histogram_rows` for the default score.

    embeddings, index: the OOD set, whose images have no label (-1). labels: the label space of the ID set (the
    reference), over which both are scored. The ID images that have a label count. The manifest's `kind` says
    which SCORES the model has, `default` which is its default.
    Errors: InputError as of `measure.join`; for a reference of another model; when an OOD image has a label, as
    when the two sets are swapped; when no image of a set is left.
    """
    images = measure.join(embeddings, index, labels, head)
    reference = measure.join(reference_embeddings, reference_index, labels, head)
    if reference.model != images.model:
        raise InputError(f"{reference_embeddings}: of model {reference.model!r}, expected {images.model!r}")
    labelled = np.flatnonzero(images.labels >= 0)
    if len(labelled):
        got = images.labels[labelled[0]]
        raise InputError(f"{index}: row {labelled[0]}: label {got}; expected -1, as an OOD image is of no ID class")
    for path, rows in ((index, images.rows), (reference_index, reference.labelled)):
        if not len(rows):
            raise InputError(f"{path}: no image to score; index and embed the data set again")
    id_scores, ood_scores = _scores(reference, reference.labelled), _scores(images, images.rows)
    kind = images.embedded["kind"]
    default = SCORES[kind][0]
    found = histogram_rows(id_scores[default], ood_scores[default], default)
    for score in SCORES[kind]:
        found += detection_rows(id_scores[score], ood_scores[score], score, seed, resamples)
    facts = {"reference": reference.embedded["dataset"], "reference_ids_sha256": reference.ids_sha256}
    facts |= {"measured": len(images.rows), "reference_measured": len(reference.labelled)}
    measure.write_rows(out, images, found, kind=kind, default=default, seed=seed, **facts)


def _scores(images: measure.Images, rows: np.ndarray) -> dict[str, np.ndarray]:
    scale = None if images.head is None else float(images.head["scale"])
    restrict = restriction(images.members, images.classes)
    scores = {score: np.empty(len(rows), np.float32) for score in SCORES[images.embedded["kind"]]}
    for part, block in images.blocks(rows):
        for score, values in detection_scores(restrict(block), scale).items():
            scores[score][part] = values
    return scores
