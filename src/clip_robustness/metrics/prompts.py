"""Prompt sets: what a zero-shot model's accuracy, calibration, factors and OOD detection owe to their number.

A head file is called {prompt set}.{label space}.npz, and a prompt set's name ends in its number of templates
(`openai_80`). Rows have the prompt set as slice (`openai_80`; `openai_80:after` for temperature scaling,
`openai_80:pose` for a factor). On the same images, every set is also compared with the largest one:
{metric}_difference is the set's value minus that of the largest set, with the interval of a paired comparison.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.features import read_head
from clip_robustness.core.io import InputError
from clip_robustness.core.statistics import RESAMPLES
from clip_robustness.metrics import measure
from clip_robustness.metrics.calibration import (
    METRICS,
    Scores,
    calibration_draws,
    draw_rows,
    fit_temperature,
    fitting_half,
    image_scores,
)
from clip_robustness.metrics.factors import FEWEST
from clip_robustness.metrics.logits import restriction, top1
from clip_robustness.metrics.ood import detection_rows
from clip_robustness.metrics.rows import Row, draws_row, paired_row, proportion_row, row

# The convention of factors: the images whose most important deviation it is, prototypes aside (`metrics.factors`).
FACTORS = "top"
OOD_METRICS = ("auroc", "fpr95")

# Prompt set -> the images with its head, the largest set last.
Sets = Mapping[str, measure.Images]


def measure_prompts(
    embeddings: Path,
    index: Path,
    labels: Path,
    heads: Sequence[Path],
    out: Path,
    factors: Path | None = None,
    reference_embeddings: Path | None = None,
    reference_index: Path | None = None,
    held_out: int = 0,
    fewest: int = FEWEST,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> None:
    """Write the rows of one zero-shot model on one data set, for each prompt set of `heads`, to `out` (.json).

    A set with labels has `accuracy` and the METRICS of calibration. held_out=1 (the ID set): for each prompt set a
    temperature is fitted on half of the images, as by `fit_temperature_file`; METRICS are then of the other half,
    before and after, beside a row `temperature`. With its factor table `factors` (see `metrics.factors`, also for
    `fewest`) it has `factor_accuracy` and `factor_gap`. A set without labels has `auroc` and `fpr95` of the score
    `mcm_t1` (see `metrics.ood`) against the reference, the ID set, whose space `labels` is. `templates` is the number
    of templates of a prompt set.
    Errors: InputError as of `measure.join`, for a prompt set whose name does not end in a number, for factors of other
    images or a reference of another model, and where no image is left.
    """
    sets = _join(embeddings, index, labels, heads)
    images = next(iter(sets.values()))
    if reference_embeddings is not None and reference_index is not None:
        rows = _ood_rows(sets, _join(reference_embeddings, reference_index, labels, heads), seed, resamples)
    else:
        if not len(images.labelled):
            raise InputError(f"{index}: no image has a label; an OOD set needs a reference (embeddings and index)")
        half = fitting_half(images, seed) if held_out else None
        correct, rows = _labelled_rows(sets, half, seed, resamples)
        if factors is not None:
            position, top, names = _annotations(factors, images, fewest)
            annotated = {name: right[position] for name, right in correct.items()}
            rows += _factor_rows(annotated, top, names, seed, resamples)
    found = {head.name.removesuffix(f".{images.base}.npz"): head for head in heads}
    sizes = {name: _templates(name, found[name]) for name in sets}
    rows += [row("templates", size, size, size, len(images.rows), name) for name, size in sizes.items()]
    measure.write_rows(out, images, rows, templates=sizes, compared_with=list(sets)[-1], seed=seed)


def _join(embeddings: Path, index: Path, labels: Path, heads: Sequence[Path]) -> Sets:
    joined = [(head, measure.join(embeddings, index, labels, head)) for head in heads]
    sets = {head.name.removesuffix(f".{images.base}.npz"): images for head, images in joined}
    return {name: sets[name] for name in sorted(sets, key=lambda name: (_templates(name), name))}


def _templates(name: str, head: Path | None = None) -> int:
    """The number in its name; of a set that was searched for, what its head says, as fewer may have been found."""
    number = re.search(r"\d+$", name)
    if number is None:
        raise InputError(f"prompt set '{name}': expected a name that ends in its number of templates; rename it")
    return int(number[0] if head is None else read_head(head).get("templates", number[0]))


def _labelled_rows(
    sets: Sets, half: np.ndarray | None, seed: int, resamples: int
) -> tuple[dict[str, np.ndarray], list[Row]]:
    """Whether each labelled image is right with each prompt set, and the rows of accuracy and calibration."""
    correct: dict[str, np.ndarray] = {}
    scores: dict[str, Scores] = {}
    rows = []
    for name, images in sets.items():
        labels = images.labels[images.labelled]
        logits, before = _read(images, labels)
        correct[name], scores[name] = before.correct > 0, before
        if half is not None:
            fitted = fit_temperature(logits[half], labels[half])
            scores[name] = Scores(*np.stack(before)[:, ~half])
            scores[f"{name}:after"] = image_scores(logits[~half], labels[~half], fitted.value)
            rows.append(row("temperature", fitted.value, fitted.low, fitted.high, fitted.n, name, "nll_minimum"))
    largest = list(sets)[-1]
    way = f"{len(sets[largest].members)}_way"
    for name, right in correct.items():
        rows.append(proportion_row("accuracy", int(right.sum()), len(right), name, way))
        if name != largest:
            rows.append(paired_row("accuracy_difference", right, correct[largest], name, way, seed))
    n = len(scores[largest].nll)
    draws = calibration_draws(scores, seed, resamples)
    rows += draw_rows(draws, n)
    for (slice, metric), one in draws.items():
        name, scaled, _ = slice.partition(":")
        if name != largest:
            other = draws[f"{largest}:after" if scaled else largest, metric]
            value, drawn = one.value - other.value, one.draws - other.draws
            rows.append(draws_row(f"{metric}_difference", np.append(value, drawn), n, slice, METRICS[metric][0]))
    return correct, rows


def _read(images: measure.Images, labels: np.ndarray) -> tuple[np.ndarray, Scores]:
    """Logits [n, K] of the labelled images, and their scores."""
    restrict = restriction(images.members, images.classes)
    logits = np.empty((len(labels), len(images.members)), np.float32)
    scores = np.empty((len(Scores._fields), len(labels)))
    for part, block in images.blocks(images.labelled):
        logits[part] = restrict(block)
        scores[:, part] = image_scores(logits[part], labels[part])
    return logits, Scores(*scores)


def _annotations(factors: Path, images: measure.Images, fewest: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Positions among the labelled images of those annotated (prototypes aside), their top factor, and the factors."""
    table = io.read_parquet(factors, ["image_id", "label", "top_factor", "prototype"])
    table = {name: column[~table["prototype"]] for name, column in table.items()}
    row_of = {image_id: position for position, image_id in enumerate(images.image_ids[images.labelled])}
    found = np.array([row_of.get(image_id, -1) for image_id in table["image_id"]], np.int64)
    position, top = found[found >= 0], table["top_factor"][found >= 0]
    if not len(position) or (images.labels[images.labelled][position] != table["label"][found >= 0]).any():
        raise InputError(f"{factors}: other images or labels than those of {images.embeddings}; annotate anew")
    names, counts = np.unique(top[top != ""].astype(str), return_counts=True)
    if not (counts >= fewest).any():
        raise InputError(f"{factors}: no factor is the top factor of {fewest} images or more; lower `fewest`")
    return position, top, names[counts >= fewest].tolist()


