"""Accuracy on video frames, of anchors alone and of whole sets of neighbouring frames (Shankar et al. 2021).

A set is an anchor frame and the frames within LARGEST_DISTANCE of it that reviewers found similar. pm-0 counts a set
as right when its anchor is; pm-10 when the anchor and all those frames are, so that pm-10 <= pm-0. Their mean is the
accuracy of the set of videos (Radford et al. 2021, section 3.3). A frame may show several classes, and any of them
is right.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.statistics import RESAMPLES, bootstrap_mean, clopper_pearson
from clip_robustness.metrics import measure
from clip_robustness.metrics.accuracy import Pool, predict, reference_rows
from clip_robustness.metrics.logits import restriction
from clip_robustness.metrics.rows import Row, proportion_row, row

LARGEST_DISTANCE = 10


class Frames(NamedTuple):
    """What the index says of each frame: [n], in its order."""

    anchor: np.ndarray  # position of the set's anchor
    near: np.ndarray  # bool: at most LARGEST_DISTANCE from the anchor
    kind: np.ndarray  # which of the rows of `right` tells its right answers
    right: np.ndarray  # bool [kinds, classes and unmapped classes]


def set_outcomes(correct: np.ndarray, readable: np.ndarray, frames: Frames) -> np.ndarray:
    """Whether pm-0 and pm-10 count each set as right, bool [sets, 2], in the order of the anchors.

    correct, readable: bool [n]. A set of which a frame could not be read is left out: its pm-10 is not known.
    """
    near, n = frames.near, len(correct)
    wrong = np.bincount(frames.anchor[near], weights=~correct[near], minlength=n)
    unreadable = np.bincount(frames.anchor[near], weights=~readable[near], minlength=n)
    anchors = np.unique(frames.anchor)
    anchors = anchors[unreadable[anchors] == 0]
    return np.stack([correct[anchors], wrong[anchors] == 0], axis=1)


def video_rows(outcomes: np.ndarray, convention: str, seed: int = 0, resamples: int = RESAMPLES) -> list[Row]:
    """Rows `pm0_accuracy`, `pm10_accuracy` (Clopper-Pearson) and `accuracy`, their mean; n = sets.

    The mean has a bootstrap over sets. Where it is 0 or 1 no resample differs, and it gets the exact interval.
    """
    n, counts = len(outcomes), np.count_nonzero(outcomes, axis=0)
    rows = [
        proportion_row(metric, int(count), n, convention=convention)
        for metric, count in zip(("pm0_accuracy", "pm10_accuracy"), counts, strict=True)
    ]
    mean = float(counts.sum() / (2 * n))
    low, high = bootstrap_mean(outcomes.mean(axis=1), resamples, seed)
    if mean in (0, 1):
        low, high = (float(limit) for limit in clopper_pearson(mean * n, n))
    return [row("accuracy", mean, min(low, mean), max(high, mean), n, convention=convention), *rows]


def measure_video(
    embeddings: Path,
    index: Path,
    labels: Path,
    out: Path,
    predictions: Path,
    head: Path | None = None,
    reference_embeddings: Path | None = None,
    reference_index: Path | None = None,
    reference_labels: Path | None = None,
    released_labels: Path | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> None:
    """Write the rows of `video_rows` to `out` (.json) and every frame's prediction to `predictions` (.parquet).

    The index needs the columns `anchor` (image id), `distance` (frames from it) and `labels` (names of the right
    classes, joined by "|"). The reference set gives `reference_accuracy`, as of `accuracy.measure_accuracy`.
    A label space may have `unmapped` classes, to which no base class belongs (YTBB-Robust). Their `fill` is null, minus
    infinity, so that they are never answered, or 0, as in the released code of that set: that wins whenever all mapped
    logits are negative, as a classifier's may be. Conventions of a fill of 0 end in `_fill_zero`; `released_labels`,
    the same label space with it, adds those rows to the others. Predictions are positions in the label space, where
    unmapped classes follow the others.
    Errors: InputError as of `measure.join` and `measure_accuracy`, and for sets without an anchor or unknown names.
    """
    images = measure.join(embeddings, index, labels, head)
    frames = _read_frames(index, images)
    readable = np.zeros(len(images.labels), bool)
    readable[images.rows] = True
    rows: list[Row] = []
    used = 0
    for fill in _fills(images, released_labels):
        pool, suffix = _pool(images, fill), "" if fill is None else "_fill_zero"
        prediction, confidence = predict(images, pool)
        if not rows:
            found = {"label": images.labels[images.rows], "prediction": prediction, "confidence": confidence}
            io.write_parquet(predictions, {"image_id": images.image_ids[images.rows], **found})
        correct = np.zeros(len(readable), bool)
        correct[images.rows] = frames.right[frames.kind[images.rows], prediction]
        outcomes = set_outcomes(correct, readable, frames)
        used = len(outcomes)
        if not used:
            raise InputError(f"{embeddings}: no set of {index} has all its frames; embed the data set again")
        rows += video_rows(outcomes, f"{len(images.members)}_way{suffix}", seed, resamples)
        reference = (reference_embeddings, reference_index, reference_labels, head)
        rows += reference_rows(images, *reference, pool, f"class_subset{suffix}")
    sets = len(np.unique(frames.anchor))
    measure.write_rows(out, images, rows, measured=used, unreadable_sets=sets - used, seed=seed)


def _fills(images: measure.Images, released: Path | None) -> list[float | None]:
    """The fill of the label space, and that of `released`, which must be the same space but for it."""
    own = images.space.get("fill")
    if released is None:
        return [own]
    other = io.read_json(released)
    if own is not None or other.get("fill") != 0:
        raise InputError(f"{released}: fill {other.get('fill')}; expected 0, beside a label space that has null")
    for name in ("classes", "members", "unmapped"):
        if other[name] != images.space[name]:
            raise InputError(f"{released}: other {name} than label space {images.space['name']!r}; expected the same")
    return [own, 0.0]


def _pool(images: measure.Images, fill: float | None) -> Pool:
    """The logits of the label space, with those of its unmapped classes behind them when they have a fill."""
    pool = restriction(images.members, images.classes)
    if fill is None:
        return pool
    unmapped = len(images.space["unmapped"])
    return lambda logits: np.pad(pool(logits), ((0, 0), (0, unmapped)), constant_values=fill)


def _read_frames(index: Path, images: measure.Images) -> Frames:
    columns = ["anchor", "distance", "labels"]
    table = io.read_parquet(index)
    if missing := [name for name in columns if name not in table]:
        raise InputError(f"{index}: no column {missing[0]!r}; pm-k needs a set of videos, indexed with {columns}")
    place = {image_id: position for position, image_id in enumerate(images.image_ids)}
    anchor = np.array([place.get(image_id, -1) for image_id in table["anchor"]], np.int64)
    distance = table["distance"]
    is_anchor = anchor == np.arange(len(anchor))
    wrong = np.flatnonzero((anchor < 0) | ~is_anchor[anchor] | (is_anchor != (distance == 0)))
    if len(wrong):
        got = f"anchor {table['anchor'][wrong[0]]!r}, distance {distance[wrong[0]]}"
        raise InputError(f"{index}: row {wrong[0]}: {got}; expected the id of an image, the only one at distance 0")
    names = [*images.space["classes"], *images.space.get("unmapped", ())]
    kinds = {text: number for number, text in enumerate(sorted(set(table["labels"])))}
    right = np.zeros((len(kinds), len(names)), bool)
    for text, number in kinds.items():
        for name in text.split("|"):
            if name not in names:
                raise InputError(f"{index}: labels {text!r}: {name!r} is no class of {images.space['name']!r}")
            right[number, names.index(name)] = True
    kind = np.array([kinds[text] for text in table["labels"]], np.int64)
    return Frames(anchor, np.abs(distance) <= LARGEST_DISTANCE, kind, right)
