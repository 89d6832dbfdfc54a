"""What several adapters need of the files that lie beside the images."""

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.members import images, read
from clip_robustness.data.rows import Member

AGAIN = "fetch it again, or name your own copy under 'local:' in the config"


def label_of(member: Member) -> str:
    """How an error names a member."""
    return f"{member.archive}, member '{member.name}'"


def find(members: Sequence[Member], name: str, where: str) -> Member:
    """The one member whose path ends in `name`; none, or several, is an `InputError`."""
    found = [member for member in members if f"/{member.name}".endswith(f"/{name}")]
    if len(found) != 1:
        count = f"{len(found)} files end in" if found else "there is no file"
        raise InputError(f"{where}: {count} '{name}', expected exactly one; {AGAIN}")
    return found[0]


def parse_json(member: Member, *kinds: type) -> Any:
    """Its content, which must be of one of the `kinds` if there are any; numbers are finite."""
    try:
        value = json.loads(read(member), parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError) as error:  # of JSON, and of the text's encoding
        raise InputError(f"{label_of(member)}: not valid JSON ({error}); {AGAIN}") from None
    if kinds and not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise InputError(f"{label_of(member)}: holds a {type(value).__name__}, expected {expected}; {AGAIN}")
    return value


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number")
    return value


def parse_csv(member: Member, columns: Sequence[str], delimiter: str = ",") -> list[dict[str, str]]:
    """Its rows, which have these columns; a cell that is missing is ''. Errors: `InputError` for another table."""
    table = csv.DictReader(io.StringIO(read_text(member), newline=""), restval="", delimiter=delimiter)
    try:
        if missing := [name for name in columns if name not in (table.fieldnames or ())]:
            fault = f"no column '{missing[0]}', expected the columns {', '.join(columns)}"
            raise InputError(f"{label_of(member)}: {fault}; {AGAIN}")
        return list(table)
    except csv.Error as error:
        raise InputError(f"{label_of(member)}, line {table.line_num}: not a table ({error}); {AGAIN}") from None


def read_text(member: Member) -> str:
    """A text file of UTF-8, with or without a byte order mark."""
    try:
        return read(member).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{label_of(member)}: not plain text ({error}); {AGAIN}") from None


def compact(value: Any) -> str:
    """JSON for a column of the index: no spaces, sorted keys, and a NaN refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def place(name: str, member: Member) -> dict[str, Any]:
    """The columns `{name}_archive`, `_offset`, `_size` and `_codec`, from which `core.archive` reads the member."""
    return {
        f"{name}_archive": member.archive,
        f"{name}_offset": member.offset,
        f"{name}_size": member.size,
        f"{name}_codec": member.codec,
    }


def images_below(
    members: Sequence[Member], folder: str | None, where: str, depth: int | None = None
) -> list[tuple[str, Member]]:
    """Each image with its path below `folder`, at whatever depth the source has it.

    A folder of the user may be that very folder. Then, and without `folder`, a path is the last `depth` parts of
    the name; without `depth` it starts where the images' folders part. So an archive, its unpacked form and a
    folder of it give the same paths.
    """
    found = images(members)
    if not found:
        raise InputError(f"{where}: holds no image; {AGAIN}")
    if folder:
        pairs = [(f"/{member.name}".partition(f"/{folder.strip('/')}/")[2], member) for member in found]
        if inside := [(path, member) for path, member in pairs if path]:
            return inside
    if depth:
        return [("/".join(member.name.split("/")[-depth:]), member) for member in found]
    start = _common_parent(member.name for member in found)
    return [(member.name[start:], member) for member in found]


def class_and_file(path: str, member: Member, expected: str) -> tuple[str, str]:
    """Split `class/file`; anything deeper or flatter is an `InputError` that shows the `expected` layout."""
    folder, _, file = path.partition("/")
    if not file or "/" in file:
        raise InputError(f"{label_of(member)}: expected images as {expected}; {AGAIN}")
    return folder, file


def caption_columns(texts: Sequence[str], per_image: int, where: str) -> dict[str, str]:
    """The column `captions`, a JSON list of the first `per_image` texts (0: all); too few are an `InputError`."""
    if len(texts) < max(per_image, 1):
        few = f"{len(texts)} captions, expected {max(per_image, 1)} or more"
        raise InputError(f"{where}: {few}; correct the option 'per_image', or {AGAIN}")
    return {"captions": compact(list(texts[:per_image] if per_image else texts))}


def of_split(members: Sequence[Member], split: str | None, where: str) -> list[Member]:
    """The members of those shards whose file or folder is of the split: ``test/0.tar``, ``data/test-00000.parquet``."""
    if split is None:
        return list(members)
    kept = []
    for member in members:
        shard = Path(member.archive)
        if split in re.split(r"[^A-Za-z0-9]+", f"{shard.parent.name}/{shard.name}"):
            kept.append(member)
    if not kept:
        raise InputError(f"{where}: no shard of the split '{split}'; correct the option 'split', or {AGAIN}")
    return kept


def require(record: Any, fields: Mapping[str, type | tuple[type, ...]], where: str) -> dict[str, Any]:
    """`record` if it is a mapping with these fields of these types, else an `InputError`."""
    for field, kind in fields.items():
        value = record.get(field) if isinstance(record, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise InputError(f"{where}: '{field}' is missing or of the wrong type; {AGAIN}")
    return record


def numbers(value: Any, count: int, where: str) -> list[float]:
    """`value` if it is a list of `count` numbers, else an `InputError`."""
    right = isinstance(value, list) and len(value) == count
    if not right or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in value):
        raise InputError(f"{where}: expected {count} numbers, found {str(value)[:60]}; {AGAIN}")
    return value


def _common_parent(names: Iterable[str]) -> int:
    """Length of the folders ('a/b/') that all names have in common."""
    parents = [name.split("/")[:-1] for name in names]
    shared = 0
    for level in zip(*parents, strict=False):
        if len(set(level)) > 1:
            break
        shared += len(level[0]) + 1
    return shared
