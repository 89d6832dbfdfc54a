"""What lies where in a tar, a zip or a parquet file. Only headers are read, and nothing is unpacked.

Refused, each with archive, member and remedy: damaged and truncated archives, devices, images that are links,
names that lead out of the archive, bombs. What a hostile archive claims about its headers is bounded too.
"""

import io as streams
import re
import stat
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from clip_robustness.core.archive import ParquetImages, largest_inflated
from clip_robustness.core.io import InputError
from clip_robustness.data.rows import Member

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"))
FETCH_AGAIN = "delete it and fetch it again"
YOURS = "your copy under 'local:' in the config"

LARGEST_HEADER = 1 << 20  # bytes of one tar member's headers: long names and pax records are read into memory
LARGEST_DIRECTORY = 128 << 20  # bytes of a zip's directory: a million members
MOST_GLOBAL = 100  # pax records for all members of a tar; Git writes one
DIGITS = re.compile(rb"\d{100}")
MOST_MEMBERS = 5_000_000  # the largest archive of the papers' data sets, ImageNet-C's blur, has one million
ENCRYPTED, SIZES_FOLLOW = 0x1, 0x8  # flags of a zip member
LOCAL_HEADER = struct.Struct("<4s22xHH")


def is_image(name: str) -> bool:
    """By its suffix; hidden files are none, such as the '._x.jpg' that macOS leaves in archives."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and f".{base.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


def clean_name(name: str, where: str) -> str | None:
    """The parts of `name` joined by '/'; None for a file to pass over: hidden, or of a name that is no text."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    plain = name.isprintable() and "\\" not in name
    if name.startswith("/") or ".." in parts or (not plain and is_image(name)):
        raise InputError(f"{where}: its name leads out of the archive or is no plain path; {FETCH_AGAIN}")
    return "/".join(parts) if plain and parts and not parts[-1].startswith(".") else None


class _Headers(streams.BufferedReader):
    """A file up to its byte `end`, of which only headers are read: `limit` bytes since `since` was set to 0."""

    def __init__(self, path: Path, limit: int, end: int):
        super().__init__(streams.FileIO(path))
        self.limit, self.end, self.since = limit, end, 0

    def read(self, size: int | None = -1, /) -> bytes:
        most = self.limit + 1 if size is None or size < 0 else min(size, self.limit + 1)
        data = super().read(max(min(most, self.end - self.tell()), 0))
        self.since += len(data)
        if self.since > self.limit:
            raise InputError(f"{self.name}: headers of more than {self.limit:,} bytes are a bomb; {FETCH_AGAIN}")
        return data


class _Info(tarfile.TarInfo):
    """A member's headers, looked at before Python is: until 3.11.10 and 3.12.6 it took quadratic time over long runs of
    digits (CVE-2024-6232)."""

    def _proc_pax(self, archive):
        start, size = archive.fileobj.tell(), -(-self.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if DIGITS.search(archive.fileobj.read(size)):
            raise InputError(f"{archive.fileobj.name}: a header of digits alone is a bomb; {FETCH_AGAIN}")
        archive.fileobj.seek(start)
        return super()._proc_pax(archive)  # type: ignore[misc]


def tar_members(path: Path) -> list[Member]:
    """The files of an uncompressed tar, by its headers alone; of the tars inside, when it holds no image itself.

    That is how ImageNet's training set comes: a tar of a tar a class. Member ``n01440764.tar`` becomes a folder.
    """
    members = _walk_tar(path, 0, path.stat().st_size)
    if any(is_image(member.name) for member in members):
        return members
    inner = [member for member in members if member.name.endswith(".tar")]
    found = [member for member in members if not member.name.endswith(".tar")]
    for outer in inner:
        folder = outer.name.removesuffix(".tar")
        for member in _walk_tar(path, outer.offset, outer.offset + outer.size):
            found.append(member._replace(name=f"{folder}/{member.name}"))
            _check_count(path, len(found))
    return found


def _walk_tar(path: Path, start: int, end: int) -> list[Member]:
    members: list[Member] = []
    position, fault = -1, ""
    try:
        with _Headers(path, LARGEST_HEADER, end) as file:
            file.seek(start)
            archive = tarfile.TarFile(fileobj=file, tarinfo=_Info)
            while (info := archive.next()) is not None:
                vars(archive)["members"].clear()  # a million headers need not stay in memory
                file.since = sum(map(len, archive.pax_headers.values()))  # of the whole archive: they pile up
                where = f"{path}, member '{info.name}'"
                if len(archive.pax_headers) > MOST_GLOBAL:  # each is applied to every member that follows
                    raise InputError(
                        f"{where}: more than {MOST_GLOBAL} headers for all members are a bomb; {FETCH_AGAIN}"
                    )
                if info.offset_data <= position or info.size < 0:
                    raise InputError(f"{where}: its header leads backwards; {FETCH_AGAIN}")
                position = info.offset_data
                if (name := _tar_name(info, where)) is not None:
                    members.append(Member(name, str(path), info.offset_data, info.size))
                    _check_count(path, len(members))
            fault = _fault_at_end(path, archive.offset, end)
    except (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError) as error:
        fault = str(error)
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    if fault:
        last = f", after member '{members[-1].name}'" if members else ""
        raise InputError(f"{path}{last}: not a whole tar ({fault}); {FETCH_AGAIN}")
    return members


def _tar_name(info: tarfile.TarInfo, where: str) -> str | None:
    if info.ischr() or info.isblk() or info.isfifo():
        raise InputError(f"{where}: a device or pipe has no place in a data set; {FETCH_AGAIN}")
    if info.isdir():
        return None
    if info.issym() or info.islnk() or info.issparse() or not info.isreg():
        if not is_image(info.name):
            return None
        kind = "a link" if info.issym() or info.islnk() else "not stored as plain bytes"
        raise InputError(f"{where}: the image is {kind}; unpack the archive and name {YOURS}")
    return clean_name(info.name, where)


def _fault_at_end(path: Path, position: int, end: int) -> str:
    """tarfile takes a damaged header, and a file cut between two members, for the end of the archive."""
    with path.open("rb") as file:
        file.seek(position)
        block = file.read(min(tarfile.BLOCKSIZE, max(end - position, 0)))
    if len(block) < tarfile.BLOCKSIZE:
        return "its end mark is missing"
    return f"damaged header at byte {position}" if block.strip(b"\0") else ""


class ZipEntry(NamedTuple):
    """A file of a zip: `size` bytes at `offset` (of its data), which become `unpacked` bytes."""

    name: str
    offset: int
    size: int
    codec: str
    unpacked: int
    crc: int
    encrypted: bool
    check: int  # what the last byte of an encrypted member's 12-byte header must be


def zip_entries(path: Path) -> list[ZipEntry]:
    """The files of a zip by its directory and local headers (zip64 too), in the order of their bytes.

    Refused: what `clean_name` refuses, links and devices, methods other than stored and deflated, bombs (a
    member that grows beyond `core.archive.largest_inflated`, or members that share bytes).
    """
    try:
        length = path.stat().st_size
        with _Headers(path, LARGEST_DIRECTORY, length) as file, zipfile.ZipFile(file) as archive:
            infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
            entries, end = [], 0
            for info in infos:
                where = f"{path}, member '{info.filename}'"
                file.since = 0
                offset = _data_offset(file, info, where)
                if info.header_offset < end or offset + info.compress_size > length:
                    raise InputError(f"{where}: shares bytes with another, or ends after the file; {FETCH_AGAIN}")
                end = offset + info.compress_size
                if (name := _zip_name(info, where)) is not None:
                    entries.append(_zip_entry(info, name, offset, where))
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, struct.error) as error:
        raise InputError(f"{path}: not a whole zip ({error}); {FETCH_AGAIN}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    return entries


def _data_offset(file: _Headers, info: zipfile.ZipInfo, where: str) -> int:
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER.size)
    signature, name, extra = LOCAL_HEADER.unpack(header) if len(header) == LOCAL_HEADER.size else (b"", 0, 0)
    if signature != b"PK\x03\x04":
        raise InputError(f"{where}: damaged header at byte {info.header_offset}; {FETCH_AGAIN}")
    return info.header_offset + LOCAL_HEADER.size + name + extra


