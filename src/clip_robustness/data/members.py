"""The files of a data set's sources, whatever they come in: tars, zips, parquet files, webdataset shards, folders."""

import contextlib
import itertools
import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.archive import ArchiveReader, ParquetImages, read_member
from clip_robustness.core.io import InputError
from clip_robustness.data.containers import (
    FETCH_AGAIN,
    YOURS,
    clean_name,
    is_image,
    parquet_members,
    tar_members,
    zip_entries,
)
from clip_robustness.data.rows import Member
from clip_robustness.data.unpack import decrypt_zip, is_gzip, unpack_gzip

GZIPS = (".tar.gz", ".tgz")
ARCHIVES = (*GZIPS, ".tar", ".zip", ".parquet")
UNREADABLE = (".rar", ".7z", ".bz2", ".tbz", ".tbz2", ".xz", ".txz", ".zst")


def list_members(sources: Sequence[Path], password: str | None = None) -> list[Member]:
    """Every file of the sources, images or not, sorted by name, then by archive.

    A source is a tar, a gzipped tar (unpacked once, beside it), a zip (an encrypted one is repacked once, with
    `password`), a parquet file, any other single file, or a folder: of files, or of such archives.
    Errors: `InputError` for a source that is missing, empty, damaged or malicious, or that names a file twice.
    """
    return sorted(itertools.chain.from_iterable(_list_source(source, password) for source in sources))


def images(members: Iterable[Member]) -> list[Member]:
    """Those that are images: by their suffix, or rows of a parquet file."""
    return [member for member in members if member.codec == "parquet" or is_image(member.name)]


def read(member: Member) -> bytes:
    """The bytes of one member, such as a file of labels. Errors as in `core.archive.ArchiveReader.read`."""
    return read_member(member.archive, member.offset, member.size, member.name, member.codec)


def read_all(members: Iterable[Member]) -> Iterator[bytes]:
    """The bytes of each, as `read`, without opening their archives anew: for the labels of a webdataset."""
    with ArchiveReader() as reader:
        for member in members:
            yield reader.read(member.archive, member.offset, member.size, member.name, member.codec)


def group_by_key(members: Iterable[Member]) -> dict[str, dict[str, Member]]:
    """The samples of webdataset shards: ``{"00012": {"jpg": Member, "cls": Member}}``, sorted by key.

    The key is the name up to the first dot of its last part, the extension (in lower case) the rest. Where
    shards count from 0 each, all keys begin with their shard: ``shard-3/00012``.
    Source: the naming convention of github.com/webdataset/webdataset.
    """
    split = [(*_key(member.name), member) for member in members]
    if len({(key, extension) for key, extension, _ in split}) < len(split):
        split = [(f"{Path(member.archive).stem}/{key}", extension, member) for key, extension, member in split]
    samples: dict[str, dict[str, Member]] = {}
    for key, extension, member in sorted(split):
        if extension in samples.setdefault(key, {}):
            raise InputError(f"{member.archive}, member '{member.name}': its sample holds two '{extension}'")
        samples[key][extension] = member
    return samples


def _key(name: str) -> tuple[str, str]:
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return folder + slash + stem, extension.lower()


def columns(archive: str) -> Mapping[str, np.ndarray]:
    """The columns of a parquet file but that of the images; row r belongs to the member with offset r."""
    with contextlib.closing(_parquet(archive)) as file:
        return io.table_columns(file.table(file.others))


def label_names(archive: str, column: str = "label") -> list[str] | None:
    """The class names that a hub's parquet file gives to the numbers of `column`, None if it gives none.

    Source: the features in the schema's metadata, as the library `datasets` writes them.
    """
    with contextlib.closing(_parquet(archive)) as file:
        features: Any = file.features()
    feature = features.get(column) if isinstance(features, dict) else None
    names = feature.get("names") if isinstance(feature, dict) else None
    return list(map(str, names)) if isinstance(names, list) else None


def _parquet(archive: str) -> ParquetImages:
    try:
        return ParquetImages(archive)
    except OSError as error:
        raise InputError(f"{archive}: cannot read it ({error.strerror or error}); {FETCH_AGAIN}") from None


def _list_source(source: Path, password: str | None) -> list[Member]:
    if source.is_dir():
        members = _list_folder(source, password)
    elif not source.exists():
        raise InputError(f"{source}: no such file or folder; fetch it, or name {YOURS}")
    else:
        members = _unique(_list_file(source, password), source)
    if not members:
        raise InputError(f"{source}: holds no file")
    return members


def _list_file(path: Path, password: str | None) -> list[Member]:
    name = path.name.lower()
    if name.endswith(UNREADABLE):
        raise InputError(f"{path}: expected a folder, {', '.join(ARCHIVES)}; unpack it and name {YOURS}")
    if name.endswith(GZIPS):  # ImageNet-V2's are plain tars under that name
        return tar_members(unpack_gzip(path) if is_gzip(path) else path)
    if name.endswith(".tar"):
        return tar_members(path)
    if name.endswith((".zip", ".whl")):
        entries = zip_entries(path)
        if any(entry.encrypted for entry in entries):
            return tar_members(decrypt_zip(path, entries, password))
        return [Member(entry.name, str(path), entry.offset, entry.size, entry.codec) for entry in entries]
    if name.endswith(".parquet"):
        return parquet_members(path)
    return [Member(path.name, str(path), 0, _file_size(path))]


def _list_folder(folder: Path, password: str | None) -> list[Member]:
    """The files below it. Archives among them are looked into only where there is no image beside them.

    So a folder of shards is what its shards hold, while an archive that lies about in a folder of images stays shut.
    """
    files = list(_walk_folder(folder))
    if any(is_image(member.name) for member in files):
        return files
    names = {member.archive for member in files}
    members = []
    for member in files:
        path = Path(member.archive)
        if not path.name.lower().endswith(ARCHIVES):
            members.append(member)
        elif not _has_plain_twin(path, names):
            members.extend(_unique(_list_file(path, password), path))
    return members


def _has_plain_twin(path: Path, names: set[str]) -> bool:
    """Whether it was unpacked before: then the tar beside it is listed too."""
    suffix = next((suffix for suffix in (*GZIPS, ".zip") if path.name.lower().endswith(suffix)), None)
    return suffix is not None and str(path)[: -len(suffix)] + ".tar" in names


def _walk_folder(folder: Path) -> Iterator[Member]:
    """Symbolic links are followed: they are the user's own, and a hub's cache consists of them."""
    entered = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(parent)) in entered:  # a link to a folder above itself would never end
            folders.clear()
            continue
        entered.add(real)
        for file in sorted(files):
            path = Path(parent, file)
            name = path.relative_to(folder).as_posix()
            if is_image(name) and not (name.isprintable() and "\\" not in name):
                raise InputError(f"{folder}, {name!r}: the name is not plain text; rename it")
            if (clean := clean_name(name, f"{folder}, '{name}'")) is not None:
                yield Member(clean, str(path), 0, _file_size(path))


def _unique(members: list[Member], source: Path) -> list[Member]:
    for one, other in itertools.pairwise(sorted(members)):
        if one.name == other.name:
            raise InputError(f"{source}, member '{one.name}': stands there twice; {FETCH_AGAIN}")
    return members


def _file_size(path: Path) -> int:
    try:
        state = path.stat()
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    if not stat.S_ISREG(state.st_mode):  # a pipe would be waited on for ever
        raise InputError(f"{path}: a device or pipe has no place in a data set; move it away")
    return state.st_size


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot read this folder ({error.strerror})")
