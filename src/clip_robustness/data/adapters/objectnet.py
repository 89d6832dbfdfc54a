"""ObjectNet (Barbu et al. 2019): objects in odd poses, places and views; 313 classes, 113 of them ImageNet's.

Layout of objectnet-1.0.zip: ``objectnet-1.0/images/alarm_clock/*.png``, and ``objectnet-1.0/mappings/`` with
``folder_to_objectnet_label.json`` (all 313). Without the mappings the folders of the label space are used, which are
the same. Every image has a red border of one pixel; crop two before use. Option `others: true` keeps the images of
the 200 other classes too, with label -1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, label_of, parse_json
from clip_robustness.data.members import images
from clip_robustness.data.rows import Member, Row

MAPPING = "folder_to_objectnet_label.json"


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Label = the class that the folder stands for; the id is ``alarm_clock/FILE.png``.

    Errors: `InputError` when the mappings lack a class of the space or a folder of the images, or no image
    is of one of the classes.
    """
    labels, known = _folders(members, space, where)
    rows = []
    for member in images(members):
        folder, file = ("", *member.name.split("/"))[-2:]
        if known and folder not in known:
            raise InputError(f"{label_of(member)}: its folder '{folder}' is none of {MAPPING}; {AGAIN}")
        label = labels.get(folder, -1)
        if label >= 0 or options.get("others"):
            rows.append(Row(f"{folder}/{file}", member, label))
    if not any(row.label >= 0 for row in rows):
        folder = next(iter(labels))
        raise InputError(f"{where}: holds no image in a folder such as '{folder}'; {AGAIN}")
    return rows


def _folders(members: Sequence[Member], space: Mapping[str, Any], where: str) -> tuple[dict[str, int], set[str]]:
    """The label of each folder that has one, and all folders (none if there are no mappings)."""
    found = [member for member in members if f"/{member.name}".endswith(f"/{MAPPING}")]
    if not found:
        if not space.get("folders"):
            wanted = "set 'labels' to a space of map:objectnet_113"
            raise InputError(f"{where}: the label space '{space.get('name', '?')}' names no folders; {wanted}")
        return {folder: label for label, folder in enumerate(space["folders"])}, set()
    mapping = parse_json(found[0], dict)
    if odd := [folder for folder, name in mapping.items() if not isinstance(name, str)]:
        raise InputError(f"{label_of(found[0])}: the folder '{odd[0]}' stands for no name; {AGAIN}")
    positions = {name: label for label, name in enumerate(space["classes"])}
    labels = {folder: positions[name] for folder, name in mapping.items() if name in positions}
    if missing := sorted(set(positions) - set(mapping.values())):
        wanted = f"has no folder for the class '{missing[0]}' of the label space '{space.get('name', '?')}'"
        raise InputError(f"{label_of(found[0])}: {wanted}; set 'labels' to a space of map:objectnet_113")
    return labels, set(mapping)
