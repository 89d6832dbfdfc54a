"""Images to uint8 pixels: into a cache, once a preprocessing spec and not once a model, or as a stream.

A stream decodes a part while the one before is embedded, where a cache would cost more disk than it saves time.
Nothing here imports torch: the processes that decode stay small. `decode: fast` does (`fast_pixels`), and gives the
last bit up for 1.6 times the speed.
"""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL

from clip_robustness.core import io, provenance
from clip_robustness.core.archive import ArchiveReader, load_index
from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.inference.images import decode, preprocess

CHUNK = 64  # images a task: a few tenths of a second, so progress is smooth and tasks cost nothing
SHOWN = 20
CHECKED = 50  # the fast path does every so manieth image in both ways, and the manifest says how far they are apart
LARGEST_TOLERANCE = 2  # levels of 255


def cache_pixels(
    index: Path, spec: str, out: Path, workers: int = 1, on_error: str = "fail", decode: str = "exact"
) -> None:
    """Decode every image of `index` into `out`, uint8 [n, h, w, 3], and write its manifest `out`.json last.

    Processes write their rows into one preallocated file, so memory does not grow with n and a full disk
    is known before the first image. The bytes do not depend on `workers`.
    `on_error`: `fail` raises one `InputError` that lists the unreadable images; `mask` leaves them black and
    lists their ids in the manifest as `masked`, for every metric to leave out and report.
    `decode`: `exact` is PIL's to the last bit; `fast` is 1.6 times as fast and leaves values one level of 255 apart,
    rarely two. The manifest's `tolerance` says what a sample of the images showed.
    """
    images = Images(index, spec, on_error, decode)
    manifest_path(out).unlink(missing_ok=True)  # it must never stand beside another array than its own
    with io.atomic(out) as temporary, _processes(workers) as pool:
        progress = io.Progress(f"pixels {out.stem}", images.n)
        faults, apart = images.decode_into(temporary, 0, images.n, pool, progress.update)
        tolerance = _tolerance(apart, index) if decode == "fast" else {}
        pixels_sha256, size = io.sha256_file(temporary), temporary.stat().st_size
    io.write_json(
        manifest_path(out),
        {
            **images.facts,
            "n": images.n,
            "size": images.spec.size,
            "bytes": size,
            "index_sha256": io.sha256_file(index),
            "pixels_sha256": pixels_sha256,
            "masked": [images.ids[row] for row in faults],
            **tolerance,
        },
    )


class Images:
    """The images of an index under a preprocessing spec: what is decoded, and how.

    Errors: `InputError` for an index without images, and for an unknown `decode` or `on_error`.
    """

    def __init__(self, index: Path, spec: str, on_error: str = "fail", decode: str = "exact"):
        if decode not in ("exact", "fast"):
            raise InputError(f"decode is '{decode}', expected exact or fast")
        if on_error not in ("fail", "mask"):
            raise InputError(f"on_error is '{on_error}', expected fail or mask")
        self.index, self.on_error, self.fast = index, on_error, decode == "fast"
        self.spec = Preprocessing.parse(spec)
        self.columns = load_index(index)
        self.ids: Sequence[str] = self.columns["image_id"].tolist()
        self.n = len(self.ids)
        if not self.n:
            raise InputError(f"{index}: holds no image")
        self.facts = {
            "spec": self.spec.pixel_spec,
            "ids_sha256": io.ids_digest(self.ids),
            "pillow": PIL.__version__,
            "decode": decode,
        }

    def decode_into(
        self, path: Path, start: int, stop: int, pool: "_Pool | None", done: Callable[[int], None]
    ) -> tuple[list[int], np.ndarray]:
        """Write images `start` to `stop` to `path` as .npy, uint8 [stop - start, h, w, 3]; call `done` as they come.

        Returns the rows that cannot be read, which stay black, and the counts of the fast path's differences.
        Errors: `InputError` for unreadable images unless they are masked, and where not one can be read.
        """
        header = _preallocate(path, (stop - start, *self.spec.size, 3))
        work = _Work(path, header, start, self.spec, self.fast)
        faults: dict[int, str] = {}
        apart = np.zeros(256, np.int64)
        for filled in _run(work, _chunks(self.columns, start, stop), pool):
            faults |= filled.faults
            apart += filled.apart
            done(filled.images)
        if faults and self.on_error == "fail":
            raise InputError(_unreadable(self.index, self.n, [faults[row] for row in sorted(faults)]))
        if len(faults) == self.n:
            raise InputError(f"{self.index}: not one of {self.n:,} images can be read; the first: {faults[0]}")
        return sorted(faults), apart


