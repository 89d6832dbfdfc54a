"""What passes from the containers to an adapter, and what it says about one image."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Member(NamedTuple):
    """A file of a source: its name there ('/' between the parts), and where its bytes lie (see `core.archive`)."""

    name: str
    archive: str
    offset: int
    size: int
    codec: str = ""


class Row(NamedTuple):
    """`label` is the position in the data set's label space, -1 for none; `attributes` become columns."""

    image_id: str
    member: Member
    label: int
    attributes: Mapping[str, Any] = MappingProxyType({})
