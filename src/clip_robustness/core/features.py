"""What a model made of a data set's images, proven to be what was written; heads; features, a block at a time."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.io import InputError

# What must agree before two files' features can be compared.
DETECTOR = ("weights", "preprocess")
# float16 storage moves the norm of a feature by 1e-4 at most; what is further off has not been normalised.
NORM_TOLERANCE = 0.01


# What a manifest of embeddings must have. It lies beside the array, under the same name (.json).
FIELDS = {"model": str, "dataset": str, "kind": str, "n": int, "dim": int, "ids_sha256": str}


def open_embeddings(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Map the embeddings `path` (.npy): (array [n, d], manifest), after comparing the bytes with their checksum.

    That costs 0.07 s for 50,000 x 1,000 logits, once a process. A manifest that this version wrote has the checksum.
    Errors: `InputError` when a file is missing or damaged, and when they do not belong together.
    """
    manifest, array = io.read_manifest(path.with_suffix(".json"), **FIELDS), io.load_array(path)
    expected = (manifest["n"], manifest["dim"])
    if array.shape != expected:
        raise InputError(f"{path}: shape {array.shape}, its manifest says {expected}; embed it again")
    state, noted = path.stat(), manifest.get("embeddings_sha256")
    if noted and _sha256(path, state.st_size, state.st_mtime_ns) != noted:
        fault = f"its SHA-256 is not that of {path.stem}.json beside it, so it was damaged after it was written"
        raise InputError(f"{path}: {fault}; delete both and run again")
    return array, manifest


@functools.cache
def _sha256(path: Path, size: int, mtime: int) -> str:
    return io.sha256_file(path)


def read_head(path: Path) -> dict[str, np.ndarray]:
    """A zero-shot head (.npz, whose members have checksums).

    `weight` float32 [C, d], `scale`, `bias` and, where it is known, the number of `templates`.
    Errors: `InputError` when it is missing, damaged, or not finite.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            head = {name: file[name] for name in ("weight", "scale", "bias", *set(file.files) & {"templates"})}
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # zipfile and NumPy raise a dozen types for broken files
        raise InputError(f"{path}: not a whole head ({io.damage(path, error)}); delete it and run again") from None
    if head["weight"].ndim != 2 or head["scale"].size != 1 or head["bias"].size != 1:
        raise InputError(f"{path}: weight {list(head['weight'].shape)}, expected [classes, d]; build the head again")
    if not all(np.isfinite(value).all() for value in head.values()):
        raise InputError(f"{path}: a value is NaN or infinite; build the head again")
    return head


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the features `path` (.npy). Errors: `InputError` for logits, and as of `open_embeddings`."""
    _, manifest = open_embeddings(path)
    if manifest["kind"] != "features":
        raise InputError(f"{path}: holds {manifest['kind']}, expected features; cosines need a model with an embedding")
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
