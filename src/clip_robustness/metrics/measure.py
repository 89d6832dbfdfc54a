"""Joining embeddings, labels and label spaces, with proof that their rows are the same images."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.features import open_embeddings, read_head
from clip_robustness.core.io import InputError
from clip_robustness.metrics.logits import stored_blocks, zero_shot_blocks
from clip_robustness.metrics.rows import Row


@dataclasses.dataclass(frozen=True)
class Images:
    """The images of one data set with what one model made of them. Positions are those of the index."""

    embeddings: Path
    array: np.ndarray  # features [n, d] or logits [n, C], mapped
    head: dict[str, np.ndarray] | None
    embedded: dict[str, Any]  # the manifest of the embeddings
    image_ids: np.ndarray
    labels: np.ndarray  # int32, -1: none
    columns: dict[str, np.ndarray]
    rows: np.ndarray  # positions of the images that could be read
    space: dict[str, Any]

    @property
    def model(self) -> str:
        return self.embedded["model"]

    @property
    def ids_sha256(self) -> str:
        return self.embedded["ids_sha256"]

    @property
    def base(self) -> str:
        return self.space["base"] or self.space["name"]

    @property
    def members(self) -> list[list[int]]:
        return self.space["members"]

    @property
    def classes(self) -> int:
        """Number of base classes."""
        return self.array.shape[1] if self.head is None else len(self.head["weight"])

    @property
    def labelled(self) -> np.ndarray:
        """Positions of the images that could be read and have a label."""
        return self.rows[self.labels[self.rows] >= 0]

    def blocks(self, rows: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield (positions in `rows`, base logits as float32); the array is reused for the next block."""
        # Contiguous rows are read as slices of the map, without a copy by index.
        chosen = None if len(rows) == len(self.array) else rows
        if self.head is None:
            return stored_blocks(self.array, chosen, str(self.embeddings))
        scale, bias = float(self.head["scale"]), float(self.head["bias"])
        return zero_shot_blocks(self.array, self.head["weight"], scale, bias, chosen, str(self.embeddings))

    def manifest(self) -> dict[str, Any]:
        """What a metric file says about its input."""
        return {
            "model": self.model,
            "dataset": self.embedded["dataset"],
            "labels": self.space["name"],
            "ids_sha256": self.ids_sha256,
            "n": len(self.labels),
            "masked": len(self.labels) - len(self.rows),
        }


def load_logits(
    embeddings: Path, head: Path | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray] | None, dict[str, Any]]:
    """Map the embeddings; read the head (weight, scale, bias) and the manifest beside the embeddings.

    Errors: InputError as of `open_embeddings` and `read_head`, when a CLIP has no head or a classifier has one,
    and when dimensions differ.
    """
    array, manifest = open_embeddings(embeddings)
    if (manifest["kind"] == "features") != (head is not None):
        needs = "a head, and none was given" if head is None else f"no head, and {head} was given"
        raise InputError(f"{embeddings}: holds {manifest['kind']} and needs {needs}")
    if head is None:
        return array, None, manifest
    arrays = read_head(head)
    if arrays["weight"].shape[1] != array.shape[1]:
        raise InputError(
            f"{head}: weight {arrays['weight'].shape}, expected [classes, {array.shape[1]}] for {embeddings}"
        )
    return array, arrays, manifest


def join(
    embeddings: Path,
    index: Path,
    labels: Path,
    head: Path | None = None,
    columns: Sequence[str] = (),
    pools: Sequence[str] = ("max",),
) -> Images:
    """Join a model's embeddings (.npy) with the index (.parquet) and label space (.json) of the data set.

    `columns`: integer columns of the index to keep; `pools`: ways of pooling that the caller knows. Images
    that the manifest lists as masked are left out of `rows`.
    Errors: InputError as of `load_logits`, and when the rows are not proven to be the same images (number or
    hash of the ids differ), a label lies outside its space, or the logits are not of the space's base.
    """
    array, arrays, manifest = load_logits(embeddings, head)
    table = io.read_parquet(index, ["image_id", "label", *columns])
    ids, own = table["image_id"], table["label"]
    if len(ids) != len(array):
        raise InputError(f"{embeddings}: {len(array):,} rows, but {index} has {len(ids):,}; embed it again")
    if io.ids_digest(ids) != manifest["ids_sha256"]:
        raise InputError(f"{embeddings}: made from other images, or another order, than {index}; embed it again")
    space = io.read_json(labels)
    if space["pool"] not in pools:
        raise InputError(f"{labels}: pool is {space['pool']!r}, expected {' or '.join(pools)}")
    for name in ("label", *columns):
        _check_labels(table[name], len(space["classes"]), f"{index}: column {name}", labels)
    base = space["base"] or space["name"]
    if head is not None and not head.name.endswith(f".{base}.npz"):
        raise InputError(f"{head}: expected a head over the base space {base!r} of {labels}")
    _check_base(space, array.shape[1] if arrays is None else len(arrays["weight"]), embeddings, labels)
    masked = set(manifest.get("masked") or ())
    rows = np.array([i for i, image_id in enumerate(ids) if image_id not in masked]) if masked else np.arange(len(ids))
    kept = {name: table[name] for name in columns}
    return Images(embeddings, array, arrays, manifest, ids, own, kept, rows.astype(np.int64, copy=False), space)


def _check_labels(values: np.ndarray, classes: int, where: str, labels: Path) -> None:
    if not np.issubdtype(values.dtype, np.integer):
        raise InputError(f"{where}: expected positions in {labels} (integers), got {values.dtype}")
    wrong = np.flatnonzero((values < -1) | (values >= classes))
    if len(wrong):
        got = values[wrong[0]]
        raise InputError(f"{where}: row {wrong[0]}: {got}; expected -1..{classes - 1} as of {labels}")


def _check_base(space: Mapping[str, Any], classes: int, embeddings: Path, labels: Path) -> None:
    if space["base"] is None and len(space["classes"]) != classes:
        raise InputError(f"{embeddings}: {classes} logits, but {labels} has {len(space['classes'])} classes")
    for name, member in zip(space["classes"], space["members"], strict=True):
        if not member or min(member) < 0 or max(member) >= classes:
            raise InputError(f"{labels}: members of {name!r} are {member}; expected some of 0..{classes - 1}")


def write_rows(out: Path, images: Images, rows: Sequence[Row], **facts: Any) -> None:
    """Write {"manifest", "rows"}; each row gets the model, the data set and the source `measured`."""
    manifest = images.manifest()
    who = {"model": manifest["model"], "dataset": manifest["dataset"], "source": "measured"}
    io.write_json(out, {"manifest": {**manifest, **facts}, "rows": [{**who, **row} for row in rows]})
