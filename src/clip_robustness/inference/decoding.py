"""Decoding images into the rows of one file, by this process or by several.

Nothing here imports torch: the processes that decode stay small. `decode: fast` does (`fast_pixels`), and gives the
last bit up for 1.6 times the speed.
"""

import concurrent.futures
import contextlib
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from clip_robustness.core.archive import ArchiveReader
from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.inference.images import decode, preprocess

CHUNK = 64  # images a task: a few tenths of a second, so progress is smooth and tasks cost nothing
CHECKED = 50  # the fast path does every so manieth image in both ways, and the manifest says how far they are apart


class _Item(NamedTuple):
    row: int
    image_id: str
    archive: str
    offset: int
    size: int
    codec: str


class Work(NamedTuple):
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


def preallocate(path: Path, shape: tuple[int, ...]) -> int:
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
            raise InputError(f"{path.parent}: {fault}; make room and run again") from None
    return header


def chunks(columns: Mapping[str, np.ndarray], start: int, stop: int) -> Iterator[list[_Item]]:
    """Tasks in the order in which the images lie on disk, so that archives are read from front to back."""
    files = columns["archive"][start:stop]
    rank = {name: i for i, name in enumerate(sorted(set(files)))}
    order = start + np.lexsort((columns["offset"][start:stop], np.array([rank[name] for name in files])))
    fields = [columns[name] for name in _Item._fields[1:]]
    for first in range(0, len(order), CHUNK):
        rows = order[first : first + CHUNK]
        picked = [values[rows].tolist() for values in fields]
        yield [_Item(*item) for item in zip(rows.tolist(), *picked, strict=True)]


class Pool(NamedTuple):
    executor: concurrent.futures.ProcessPoolExecutor
    workers: int


@contextlib.contextmanager
def processes(workers: int) -> Iterator[Pool | None]:
    """Processes that decode, or none for one worker: the caller's own does it then."""
    if workers <= 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker) as executor:
        try:
            yield Pool(executor, workers)
        finally:
            executor.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes that start in here never hear it. It reaches all of a terminal: the parent says so, and ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(work: Work, chunks: Iterable[list[_Item]], pool: Pool | None) -> Iterator[_Filled]:
    """What each task did, in any order. Few tasks wait at a time."""
    if pool is None:
        with ArchiveReader() as reader:
            for chunk in chunks:
                yield _fill(work, chunk, reader)
        return
    waiting: set[concurrent.futures.Future] = set()
    try:
        for chunk in chunks:
            with _deaf_to_ctrl_c():
                waiting.add(pool.executor.submit(_fill_in_worker, work, chunk))
            if len(waiting) >= 3 * pool.workers:
                first = concurrent.futures.FIRST_COMPLETED
                done, waiting = concurrent.futures.wait(waiting, return_when=first)
                yield from (future.result() for future in done)
        yield from (future.result() for future in concurrent.futures.as_completed(waiting))
    except concurrent.futures.process.BrokenProcessPool:
        fault = "a process that decodes was killed, most likely for want of memory"
        remedy = "give the job more (`set-resources`, key mem_mb) or take fewer `threads`, then run again"
        raise InputError(f"{work.file.parent}: {fault}; {remedy}") from None


def _fill(work: Work, chunk: list[_Item], reader: ArchiveReader) -> _Filled:
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
            except (InputError, ValueError) as error:  # the latter: an absurd aspect ratio
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


def _fill_in_worker(work: Work, chunk: list[_Item]) -> _Filled:
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
