"""Planted near-duplicates of another data set's images, made by `data.copies`.

Layout: ``00017-mirror.png`` and so on, and ``copies.csv`` with the columns ``image,source,transform``: the file, the id
of the image that it is a copy of, and what was done to it. A fourth column ``label`` is the label of both.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, find, label_of, parse_csv
from clip_robustness.data.members import images
from clip_robustness.data.rows import Member, Row

TABLE = "copies.csv"
COLUMNS = ("image", "source", "transform", "label")


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """The id is the file's name; attributes `source` and `transform`; label -1 where the table has none.

    Errors: `InputError` for an image that the table does not have, or names twice, for one that is missing, and for a
    label outside the label space.
    """
    table = find(members, TABLE, where)
    copies = _copies(table)
    rows = []
    for member in images(members):
        file = member.name.rpartition("/")[2]
        copy = copies.pop(file, None)
        if copy is None:
            raise InputError(f"{label_of(table)}: has no line of its own for the image '{file}'; make the copies again")
        attributes = {"source": copy["source"], "transform": copy["transform"]}
        rows.append(Row(file, member, _label(copy, space, table), attributes))
    if copies:
        raise InputError(f"{where}: {len(copies)} images are missing, such as '{min(copies)}'; {AGAIN}")
    return rows


def _copies(member: Member) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for row in parse_csv(member, COLUMNS[:3]):
        if row["image"] in found or not row["source"] or not row["transform"]:
            fault = f"the image '{row['image']}' stands there twice, or without source or transform"
            raise InputError(f"{label_of(member)}: {fault}; {AGAIN}")
        found[row["image"]] = row
    return found


def _label(copy: Mapping[str, str], space: Mapping[str, Any], table: Member) -> int:
    text, classes = copy.get("label") or "-1", len(space["classes"])
    if not re.fullmatch("-?[0-9]{1,9}", text) or not -1 <= int(text) < classes:
        known = f"-1..{classes - 1} of the label space '{space.get('name', '?')}'"
        raise InputError(f"{label_of(table)}, image '{copy['image']}': label '{text}', expected {known}; fix 'labels'")
    return int(text)
