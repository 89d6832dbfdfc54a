"""Files: reading and writing, manifests, hashes, and the one exception that users see.

Every file that the workflow writes goes through `core.atomic`, so a killed process never leaves half a file
under a final name. Nothing here imports more than NumPy and (inside functions) pyarrow.
"""

import hashlib
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core.atomic import atomic


class InputError(Exception):
    """Something the user gave is wrong. The message names the file, the place in it, and the remedy."""


def write_text(path: str | os.PathLike, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as JSON with sorted keys; a NaN is refused, since no reader could compare it."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False, default=_plain) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"cannot write {type(value).__name__} as JSON")


def read_json(path: str | os.PathLike) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # damage, no UTF-8, a number of 5,000 digits, or nested too deep
        raise InputError(f"{path}: not valid JSON ({error}); delete it and run again") from None


def save_array(path: str | os.PathLike, array: np.ndarray) -> None:
    array = np.asarray(array)
    _write_array(path, array.dtype, array.shape, [array])


def load_array(path: str | os.PathLike, mmap: bool = True) -> np.ndarray:
    """Map (or read) a .npy file. Errors: `InputError` when it is missing, truncated or holds objects."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)  # which compares the header with the file's size
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:  # NumPy raises half a dozen types for headers that lie
        raise InputError(f"{path}: not a whole .npy array ({damage(path, error)}); delete it and run again") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise InputError(f"{path}: a zip, not a .npy array; delete it and run again")
    return array if mmap else np.array(array)


def damage(path: str | os.PathLike, error: Exception) -> str:
    """What a library says of a damaged file, in one line.

    Errors: `error` itself where it is no damage: a want of memory, of permission or of the network is no reason to
    delete a file.
    """
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, OSError) and error.errno is not None:
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
    if "pickle" in str(error):  # NumPy takes whatever it does not know for one, and tells how to run it
        return "it does not begin as an array of numbers"
    return " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())


def join_arrays(path: str | os.PathLike, parts: Sequence[str | os.PathLike]) -> None:
    """Write .npy files of one type, equal but for their number of rows, as one; a part at a time is in memory."""
    arrays = [load_array(part) for part in parts]
    shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
    _write_array(path, arrays[0].dtype, shape, (load_array(part, mmap=False) for part in parts))


def _write_array(path: str | os.PathLike, dtype: np.dtype, shape: Sequence[int], parts: Iterable[np.ndarray]) -> None:
    """Not by np.save, which does not notice that a disk is full while it writes the last few kilobytes."""
    if dtype.hasobject:
        raise ValueError(f"{path}: an array of objects is not for a .npy file")
    layout = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": tuple(shape)}
    with atomic(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, layout)
        for part in parts:
            file.write(part.tobytes())


def write_parquet(path: str | os.PathLike, columns: Mapping[str, Any]) -> None:
    """Write named columns (arrays or lists of equal length) as one parquet file, byte for byte reproducible.

    Every page has a checksum (CRC-32), which `read_table` compares.
    """
    import pyarrow
    import pyarrow.parquet

    table = columns
    if not isinstance(columns, pyarrow.Table):
        table = pyarrow.table({name: _to_arrow(values) for name, values in columns.items()})
    with atomic(path) as temporary:
        pyarrow.parquet.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def read_parquet(path: str | os.PathLike, columns: Sequence[str] | None = None) -> dict[str, np.ndarray]:
    """Read a parquet file as a dict of NumPy arrays (strings as object arrays), in the order of `columns`.

    Errors: as of `read_table`.
    """
    try:
        return table_columns(read_table(path, columns))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a whole parquet file ({error}); delete it and run again") from None


def table_columns(table: Any) -> dict[str, np.ndarray]:
    """The columns of an arrow table as NumPy arrays (strings as object arrays)."""
    return {name: _to_numpy(column) for name, column in zip(table.column_names, table.columns, strict=True)}


def read_table(path: str | os.PathLike, columns: Sequence[str] | None = None) -> Any:
    """Read a parquet file as an arrow table. Errors: `InputError` when it is missing, damaged, or lacks a column."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            names = file.schema_arrow.names if columns is None else list(columns)
            if missing := [name for name in names if name not in file.schema_arrow.names]:
                raise InputError(f"{path}: no column {missing[0]!r}; delete it and run again")
            return file.read(columns=names).select(names)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, KeyError) as error:  # the last: a name twice
        raise InputError(f"{path}: not a whole parquet file ({damage(path, error)}); delete it and run again") from None


# pyarrow's own conversions import pandas, where it is installed, and with it take 0.2 s of every process.


def _to_arrow(values: Any) -> Any:
    import pyarrow

    if isinstance(values, np.ndarray) and values.ndim == 1 and len(values):
        if values.dtype.kind in "iuf":
            kind, data = pyarrow.from_numpy_dtype(values.dtype), pyarrow.py_buffer(np.ascontiguousarray(values))
            return pyarrow.Array.from_buffers(kind, len(values), [None, data])
        if values.dtype.kind in "OU" and all(isinstance(value, str) for value in values):
            ends, data = np.zeros(len(values) + 1, np.int64), bytearray()
            for start in range(0, len(values), 10_000):
                texts = [value.encode() for value in values[start : start + 10_000]]
                ends[start + 1 : start + 1 + len(texts)] = np.cumsum([*map(len, texts)]) + len(data)
                data += b"".join(texts)
            if ends[-1] < 2**31:
                buffers = (pyarrow.py_buffer(ends.astype(np.int32)), pyarrow.py_buffer(data))
                return pyarrow.StringArray.from_buffers(len(values), *buffers)
    return pyarrow.array(values)


