"""Records of which word is printed on which image (config/typographic)."""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters.class_folders import folder_labels

RECORD = ("target", "word", "image", "numbers")
DIGITS = re.compile("#+")


class Target(NamedTuple):
    """The label of the class whose name is printed, and that name."""

    label: int
    word: str


def read_record(path: Path, image_ids: Iterable[str], space: Mapping[str, Any]) -> dict[str, Target]:
    """The printed class and word of each image of `image_ids` that a record names, by image id.

    A CSV file with the columns target, word, image, numbers and a line a printed class or image: its WordNet id, index
    or name; the word (the class's name if empty); the image's id, in which a run of # stands for each of the
    `numbers`, as many digits long. Lines that begin with # are comments.
    Errors: `InputError` for other columns, unknown classes, numbers without #, an image named twice, and a record
    that names none of the images.
    """
    labels, names, known = folder_labels(space), space["classes"], set(image_ids)
    found: dict[str, Target] = {}
    for where, row in _record_lines(path):
        if row["target"] not in labels:
            unknown = f"the target '{row['target']}' is no class of the label space '{space.get('name', '?')}'"
            raise InputError(f"{where}: {unknown}; correct it, or 'labels' of the data set")
        label = labels[row["target"]]
        target = Target(label, row["word"] or names[label])
        for image_id in _record_images(row["image"], row["numbers"], where):
            if image_id in found:
                raise InputError(f"{where}: the image '{image_id}' stands there twice; remove one")
            found[image_id] = target
    kept = {image_id: target for image_id, target in found.items() if image_id in known}
    if not kept:
        shown = f"such as '{next(iter(found))}'" if found else "none at all"
        fault = f"names {len(found):,} images ({shown}), and none of those of the data set"
        raise InputError(f"{path}: {fault}, such as '{min(known, default='')}'; give the record of that data set")
    return kept


def _record_lines(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            table = csv.reader(line for line in file if not line.startswith("#"))
            header = tuple(next(table, ()))
            if header != RECORD:
                raise InputError(f"{path}: the columns are {', '.join(header)}, expected {', '.join(RECORD)}")
            for number, fields in enumerate(table, 1):
                where = f"{path}, row {number}"
                if len(fields) != len(RECORD):
                    raise InputError(f"{where}: {len(fields)} fields, expected {', '.join(RECORD)}")
                yield where, dict(zip(RECORD, fields, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: cannot read it ({error})") from None


def _record_images(image: str, numbers: str, where: str) -> Iterator[str]:
    runs = DIGITS.findall(image)
    given = numbers.split()
    if len(runs) != bool(given) or not all(number.isdecimal() for number in given):
        expected = "an id with one run of # and whole numbers for it, or an id without # and no numbers"
        raise InputError(f"{where}: image '{image}' with {len(given)} numbers; expected {expected}")
    if not given:
        yield image
    for number in given:
        yield image.replace(runs[0], number.zfill(len(runs[0])))
