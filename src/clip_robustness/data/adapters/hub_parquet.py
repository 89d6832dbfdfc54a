"""Parquet shards of the model hub: a column of images and, beside it, labels or captions.

Layout of the library `datasets`: ``data/test-00000-of-00001.parquet``, the images in the column `image` (a struct of
bytes and path), the class in `label`. Options:

* `column`: the column of the class (default ``label``): a number, or a text that is the class's WordNet id or name;
* `labels`: what a number is: ``position`` in the label space (the default), index in its ``base`` space, or
  ``name``: the name that the file's own features give to it is the class's;
* `unlabelled: true`: every label is -1;
* `captions`: the column of the captions, a list of texts or a text; then the label is -1; `per_image` (default 5)
  of them are kept, the first; 0 for all;
* `split`: only the shards with that word in their name or folder; `rows`, such as ``{split: test}``: only the rows
  with these values in these columns;
* `attributes`: a list of more columns to keep.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, caption_columns, of_split
from clip_robustness.data.adapters.class_folders import Sample, folder_labels, shard_label
from clip_robustness.data.members import columns, label_names
from clip_robustness.data.rows import Member, Row

KINDS = ("position", "base", "name")


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Id ``SHARD/ROW/NAME``, NAME being the image's file name where the writer kept it."""
    kind = options.get("labels", "position")
    if kind not in KINDS:
        raise InputError(f"{where}: no kind of label '{kind}'; set the option 'labels' to one of {', '.join(KINDS)}")
    found = [member for member in members if member.codec == "parquet"]
    if not found:
        raise InputError(f"{where}: no parquet file with a column of images; {AGAIN}")
    shards: dict[str, list[Member]] = {}
    for member in of_split(found, options.get("split"), where):
        shards.setdefault(member.archive, []).append(member)
    rows = [row for shard in shards for row in _shard_rows(shard, shards[shard], space, options)]
    if not rows:
        raise InputError(f"{where}: no row has the values of the option 'rows', {options.get('rows')}; correct it")
    return rows


def _shard_rows(
    shard: str, members: Sequence[Member], space: Mapping[str, Any], options: Mapping[str, Any]
) -> list[Row]:
    table = columns(shard)
    kept = {name: _column(table, name, shard) for name in options.get("attributes") or ()}
    wanted = [(_column(table, name, shard), value) for name, value in (options.get("rows") or {}).items()]
    captions = _column(table, options["captions"], shard) if options.get("captions") else None
    values = _labels(table, shard, options) if captions is None and not options.get("unlabelled") else None
    known = folder_labels(space) if values else None
    rows = []
    for member in members:
        row, where = member.offset, f"{shard}, row {member.offset}"
        if any(isinstance(column[row], np.ndarray) or column[row] != value for column, value in wanted):
            continue
        attributes = {name: column[row] for name, column in kept.items()}
        if captions is not None:
            attributes |= caption_columns(_texts(captions[row], where), options.get("per_image", 5), where)
        sample = Sample(f"{Path(shard).stem}/{member.name}", member, values[row] if values else 0)
        if not isinstance(sample.value, int | str):
            raise InputError(f"{where}: its class is {sample.value!r}, expected a number or a name; {AGAIN}")
        rows.append(Row(sample.image_id, member, shard_label(sample, known, space, where), attributes))
    return rows


def _labels(table: Mapping[str, np.ndarray], shard: str, options: Mapping[str, Any]) -> list[Any]:
    """For each row of the shard a position in the label space, or what `folder_labels` knows of a class."""
    name, kind = options.get("column", "label"), options.get("labels", "position")
    # a column with a null holds floats
    values = [int(v) if isinstance(v, float) and v.is_integer() else v for v in _column(table, name, shard)]
    if kind == "base":
        return [str(value) if isinstance(value, int) else value for value in values]
    if kind == "name":
        names = label_names(shard, name)
        if names is None:
            raise InputError(f"{shard}: does not name the classes of '{name}'; set the option 'labels' otherwise")
        return [names[value] if isinstance(value, int) and 0 <= value < len(names) else None for value in values]
    return values


def _column(table: Mapping[str, np.ndarray], name: str, shard: str) -> list[Any]:
    if name not in table:
        raise InputError(f"{shard}: no column '{name}', it has {', '.join(table)}; correct the data set's options")
    return table[name].tolist()


def _texts(value: object, where: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | np.ndarray) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: the captions are no list of texts; {AGAIN}")
    return list(texts)