class Part(NamedTuple):
    """Images `start` to `stop` of a data set: rows `offset` and on of the mapped `pixels`; those `masked` are black."""

    start: int
    stop: int
    pixels: np.ndarray
    offset: int
    masked: Sequence[str] = ()


class Cached:
    """A pixel cache as a source of parts. `facts`: what decides its pixels."""

    def __init__(self, path: Path):
        self._pixels, manifest = open_pixels(path)
        self.n, self.name = len(self._pixels), path.stem
        self.spec, self.masked = Preprocessing.parse(manifest["spec"]), list(manifest.get("masked", ()))
        self.facts = {name: manifest[name] for name in ("ids_sha256", "pixels_sha256")}

    def parts(self, bounds: Sequence[tuple[int, int]], folder: Path) -> Iterator[Part]:
        for start, stop in bounds:
            yield Part(start, stop, self._pixels, start)


class Streamed:
    """The images of an index as a source of parts, decoded one part ahead of the model. `facts` as of `Cached`.

    What the archives hold is known here by their size and time of change: to hash the pixels, all would have to be
    decoded before it is known whether their embeddings are there already.
    """

    masked = ()

    def __init__(self, index: Path, spec: str, workers: int = 1, on_error: str = "fail", decode: str = "exact"):
        self._images, self._workers = Images(index, spec, on_error, decode), workers
        self.n, self.name, self.spec = self._images.n, index.stem, self._images.spec
        files = {name: Path(name).stat() for name in sorted(set(self._images.columns["archive"].tolist()))}
        seen = [(stat.st_size, stat.st_mtime_ns) for stat in files.values()]
        places = [self._images.columns[name].tolist() for name in ("offset", "size")]
        code = provenance.code_hash("inference.images", "inference.fast_pixels", imports=False)
        self.facts = {**self._images.facts, "archives": io.digest(seen, *places), "decoder": code}

    def parts(self, bounds: Sequence[tuple[int, int]], folder: Path) -> Iterator[Part]:
        """Parts by `bounds` (start, stop); their pixels lie in `folder` until the next but one is asked for."""
        ahead = concurrent.futures.ThreadPoolExecutor(1)
        with (
            tempfile.TemporaryDirectory(dir=folder, prefix="pixels-") as name,
            _processes(self._workers) as pool,
            ahead,
        ):

            def decode(start: int, stop: int) -> Part:
                path = Path(name) / f"{start}.npy"
                masked, apart = self._images.decode_into(path, start, stop, pool, lambda _: None)
                if self._images.fast:
                    _tolerance(apart, self._images.index)
                return Part(start, stop, io.load_array(path), 0, [self._images.ids[row] for row in masked])

            following = ahead.submit(decode, *bounds[0]) if bounds else None
            for further in [*bounds[1:], None][: len(bounds)]:
                assert following is not None
                part = following.result()
                following = ahead.submit(decode, *further) if further else None
                yield part
                Path(part.pixels.filename).unlink()  # type: ignore[attr-defined]


def _tolerance(apart: np.ndarray, index: Path) -> dict[str, Any]:
    """What the manifest says of the fast path: `apart` counts the checked values by their difference in levels."""
    total, largest = int(apart.sum()), int(np.flatnonzero(apart).max(initial=0))
    if largest > LARGEST_TOLERANCE:
        fault = f"decode: fast is {largest} levels of 255 off the exact path here"
        raise InputError(f"{index}: {fault}; set `decode: exact`")
    shares = [int(apart[1]) / max(total, 1), int(apart[2:].sum()) / max(total, 1)]
    return {
        "tolerance": {"levels": largest, "values": total, "share_one_level": shares[0], "share_two_levels": shares[1]},
        "versions": provenance.versions(["simplejpeg", "torch"]),
    }


