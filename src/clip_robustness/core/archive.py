"""Reading images out of archives in place: an image is (archive, offset, size, codec) and nothing is unpacked.

The codec says what stands there: "" the image file itself, "deflate" a raw deflate stream of it (a member of
a zip), "parquet" row `offset` of a parquet file. A file of a folder is an archive that holds one image: its
path, offset 0 and its own size.

Positioned reads instead of a memory map: they are as fast (61,000 against 53,000 images of 100 KB a
second from the page cache), and a file that shrinks under its reader gives an error and no SIGBUS.
"""

import collections
import contextlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.io import InputError, damage
from clip_robustness.core.parquet import decode

REQUIRED = ("image_id", "archive", "offset", "size", "label")
CODECS = ("", "deflate", "parquet")
REMEDY = "fetch the archive again, or delete the index and build it anew"

# What hubs call the column of images: a struct of `bytes` and `path`, or plain bytes.
IMAGE_COLUMNS = ("image", "img")
LARGEST_GROUP = 8 << 30  # bytes of images in one row group of a parquet file; it is read as a whole
LARGEST_TABLE = 1 << 30  # bytes of its other columns

# Images do not deflate. What grows far more than this is a bomb; small files of text and numbers may.
LARGEST_RATIO = 100
SMALL = 16 << 20
LARGEST_INFLATED = 1 << 30


def largest_inflated(size: int) -> int:
    """How many bytes may come out of a deflate stream of `size` bytes."""
    return min(max(LARGEST_RATIO * size, SMALL), LARGEST_INFLATED)


