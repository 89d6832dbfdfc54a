"""Images in one folder a class: ImageNet-A, -R, -Sketch (WordNet ids), ImageNet-V2 (class indices 0..999).

Folders above the class folder do not matter, so the archive, its unpacked form and a copy elsewhere give
the same ids: ``n01498041/0.000116_digital clock.jpg``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.members import Member
from clip_robustness.data.rows import Row


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str) -> list[Row]:
    """Label = the class whose WordNet id, index of the base space, or name is the folder's name."""
    labels = folder_labels(space)
    rows = []
    for member in members:
        folder, _, file = member.name.rpartition("/")
        folder = folder.rpartition("/")[2]
        if folder not in labels:
            known = f"a class of the label space '{space.get('name', '?')}'"
            remedy = "correct 'labels' or 'path' of the data set, or name the folder of the class folders"
            raise InputError(f"{where}, '{member.name}': its folder '{folder}' is not {known}; {remedy}")
        rows.append(Row(f"{folder}/{file}", member, labels[folder]))
    return rows


def folder_labels(space: Mapping[str, Any]) -> dict[str, int]:
    """Every folder name that stands for a class: its WordNet ids, else base indices and names.

    `wnids` of a space is one id, or a list of ids, a class. Base indices come from `members`.
    """
    labels: dict[str, int] = {}
    for label, name in enumerate(space["classes"]):
        labels.setdefault(name, label)
    for label, indices in enumerate(space["members"]):
        for index in indices:
            labels[str(index)] = label
    for label, wnids in enumerate(space.get("wnids") or []):
        for wnid in [wnids] if isinstance(wnids, str) else wnids:
            labels[wnid] = label
    return labels
