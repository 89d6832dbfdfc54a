"""Top-1 accuracy with its exact binomial interval."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.metrics import measure
from clip_robustness.metrics.logits import restriction, top1
from clip_robustness.metrics.rows import Row, proportion_row

Pool = Callable[[np.ndarray], np.ndarray]


def per_image(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Prediction (int32), confidence (float32) and correct (bool) for each row of logits [n, K].

    Ties go to the first class. A label of -1 (none) is never correct. Errors: InputError on a NaN logit.
    """
    prediction, confidence = top1(logits)
    return prediction, confidence, prediction == labels


def accuracy_rows(correct: np.ndarray, metric: str = "accuracy", convention: str = "") -> list[Row]:
    """The fraction of `correct` [n] as one row (none when n is 0), with a Clopper-Pearson interval."""
    if not len(correct):
        return []
    return [proportion_row(metric, int(np.count_nonzero(correct)), len(correct), convention=convention)]


def measure_accuracy(
    embeddings: Path,
    index: Path,
    labels: Path,
    out: Path,
    predictions: Path,
    head: Path | None = None,
    reference_embeddings: Path | None = None,
    reference_index: Path | None = None,
    reference_labels: Path | None = None,
) -> None:
    """Write the row `accuracy` to `out` (.json) and every image's prediction to `predictions` (.parquet).

    With the reference set (the in-distribution partner, embedded by the same model), also the row
    `reference_accuracy`: on the images of the reference set whose class belongs to this label space, with
    the logits restricted to it (Taori et al. 2020; 1,000-way accuracy is not comparable to 200-way).
    Errors: InputError as of `measure.join`, for a reference of another model or base space, or one of the
    three reference files missing.
    """
    images = measure.join(embeddings, index, labels, head)
    prediction, confidence = predict(images)
    labelled = images.labels[images.rows] >= 0
    correct = (prediction == images.labels[images.rows])[labelled]
    if not len(correct):
        raise InputError(f"{index}: no image has a label of {labels}; index the data set again")
    rows = accuracy_rows(correct, convention=f"{len(images.members)}_way")
    rows += reference_rows(images, reference_embeddings, reference_index, reference_labels, head)
    io.write_parquet(
        predictions,
        {
            "image_id": images.image_ids[images.rows],
            "label": images.labels[images.rows],
            "prediction": prediction,
            "confidence": confidence,
        },
    )
    measure.write_rows(out, images, rows, measured=len(correct))


def predict(images: measure.Images, pool: Pool | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The top class of each of `images.rows` (int32) and its softmax probability (float32).

    pool: from base logits [n, C] to those of the classes that may be answered (default: the label space's).
    """
    rows, pool = images.rows, pool or restriction(images.members, images.classes)
    prediction, confidence = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)
    for part, block in images.blocks(rows):
        prediction[part], confidence[part] = top1(pool(block))
    return prediction, confidence


def reference_rows(
    images: measure.Images,
    embeddings: Path | None,
    index: Path | None,
    labels: Path | None,
    head: Path | None,
    pool: Pool | None = None,
    convention: str = "class_subset",
) -> list[Row]:
    """The row `reference_accuracy` as of `measure_accuracy`; none without the three files of the reference set.

    pool: as of `predict`. Errors: InputError as of `measure_accuracy`.
    """
    if embeddings is not None and index is not None and labels is not None:
        reference = measure.join(embeddings, index, labels, head)
        pool = pool or restriction(images.members, images.classes)
        return accuracy_rows(_reference_correct(images, reference, pool), "reference_accuracy", convention)
    if given := [path for path in (embeddings, index, labels) if path is not None]:
        raise InputError(f"reference: {given[0]} alone; needed: embeddings, index and label space")
    return []


def _reference_correct(images: measure.Images, reference: measure.Images, pool: Pool) -> np.ndarray:
    """Whether each reference image of a class of `images` is right among the classes of `images`."""
    if (reference.model, reference.base) != (images.model, images.base):
        raise InputError(
            f"{reference.embeddings}: model {reference.model!r}, base space {reference.base!r}; expected "
            f"{images.model!r} and {images.base!r}: a reference must come from the same model and base space"
        )
    class_of_base = {base: k for k, member in enumerate(images.members) for base in member}
    class_of_label = [
        next((class_of_base[base] for base in member if base in class_of_base), -1) for member in reference.members
    ]
    rows = reference.labelled
    expected = np.array(class_of_label, np.int32)[reference.labels[rows]]
    rows, expected = rows[expected >= 0], expected[expected >= 0]
    correct = np.empty(len(rows), bool)
    for part, block in reference.blocks(rows):
        # No softmax: nobody asks for the confidence.
        correct[part] = pool(block).argmax(axis=1) == expected[part]
    return correct
