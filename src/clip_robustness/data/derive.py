"""Data sets that are made from the images of another: `derive` of an entry in datasets.yaml.

    derive: {from: imagenet_val, by: words, targets: config/typographic/imagenet_t.csv, copies: 8, size: 24, seed: 1}
    derive: {from: imagenet_val, by: copies, share: 0.05, transforms: [mirror, crop], seed: 3}

The data set's adapter then reads the tar that is made, as it reads a download.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.core.schema import unknown
from clip_robustness.data.copies import TRANSFORMS, write_copies
from clip_robustness.data.words import draw_words

Rule = tuple[Callable[[Any], bool], str]


def _whole(least: int) -> Rule:
    return lambda value: type(value) is int and value >= least, f"a whole number of at least {least}"


def _one_of(*choices: str) -> Rule:
    return lambda value: value in choices, f"one of {', '.join(choices)}"


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _names_transforms(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(kind in list(TRANSFORMS) for kind in value)


# Per maker: what must be given, then what may be.
NEEDED = {"words": ("copies", "size", "seed"), "copies": ("seed",)}
KNOWN: dict[str, dict[str, Rule]] = {
    "words": {
        "targets": (lambda value: isinstance(value, str) and bool(value), "the path of a record of targets"),
        "copies": _whole(1),
        "size": (
            lambda value: (type(value) is int and value >= 4) or (_number(value) and 0 < value < 1),
            "whole pixels, at least 4, or a share of the shorter side between 0 and 1",
        ),
        "seed": _whole(0),
        "words": _one_of("any", "single"),
        "enlarge": _whole(1),
        "format": _one_of("png", "jpg"),
        "quality": (lambda value: type(value) is int and 1 <= value <= 95, "a whole number of 1 to 95"),
    },
    "copies": {
        "share": (lambda value: _number(value) and 0 < value <= 1, "above 0, at most 1"),
        "number": _whole(1),
        "transforms": (_names_transforms, f"a list of some of {', '.join(TRANSFORMS)}"),
        "seed": _whole(0),
    },
}


def check_derive(entry: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The options of an entry's maker. `where` names the entry in errors.

    Errors: one `InputError` for each kind of fault: no or another maker, unknown, missing and wrong fields.
    """
    maker = entry.get("by")
    if not isinstance(maker, str) or maker not in KNOWN:
        raise InputError(f"{where}.by: {maker!r}, expected {' or '.join(KNOWN)}")
    if not isinstance(entry.get("from"), str):
        raise InputError(f"{where}.from: {entry.get('from')!r}, expected the name of the data set to make it from")
    options = {field: value for field, value in entry.items() if field not in ("from", "by")}
    for field, value in options.items():
        if field not in KNOWN[maker]:
            raise InputError(f"{where}: {unknown(field, KNOWN[maker], f'by: {maker}', 'field')}")
        right, expected = KNOWN[maker][field]
        if not right(value):
            raise InputError(f"{where}.{field}: {value!r}, expected {expected}")
    if missing := [field for field in NEEDED[maker] if field not in options]:
        raise InputError(f"{where}.{missing[0]}: is missing, expected {KNOWN[maker][missing[0]][1]}")
    if {"share", "number"} <= set(options):
        raise InputError(f"{where}: both 'share' and 'number' are given, expected one of them")
    if {"targets", "words"} <= set(options):
        raise InputError(f"{where}: both 'targets' and 'words' are given; recorded targets leave nothing to choose")
    return options


def derive_dataset(
    entry: Mapping[str, Any], index: Path, labels: Path, out: Path, targets: Path | None = None, workers: int = 1
) -> int:
    """Make the tar of a derived data set from the source's index; return its number of images.

    `entry` is the mapping `derive`, `labels` the data set's label space (that of its source), `targets` the file of
    `entry` if that is not where it says. Errors: `InputError` as of `check_derive` and of the makers.
    """
    options = check_derive(entry, f"{out.stem}: derive")
    if entry["by"] == "copies":
        return write_copies(index, out, workers=workers, **options)
    record = options.pop("targets", None)
    return draw_words(index, labels, out, targets=targets or (record and Path(record)), workers=workers, **options)