def _factor_rows(
    correct: Mapping[str, np.ndarray], top: np.ndarray, factors: Sequence[str], seed: int, resamples: int
) -> list[Row]:
    """Rows `factor_accuracy` and `factor_gap`, with their differences; correct: prompt set -> bool [n], top: [n].

    The gap is the mean over factors of the accuracy on a factor's images, minus the accuracy on all n images: below 0
    where factors hurt. Prompts that help against factors, and not only altogether, narrow it.
    """
    *others, largest = correct
    rows = []
    for factor in factors:
        images = top == factor
        for name, right in correct.items():
            hits, n, slice = int(right[images].sum()), int(images.sum()), f"{name}:{factor}"
            rows.append(proportion_row("factor_accuracy", hits, n, slice, FACTORS))
            if name != largest:
                both = right[images], correct[largest][images]
                rows.append(paired_row("factor_accuracy_difference", *both, slice, FACTORS, seed))
    gaps = _gaps(correct, top, factors, seed, resamples)
    rows += [draws_row("factor_gap", gap, len(top), name, FACTORS) for name, gap in gaps.items()]
    for name in others:
        rows.append(draws_row("factor_gap_difference", gaps[name] - gaps[largest], len(top), name, FACTORS))
    return rows


def _gaps(
    correct: Mapping[str, np.ndarray], top: np.ndarray, factors: Sequence[str], seed: int, resamples: int
) -> dict[str, np.ndarray]:
    """Prompt set -> its factor gap, followed by bootstrap draws over images, [1 + resamples].

    Images of the same factor that the same prompt sets get right are counted, and the counts resampled.
    """
    code = (top[:, None] == np.array(factors, object)) @ np.arange(1, len(factors) + 1)
    cells, counts = np.unique(np.column_stack([code, *correct.values()]), axis=0, return_counts=True)
    draws = np.random.default_rng(seed).multinomial(len(top), counts / len(top), size=resamples)
    counts = np.vstack([counts, draws])
    member = cells[:, :1] == np.arange(1, len(factors) + 1)
    total = counts @ member
    found = {}
    for name, right in zip(correct, cells.T[1:], strict=True):
        hits = counts @ (member * right[:, None])
        accuracy = np.divide(hits, total, out=np.full(total.shape, np.nan), where=total > 0)
        found[name] = accuracy.mean(axis=1) - counts @ right / len(top)
    return found


