"""Textures: the Describable Textures Dataset (Cimpoi et al. 2014), all 5,640 images of 47 textures.

Layout of dtd-r1.0.1.tar.gz: ``dtd/images/banded/banded_0002.jpg``, lists such as ``dtd/labels/test1.txt`` and
a ``dtd/imdb/imdb.mat`` that nothing here needs. Options:

* `keep_labels: true`: label = the position of the texture in the label space, else -1 (out of distribution);
* `list`: a list of the archive, such as ``labels/test1.txt``, to keep only one of its splits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import class_and_file, label_of
from clip_robustness.data.adapters.unlabelled import listed_images
from clip_robustness.data.rows import Member, Row


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Id ``banded/banded_0002.jpg``, attribute `texture` = ``banded``."""
    positions = {name: position for position, name in enumerate(space["classes"])}
    rows = []
    for path, member in listed_images(members, "images", where, options, depth=2):
        texture, _ = class_and_file(path, member, "images/TEXTURE/FILE.jpg")
        if options.get("keep_labels") and texture not in positions:
            known = f"a class of the label space '{space.get('name', '?')}'"
            remedy = "correct 'labels' of the data set, or leave out its option 'keep_labels'"
            raise InputError(f"{label_of(member)}: the texture '{texture}' is not {known}; {remedy}")
        label = positions[texture] if options.get("keep_labels") else -1
        rows.append(Row(path, member, label, {"texture": texture}))
    return rows
