"""Images to uint8 pixels, once for each preprocessing spec and not once for each model.

Decoding is PIL's, converted to RGB first: grey, palette, CMYK, 16-bit and alpha become what torchvision's
loader, and so every library that evaluates on folders of images, feeds to its transforms. EXIF orientation
is not applied, as neither open_clip nor timm does. Resize and crop follow torchvision's PIL back end to the
last bit. No torch here: the workers that decode stay small.
"""

import concurrent.futures
import functools
import io as bytes_io
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from PIL import Image

from clip_robustness.core import io
from clip_robustness.core.archive import ArchiveReader, load_index
from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import Preprocessing

# What data sets hold. Others, such as PostScript, would start programs of the machine.
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CHUNK = 64  # images a task: a few tenths of a second, so progress is smooth and tasks cost nothing
SHOWN = 20


def decode(data: bytes, archive: str, image_id: str) -> Image.Image:
    """Encoded bytes -> RGB image. Errors: `InputError` that names archive and image, whatever is wrong."""
    try:
        with Image.open(bytes_io.BytesIO(data), formats=FORMATS) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises a dozen types for broken files, SyntaxError and IndexError too
        fault = "zero bytes" if not data else str(error).partition("<_io")[0].strip() or type(error).__name__
        raise InputError(f"{archive}, image '{image_id}': cannot decode it ({fault})") from None


def preprocess(image: Image.Image, spec: Preprocessing) -> np.ndarray:
    """RGB image -> uint8 [h, w, 3] by the pixel part of `spec`, equal to torchvision's Resize and CenterCrop.

    Source: torchvision.transforms.functional, PIL back end (which always filters when it shrinks).
    """
    width, height = image.size
    if spec.border:
        if min(width, height) <= 2 * spec.border:
            raise InputError(f"{width}x{height} px have nothing inside a border of {spec.border} px")
        image = image.crop((spec.border, spec.border, width - spec.border, height - spec.border))
        width, height = image.size
    if spec.squash is not None:
        height, width = spec.squash
    elif spec.shorter_side is not None:
        short, long = sorted((width, height))
        longer_side = int(spec.shorter_side * long / short)
        portrait = width <= height
        width, height = (spec.shorter_side, longer_side) if portrait else (longer_side, spec.shorter_side)
    if (width, height) != image.size:
        image = image.resize((width, height), RESAMPLING[spec.interpolation])
    if spec.crop is not None:
        top, left = (_crop_start(have, want) for have, want in zip((height, width), spec.crop, strict=True))
        image = image.crop((left, top, left + spec.crop[1], top + spec.crop[0]))  # black outside the image
    return np.array(image)


