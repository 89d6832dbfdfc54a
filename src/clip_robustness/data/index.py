"""The index of a data set: one row an image, and where its bytes lie."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import archive, io
from clip_robustness.core.io import InputError
from clip_robustness.data.adapters import FAMILIES
from clip_robustness.data.members import Member, list_images


def build_index(dataset: Mapping[str, Any], source: Path, labels: Path, out: Path) -> int:
    """Index a folder or archive, in place, and return the number of images.

    `dataset` is the data set's entry with its `name`: `family` chooses the adapter, `path` (optional) is
    the folder in the source that holds the images, `images` (optional) is their number. `labels` is the
    JSON of its label space. Rows are ordered by label, then id, whatever order the source has.
    Errors: `InputError` for a source, name, label or number of images that does not fit.
    """
    family, where = dataset["family"], f"{source} (data set {dataset.get('name', '?')})"
    if family not in FAMILIES:
        raise InputError(f"{where}: no adapter for the family '{family}', expected {', '.join(FAMILIES)}")
    members = _below(list_images(source), dataset.get("path"), source)
    rows = FAMILIES[family](members, io.read_json(labels), where)
    expected = dataset.get("images")
    if expected is not None and len(rows) != expected:
        remedy = "fetch it again, or correct 'images' in datasets.yaml if the release changed"
        raise InputError(f"{where}: {len(rows):,} images, expected {expected:,}; {remedy}")
    rows.sort(key=lambda row: (row.label, row.image_id))
    columns: dict[str, Any] = {
        "image_id": np.array([row.image_id for row in rows], dtype=object),
        "archive": np.array([row.member.archive for row in rows], dtype=object),
        "offset": np.array([row.member.offset for row in rows], dtype=np.int64),
        "size": np.array([row.member.size for row in rows], dtype=np.int64),
        "label": np.array([row.label for row in rows], dtype=np.int32),
    }
    for name, value in rows[0].attributes.items():
        kind = np.int32 if isinstance(value, int) else object
        columns[name] = np.array([row.attributes[name] for row in rows], dtype=kind)
    archive.check_index(columns, where)
    io.write_parquet(out, columns)
    return len(rows)


def _below(members: list[Member], folder: str | None, source: Path) -> list[Member]:
    """The members below `folder`, at whatever depth the source has it.

    A folder that the user already has may be that very folder, so there nothing found means everything.
    """
    if not folder:
        return members
    found = [member for member in members if f"/{folder.strip('/')}/" in f"/{member.name}"]
    if not found and not source.is_dir():
        remedy = f"its images lie in folders such as '{members[0].name.rpartition('/')[0]}'"
        raise InputError(f"{source}: no image below '{folder}'; correct 'path' of the data set: {remedy}")
    return found or members