def open_pixels(path: Path, image_ids: Iterable[str] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
    """Map a pixel cache: (uint8 [n, h, w, 3], manifest).

    Errors: `InputError` when array and manifest disagree, or are not of `image_ids` in this order.
    """
    manifest = io.read_json(manifest_path(path))
    pixels = io.load_array(path)
    remedy = "delete both and run again"
    try:
        shape = (manifest["n"], *Preprocessing.parse(manifest["spec"]).size, 3)
        size, digest = manifest["bytes"], manifest["ids_sha256"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{manifest_path(path)}: no manifest of a pixel cache ({error}); {remedy}") from None
    if pixels.dtype != np.uint8 or pixels.shape != shape or path.stat().st_size != size:
        found = f"{pixels.dtype} {list(pixels.shape)}, {path.stat().st_size:,} bytes"
        said = f"uint8 {list(shape)}, {size:,} bytes"
        raise InputError(f"{path}: holds {found}; its manifest says {said}; {remedy}")
    if image_ids is not None and io.ids_digest(image_ids) != digest:
        raise InputError(f"{path}: made from other images, or in another order, than asked for; {remedy}")
    return pixels, manifest


def read_rows(pixels: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Rows of a mapped pixel cache, read into memory: uint8 [stop - start, h, w, 3].

    Not through the map: what a job has seen would count as its memory, and a file that shrinks under it would be a
    signal that kills. Errors: `InputError` when rows are gone.
    """
    assert isinstance(pixels, np.memmap), "as open_pixels returns it"
    shape = (stop - start, *pixels.shape[1:])
    offset = pixels.offset + start * int(np.prod(shape[1:]))
    rows = np.fromfile(str(pixels.filename), np.uint8, int(np.prod(shape)), offset=offset)
    if rows.size != np.prod(shape):
        raise InputError(f"{pixels.filename}: became shorter while it was read; delete it and run again")
    return rows.reshape(shape)


def _unreadable(index: Path, n: int, faults: list[str]) -> str:
    more = [f"  and {len(faults) - SHOWN:,} more"] if len(faults) > SHOWN else []
    remedy = "Remedy: repair or fetch the archive again, or set on_error to mask to leave them out"
    shown = [f"  {fault}" for fault in faults[:SHOWN]]
    return "\n".join([f"{index}: {len(faults):,} of {n:,} images cannot be read:", *shown, *more, remedy])


def manifest_path(path: Path) -> Path:
    return path.with_suffix(".json")


class _Item(NamedTuple):
    row: int
    image_id: str
    archive: str
    offset: int
    size: int
    codec: str


class _Work(NamedTuple):
    """What every task needs: the file to fill, the length of its header, the image in its first row, and the spec."""

    file: Path
    header: int
    start: int
    spec: Preprocessing
    fast: bool


class _Filled(NamedTuple):
    """What a task did: images, faults by row, and the checked values of the fast path by their difference in levels."""

    images: int
    faults: dict[int, str]
    apart: np.ndarray


def _preallocate(path: Path, shape: tuple[int, ...]) -> int:
    """Lay out an .npy of zeros and reserve its bytes; return the header's length."""
    with path.open("wb") as file:
        layout: Mapping[str, Any] = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, dict(layout))
        file.flush()
        header = file.tell()
        total = header + int(np.prod(shape))
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, total)
            file.truncate(total)
        except OSError as error:
            fault = f"no room for {total:,} bytes ({error.strerror})"
            raise InputError(f"{path.parent}: {fault}; make room") from None
    return header


def _chunks(columns: Mapping[str, np.ndarray], start: int, stop: int) -> Iterator[list[_Item]]:
    """Tasks in the order in which the images lie on disk, so that archives are read from front to back."""
    files = columns["archive"][start:stop]
    rank = {name: i for i, name in enumerate(sorted(set(files)))}
    order = start + np.lexsort((columns["offset"][start:stop], np.array([rank[name] for name in files])))
    fields = [columns[name] for name in _Item._fields[1:]]
    for first in range(0, len(order), CHUNK):
        rows = order[first : first + CHUNK]
        picked = [values[rows].tolist() for values in fields]
        yield [_Item(*item) for item in zip(rows.tolist(), *picked, strict=True)]


class _Pool(NamedTuple):
    executor: concurrent.futures.ProcessPoolExecutor
    workers: int


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[_Pool | None]:
    """Processes that decode, or none for one worker: the caller's own does it then."""
    if workers <= 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker) as executor:
        try:
            yield _Pool(executor, workers)
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


