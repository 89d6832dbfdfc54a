"""ImageNet-X (Idrissi et al. 2022): what makes an ImageNet validation image differ from its class's prototypes.

The annotations are CC BY-NC 4.0, whatever the package's metadata says: they are fetched when a study needs them and
never become part of this project. Layout, of the wheel imagenet-x 0.0.7 and of facebookresearch/imagenetx:
``annotations/imagenet_x_val_top_factor.jsonl`` and ``imagenet_x_val_multi_factor.jsonl``, one JSON object a line with
`file_name`, `class` and a 0 or 1 for each of the 16 factors, and ``annotations/prototypical_paths.csv``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import archive, io
from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, find, label_of, read_text
from clip_robustness.data.members import list_members
from clip_robustness.data.rows import Member, Row

# In the order of how many images have them as their top factor.
FACTORS = (
    "pose",
    "background",
    "color",
    "pattern",
    "smaller",
    "shape",
    "partial_view",
    "subcategory",
    "texture",
    "larger",
    "darker",
    "object_blocking",
    "person_blocking",
    "brighter",
    "style",
    "multiple_objects",
)
TOP, MULTI = "imagenet_x_val_top_factor.jsonl", "imagenet_x_val_multi_factor.jsonl"
PROTOTYPES = "prototypical_paths.csv"


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Always an `InputError`: the set has no images of its own, see `write_factors`."""
    raise InputError(f"{where}: annotates images of imagenet_val and has none; index imagenet_val instead")


def write_factors(annotations: Sequence[Path], index: Path, out: Path) -> int:
    """Write the factors of ImageNet's validation images as a parquet table and return its number of rows.

    `annotations` are the wheel, its unpacked form or the repository; `index` is the index of imagenet_val. The table
    has a row for each annotated image of the index, in its order: `image_id`, `label`, `top_factor` (str, "" where
    the annotators chose none), `prototype` (bool: one of the 3,000 images that the others were compared with; the
    published numbers leave them out) and one bool column a factor, whether the image has it at all (`multi`).
    Errors: `InputError` for a missing or damaged list, for ids that are not ImageNet's own, and for an image whose
    class differs between index and annotation.
    """
    members = list_members(annotations)
    where = ", ".join(map(str, annotations))
    top, multi = (_read(find(members, name, where)) for name in (TOP, MULTI))
    prototypes = {line.strip().partition(".")[0] for line in read_text(find(members, PROTOTYPES, where)).splitlines()}
    images = archive.load_index(index, archives=False)
    rows = []
    for image_id, label in zip(images["image_id"].tolist(), images["label"].tolist(), strict=True):
        if image_id in top and image_id in multi:
            if top[image_id]["class"] != label or multi[image_id]["class"] != label:
                found = f"class {top[image_id]['class']} by the annotation, {label} by {index}"
                raise InputError(f"{where}: '{image_id}' is of {found}; index imagenet_val anew")
            rows.append((image_id, label))
    if not rows:
        named = "images named as ImageNet's own files are, such as ILSVRC2012_val_00000001"
        raise InputError(f"{index}: none of its images is annotated; point imagenet_val at a copy with {named}")
    ids = [image_id for image_id, _ in rows]
    columns: dict[str, Any] = {
        "image_id": np.array(ids, dtype=object),
        "label": np.array([label for _, label in rows], dtype=np.int32),
        "top_factor": np.array([_chosen(top[i]) for i in ids], dtype=object),
        "prototype": np.array([i in prototypes for i in ids]),
    }
    columns |= {factor: np.array([bool(multi[i][factor]) for i in ids]) for factor in FACTORS}
    io.write_parquet(out, columns)
    return len(ids)


def _read(member: Member) -> dict[str, dict[str, Any]]:
    """Annotations by the stem of the image's file name."""
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(read_text(member).splitlines(), 1):
        try:
            entry = json.loads(line)
            values = {name: int(entry[name]) for name in ("class", *FACTORS)}
            stem = entry["file_name"].partition(".")[0]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError) as error:
            raise InputError(f"{label_of(member)}, line {number}: no annotation ({error!r}); {AGAIN}") from None
        if stem in found or not {values[factor] for factor in FACTORS} <= {0, 1}:
            raise InputError(f"{label_of(member)}, line {number}: '{stem}' twice, or a factor not 0 or 1; {AGAIN}")
        found[stem] = values
    return found


def _chosen(entry: Mapping[str, Any]) -> str:
    return next((factor for factor in FACTORS if entry[factor]), "")
