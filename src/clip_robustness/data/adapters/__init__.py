"""One file a family of data sets: from where images lie to their ids, labels and attributes.

An adapter is a function ``adapt(members, space, where)``: `members` are what `data.members` found (name,
archive, offset, size), `space` is the label space, `where` names the source in errors. It returns one
`Row` an image. A new family is a new file and a line in `FAMILIES`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from clip_robustness.data.adapters import class_folders, cue_conflict
from clip_robustness.data.members import Member
from clip_robustness.data.rows import Row

Adapter = Callable[[Sequence[Member], Mapping[str, Any], str], list[Row]]

FAMILIES: dict[str, Adapter] = {
    "class_folders": class_folders.adapt,
    "cue_conflict": cue_conflict.adapt,
}