def _zip_name(info: zipfile.ZipInfo, where: str) -> str | None:
    kind = stat.S_IFMT(info.external_attr >> 16)
    if kind in (stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
        raise InputError(f"{where}: a device or pipe has no place in a data set; {FETCH_AGAIN}")
    if info.orig_filename != info.filename:  # it holds a zero byte, after which zipfile sees no more
        raise InputError(f"{where}: its name leads out of the archive or is no plain path; {FETCH_AGAIN}")
    if info.filename.endswith("/") or kind == stat.S_IFDIR:
        return None
    if kind == stat.S_IFLNK:
        if is_image(info.filename):
            raise InputError(f"{where}: the image is a link; unpack the archive and name {YOURS}")
        return None
    return clean_name(info.filename, where)


def _zip_entry(info: zipfile.ZipInfo, name: str, offset: int, where: str) -> ZipEntry:
    codecs = {zipfile.ZIP_STORED: "", zipfile.ZIP_DEFLATED: "deflate"}
    if info.compress_type not in codecs:
        method = "AES encryption" if info.compress_type == 99 else f"compression method {info.compress_type}"
        raise InputError(f"{where}: {method} cannot be read in place; unpack it and name {YOURS}")
    codec, encrypted = codecs[info.compress_type], bool(info.flag_bits & ENCRYPTED)
    stored = info.compress_size - (12 if encrypted else 0)
    if codec and info.file_size > (limit := largest_inflated(info.compress_size)):
        grows = f"{info.compress_size:,} bytes grow to {info.file_size:,}, more than {limit:,}"
        raise InputError(f"{where}: {grows}: a bomb; unpack it yourself if you trust it, and name {YOURS}")
    if stored < 0 or (not codec and stored != info.file_size):
        raise InputError(f"{where}: its two sizes, {stored} and {info.file_size}, do not fit; {FETCH_AGAIN}")
    hour, minute = info.date_time[3:5]
    check = hour << 3 | minute >> 3 if info.flag_bits & SIZES_FOLLOW else info.CRC >> 24
    return ZipEntry(name, offset, info.compress_size, codec, info.file_size, info.CRC, encrypted, check)


def parquet_members(path: Path) -> list[Member]:
    """The images of a parquet file, one a row: ``00000012/name of the file.jpg``, offset = row, size 0 (not known).

    A parquet file without a column of images (see `core.archive.IMAGE_COLUMNS`) is one file like any other.
    """
    import pyarrow

    try:
        images = ParquetImages(str(path))
        _check_count(path, images.rows)
        paths = images.paths() if images.column else None
        images.close()
        if paths is None:
            return [Member(path.name, str(path), 0, path.stat().st_size)]
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path}: cannot read it ({error}); {FETCH_AGAIN}") from None
    members = []
    for row, file in enumerate(paths):
        name = clean_name(file, f"{path}, row {row}") if file else None
        members.append(Member(f"{row:08d}/{name}" if name else f"{row:08d}", str(path), row, 0, "parquet"))
    return members


def _check_count(path: Path, count: int) -> None:
    if count > MOST_MEMBERS:
        raise InputError(f"{path}: more than {MOST_MEMBERS:,} members; split it, or unpack it and name {YOURS}")