def _to_numpy(column: Any) -> np.ndarray:
    from pyarrow import types

    if not column.null_count:
        if types.is_integer(column.type) or types.is_floating(column.type):
            return np.from_dlpack(column.combine_chunks())
        if types.is_string(column.type):
            texts = column.to_pylist()
            if len(set(texts[:1000])) == len(texts[:1000]):  # such as ids
                return np.array(texts, object)
            seen: dict[str, str] = {}  # equal strings become one object: an archive is named by all its images
            return np.array([seen.setdefault(text, text) for text in texts], object)
    return column.to_numpy(zero_copy_only=False)


def place(store: Path, target: Path) -> None:
    """Put a finished file under another name too: a hard link costs no space; copy across file systems."""
    with atomic(target) as temporary:
        try:
            os.link(store, temporary)
        except OSError:
            shutil.copyfile(store, temporary)


def sha256_file(path: str | os.PathLike) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: Any) -> str:
    """SHA-256 of JSON-able values: the content key of a work folder or a cache."""
    text = json.dumps(parts, sort_keys=True, allow_nan=False, default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


def ids_digest(image_ids: Iterable[str]) -> str:
    """SHA-256 of the ordered image ids: two files may be joined row by row only when theirs agree."""
    found, ids = hashlib.sha256(), iter(image_ids)
    while some := list(itertools.islice(ids, 10_000)):
        found.update("".join(f"{image_id}\n" for image_id in some).encode())
    return found.hexdigest()


class Progress:
    """Lines such as ``embed 4,096/50,000 images, 310 images/s, 2 min left`` on standard error."""

    def __init__(self, what: str, total: int, unit: str = "images", every: float = 5.0):
        self.what, self.total, self.unit, self.every = what, total, unit, every
        self.done = self.skipped = 0
        self.start = self.last = time.monotonic()

    def skip(self, count: int) -> None:
        """Count work that an earlier run has done: it is shown, and left out of the rate."""
        self.skipped += count
        self.update(0)

    def update(self, count: int) -> None:
        self.done += count
        now = time.monotonic()
        finished = self.done + self.skipped >= self.total
        if now - self.last < self.every and not finished:
            return
        self.last = now
        rate = self.done / max(now - self.start, 1e-9)
        line = f"{self.what} {self.done + self.skipped:,}/{self.total:,} {self.unit}"
        if self.done:
            line += f", {rate:,.0f} {self.unit}/s"
        if self.skipped:
            line += f", {self.skipped:,} were there"
        if not finished and self.done:
            line += f", {_duration((self.total - self.done - self.skipped) / rate)} left"
        print(line, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def seal(folder: Path, **facts: Any) -> dict[str, Any]:
    """Write `folder`/manifest.json, last, with the SHA-256 of every file in the folder; return what it says."""
    files = {p.name: sha256_file(p) for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != "."}
    files.pop("manifest.json", None)
    write_json(folder / "manifest.json", {**facts, "files": files})
    return read_json(folder / "manifest.json")


def check_sealed(folder: Path) -> dict[str, Any]:
    """Return the manifest of a sealed folder after comparing every file with its checksum."""
    manifest = read_seal(folder)
    for name, expected in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            raise InputError(f"{path}: the manifest beside it lists this file, and it is gone; delete the folder")
        if sha256_file(path) != expected:
            raise InputError(f"{path}: its SHA-256 is not that of the manifest beside it; delete the folder and rerun")
    return manifest


def read_seal(folder: Path) -> dict[str, Any]:
    """The manifest of a sealed folder, whose `files` are names of that folder: none leads out of it."""
    manifest = read_manifest(folder / "manifest.json", files=dict)
    for name in manifest["files"]:
        if name in ("", ".", "..") or not name.isprintable() or "/" in name or len(name.encode()) > 255:
            raise InputError(f"{folder / 'manifest.json'}: lists {name!r}, which is no file's name; delete the folder")
    return manifest


def sealed(folder: Path) -> dict[str, Any] | None:
    """As `check_sealed`, of a folder that can be made again: None where it is not sealed, or damaged, which is said."""
    if not (folder / "manifest.json").is_file():
        return None
    try:
        return check_sealed(folder)
    except InputError as error:
        print(f"{str(error).partition('; ')[0]}; made again", file=sys.stderr, flush=True)
        shutil.rmtree(folder)
        return None


def read_manifest(path: Path, **kinds: type) -> dict[str, Any]:
    """Read a manifest that must have these fields, each of its type; what else it has is another version's.

    Errors: `InputError` when it is missing, damaged, or lacks a field.
    """
    manifest = read_json(path)
    for name, kind in kinds.items():
        if not isinstance(manifest, dict) or not isinstance(manifest.get(name), kind):
            fault = f"no '{name}' ({kind.__name__}) in it, so it is of another version of this project, or no manifest"
            raise InputError(f"{path}: {fault}; delete it and what it stands beside, and run again")
    return manifest
