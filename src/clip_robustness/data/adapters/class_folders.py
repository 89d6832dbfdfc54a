"""Images in one folder a class, and the shards that hubs make of them.

ImageNet-A, -R, -Sketch, Stylized-ImageNet: WordNet ids. ImageNet-V2: class indices 0..999. Folders above the class
folder do not matter, so the archive, its unpacked form and a copy elsewhere give the same ids:
``n01498041/0.000116_digital clock.jpg``. The `stylized` set of bethgelab/model-vs-human has its 16 categories in
the file names instead: ``dnn/session-1/0350_sty_dnn_0_car_00_car-0149-ILSVRC2012-val-00049427.png``.

Shards: webdataset (``s0000012.jpg`` beside ``s0000012.cls``) and parquet (columns `image` and `label`). Options:

* `unlabelled: true`: every label is -1, such as for ImageNet-O, whose images are of none of the classes;
* `column`: the column of a parquet file that says the class, by number, WordNet id or name (default `label`).
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, label_of
from clip_robustness.data.members import columns, group_by_key, images, label_names, read_all
from clip_robustness.data.rows import Member, Row

SESSION_FILE = re.compile(r"\d+_[a-z]+_dnn_[^_]+_([a-z]+)_.+")


class Sample(NamedTuple):
    """An image of a shard with the class that the shard gives it: a number, a WordNet id or a name."""

    image_id: str
    member: Member
    value: int | str


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Label = the class whose WordNet id, index of the base space, or name is the folder's name."""
    labels = None if options.get("unlabelled") else folder_labels(space)
    column = options.get("column", "label")
    if samples := shard_samples(members, where, column):
        if labels is not None:
            check_names(samples, column, space)
        return [Row(s.image_id, s.member, shard_label(s, labels, space, where)) for s in samples]
    rows = []
    for member in images(members):
        folder, file = ("", *member.name.split("/"))[-2:]
        if folder.startswith("session-") and (match := SESSION_FILE.fullmatch(file)):
            folder = match[1]
        rows.append(Row(f"{folder}/{file}", member, folder_label(folder, member, labels, space, where)))
    return rows


def folder_labels(space: Mapping[str, Any]) -> dict[str, int]:
    """Every folder name that stands for a class: its WordNet ids, else base indices and names.

    `wnids` of a space is one id, or a list of ids, a class. Base indices come from `members`.
    """
    labels: dict[str, int] = {}
    for label, name in enumerate(space["classes"]):
        labels.setdefault(name, label)
    for label, indices in enumerate(space["members"]):
        for index in indices:
            labels[str(index)] = label
    for label, wnids in enumerate(space.get("wnids") or []):
        for wnid in [wnids] if isinstance(wnids, str) else wnids:
            labels[wnid] = label
    return labels


def folder_label(
    folder: str, member: Member, labels: Mapping[str, int] | None, space: Mapping[str, Any], where: str
) -> int:
    """The label of a folder's name; -1 when `labels` is None."""
    if labels is None:
        return -1
    if folder not in labels:
        known = f"a class of the label space '{space.get('name', '?')}'"
        remedy = "correct 'labels' or 'path' of the data set, or name the folder of the class folders"
        raise InputError(f"{where}, '{member.name}': its folder '{folder}' is not {known}; {remedy}")
    return labels[folder]


def shard_samples(members: Sequence[Member], where: str, column: str = "label") -> list[Sample]:
    """The images of webdataset shards or parquet files, with their classes; nothing if these are neither.

    The id is the sample's key, or ``FILE/ROW/NAME`` of a parquet file. Errors: `InputError` when a sample has no
    image or no class, or the parquet file no such column.
    """
    rows = [member for member in members if member.codec == "parquet"]
    if rows:
        return _parquet_samples(rows, column)
    if any(member.name.lower().endswith(".cls") for member in members):
        return _webdataset_samples(members, where)
    return []


def shard_label(sample: Sample, labels: Mapping[str, int] | None, space: Mapping[str, Any], where: str) -> int:
    """A number counts the classes of the label space; a name is looked up as a folder's. -1 without `labels`."""
    if labels is None:
        return -1
    value, count = sample.value, len(space["classes"])
    if isinstance(value, str):
        return folder_label(value, sample.member, labels, space, where)
    if not 0 <= value < count:
        known = f"0..{count - 1} of the label space '{space.get('name', '?')}'"
        raise InputError(f"{label_of(sample.member)}: its class is {value}, expected {known}; correct 'labels'")
    return value


def check_names(samples: Sequence[Sample], column: str, space: Mapping[str, Any]) -> None:
    """A parquet file that names its classes must have as many as the label space: else its numbers mean others."""
    for archive in dict.fromkeys(s.member.archive for s in samples if s.member.codec == "parquet"):
        names = label_names(archive, column)
        if names is not None and len(names) != len(space["classes"]):
            wanted = f"the {len(space['classes'])} of the label space '{space.get('name', '?')}'"
            raise InputError(
                f"{archive}: its column '{column}' counts {len(names)} classes, not {wanted}; fix 'labels'"
            )


def _parquet_samples(rows: Sequence[Member], column: str) -> list[Sample]:
    tables: dict[str, Any] = {}
    samples = []
    for member in rows:
        if member.archive not in tables:
            table = columns(member.archive)
            if column not in table:
                known = ", ".join(table) or "none"
                remedy = f"set the option 'column' of the data set to one of: {known}"
                raise InputError(f"{member.archive}: no column '{column}' with the classes; {remedy}")
            tables[member.archive] = table[column].tolist()
        value = tables[member.archive][member.offset]
        if not isinstance(value, int | str):
            raise InputError(f"{label_of(member)}: its class is {value!r}, expected a number or a name; {AGAIN}")
        samples.append(Sample(f"{Path(member.archive).stem}/{member.name}", member, value))
    return samples


def _webdataset_samples(members: Sequence[Member], where: str) -> list[Sample]:
    pairs = []
    for key, sample in group_by_key(members).items():
        pictures = images(sample.values())
        if not pictures and "cls" not in sample:
            continue  # a shard may hold other files, such as a list of classes
        if len(pictures) != 1 or "cls" not in sample:
            found = ", ".join(sample)
            raise InputError(f"{where}, sample '{key}': holds {found}, expected one image and one .cls; {AGAIN}")
        pairs.append((key, pictures[0], sample["cls"]))
    texts = read_all(pair[2] for pair in pairs)
    samples = []
    for (key, picture, label), text in zip(pairs, texts, strict=True):
        if not text.strip().isdigit() or len(text) > 20:
            raise InputError(f"{label_of(label)}: {text[:20]!r} is no class number; {AGAIN}")
        samples.append(Sample(key, picture, int(text)))
    return samples
