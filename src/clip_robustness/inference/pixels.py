"""Images to uint8 pixels: into a cache, once a preprocessing spec and not once a model, or as a stream.

A stream decodes a part while the one before is embedded, where a cache would cost more disk than it saves time.
"""

import concurrent.futures
import hashlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL

from clip_robustness.core import io, provenance
from clip_robustness.core.archive import load_index
from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.inference.decoding import CHUNK, Pool, Work, chunks, preallocate, processes, run

SHOWN = 20
LARGEST_TOLERANCE = 2  # levels of 255
BLOCK = 4096  # images that share a checksum


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
    with io.atomic(out) as temporary, processes(workers) as pool:
        progress = io.Progress(f"pixels {out.stem}", images.n)
        faults, apart = images.decode_into(temporary, 0, images.n, pool, progress.update)
        tolerance = _tolerance(apart, index) if decode == "fast" else {}
        pixels, size = io.load_array(temporary), temporary.stat().st_size
        blocks = [_block_sha256(pixels, start) for start in range(0, images.n, BLOCK)]
    io.write_json(
        manifest_path(out),
        {
            **images.facts,
            "n": images.n,
            "size": images.spec.size,
            "bytes": size,
            "index_sha256": io.sha256_file(index),
            "blocks_sha256": blocks,
            "pixels_sha256": io.digest(*blocks),
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
        self, path: Path, start: int, stop: int, pool: Pool | None, done: Callable[[int], None]
    ) -> tuple[list[int], np.ndarray]:
        """Write images `start` to `stop` to `path` as .npy, uint8 [stop - start, h, w, 3]; call `done` as they come.

        Returns the rows that cannot be read, which stay black, and the counts of the fast path's differences.
        Errors: `InputError` for unreadable images unless they are masked, and where not one can be read.
        """
        header = preallocate(path, (stop - start, *self.spec.size, 3))
        work = Work(path, header, start, self.spec, self.fast)
        faults: dict[int, str] = {}
        apart = np.zeros(256, np.int64)
        for filled in run(work, chunks(self.columns, start, stop), pool):
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
    """A pixel cache as a source of parts. `facts`: what decides its pixels.

    A part is compared with the checksums of its pixels while the model is at the part before.
    """

    def __init__(self, path: Path):
        self._pixels, manifest = open_pixels(path)
        self._blocks = dict(enumerate(manifest.get("blocks_sha256", ())))
        self.n, self.name = len(self._pixels), path.stem
        self.spec, self.masked = Preprocessing.parse(manifest["spec"]), list(manifest.get("masked", ()))
        self.facts = {name: manifest[name] for name in ("ids_sha256", "pixels_sha256")}

    def parts(self, bounds: Sequence[tuple[int, int]], folder: Path) -> Iterator[Part]:
        yield from _ahead(self._checked, bounds)

    def _checked(self, start: int, stop: int) -> Part:
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            noted, first = self._blocks.pop(block, None), block * BLOCK
            if noted and _block_sha256(self._pixels, first) != noted:
                where = f"images {first:,} to {min(first + BLOCK, self.n):,}"
                fault = "not the bytes that were written (SHA-256), so it was damaged since; delete it and run again"
                raise InputError(f"{self._pixels.filename}, {where}: {fault}")  # type: ignore[attr-defined]
        return Part(start, stop, self._pixels, start)


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
        with tempfile.TemporaryDirectory(dir=folder, prefix="pixels-") as name, processes(self._workers) as pool:

            def decode(start: int, stop: int) -> Part:
                path = Path(name) / f"{start}.npy"
                masked, apart = self._images.decode_into(path, start, stop, pool, lambda _: None)
                if self._images.fast:
                    _tolerance(apart, self._images.index)
                return Part(start, stop, io.load_array(path), 0, [self._images.ids[row] for row in masked])

            for part in _ahead(decode, bounds):
                yield part
                Path(part.pixels.filename).unlink()  # type: ignore[attr-defined]


def _ahead(make: Callable[[int, int], Part], bounds: Sequence[tuple[int, int]]) -> Iterator[Part]:
    """Parts by `bounds` (start, stop), each made by a thread while the one before it is used."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        following = thread.submit(make, *bounds[0]) if bounds else None
        for further in [*bounds[1:], None][: len(bounds)]:
            assert following is not None
            part = following.result()
            following = thread.submit(make, *further) if further else None
            yield part


def _block_sha256(pixels: np.ndarray, start: int) -> str:
    """SHA-256 of `BLOCK` images of a mapped pixel cache from `start` on."""
    checksum, end = hashlib.sha256(), min(start + BLOCK, len(pixels))
    for first in range(start, end, CHUNK):
        checksum.update(read_rows(pixels, first, min(first + CHUNK, end)).data)
    return checksum.hexdigest()


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
    manifest = io.read_manifest(manifest_path(path), spec=str, n=int, bytes=int, ids_sha256=str)
    pixels = io.load_array(path)
    remedy = "delete both and run again"
    shape = (manifest["n"], *Preprocessing.parse(manifest["spec"]).size, 3)
    size, digest = manifest["bytes"], manifest["ids_sha256"]
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
    remedy = "Remedy: repair or fetch the archive again, or set `on_unreadable: mask` in the config to leave them out"
    shown = [f"  {fault}" for fault in faults[:SHOWN]]
    return "\n".join([f"{index}: {len(faults):,} of {n:,} images cannot be read:", *shown, *more, remedy])


def manifest_path(path: Path) -> Path:
    return path.with_suffix(".json")
