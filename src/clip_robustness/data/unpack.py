"""The two archives that cannot be read in place, unpacked once to a plain tar beside them: gzip and encrypted zip.

A killed run leaves nothing under the tar's name.
"""

import contextlib
import errno
import gzip
import itertools
import shutil
import tarfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.archive import read_member
from clip_robustness.core.io import InputError
from clip_robustness.data import zipcrypto
from clip_robustness.data.containers import FETCH_AGAIN, YOURS, ZipEntry

# Images do not compress, so a gzip that grows far beyond this is a bomb or no image archive.
LARGEST_RATIO = 50
SMALL = 1 << 30
LANES, STEP = 2048, 1 << 14  # members that are decrypted side by side, and bytes of each at a time


def is_gzip(path: Path) -> bool:
    """By its content, unless that is no tar either: then it should have been a gzip."""
    with path.open("rb") as file:
        start = file.read(tarfile.BLOCKSIZE)
    return start[:2] == b"\x1f\x8b" or start[257:262] != b"ustar"


def unpack_gzip(path: Path) -> Path:
    """Unpack `x.tar.gz` to `x.tar` beside it, once, and return that."""
    plain = path.with_name(path.name.removesuffix(".tgz").removesuffix(".tar.gz") + ".tar")
    if _is_fresh(plain, path):
        return plain
    size = path.stat().st_size
    _check_room(path, size)
    limit = max(SMALL, LARGEST_RATIO * size)
    progress = io.Progress(f"unpack {path.name}", size >> 20, "MiB")
    try:
        with (
            _writing(plain, path) as target,
            path.open("rb") as raw,
            gzip.open(raw) as source,
        ):
            while block := source.read(1 << 20):
                if target.tell() + len(block) > limit:
                    grows = f"grows beyond {limit:,} bytes, too much for images"
                    raise InputError(f"{path}: {grows}; unpack it yourself if you trust it, and name {YOURS}")
                target.write(block)
                progress.update((raw.tell() >> 20) - progress.done)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip ({error}); {FETCH_AGAIN}") from None
    return plain


