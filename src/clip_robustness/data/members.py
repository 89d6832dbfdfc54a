"""Where the images of a source lie: the members of a tar archive, or the files of a folder.

Nothing is unpacked but a gzip, once, to a plain tar beside it. Only headers are read.
"""

import errno
import gzip
import itertools
import os
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

from clip_robustness.core import io
from clip_robustness.core.io import InputError

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm"))
FETCH_AGAIN = "delete it and fetch it again"
YOURS = "your copy under 'local:' in the config"

# Images do not compress, so a gzip that grows far beyond this is a bomb or no image archive.
LARGEST_RATIO = 50
SMALL = 1 << 30


class Member(NamedTuple):
    """An image of a source: its name there ('/' between the parts), and which bytes of `archive` hold it."""

    name: str
    archive: str
    offset: int
    size: int


def list_images(source: Path) -> list[Member]:
    """The images of a folder, a tar, or a gzipped tar, sorted by name."""
    if source.is_dir():
        return index_folder(source)
    if not source.exists():
        raise InputError(f"{source}: no such file or folder; fetch it, or name {YOURS}")
    if source.name.endswith((".tar.gz", ".tgz")):
        return index_tar(unpack_gzip(source))
    if source.name.endswith(".tar"):
        return index_tar(source)
    raise InputError(f"{source}: expected a folder, .tar, .tar.gz or .tgz; unpack it and name {YOURS}")


def index_folder(folder: Path) -> list[Member]:
    """The image files below a folder; symbolic links are followed (they are the user's own)."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    members = []
    entered = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_unreadable):
        folders.sort()
        if (real := os.path.realpath(parent)) in entered:  # a link to a folder above itself would never end
            folders.clear()
            continue
        entered.add(real)
        for file in filter(is_image, files):
            path = Path(parent, file)
            name = path.relative_to(folder).as_posix()
            if not name.isprintable():
                raise InputError(f"{folder}, {name!r}: the name is not plain text; rename it")
            members.append(Member(name, str(path), 0, _file_size(path)))
    return _sorted(members, folder)


def index_tar(path: Path) -> list[Member]:
    """The images of an uncompressed tar, by its headers alone.

    Refused, each with archive, member and remedy: a truncated or damaged tar, devices, images that are
    links or sparse, absolute names, '..', and a name that stands there twice.
    """
    members: list[Member] = []
    position = -1
    try:
        with tarfile.open(path, "r:") as archive:
            while (info := archive.next()) is not None:
                vars(archive)["members"].clear()  # a million headers need not stay in memory
                where = f"{path}, member '{info.name}'"
                if info.offset_data <= position or info.size < 0:
                    raise InputError(f"{where}: its header leads backwards; {FETCH_AGAIN}")
                position = info.offset_data
                if (name := _image_name(info, where)) is not None:
                    members.append(Member(name, str(path), info.offset_data, info.size))
            fault = _fault_at_end(path, archive.offset)
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        fault = str(error)
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    if fault:
        last = f", after member '{members[-1].name}'" if members else ""
        raise InputError(f"{path}{last}: not a whole tar ({fault}); {FETCH_AGAIN}")
    return _sorted(members, path)


def unpack_gzip(path: Path) -> Path:
    """Unpack `x.tar.gz` to `x.tar` beside it, once, and return that."""
    plain = path.with_name(path.name.removesuffix(".tgz").removesuffix(".tar.gz") + ".tar")
    packed = path.stat()
    if plain.exists() and plain.stat().st_mtime_ns >= packed.st_mtime_ns:
        return plain
    free = shutil.disk_usage(path.parent).free
    if free < packed.st_size:
        room = f"at least {packed.st_size:,} bytes, {free:,} are free"
        raise InputError(f"{path}: unpacking needs {room}; make room, or unpack it elsewhere and name {YOURS}")
    limit = max(SMALL, LARGEST_RATIO * packed.st_size)
    progress = io.Progress(f"unpack {path.name}", packed.st_size >> 20, "MiB")
    try:
        with (
            path.open("rb") as raw,
            gzip.open(raw) as source,
            io.atomic(plain) as temporary,
            temporary.open("wb") as target,
        ):
            while block := source.read(1 << 20):
                if target.tell() + len(block) > limit:
                    grows = f"grows beyond {limit:,} bytes, too much for images"
                    raise InputError(f"{path}: {grows}; unpack it yourself if you trust it, and name {YOURS}")
                target.write(block)
                progress.update((raw.tell() >> 20) - progress.done)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip ({error}); {FETCH_AGAIN}") from None
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        remedy = "make room" if full else f"unpack it elsewhere and name {YOURS}"
        raise InputError(f"{plain}: cannot unpack {path.name} there ({error.strerror}); {remedy}") from None
    return plain


def is_image(name: str) -> bool:
    """By its suffix; hidden files are none, such as the '._x.jpg' that macOS leaves in archives."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and f".{base.rpartition('.')[2].lower()}" in IMAGE_SUFFIXES


def _image_name(info: tarfile.TarInfo, where: str) -> str | None:
    """The member's clean name if it is an image, None if it is something to pass over."""
    if info.ischr() or info.isblk() or info.isfifo():
        raise InputError(f"{where}: a device or pipe has no place in a data set; {FETCH_AGAIN}")
    if info.isdir() or not is_image(info.name):
        return None
    if info.issym() or info.islnk() or info.issparse() or not info.isreg():
        kind = "a link" if info.issym() or info.islnk() else "not stored as plain bytes"
        raise InputError(f"{where}: the image is {kind}; unpack the archive and name {YOURS}")
    parts = [part for part in info.name.split("/") if part not in ("", ".")]
    if info.name.startswith("/") or ".." in parts or "\\" in info.name or not info.name.isprintable():
        raise InputError(f"{where}: its name leads out of the archive or is no plain path; {FETCH_AGAIN}")
    return "/".join(parts)


def _fault_at_end(path: Path, end: int) -> str:
    """tarfile takes a damaged header, and a file cut between two members, for the end of the archive."""
    with path.open("rb") as file:
        file.seek(end)
        block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        return "its end mark is missing"
    return f"damaged header at byte {end}" if block.strip(b"\0") else ""


def _sorted(members: list[Member], source: Path) -> list[Member]:
    members.sort()
    for one, other in itertools.pairwise(members):
        if one.name == other.name:
            raise InputError(f"{source}, member '{one.name}': stands there twice; {FETCH_AGAIN}")
    if not members:
        raise InputError(f"{source}: holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return members


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None


def _unreadable(error: OSError) -> None:
    raise InputError(f"{error.filename}: cannot read this folder ({error.strerror})")