def _crop_start(have: int, want: int) -> int:
    # Python rounds halves to even and torchvision pads the smaller half first: both decide the last pixel.
    return -((want - have) // 2) if want > have else round((have - want) / 2.0)


def cache_pixels(index: Path, spec: str, out: Path, workers: int = 1, on_error: str = "fail") -> None:
    """Decode every image of `index` into `out`, uint8 [n, h, w, 3], and write its manifest `out`.json last.

    Processes write their rows into one preallocated file, so memory does not grow with n and a full disk
    is known before the first image. The bytes do not depend on `workers`.
    `on_error`: `fail` raises one `InputError` that lists the unreadable images; `mask` leaves them black and
    lists their ids in the manifest as `masked`, for every metric to leave out and report.
    """
    if on_error not in ("fail", "mask"):
        raise InputError(f"on_error is '{on_error}', expected fail or mask")
    parsed = Preprocessing.parse(spec)
    columns = load_index(index)
    n = len(columns["image_id"])
    if not n:
        raise InputError(f"{index}: holds no image")
    manifest_path(out).unlink(missing_ok=True)  # it must never stand beside another array than its own
    with io.atomic(out) as temporary:
        header = _preallocate(temporary, (n, *parsed.size, 3))
        work = _Work(temporary, header, parsed)
        progress = io.Progress(f"pixels {out.stem}", n)
        faults: dict[int, str] = {}
        for done, found in _run(work, _chunks(columns), workers):
            faults |= found
            progress.update(done)
        if faults and on_error == "fail":
            raise InputError(_unreadable(index, n, [faults[row] for row in sorted(faults)]))
        if len(faults) == n:
            raise InputError(f"{index}: not one of {n:,} images can be read; the first: {faults[0]}")
        pixels_sha256, size = io.sha256_file(temporary), temporary.stat().st_size
    io.write_json(
        manifest_path(out),
        {
            "spec": parsed.pixel_spec,
            "n": n,
            "size": parsed.size,
            "bytes": size,
            "ids_sha256": io.ids_digest(columns["image_id"]),
            "index_sha256": io.sha256_file(index),
            "pixels_sha256": pixels_sha256,
            "masked": [columns["image_id"][row] for row in sorted(faults)],
            "pillow": PIL.__version__,
        },
    )


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
    """What every task needs: the file to fill, the length of its header, and the spec."""

    file: Path
    header: int
    spec: Preprocessing


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


def _chunks(columns: Mapping[str, np.ndarray]) -> Iterator[list[_Item]]:
    """Tasks in the order in which the images lie on disk, so that archives are read from front to back."""
    files = columns["archive"]
    rank = {name: i for i, name in enumerate(sorted(set(files)))}
    order = np.lexsort((columns["offset"], np.array([rank[name] for name in files])))
    fields = [columns[name].tolist() for name in _Item._fields[1:]]
    for start in range(0, len(order), CHUNK):
        rows = order[start : start + CHUNK].tolist()
        yield [_Item(row, *(values[row] for values in fields)) for row in rows]


def _run(work: _Work, chunks: Iterable[list[_Item]], workers: int) -> Iterator[tuple[int, dict[int, str]]]:
    """(images done, faults by row) of each task, in any order. Few tasks wait at a time."""
    if workers <= 1:
        with ArchiveReader() as reader:
            for chunk in chunks:
                yield _fill(work, chunk, reader)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context, _die_with_parent) as pool:
        waiting: set[concurrent.futures.Future] = set()
        try:
            for chunk in chunks:
                waiting.add(pool.submit(_fill_in_worker, work, chunk))
                if len(waiting) >= 3 * workers:
                    first = concurrent.futures.FIRST_COMPLETED
                    done, waiting = concurrent.futures.wait(waiting, return_when=first)
                    yield from (future.result() for future in done)
            yield from (future.result() for future in concurrent.futures.as_completed(waiting))
        except concurrent.futures.process.BrokenProcessPool:
            fault = "a process that decodes was killed, most likely for want of memory"
            raise InputError(f"{work.file.parent}: {fault}; run with fewer workers") from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _fill(work: _Work, chunk: list[_Item], reader: ArchiveReader) -> tuple[int, dict[int, str]]:
    """Decode a chunk into its rows of the file; rows that cannot be decoded stay zero."""
    faults: dict[int, str] = {}
    with work.file.open("r+b", buffering=0) as file:
        for item in chunk:
            try:
                data = reader.read(item.archive, item.offset, item.size, item.image_id, item.codec)
                pixels = preprocess(decode(data, item.archive, item.image_id), work.spec)
            except (InputError, ValueError, MemoryError) as error:  # the latter two: an absurd aspect ratio
                named = str(error).startswith(item.archive)
                faults[item.row] = f"{'' if named else f'{item.archive}, image {item.image_id!r}: '}{error}"
                continue
            _write(file.fileno(), pixels.tobytes(), work.header + item.row * pixels.nbytes)
    return len(chunk), faults


def _fill_in_worker(work: _Work, chunk: list[_Item]) -> tuple[int, dict[int, str]]:
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


def _die_with_parent() -> None:
    """A worker whose parent was killed would wait for its next task for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def wait() -> None:
            multiprocessing.connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()
