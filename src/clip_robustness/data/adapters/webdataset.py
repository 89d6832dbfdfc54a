"""Shards of tars, as CLIP_benchmark and timm put data sets on the model hub.

Layout (LAION-AI/CLIP_benchmark, webdataset_builder.py): ``test/0.tar``, ``test/1.tar``, ... with a sample's files
side by side: ``s0000012.jpg`` (or .jpeg, .png, .webp) and ``s0000012.cls``, its label as a number, or
``s0000012.txt``, its captions, one a line. Class names and templates that lie beside the shards are not used: the
project has its own. Options:

* `captions: true`: attribute `captions`, label -1; `per_image` (default 5) captions an image, the first; 0 for all;
* `labels`: what the numbers are: ``position`` in the label space (the default), or index in its ``base`` space;
* `unlabelled: true`: every label is -1;
* `split`: only the shards in a folder of that name, or with that word in their own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, caption_columns, label_of, of_split, read_text
from clip_robustness.data.adapters.class_folders import folder_labels, shard_label, shard_samples
from clip_robustness.data.members import group_by_key, images
from clip_robustness.data.rows import Member, Row

KINDS = ("position", "base")


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Id = the sample's key, with its shard before it where shards repeat keys."""
    chosen = of_split(members, options.get("split"), where)
    # lists beside the shards, such as nshards.txt of each split, would count as samples
    chosen = [member for member in chosen if member.archive.endswith(".tar")] or chosen
    if options.get("captions"):
        return _caption_rows(chosen, where, options.get("per_image", 5))
    kind = options.get("labels", "position")
    if kind not in KINDS:
        raise InputError(f"{where}: no kind of label '{kind}'; set the option 'labels' to one of {', '.join(KINDS)}")
    labels = None if options.get("unlabelled") else folder_labels(space)
    samples = shard_samples(chosen, where)
    if not samples:
        remedy = "set the option 'captions' to true if they hold captions"
        raise InputError(f"{where}: no sample with a .cls file; {remedy}, or {AGAIN}")
    if kind == "base":
        samples = [sample._replace(value=str(sample.value)) for sample in samples]
    return [Row(sample.image_id, sample.member, shard_label(sample, labels, space, where)) for sample in samples]


def _caption_rows(members: Sequence[Member], where: str, per_image: int) -> list[Row]:
    rows = []
    for key, sample in group_by_key(members).items():
        pictures, source = images(sample.values()), sample.get("txt")
        if pictures and (len(pictures) > 1 or source is None):
            found = ", ".join(sample)
            raise InputError(f"{where}, sample '{key}': holds {found}, expected one image and one .txt; {AGAIN}")
        if pictures and source:
            lines = [line for line in read_text(source).splitlines() if line.strip()]
            rows.append(Row(key, pictures[0], -1, caption_columns(lines, per_image, label_of(source))))
    return rows
