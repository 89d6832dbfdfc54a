"""What an adapter says about one image."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from clip_robustness.data.members import Member


class Row(NamedTuple):
    """`label` is the position in the data set's label space, -1 for none; `attributes` become columns."""

    image_id: str
    member: Member
    label: int
    attributes: Mapping[str, Any] = MappingProxyType({})
