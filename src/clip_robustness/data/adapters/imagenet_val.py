"""ILSVRC2012's validation images, in every layout that people have them in.

* flat ``ILSVRC2012_val_00000001.JPEG``, as image-net.org gives them, with one of: the devkit
  (``data/ILSVRC2012_validation_ground_truth.txt`` and ``data/meta.mat``, unpacked or as ILSVRC2012_devkit_t12.tar.gz),
  Kaggle's ``LOC_val_solution.csv``, or a ``val.txt`` of lines ``ILSVRC2012_val_00000001.JPEG 65`` (class indices);
* flat ``ILSVRC2012_val_00000001_n01751748.JPEG``, as a hub's val_images.tar.gz has them;
* one folder a WordNet id, as valprep.sh and torchvision make them (``val/`` beside ``meta.bin``, which is not read);
* a hub's parquet files (`label` = class index) and webdataset shards (``.jpg`` and ``.cls``).

Class indices count the WordNet ids in sorted order. The devkit's ids do not: they are its own numbers, see meta.mat.
"""

import concurrent.futures
import gzip
import io
import multiprocessing
import re
import resource
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, label_of, parse_csv, read_text
from clip_robustness.data.adapters.class_folders import (
    check_names,
    folder_label,
    folder_labels,
    shard_label,
    shard_samples,
)
from clip_robustness.data.containers import tar_members
from clip_robustness.data.members import images, read
from clip_robustness.data.rows import Member, Row

STEM = re.compile(r"(ILSVRC2012_val_\d{8})(?:_(n\d{8}))?")
LISTED = re.compile(r"(?:.*/)?(ILSVRC2012_val_\d{8})\.JPEG\s+(\d+)")
TRUTH, META, DEVKIT = "ILSVRC2012_validation_ground_truth.txt", "meta.mat", "ILSVRC2012_devkit_t12.tar.gz"
LARGEST_DEVKIT = 64 << 20  # bytes of it, unpacked; it has 3 MB
LARGEST_MEMORY = 4 << 30  # bytes of the process that reads its table
KAGGLE, INDICES = "LOC_val_solution.csv", "val.txt"


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """The id is the official stem ``ILSVRC2012_val_00000001`` wherever the source tells it, so that layouts agree.

    A shard that does not name its images gives ids of its own; nothing that is told of single images, such as the
    annotations of ImageNet-X, can be joined to those. Other images beside them (the training set) are left out.
    Errors: `InputError` for flat images without their labels, and for a label that is not in the space.
    """
    labels, column = folder_labels(space), options.get("column", "label")
    if samples := shard_samples(members, where, column):
        check_names(samples, column, space)
        named = [(STEM.search(s.image_id), s) for s in samples]
        return [Row(m[1] if m else s.image_id, s.member, shard_label(s, labels, space, where)) for m, s in named]
    pictures = images(members)
    official = [member for member in pictures if STEM.match(_file(member))]
    truth: Mapping[str, str] | None = None
    rows = []
    for member in official or pictures:
        folder, match = ("", *member.name.split("/"))[-2], STEM.match(_file(member))
        if match and not match[2] and folder not in labels:
            truth = _truth(members, where) if truth is None else truth
            if match[1] not in truth:
                raise InputError(f"{label_of(member)}: {where} has no label for it; {AGAIN}")
            folder = truth[match[1]]
        label = folder_label(match[2] if match and match[2] else folder, member, labels, space, where)
        rows.append(Row(match[1] if match else f"{folder}/{_file(member)}", member, label))
    return rows


def _file(member: Member) -> str:
    return member.name.rpartition("/")[2]


