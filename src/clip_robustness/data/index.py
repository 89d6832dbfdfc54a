"""The index of a data set: one row an image, and where its bytes lie."""

import collections
import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import archive, io
from clip_robustness.core.io import InputError
from clip_robustness.data import adapters
from clip_robustness.data.containers import IMAGE_SUFFIXES
from clip_robustness.data.members import images, list_members
from clip_robustness.data.rows import Member, Row

Adapter = Callable[[Sequence[Member], Mapping[str, Any], str, Mapping[str, Any]], list[Row]]
SHOWN = 5
HALVES = re.compile("[\ud800-\udfff]")  # of characters: JSON may hold them, no file of text can
AGAIN = "fetch it again, or name your own copy under 'local:' in the config"


def build_index(dataset: Mapping[str, Any], sources: Sequence[Path], labels: Path, out: Path) -> int:
    """Index folders and archives, in place, and return the number of images.

    `dataset` is the data set's entry with its `name`: `family` is the module of `data.adapters` that reads
    it, `options` (optional) are for that adapter (`password` is for encrypted zips), `path` (optional) is
    the folder in the sources that holds the images, `images` (optional) is their number. `labels` is the
    JSON of its label space. Rows are ordered by label, then id, whatever order the sources have.
    Errors: `InputError` for a source, name, label or number of images that does not fit.
    """
    where = f"{_name(sources)} (data set {dataset.get('name', '?')})"
    adapt = find_adapter(dataset["family"], where)
    options, space = dataset.get("options") or {}, io.read_json(labels)
    members = _below(list_members(sources, options.get("password")), dataset.get("path"), sources)
    rows = adapt(members, space, where, options)
    _check_count(rows, dataset.get("images"), space, where)
    _check_unique(rows, where)
    rows.sort(key=lambda row: (row.label, row.image_id))
    columns: dict[str, Any] = {
        "image_id": np.array([row.image_id for row in rows], dtype=object),
        "archive": np.array([row.member.archive for row in rows], dtype=object),
        "offset": np.array([row.member.offset for row in rows], dtype=np.int64),
        "size": np.array([row.member.size for row in rows], dtype=np.int64),
        "codec": np.array([row.member.codec for row in rows], dtype=object),
        "label": np.array([row.label for row in rows], dtype=np.int32),
    }
    archive.check_index(columns, where)
    io.write_parquet(out, columns | _attributes(rows, frozenset(columns), where))
    return len(rows)


def find_adapter(family: str, where: str) -> Adapter:
    """The function `adapt` of the module ``data.adapters.{family}``."""
    known = sorted(path.stem for path in Path(adapters.__path__[0]).glob("[a-z]*.py"))
    module = importlib.import_module(f"{adapters.__name__}.{family}") if family in known else None
    if not hasattr(module, "adapt"):
        raise InputError(f"{where}: no adapter for the family '{family}', expected {', '.join(known)}")
    return module.adapt  # type: ignore[union-attr]


def _name(sources: Sequence[Path]) -> str:
    if not sources:
        raise InputError("no source to index; fetch the data set's archives, or name your copy under 'local:'")
    return str(sources[0]) + (f" and {len(sources) - 1} more" if len(sources) > 1 else "")


def _below(members: list[Member], folder: str | None, sources: Sequence[Path]) -> list[Member]:
    """The images below `folder`, at whatever depth the sources have it; other files wherever they lie.

    A folder that the user already has may be that very folder, so there nothing found means everything.
    """
    if not folder:
        return members
    found = {m for m in images(members) if f"/{folder.strip('/')}/" in f"/{m.name}"}
    if not found:
        if any(source.is_dir() for source in sources):
            return members
        first = next((member.name.rpartition("/")[0] for member in images(members)), "")
        remedy = f"correct 'path' of the data set: its images lie in folders such as '{first}'"
        raise InputError(f"{_name(sources)}: no image below '{folder}'; {remedy}")
    others = set(images(members)) - found
    return [member for member in members if member not in others]


def _check_count(rows: list[Row], expected: int | None, space: Mapping[str, Any], where: str) -> None:
    if not rows:
        raise InputError(f"{where}: holds no image of the data set ({', '.join(sorted(IMAGE_SUFFIXES))})")
    if expected is None or len(rows) == expected:
        return
    off = f"{expected - len(rows):,} missing" if len(rows) < expected else f"{len(rows) - expected:,} too many"
    labels = {row.label for row in rows}
    empty = [name for label, name in enumerate(space["classes"]) if label not in labels]
    if empty and labels != {-1}:
        more = f" and {len(empty) - SHOWN:,} more" if len(empty) > SHOWN else ""
        off += f"; no image at all of {', '.join(empty[:SHOWN])}{more}"
    remedy = "fetch it again, or correct 'images' in datasets.yaml if the release changed"
    raise InputError(f"{where}: {len(rows):,} images, expected {expected:,} ({off}); {remedy}")


def _check_unique(rows: list[Row], where: str) -> None:
    counts = collections.Counter(row.image_id for row in rows)
    if len(counts) < len(rows):
        twice, count = counts.most_common(1)[0]
        one, other = [row.member for row in rows if row.image_id == twice][:2]
        places = f"'{one.name}' of {one.archive} and '{other.name}' of {other.archive}"
        remedy = "remove one copy, or correct 'path' of the data set"
        raise InputError(f"{where}: the image id '{twice}' stands there {count} times: {places}; {remedy}")


def _attributes(rows: list[Row], taken: frozenset[str], where: str) -> dict[str, np.ndarray]:
    """Columns of int32 (int64 where needed), float64 or text; a None is a NaN among numbers, else a null."""
    names = list(rows[0].attributes)
    for row in rows:
        if list(row.attributes) != names or taken & set(names):
            keys = f"attributes {', '.join(row.attributes)}; the first row has {', '.join(names)}"
            raise InputError(f"{where}, image '{row.image_id}': {keys}; all need the same, none of {sorted(taken)}")
    columns = {}
    for name in names:
        values = [row.attributes[name] for row in rows]
        present = [value for value in values if value is not None]
        if all(isinstance(value, str) for value in present):
            if odd := [value for value in present if HALVES.search(value)]:
                raise InputError(f"{where}: attribute '{name}': {odd[0][:60]!r} is no text; {AGAIN}")
            columns[name] = np.array(values, dtype=object)
        elif not all(isinstance(value, int | float | np.integer | np.floating) for value in present):
            kinds = sorted({type(value).__name__ for value in present})
            raise InputError(f"{where}: attribute '{name}' mixes {', '.join(kinds)}; expected numbers, or text")
        elif len(present) < len(values) or any(isinstance(value, float | np.floating) for value in present):
            columns[name] = np.array([np.nan if value is None else value for value in values], np.float64)
        else:
            small = all(-(2**31) <= value < 2**31 for value in values)
            if not all(-(2**63) <= value < 2**63 for value in values):
                raise InputError(f"{where}: attribute '{name}': {max(values, key=abs)} is too large; {AGAIN}")
            columns[name] = np.array(values, dtype=np.int32 if small else np.int64)
    return columns
