"""Shape bias on cue-conflict images (Geirhos et al. 2019): the shape of one class, the texture of another.

    shape_bias   = shape decisions / (shape decisions + texture decisions)
    cue_accuracy = (shape decisions + texture decisions) / conflicts

Only true conflicts count: images whose shape and texture are of different classes (1,200 of the 1,280).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clip_robustness.core.io import InputError
from clip_robustness.metrics import measure
from clip_robustness.metrics.logits import category_probabilities, restrict
from clip_robustness.metrics.rows import Row, proportion_row


def decision_counts(
    prediction: np.ndarray, shape: np.ndarray, texture: np.ndarray, classes: int
) -> dict[str, np.ndarray]:
    """Counts by the class of the shape: `shape` and `texture` decisions, and `conflicts`; each [classes].

    All arguments are class positions [n]; images without a shape or a texture label (-1) do not count.
    """
    conflict = (shape != texture) & (shape >= 0) & (texture >= 0)

    def count(chosen: np.ndarray) -> np.ndarray:
        return np.bincount(shape[conflict & chosen], minlength=classes)

    return {
        "shape": count(prediction == shape),
        "texture": count(prediction == texture),
        "conflicts": count(conflict),
    }


def shape_bias_rows(counts: dict[str, np.ndarray], names: Sequence[str], convention: str = "") -> list[Row]:
    """Rows `shape_bias` (n = decisions for a cue) and `cue_accuracy` (n = conflicts), overall and by class.

    Slice "" is overall, else the name of the shape's class. A ratio without a decision or a conflict has no
    row. Intervals: Clopper-Pearson, for the shape bias given the number of decisions.
    """
    rows = []
    slices = [("", {key: int(value.sum()) for key, value in counts.items()})]
    slices += [
        (name, {key: int(value[position]) for key, value in counts.items()}) for position, name in enumerate(names)
    ]
    for slice, count in slices:
        decided = count["shape"] + count["texture"]
        if decided:
            rows.append(proportion_row("shape_bias", count["shape"], decided, slice, convention))
        if count["conflicts"]:
            rows.append(proportion_row("cue_accuracy", decided, count["conflicts"], slice, convention))
    return rows


def measure_shape_bias(
    embeddings: Path,
    index: Path,
    labels: Path,
    out: Path,
    head: Path | None = None,
    *,
    texture: str = "texture_class",
) -> None:
    """Write the rows of `shape_bias_rows` for one model; the index's column `texture` labels the textures.

    A label space whose pool is `mean_probability` decides by the mean of its members' probabilities
    (convention `1000_way_mean_probability`); any other by the largest pooled logit (`16_way`). Ties go to the
    first class. Errors: InputError as of `measure.join`, or when there is no true conflict.
    """
    images = measure.join(embeddings, index, labels, head, columns=[texture], pools=("max", "mean_probability"))
    mean = images.space["pool"] == "mean_probability"
    prediction = np.empty(len(images.rows), np.int32)
    for part, block in images.blocks(images.rows):
        pool = category_probabilities if mean else restrict
        prediction[part] = pool(block, images.members).argmax(axis=1)
    shape, textures = images.labels[images.rows], images.columns[texture][images.rows]
    names = images.space["classes"]
    counts = decision_counts(prediction, shape, textures, len(names))
    conflicts = int(counts["conflicts"].sum())
    if not conflicts:
        raise InputError(f"{index}: no image whose label and {texture} differ; is it a cue-conflict set?")
    convention = f"{images.classes}_way_mean_probability" if mean else f"{len(names)}_way"
    measure.write_rows(out, images, shape_bias_rows(counts, names, convention), measured=conflicts)
