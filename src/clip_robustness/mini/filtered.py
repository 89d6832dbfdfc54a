"""The ImageNet-A construction: keep the images that a reference classifier gets wrong."""

from pathlib import Path

import numpy as np

from clip_robustness.core.io import InputError, ids_digest, read_parquet, write_parquet

FEWEST = 50


def filter_misclassified(index: Path, predictions: Path, out_index: Path, limit: int, seed: int = 0) -> None:
    """Write the rows of `index` that `predictions` gets wrong, at most `limit`, drawn with `seed`.

    predictions: parquet with image_id, label, prediction (int32) and confidence (float32), one row an image in
    the index's order. The kept rows stay in that order and get the columns `reference_prediction` and
    `reference_confidence`. Source: Hendrycks et al., "Natural adversarial examples", arXiv 1907.07174, section 3.
    Errors: `InputError` when the two files hold different images, or fewer than FEWEST are wrong.
    """
    rows = read_parquet(index)
    predicted = read_parquet(predictions, ["image_id", "label", "prediction", "confidence"])
    if ids_digest(rows["image_id"]) != ids_digest(predicted["image_id"]):
        raise InputError(
            f"{predictions}: its image ids are not those of {index} in the same order; predict this index again"
        )
    if not np.array_equal(rows["label"], predicted["label"]):
        first = str(rows["image_id"][np.flatnonzero(rows["label"] != predicted["label"])[0]])
        raise InputError(f"{predictions}: label of {first} differs from {index}; predict this index again")
    wrong = np.flatnonzero(predicted["prediction"] != rows["label"])
    if len(wrong) < FEWEST:
        raise InputError(
            f"{predictions}: only {len(wrong)} of {len(rows['label'])} images are wrong, expected at least {FEWEST}; "
            f"give {index} more images or more unusual ones"
        )
    if len(wrong) > limit:
        wrong = np.sort(np.random.default_rng(seed).choice(wrong, limit, replace=False))
    kept = {name: column[wrong] for name, column in rows.items()}
    kept["reference_prediction"] = predicted["prediction"][wrong].astype(np.int32)
    kept["reference_confidence"] = predicted["confidence"][wrong].astype(np.float32)
    write_parquet(out_index, kept)
