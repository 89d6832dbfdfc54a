"""Typographic attacks: a wrong word printed on an image (Goh et al. 2021; ImageNet-T of arXiv 2403.10499).

    accuracy             share of images whose true class is answered
    attack_success_rate  share of images whose printed class is answered

On the same images without the word, these are `clean_accuracy` and `clean_success_rate`: how often the class is
answered that would be printed, which no attack has to explain.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np

from clip_robustness.core.io import InputError
from clip_robustness.metrics import measure
from clip_robustness.metrics.accuracy import predict
from clip_robustness.metrics.rows import Row, paired_row, proportion_row

TARGET = "target_class"
_ENDING = re.compile(r"\.(png|jpe?g|bmp|webp)$", re.IGNORECASE)


def measure_typographic(
    embeddings: Path,
    index: Path,
    labels: Path,
    out: Path,
    head: Path | None = None,
    source_embeddings: Path | None = None,
    source_index: Path | None = None,
    seed: int = 0,
) -> None:
    """Write the rows of one model on images with a printed word to `out` (.json).

    The index's column `target_class` is the class printed. With the source (the data set that was printed on, embedded
    by the same model), also `clean_accuracy` and `clean_success_rate` on the images that both have, and `accuracy_drop`
    = clean accuracy minus accuracy, paired by image. Images are matched by `_matches`. All are fractions with
    Clopper-Pearson intervals, the drop with that of a paired parametric bootstrap (`seed`).
    Errors: InputError as of `measure.join`; for a printed class that is none or the true one; for a source of another
    model, without the images, or with other labels; for one of the two source files alone.
    """
    images = measure.join(embeddings, index, labels, head, columns=[TARGET])
    label, target = images.labels, images.columns[TARGET]
    wrong = np.flatnonzero((target < 0) | (target == label) | (label < 0))
    if len(wrong) or not len(images.rows):
        place = f"image '{images.image_ids[wrong[0]]}'" if len(wrong) else "no image"
        raise InputError(f"{index}: {place}: expected a label and another class as {TARGET}; index it again")
    way = f"{len(images.members)}_way"
    answer = _answers(images)
    rows = _rates(answer, label, target, images.rows, ("accuracy", "attack_success_rate"), way)
    paired = 0
    if source_embeddings is not None and source_index is not None:
        source = measure.join(source_embeddings, source_index, labels, head)
        if source.model != images.model:
            raise InputError(f"{source_embeddings}: of model {source.model!r}, expected {images.model!r}")
        clean = _clean_answers(images, source, index, source_index)
        both = images.rows[clean[images.rows] >= 0]
        if not len(both):
            raise InputError(f"{source_embeddings}: all images of {index} are masked; embed it again")
        paired = len(both)
        rows += _rates(clean, label, target, both, ("clean_accuracy", "clean_success_rate"), way)
        right, was_right = answer[both] == label[both], clean[both] == label[both]
        rows.append(paired_row("accuracy_drop", was_right, right, "", way, seed))
    elif source_embeddings is not None or source_index is not None:
        raise InputError(f"source: {source_embeddings or source_index} alone; needed: embeddings and index")
    measure.write_rows(out, images, rows, measured=len(images.rows), paired=paired)


def _rates(
    answer: np.ndarray, label: np.ndarray, target: np.ndarray, rows: np.ndarray, metrics: tuple[str, str], way: str
) -> list[Row]:
    """How often the images `rows` are answered by their label, and by the printed class."""
    hits = (int((answer[rows] == wanted[rows]).sum()) for wanted in (label, target))
    return [proportion_row(metric, k, len(rows), convention=way) for metric, k in zip(metrics, hits, strict=True)]


def _answers(images: measure.Images) -> np.ndarray:
    """The class answered for each image, int32 [n]; -1 for an image that could not be read. Ties: the first class."""
    answer = np.full(len(images.labels), -1, np.int32)
    answer[images.rows] = predict(images)[0]
    return answer


def _clean_answers(images: measure.Images, source: measure.Images, index: Path, source_index: Path) -> np.ndarray:
    """For each printed image, the answer to the image that it was made from; -1 where that could not be read."""
    found = _matches(images.image_ids, source.image_ids, index, source_index)
    differs = np.flatnonzero(source.labels[found] != images.labels)
    if len(differs):
        name = images.image_ids[differs[0]]
        raise InputError(f"{source_index}: label of '{name}' differs from {index}; index both data sets again")
    return _answers(source)[found]


def _matches(image_ids: np.ndarray, sources: np.ndarray, index: Path, source_index: Path) -> np.ndarray:
    """The row in `sources` of each of `image_ids`: by the id; if no id is shared, by file name.

    Images that are printed on get another folder and another ending (PNG), so that only the name between is left.
    """
    if not set(image_ids) & set(sources):
        image_ids, sources = (np.array([_name(i) for i in ids], object) for ids in (image_ids, sources))
    row_of = {name: row for row, name in enumerate(sources)}
    counts = Counter(sources)
    for name in image_ids:
        if counts[name] != 1:
            what = "no image" if not counts[name] else f"{counts[name]} images"
            raise InputError(
                f"{source_index}: {what} of the name '{name}' of {index}; expected one: give the data set printed on"
            )
    return np.array([row_of[name] for name in image_ids], np.int64)


def _name(image_id: str) -> str:
    return _ENDING.sub("", image_id.rpartition("/")[2])