def _truth(members: Sequence[Member], where: str) -> dict[str, str]:
    """The WordNet id, or class index, of each stem, by whichever list of labels is there."""
    known: dict[str, Callable[[Member], dict[str, str]]] = {KAGGLE: _kaggle, INDICES: _indices, DEVKIT: _packed_devkit}
    found = {_file(member): member for member in reversed(members)}
    if TRUTH in found and META in found:
        return _devkit(read(found[TRUTH]), read(found[META]), found[TRUTH], found[META])
    for name, parse in known.items():
        if name in found:
            return parse(found[name])
    remedy = f"name {DEVKIT} beside the images, as a second source, or a folder that holds both"
    raise InputError(f"{where}: its images lie in no class folders, and there are no labels; {remedy}")


def _devkit(truth: bytes, meta: bytes, truth_at: Member, meta_at: Member) -> dict[str, str]:
    """Line i of the ground truth is the devkit's id of image i; meta.mat says which WordNet id that is."""
    wnids = _wnids(meta, meta_at)
    labels = {}
    for number, line in enumerate(truth.split(), 1):
        if not line.isdigit() or len(line) > 9 or int(line) not in wnids:
            found = line.decode(errors="replace")
            raise InputError(f"{label_of(truth_at)}, line {number}: '{found}' is no class of {META}; {AGAIN}")
        labels[f"ILSVRC2012_val_{number:08d}"] = wnids[int(line)]
    return labels


def _wnids(meta: bytes, at: Member) -> dict[int, str]:
    """Class of each of the devkit's ids. In a process of its own: a damaged file takes SciPy's reader down."""
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, context, _limit_memory) as alone:
            return alone.submit(_read_synsets, meta).result()
    except Exception as error:  # SciPy raises a dozen types for broken files
        raise InputError(f"{label_of(at)}: not the devkit's table of classes ({error}); {AGAIN}") from None


def _limit_memory() -> None:
    limit = min(number for number in (LARGEST_MEMORY, *resource.getrlimit(resource.RLIMIT_AS)) if number > 0)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _read_synsets(meta: bytes) -> dict[int, str]:
    import scipy.io

    synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True, variable_names=["synsets"])["synsets"]
    fields = [synsets[name].tolist() for name in ("ILSVRC2012_ID", "WNID", "num_children")]
    # Synsets above the classes have children, and numbers above the classes'.
    return {int(number): str(wnid) for number, wnid, children in zip(*fields, strict=True) if not children}


def _packed_devkit(member: Member) -> dict[str, str]:
    found = {}
    try:
        with gzip.open(io.BytesIO(read(member))) as packed:
            plain = packed.read(LARGEST_DEVKIT + 1)
        if len(plain) > LARGEST_DEVKIT:
            raise InputError(f"{label_of(member)}: grows beyond {LARGEST_DEVKIT:,} bytes, too much for it; {AGAIN}")
        with tempfile.NamedTemporaryFile(suffix=".tar") as file:
            file.write(plain)
            file.flush()
            try:
                inside = tar_members(Path(file.name))
            except InputError as error:
                raise InputError(str(error).replace(file.name, label_of(member))) from None
        for inner in inside:
            found[_file(inner)] = plain[inner.offset : inner.offset + inner.size]
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{label_of(member)}: not a whole .tar.gz ({error}); {AGAIN}") from None
    if missing := [name for name in (TRUTH, META) if name not in found]:
        raise InputError(f"{label_of(member)}: holds no {missing[0]}; {AGAIN}")
    return _devkit(found[TRUTH], found[META], member, member)


def _kaggle(member: Member) -> dict[str, str]:
    """``ILSVRC2012_val_00048981,n03995372 85 1 499 272``: the WordNet id, then boxes."""
    rows = parse_csv(member, ("ImageId", "PredictionString"))
    return {row["ImageId"]: row["PredictionString"].split()[0] for row in rows if row["PredictionString"].strip()}


def _indices(member: Member) -> dict[str, str]:
    """``ILSVRC2012_val_00000001.JPEG 65``: the class index. Kaggle's ImageSets, without .JPEG, count the images."""
    lines = (LISTED.fullmatch(line.strip()) for line in read_text(member).splitlines())
    return {match[1]: match[2] for match in lines if match}
