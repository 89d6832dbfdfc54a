"""NINCO (Bitterwolf et al. 2023): images without any ImageNet-1k object, each checked by eye.

Layout of NINCO_all.tar.gz, by the lists and the readme of j-cb/NINCO: below ``NINCO/`` are three folders,
each with one folder a class. Option `part` chooses one of them; by default it is the first of these that is there:

* ``NINCO_OOD_classes``: 5,879 images in 64 classes; attribute `ood_class`;
* ``NINCO_popular_datasets_subsamples``: the 2,715 images of 11 popular sets (Places, Textures, ImageNet_O, ...)
  that hold no ImageNet object; attribute `origin`, the name of the set;
* ``NINCO_OOD_unit_tests``: 400 synthetic images of each of 17 kinds; attribute `unit_test`.

Option `only` is a list of class folders to keep, such as [Places].
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, class_and_file, images_below
from clip_robustness.data.members import images
from clip_robustness.data.rows import Member, Row

PARTS = {
    "NINCO_OOD_classes": "ood_class",
    "NINCO_popular_datasets_subsamples": "origin",
    "NINCO_OOD_unit_tests": "unit_test",
}


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Label -1; id ``CLASS/FILE``; one attribute, the class folder, named after the part."""
    present = {name for member in images(members) for name in member.name.split("/")[:-1] if name in PARTS}
    first = next((name for name in PARTS if name in present), "NINCO_OOD_classes")
    part, only = options.get("part", first), options.get("only")
    if part not in PARTS:
        raise InputError(f"{where}: no part '{part}' of NINCO; set the option 'part' to one of {', '.join(PARTS)}")
    if present and part not in present:
        raise InputError(f"{where}: holds {', '.join(sorted(present))} but no folder '{part}'; {AGAIN}")
    rows = []
    for path, member in images_below(members, part, where, depth=2):
        folder, _ = class_and_file(path, member, f"{part}/CLASS/FILE")
        rows.append(Row(path, member, -1, {PARTS[part]: folder}))
    if only:
        folders = sorted({row.attributes[PARTS[part]] for row in rows})
        for name in only:
            if name not in folders:
                raise InputError(f"{where}: no folder '{name}' in {part}; the option 'only' may have {folders}")
        rows = [row for row in rows if row.attributes[PARTS[part]] in only]
    return rows
