"""Any images without labels, such as out-of-distribution sets: the MOS subsets of iNaturalist, SUN and Places.

Layout of the MOS archives (Huang and Li 2021): ``iNaturalist/images/*.jpg``, ``SUN/images/sun_*.jpg`` and
``Places/images/*.jpg``, one tar.gz each. Any other folders do as well. Options:

* `folder`: the folder whose images count, at whatever depth;
* `list`: a text file among the sources that names the images to keep, one a line; what follows the path on
  the line, such as the label of OpenOOD's lists, is passed over.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, find, images_below, label_of, read_text
from clip_robustness.data.rows import Member, Row


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Label -1 for every image; the id is the path below the folders that all images share."""
    return [Row(path, member, -1) for path, member in listed_images(members, options.get("folder"), where, options)]


def listed_images(
    members: Sequence[Member],
    folder: str | None,
    where: str,
    options: Mapping[str, Any],
    depth: int | None = None,
) -> list[tuple[str, Member]]:
    """(path, member) of the images as `images_below` has them, only those of the option `list` if there is one.

    Errors: `InputError` when the list is missing, empty, or names an image that is not there.
    """
    found = images_below(members, folder, where, depth)
    if not options.get("list"):
        return found
    source = find(members, options["list"], where)
    by_file: dict[str, list[tuple[str, Member]]] = {}
    for path, member in found:
        by_file.setdefault(path.rpartition("/")[2], []).append((path, member))
    kept = {}
    for number, line in enumerate(read_text(source).splitlines(), 1):
        if entry := line.strip():
            match = _match(entry, by_file) or _match(entry.rpartition(" ")[0].rstrip(), by_file)
            if not match:
                missing = f"the image '{entry}' is not among the images"
                raise InputError(f"{label_of(source)}, line {number}: {missing} of {where}; {AGAIN}")
            kept[match[0]] = match
    if not kept:
        raise InputError(f"{label_of(source)}: names no image; {AGAIN}")
    return list(kept.values())


def _match(entry: str, by_file: Mapping[str, list[tuple[str, Member]]]) -> tuple[str, Member] | None:
    """A list may start higher or lower in the tree than the paths do: one must be the end of the other."""
    for path, member in by_file.get(entry.rpartition("/")[2], ()):
        if f"/{entry}".endswith(f"/{path}") or f"/{member.name}".endswith(f"/{entry}"):
            return path, member
    return None
