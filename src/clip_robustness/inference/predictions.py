"""Outputs that another program made, in the form of embeddings: every metric and figure that logits allow.

A model's folder holds a file for each data set that it answers for, named by the data set:

* ``{dataset}.parquet`` with the columns `image_id` and either `logits` or `probabilities` (a list of numbers a row), or
* ``{dataset}.npy`` [n, C], logits, with ``{dataset}.ids.txt`` beside it, an image id a line.

Rows may be in any order and may hold more images than the data set; columns are the classes of the base label space in
its order. Ids are those of the index (``resources/index/{dataset}.parquet``).
"""

import collections
from pathlib import Path

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.io import InputError

FLOOR = 1e-30  # a probability of zero; its logarithm, -69, is far below any other and finite in float16
SHOWN = 5


def import_predictions(model: str, predictions: Path, index: Path, labels: Path, out: Path) -> None:
    """Write float16 logits [n, C] in the order of `index` to `out` (.npy) with their manifest beside it.

    Of probabilities the logarithm is taken, which is a logit up to a constant that no softmax sees.
    Errors: `InputError` for images without a prediction, images predicted twice, another number of classes than
    the base label space `labels` has, and values that are not finite, negative, or no distribution.
    """
    ids, values, kind = _read(predictions)
    classes = len(io.read_json(labels)["classes"])
    if values.ndim != 2 or values.shape[1] != classes:
        raise InputError(f"{predictions}: {kind} of shape {list(values.shape)}, expected [n, {classes}] as of {labels}")
    if len(ids) != len(values):
        raise InputError(f"{predictions}: {len(values):,} rows of {kind} and {len(ids):,} image ids")
    wanted = io.read_parquet(index, ["image_id"])["image_id"].tolist()
    chosen = values[_rows(ids, wanted, predictions, index)]
    _check(chosen, kind, wanted, predictions)
    if kind == "probabilities":
        chosen = np.log(np.maximum(chosen, FLOOR))
    with np.errstate(over="ignore"):
        stored = chosen.astype(np.float16)
    _check(stored, "logits in float16", wanted, predictions)
    io.save_array(out, stored)
    manifest = {"kind": "logits", "n": len(wanted), "dim": classes, "ids_sha256": io.ids_digest(wanted)}
    manifest["embeddings_sha256"] = io.sha256_file(out)
    source = {"imported_from": predictions.name, "sha256": io.sha256_file(predictions), "given": kind}
    io.write_json(out.with_suffix(".json"), {"model": model, "dataset": out.stem, **manifest, **source})


def _read(path: Path) -> tuple[list[str], np.ndarray, str]:
    """(image ids, values float32 [n, C], what they are)."""
    if path.suffix == ".npy":
        names = path.with_suffix(".ids.txt")
        try:
            ids = names.read_text(encoding="utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{names}: cannot read the image ids of {path} ({error}); one id a line") from None
        values = io.load_array(path)
        if values.dtype.kind not in "fiu":
            raise InputError(f"{path}: holds {values.dtype}, expected numbers")
        return ids[:-1] if ids[-1] == "" else ids, np.asarray(values, np.float32), "logits"
    import pyarrow
    from pyarrow import parquet, types

    try:
        names = parquet.read_schema(path).names
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole parquet file ({error})") from None
    kinds = [kind for kind in ("logits", "probabilities") if kind in names]
    if "image_id" not in names or len(kinds) != 1:
        raise InputError(f"{path}: columns {', '.join(names)}; expected image_id and either logits or probabilities")
    table = io.read_table(path, ["image_id", kinds[0]])
    ids, lists = table.column("image_id").to_pylist(), table.column(kinds[0]).combine_chunks()
    if types.is_fixed_size_list(lists.type):
        lists = lists.cast(pyarrow.list_(lists.type.value_type))
    number = types.is_list(lists.type) or types.is_large_list(lists.type)
    number = number and (types.is_floating(lists.type.value_type) or types.is_integer(lists.type.value_type))
    if not number or not all(isinstance(image_id, str) for image_id in ids):
        kinds_found = f"image_id of {table.schema.field('image_id').type} and {kinds[0]} of {lists.type}"
        raise InputError(f"{path}: {kinds_found}; expected a text, and a list of numbers, in each row")
    lengths = set(lists.value_lengths().to_pylist())
    if len(lengths) != 1 or None in lengths:
        raise InputError(
            f"{path}, column '{kinds[0]}': rows of different lengths, or empty ones; expected C numbers each"
        )
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    return ids, values.reshape(len(lists), -1), kinds[0]


def _rows(ids: list[str], wanted: list[str], path: Path, index: Path) -> list[int]:
    position = {image_id: row for row, image_id in enumerate(ids)}
    if len(position) < len(ids):
        twice = [image_id for image_id, count in collections.Counter(ids).items() if count > 1]
        raise InputError(f"{path}: {len(twice):,} images are predicted more than once, such as {twice[:SHOWN]}")
    missing = [image_id for image_id in wanted if image_id not in position]
    if missing:
        raise InputError(
            f"{path}: no prediction for {len(missing):,} of {len(wanted):,} images of {index}, such as"
            f" {missing[:SHOWN]}; ids must be those of the index"
        )
    return [position[image_id] for image_id in wanted]


def _check(values: np.ndarray, kind: str, ids: list[str], path: Path) -> None:
    bad = ~np.isfinite(values).all(axis=1)
    if kind == "probabilities":
        bad |= (values < 0).any(axis=1) | (np.abs(values.sum(axis=1, dtype=np.float64) - 1) > 1e-2)
    if bad.any():
        rows = [ids[row] for row in np.flatnonzero(bad)[:SHOWN]]
        expected = "finite, not negative, of sum 1" if kind == "probabilities" else "finite"
        raise InputError(f"{path}: {int(bad.sum()):,} rows of {kind} are not {expected}, such as {rows}")