def _run(work: _Work, chunks: Iterable[list[_Item]], pool: _Pool | None) -> Iterator[_Filled]:
    """What each task did, in any order. Few tasks wait at a time."""
    if pool is None:
        with ArchiveReader() as reader:
            for chunk in chunks:
                yield _fill(work, chunk, reader)
        return
    waiting: set[concurrent.futures.Future] = set()
    try:
        for chunk in chunks:
            waiting.add(pool.executor.submit(_fill_in_worker, work, chunk))
            if len(waiting) >= 3 * pool.workers:
                first = concurrent.futures.FIRST_COMPLETED
                done, waiting = concurrent.futures.wait(waiting, return_when=first)
                yield from (future.result() for future in done)
        yield from (future.result() for future in concurrent.futures.as_completed(waiting))
    except concurrent.futures.process.BrokenProcessPool:
        fault = "a process that decodes was killed, most likely for want of memory"
        raise InputError(f"{work.file.parent}: {fault}; run with fewer workers") from None


def _fill(work: _Work, chunk: list[_Item], reader: ArchiveReader) -> _Filled:
    """Decode a chunk into its rows of the file; rows that cannot be decoded stay zero."""
    faults: dict[int, str] = {}
    apart = np.zeros(256, np.int64)
    with work.file.open("r+b", buffering=0) as file:
        for item in chunk:
            try:
                data = reader.read(item.archive, item.offset, item.size, item.image_id, item.codec)
                fast = _fast(data, item, work.spec) if work.fast else None
                if fast is None or item.row % CHECKED == 0:
                    pixels = preprocess(decode(data, item.archive, item.image_id), work.spec)
            except (InputError, ValueError, MemoryError) as error:  # the latter two: an absurd aspect ratio
                named = str(error).startswith(item.archive)
                faults[item.row] = f"{'' if named else f'{item.archive}, image {item.image_id!r}: '}{error}"
                continue
            if fast is not None:
                if item.row % CHECKED == 0:
                    apart += np.bincount(np.abs(fast.astype(np.int16) - pixels).ravel(), minlength=256)
                pixels = fast
            _write(file.fileno(), pixels.tobytes(), work.header + (item.row - work.start) * pixels.nbytes)
    return _Filled(len(chunk), faults, apart)


def _fast(data: bytes, item: _Item, spec: Preprocessing) -> np.ndarray:
    from clip_robustness.inference.fast_pixels import preprocess_fast

    return preprocess_fast(data, item.archive, item.image_id, spec)


def _fill_in_worker(work: _Work, chunk: list[_Item]) -> _Filled:
    return _fill(work, chunk, _worker_reader())


@functools.cache
def _worker_reader() -> ArchiveReader:
    """One for the life of a worker: a row group of a parquet file, once read, serves its next chunks too."""
    return ArchiveReader()


def _write(descriptor: int, data: bytes, position: int) -> None:
    """All of `data` at `position`. Not through a memory map: a full disk is an error there, not a signal."""
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, position)
        view, position = view[written:], position + written


def _start_worker() -> None:
    """One thread a process; and a worker whose parent was killed would wait for its next task for ever."""
    os.environ["OMP_NUM_THREADS"] = "1"
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def wait() -> None:
            multiprocessing.connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()