def decrypt_zip(path: Path, entries: Sequence[ZipEntry], password: str | None) -> Path:
    """Repack the encrypted `x.zip` as `x.tar` beside it, once, and return that. Every member's CRC is checked.

    Errors: `InputError` for no or a wrong password, damage, or too little room for the tar.
    """
    plain = path.with_suffix(".tar")
    if _is_fresh(plain, path):
        return plain
    if not password:
        asks = "is encrypted; give the password that its makers publish as 'password' in the data set's options"
        raise InputError(f"{path}: {asks}, or unpack it and name {YOURS}")
    jobs, end = [], 0
    for entry in entries:
        header = _tar_header(entry)
        jobs.append((entry, header, end))
        end += len(header) + -(-entry.unpacked // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
    end += 2 * tarfile.BLOCKSIZE  # the end mark
    _check_room(path, end)
    progress = io.Progress(f"decrypt {path.name}", path.stat().st_size >> 20, "MiB")
    done = 0
    with _writing(plain, path) as target, path.open("rb") as source:
        target.truncate(end)
        lanes = []
        for entry, header, position in jobs:
            _write(target, header, position)
            position += len(header)
            if entry.encrypted:
                lanes.append(_Lane(path, entry, position))
            else:
                data = read_member(path, entry.offset, entry.size, entry.name, entry.codec)
                _write(target, data, position)
        for count in _decrypt(lanes, source, target, zipcrypto.password_keys(password)):
            done += count
            progress.update((done >> 20) - progress.done)
    return plain


def _tar_header(entry: ZipEntry) -> bytes:
    info = tarfile.TarInfo(entry.name)
    info.size = entry.unpacked
    return info.tobuf(tarfile.GNU_FORMAT)


class _Lane:
    """A member on its way from the zip to the tar."""

    def __init__(self, path: Path, entry: ZipEntry, position: int):
        self.where = f"{path}, member '{entry.name}'"
        self.entry, self.position = entry, position
        self.read, self.written, self.crc = 0, 0, 0
        self.inflater = zlib.decompressobj(-zlib.MAX_WBITS) if entry.codec else None

    @property
    def left(self) -> int:
        return self.entry.size - self.read

    def take(self, data: bytes, target: BinaryIO) -> None:
        """Check, inflate and write the next decrypted bytes."""
        if not self.read and data[zipcrypto.HEADER - 1] != self.entry.check:
            wrong = "wrong password; correct 'password' in the data set's options"
            raise InputError(f"{self.where}: {wrong}")
        plain = data if self.read else data[zipcrypto.HEADER :]
        self.read += len(data)
        if self.inflater:
            try:
                plain = self.inflater.decompress(plain, self.entry.unpacked - self.written + 1)
            except zlib.error as error:
                raise self._fault(str(error)) from None
        if self.written + len(plain) > self.entry.unpacked:
            raise self._fault("it is longer than the zip says")
        _write(target, plain, self.position + self.written)
        self.written += len(plain)
        self.crc = zlib.crc32(plain, self.crc)
        if not self.left and (self.written, self.crc) != (self.entry.unpacked, self.entry.crc):
            raise self._fault("wrong checksum")

    def _fault(self, fault: str) -> InputError:
        return InputError(f"{self.where}: damaged, or a wrong password ({fault}); {FETCH_AGAIN}")


def _decrypt(waiting: Iterable[_Lane], source: BinaryIO, target: BinaryIO, start: np.ndarray) -> Iterator[int]:
    """Take all members through, LANES at a time in the order of the zip; yield the bytes done by each step."""
    queue = iter(waiting)
    lanes: list[_Lane] = []
    keys = np.empty((3, 0), np.uint32)
    while True:
        new = list(itertools.islice(queue, LANES - len(lanes)))
        lanes += new
        keys = np.concatenate([keys, np.repeat(start[:, None], len(new), axis=1)], axis=1)
        if not lanes:
            return
        sizes = [min(lane.left, STEP) for lane in lanes]
        block = np.zeros((len(lanes), max(sizes)), np.uint8)
        for row, lane, size in zip(block, lanes, sizes, strict=True):
            source.seek(lane.entry.offset + lane.read)
            if len(data := source.read(size)) < size:
                raise InputError(f"{lane.where}: truncated; {FETCH_AGAIN}")
            row[:size] = np.frombuffer(data, np.uint8)
        columns = np.ascontiguousarray(block.T)
        zipcrypto.decrypt(columns, keys)
        block = np.ascontiguousarray(columns.T)
        for row, lane, size in zip(block, lanes, sizes, strict=True):
            lane.take(row[:size].tobytes(), target)
        going = np.array([lane.left > 0 for lane in lanes])
        lanes, keys = [lane for lane in lanes if lane.left], keys[:, going]
        yield sum(sizes)


def _write(target: BinaryIO, data: bytes, position: int) -> None:
    target.seek(position)
    target.write(data)


def _is_fresh(plain: Path, packed: Path) -> bool:
    return plain.exists() and plain.stat().st_mtime_ns >= packed.stat().st_mtime_ns


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        room = f"at least {needed:,} bytes, {free:,} are free"
        raise InputError(f"{path}: unpacking needs {room}; make room, or unpack it elsewhere and name {YOURS}")


@contextlib.contextmanager
def _writing(plain: Path, packed: Path) -> Iterator[BinaryIO]:
    """The file that becomes `plain`; what goes wrong with the disk is an `InputError`."""
    try:
        with io.atomic(plain) as temporary, temporary.open("w+b") as target:
            yield target
            target.flush()
    except (EOFError, gzip.BadGzipFile):
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
        remedy = "make room" if full else f"unpack it elsewhere and name {YOURS}"
        raise InputError(f"{plain}: cannot unpack {packed.name} there ({error.strerror}); {remedy}") from None