def _ood_rows(sets: Sets, references: Sets, seed: int, resamples: int) -> list[Row]:
    """Rows of OOD_METRICS by `mcm_t1`, and `auroc_difference`.

    The variance of the latter is that which resampling the images of both data sets has to first order, from the
    share of the other data set that each image's score beats (DeLong et al. 1988); its interval is normal.
    """
    rows, beaten = [], {}
    for name, images in sets.items():
        reference = references[name]
        if reference.model != images.model:
            raise InputError(f"{reference.embeddings}: of model {reference.model!r}, expected {images.model!r}")
        if (images.labels >= 0).any() or not len(images.rows) or not len(reference.labelled):
            raise InputError(f"{images.embeddings}: expected images without a label and a reference with labels")
        scores = _mcm(reference, reference.labelled), _mcm(images, images.rows)
        n = len(images.rows) + len(reference.labelled)
        rows += [r for r in detection_rows(*scores, name, seed, resamples) if r["metric"] in OOD_METRICS]
        beaten[name] = _share_below(*scores), 1 - _share_below(*scores[::-1])
    *others, largest = beaten
    for name in others:
        differences = [one - other for one, other in zip(beaten[name], beaten[largest], strict=True)]
        value = float(differences[0].mean())
        error = 1.96 * np.sqrt(sum(d.var() / len(d) for d in differences))
        low, high = max(value - error, -1), min(value + error, 1)
        rows.append(row("auroc_difference", value, low, high, n, name, "id_positive"))
    return rows


def _mcm(images: measure.Images, rows: np.ndarray) -> np.ndarray:
    """Maximum softmax probability of the cosines (`metrics.ood`), float32 [len(rows)]."""
    assert images.head is not None
    restrict, scores = restriction(images.members, images.classes), np.empty(len(rows), np.float32)
    for part, block in images.blocks(rows):
        scores[part] = top1(restrict(block), float(images.head["scale"]))[1]
    return scores


def _share_below(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The share of `others` below each score, where a tie counts one half."""
    ranked = np.sort(others)
    below, up_to = (np.searchsorted(ranked, scores, side) for side in ("left", "right"))
    return (below + up_to) / (2 * len(others))