class ArchiveReader:
    """Reads members of any number of archives; keeps the files it used last open, and one parquet row group.

    Read rows of a parquet file in order: each row group is then decoded once. Not for sharing between
    processes: each makes its own.
    """

    def __init__(self, most_open: int = 32):
        self._most_open = most_open
        self._files: collections.OrderedDict[str, int | ParquetImages] = collections.OrderedDict()

    def __enter__(self) -> "ArchiveReader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        while self._files:
            _close(self._files.popitem()[1])

    def read(self, archive: str, offset: int, size: int, image_id: str = "", codec: str = "") -> bytes:
        """The image at `offset` of the file `archive`: `size` bytes, inflated by "deflate"; a row by "parquet".

        Errors: `InputError` that names archive, image and remedy when the file is missing, too short or
        damaged, or when a deflate stream grows beyond `largest_inflated`.
        """
        name = f"{archive}, image '{image_id}'" if image_id else archive
        if offset < 0 or size < 0:
            raise InputError(f"{name}: offset {offset} and size {size} must not be negative; {REMEDY}")
        try:
            file = self._open(archive, codec)
            if isinstance(file, ParquetImages):
                self._drop_other_groups(file)
                return file.read(offset, name)
            if (beyond := offset + size - os.fstat(file).st_size) > 0:
                end = f"ends {beyond} bytes before the image does (bytes {offset} to {offset + size})"
                raise InputError(f"{name}: truncated, the file {end}; {REMEDY}")
            parts, missing = [], size
            while missing:  # one read returns 2 GiB at most, and less on some network file systems
                part = os.pread(file, missing, offset + size - missing)
                if not part:
                    break
                parts.append(part)
                missing -= len(part)
        except OSError as error:
            raise InputError(f"{name}: cannot read it ({error.strerror or error}); {REMEDY}") from None
        if missing:
            raise InputError(f"{name}: truncated, the file became shorter while it was read; {REMEDY}")
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        return _inflate(data, name) if codec else data

    def _open(self, archive: str, codec: str) -> "int | ParquetImages":
        if codec not in CODECS:
            raise InputError(f"{archive}: codec '{codec}' is none of {CODECS}; {REMEDY}")
        key = f"{codec == 'parquet'}:{archive}"
        if key in self._files:
            self._files.move_to_end(key)
            return self._files[key]
        if codec == "parquet":
            self._files[key] = ParquetImages(archive)
        else:
            self._files[key] = os.open(archive, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        if len(self._files) > self._most_open:
            _close(self._files.popitem(last=False)[1])
        return self._files[key]

    def _drop_other_groups(self, used: "ParquetImages") -> None:
        for file in self._files.values():
            if isinstance(file, ParquetImages) and file is not used:
                file.drop_group()


class ParquetImages:
    """The column of images of a parquet file, one row group at a time.

    Errors: `InputError` for a file that is no parquet file or has no such column, `OSError` when it is missing.
    """

    def __init__(self, path: str):
        import pyarrow
        import pyarrow.parquet

        self.path = path
        Path(path).stat()  # its error is plainer than pyarrow's
        try:
            self._file = pyarrow.parquet.ParquetFile(path)
            kinds = {name: self._file.schema_arrow.field(name).type for name in self._file.schema_arrow.names}
            schema = self._file.schema
            self._leaves = [schema.column(i).path for i in range(len(schema))]
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:  # the last: a name twice
            raise InputError(f"{path}: not a whole parquet file ({damage(path, error)}); {REMEDY}") from None
        self.rows: int = self._file.metadata.num_rows
        leaves = {name: _leaf(name, kinds.get(name)) for name in IMAGE_COLUMNS}
        self.name = next((name for name, leaf in leaves.items() if leaf), None)
        self.column = leaves[self.name] if self.name else None
        self.others = [name for name in kinds if name != self.name]
        groups = [self._file.metadata.row_group(i) for i in range(self._file.metadata.num_row_groups)]
        self._ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
        if min([group.num_rows for group in groups], default=0) < 0 or self._ends[-1:].sum() != self.rows:
            raise InputError(f"{path}: not a whole parquet file (its row groups are not its rows); {REMEDY}")
        self.drop_group()

    def close(self) -> None:
        self.drop_group()
        self._file.close()

    def drop_group(self) -> None:
        self._group, self._values = -1, None

    def read(self, row: int, name: str) -> bytes:
        import pyarrow

        if self.column is None:
            raise InputError(f"{name}: the parquet file has no column {' or '.join(IMAGE_COLUMNS)}; {REMEDY}")
        if row >= self.rows:
            raise InputError(f"{name}: row {row} of a parquet file of {self.rows} rows; {REMEDY}")
        group = int(np.searchsorted(self._ends, row, side="right"))
        if group != self._group:
            self.drop_group()
            try:
                self._values = self._read_group(group)
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise InputError(f"{name}: damaged row group {group} ({damage(self.path, error)}); {REMEDY}") from None
            self._group = group
        first = int(self._ends[group - 1]) if group else 0
        value = self._values[row - first].as_py()  # type: ignore[index]
        data = value["bytes"] if isinstance(value, dict) else value
        if data is None:
            raise InputError(f"{name}: row {row} holds no bytes (a path only, or nothing); {REMEDY}")
        return data

    def paths(self) -> list[str | None]:
        """What the writer called each image, without a look at the images; None where it did not say."""
        leaf = f"{self.name}.path"
        if self.column != f"{self.name}.bytes" or leaf not in self._leaves:
            return [None] * self.rows
        return self.table([leaf]).flatten().column(0).to_pylist()

    def table(self, columns: Sequence[str]) -> Any:
        """Columns of all rows. Errors: `InputError` for a damaged file, and for what grows beyond LARGEST_TABLE."""
        import pyarrow

        try:
            table = decode(self._file, columns, range(len(self._ends)), LARGEST_TABLE)
        except (pyarrow.ArrowException, OSError, KeyError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path}: not a whole parquet file ({damage(self.path, error)}); {REMEDY}") from None
        if table is None:
            fault = f"its columns {', '.join(columns)} hold more than {LARGEST_TABLE:,} bytes"
            raise InputError(f"{self.path}: {fault}; write it anew in several files")
        return table

    def features(self) -> Any:
        """What the library `datasets` wrote about the columns, {} if it did not write the file."""
        try:
            return json.loads((self._file.schema_arrow.metadata or {})[b"huggingface"])["info"]["features"]
        except (KeyError, TypeError, ValueError, RecursionError):
            return {}

    def _read_group(self, group: int) -> Any:
        assert self.column is not None
        table = decode(self._file, [self.column], [group], LARGEST_GROUP)
        if table is None:
            fault = f"row group {group} holds more than {LARGEST_GROUP:,} bytes of images"
            raise InputError(f"{self.path}: {fault}; write it anew with smaller row groups")
        if len(table) != self._file.metadata.row_group(group).num_rows:
            raise InputError(f"{self.path}: row group {group} holds {len(table)} images; {REMEDY}")
        return table.column(0)


def _leaf(name: str, kind: Any) -> str | None:
    """The path of the leaf that holds images, if the column `name` of the type `kind` does."""
    import pyarrow

    def is_bytes(some: Any) -> bool:
        return pyarrow.types.is_binary(some) or pyarrow.types.is_large_binary(some)

    if kind is None:
        return None
    if pyarrow.types.is_struct(kind):
        index = kind.get_field_index("bytes")
        return f"{name}.bytes" if index >= 0 and is_bytes(kind.field(index).type) else None
    return name if is_bytes(kind) else None


def _close(file: int | ParquetImages) -> None:
    if isinstance(file, ParquetImages):
        file.close()
    else:
        os.close(file)


def _inflate(data: bytes, name: str) -> bytes:
    # The stream must end with its last byte: that finds nearly all damage, and the archive's CRC is not at hand.
    limit = largest_inflated(len(data))
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        inflated = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise InputError(f"{name}: damaged ({error}); {REMEDY}") from None
    if len(inflated) > limit:
        raise InputError(f"{name}: {len(data):,} bytes grow beyond {limit:,}, too much for an image; {REMEDY}")
    if not inflater.eof or inflater.unused_data:
        raise InputError(f"{name}: damaged (its deflate stream does not end with its {len(data)} bytes); {REMEDY}")
    return inflated


def read_member(archive: str | os.PathLike, offset: int, size: int, image_id: str = "", codec: str = "") -> bytes:
    """One read, without a reader to keep. Errors as in `ArchiveReader.read`."""
    with ArchiveReader() as reader:
        return reader.read(os.fspath(archive), offset, size, image_id, codec)


def load_index(path: str | os.PathLike, archives: bool = True) -> dict[str, np.ndarray]:
    """The columns of an index: image_id, archive, codec (objects), offset, size (int64), label (int32), attributes.

    An index without a codec has "" everywhere. `archives=False` leaves the archives alone: a metric needs
    labels where the images may be gone.
    Errors: `InputError` for a missing column, a wrong type, a duplicate id or an image outside its archive.
    """
    columns = io.read_parquet(path)
    missing = [name for name in REQUIRED if name not in columns]
    if missing:
        needed = ", ".join(REQUIRED)
        raise InputError(f"{path}: the column '{missing[0]}' is missing (needed: {needed}); {REMEDY}")
    columns.setdefault("codec", np.full(len(columns["image_id"]), "", dtype=object))
    check_index(columns, str(path))
    if archives:
        _check_extents(columns, str(path))
    return columns


def check_index(columns: Mapping[str, np.ndarray], where: str) -> None:
    """Types and values of an index's columns, without a look at the archives."""
    for name in ("offset", "size", "label"):
        if columns[name].dtype.kind not in "iu":
            kind = columns[name].dtype
            raise InputError(f"{where}: column '{name}' holds {kind}, expected whole numbers; {REMEDY}")
        lowest = -1 if name == "label" else 0
        for row in np.flatnonzero(columns[name] < lowest)[:1]:
            raise InputError(f"{where}, row {row}: {name} is {columns[name][row]}, below {lowest}; {REMEDY}")
    for name in ("image_id", "archive"):
        for row, value in enumerate(columns[name]):
            if not isinstance(value, str) or not value or not value.isprintable():
                raise InputError(f"{where}, row {row}: {name} is {value!r}, expected plain text; {REMEDY}")
    for row, value in enumerate(columns.get("codec", ())):
        if value not in CODECS:
            raise InputError(f"{where}, row {row}: codec is {value!r}, expected one of {CODECS}; {REMEDY}")
    if len(set(columns["image_id"])) < len(columns["image_id"]):
        twice, count = collections.Counter(columns["image_id"]).most_common(1)[0]
        raise InputError(f"{where}: the image id '{twice}' stands there {count} times; {REMEDY}")


def _check_extents(columns: Mapping[str, np.ndarray], where: str) -> None:
    lengths: dict[tuple[str, bool], int] = {}
    in_parquet = columns["codec"] == "parquet"
    ends = (columns["offset"] + np.where(in_parquet, 1, columns["size"])).tolist()
    for row, (archive, end, parquet) in enumerate(zip(columns["archive"], ends, in_parquet.tolist(), strict=True)):
        length = lengths.get((archive, parquet))
        if length is None:
            length = lengths[archive, parquet] = _length(archive, parquet)
        if end > length:
            unit = ("rows long", "is row") if parquet else ("bytes long", "ends at byte")
            found = "no such file" if length < 0 else f"{length} {unit[0]}, but the image {unit[1]} {end}"
            image = columns["image_id"][row]
            raise InputError(f"{archive}, image '{image}' (row {row} of {where}): {found}; {REMEDY}")


def _length(archive: str, parquet: bool) -> int:
    """Bytes of a file, rows of a parquet file, -1 when it is missing."""
    with contextlib.suppress(OSError):
        if not parquet:
            return Path(archive).stat().st_size
        images = ParquetImages(archive)
        images.close()
        return images.rows
    return -1
