"""Features of one detector, read a block at a time: of a data set of this project, or shards made elsewhere."""

from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.io import InputError

# What must agree before two files' features can be compared.
DETECTOR = ("weights", "preprocess")
# float16 storage moves the norm of a feature by 1e-4 at most; what is further off has not been normalised.
NORM_TOLERANCE = 0.01


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest beside the embeddings `path` (.npy), after comparing it with the array.

    Errors: `InputError` when a file is missing or damaged, the array is not of the manifest's size, or it holds logits.
    """
    manifest, array = io.read_json(path.with_suffix(".json")), io.load_array(path)
    missing = [name for name in ("model", "dataset", "kind", "n", "dim", "ids_sha256") if name not in manifest]
    if missing:
        raise InputError(f"{path.with_suffix('.json')}: no '{missing[0]}', so it is no manifest of embeddings")
    if manifest["kind"] != "features":
        raise InputError(f"{path}: holds {manifest['kind']}, expected features; cosines need a model with an embedding")
    if array.shape != (manifest["n"], manifest["dim"]):
        expected = (manifest["n"], manifest["dim"])
        raise InputError(f"{path}: shape {array.shape}, its manifest says {expected}; embed it again")
    return manifest


def read_index(path: Path, manifest: dict[str, Any], columns: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Columns of the index `path`, `image_id` among them, proven to be of the images that `manifest` is about."""
    table = io.read_parquet(path, ["image_id", *columns])
    if io.ids_digest(table["image_id"]) != manifest["ids_sha256"]:
        raise InputError(f"{path}: other images, or another order, than the embeddings of {manifest['dataset']!r}")
    return table


def check_detector(path: Path, manifest: dict[str, Any], other: Path, expected: dict[str, Any]) -> None:
    """Errors: `InputError` when the features of `path` and `other` are not of the same weights and preprocessing."""
    for name in DETECTOR:
        if manifest.get(name) != expected.get(name):
            models = f"{manifest['model']!r} and {expected['model']!r}"
            raise InputError(f"{path}: '{name}' differs from that of {other} ({models}); embed both by one detector")


def unit_rows(path: Path, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Rows `start` to `stop` of the .npy file `path` as float32 of norm 1.

    The file is mapped for this block alone, so that what has been read does not stay in the process's memory.
    Errors: `InputError` naming the file and the row where a feature is not finite or not normalised.
    """
    rows = np.array(io.load_array(path)[start:stop], np.float32)
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    wrong = np.flatnonzero(~(np.abs(norms - 1) <= NORM_TOLERANCE))
    if len(wrong):
        fault = f"norm {norms[wrong[0]]:g}, expected 1" if np.isfinite(norms[wrong[0]]) else "NaN or infinite"
        raise InputError(f"{path}: row {start + wrong[0]}: {fault}; normalise the features, or embed again")
    rows /= norms[:, None]
    return rows
