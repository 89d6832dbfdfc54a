"""Images with a wrong word printed on them: ImageNet-T and CIFAR-10-T, drawn by `data.words`.

Layout: one folder a true class (WordNet id, class index or name), and ``targets.csv`` with the columns
``image,target``: ``n01440764/ILSVRC2012_val_00000293.png,n02123045``, the class whose name is printed. A third column
``source`` is the id that the image had without the word; it is kept, so that both are joined by it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, find, label_of, parse_csv
from clip_robustness.data.adapters.class_folders import folder_label, folder_labels
from clip_robustness.data.members import images
from clip_robustness.data.rows import Member, Row

TARGETS = "targets.csv"


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Label = the class of the folder; attribute `target_class` = the label of the printed class; the id as above.

    Errors: `InputError` for an image without a target, a target without an image, an unknown class, and a target
    that is the true class.
    """
    labels, table = folder_labels(space), find(members, TARGETS, where)
    targets = _targets(table)
    rows = []
    for member in images(members):
        folder, file = ("", *member.name.split("/"))[-2:]
        image_id = f"{folder}/{file}"
        label = folder_label(folder, member, labels, space, where)
        if image_id not in targets:
            raise InputError(f"{label_of(table)}: no target for the image '{image_id}'; draw the images again")
        target, source = targets.pop(image_id)
        if labels.get(target, label) == label:
            wrong = "the true class" if target in labels else "no class"
            raise InputError(f"{label_of(table)}: the target '{target}' of '{image_id}' is {wrong}; draw them again")
        rows.append(Row(source or image_id, member, label, {"target_class": labels[target]}))
    if targets:
        raise InputError(f"{where}: {len(targets)} images are missing, such as '{min(targets)}'; {AGAIN}")
    return rows


def _targets(member: Member) -> dict[str, tuple[str, str]]:
    """The target and the source ("" for none) of each image."""
    rows = parse_csv(member, ("image", "target"))
    return {row["image"]: (row["target"], row.get("source", "")) for row in rows}
