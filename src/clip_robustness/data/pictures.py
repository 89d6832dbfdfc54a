"""From an index's images to a tar of other images: read, decoded, changed, encoded, with little of it in memory."""

import collections
import csv
import io as streams
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from clip_robustness.core.archive import ArchiveReader
from clip_robustness.core.io import InputError, Progress, atomic, digest

if TYPE_CHECKING:
    from PIL.Image import Image

Changed = TypeVar("Changed")

# What data sets hold. Others, such as PostScript, would start programs of the machine.
READ = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM")
AHEAD = 4  # images that are read before they are needed, for each worker


def decode(data: bytes, archive: str, image_id: str) -> "Image":
    """Encoded bytes -> RGB image without metadata (an orientation of EXIF is not applied, as nowhere here).

    Errors: `InputError` that names archive and image, whatever is wrong.
    """
    from PIL import Image

    try:
        with Image.open(streams.BytesIO(data), formats=READ) as image:
            plain = image.convert("RGB")
    except MemoryError:  # no fault of the image
        raise
    except Exception as error:  # Pillow raises a dozen types for broken files, SyntaxError and IndexError too
        fault = "zero bytes" if not data else str(error).partition("<_io")[0].strip() or type(error).__name__
        remedy = "fetch the data set that it is made from again"
        raise InputError(f"{archive}, image '{image_id}': cannot decode it ({fault}); {remedy}") from None
    plain.info = {}  # Pillow would write its comment or colour profile into the new file
    return plain


def encode(image: "Image", suffix: str, quality: int = 95) -> bytes:
    """A file of the format that the suffix stands for, ``png`` or ``jpg``; `quality` (1..95) is the JPEG's."""
    buffer = streams.BytesIO()
    if suffix == "jpg":
        image.save(buffer, "JPEG", quality=quality)
    else:
        image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def generator(seed: int, *names: str) -> np.random.Generator:
    """Random numbers of one image: they depend on nothing but the seed and its names."""
    return np.random.default_rng(int(digest(seed, *names), 16))


def change_images(
    index: Mapping[str, np.ndarray],
    rows: Iterable[int],
    change: Callable[[int, "Image"], Changed],
    workers: int,
    progress: Progress,
) -> Iterator[Changed]:
    """Yield `change(row, image)` for rows of an index, in the order of `rows`.

    `workers` threads decode, change and encode: Pillow lets go of Python's lock meanwhile. A few images for each
    worker are in memory.
    """

    def work(row: int, data: bytes) -> Changed:
        return change(row, decode(data, index["archive"][row], index["image_id"][row]))

    places = [index[name] for name in ("archive", "offset", "size", "image_id", "codec")]
    waiting: collections.deque[Any] = collections.deque()
    with ArchiveReader() as reader, ThreadPoolExecutor(workers) as pool:
        for row in rows:
            archive, offset, size, image_id, codec = (column[row] for column in places)
            waiting.append(pool.submit(work, row, reader.read(archive, int(offset), int(size), image_id, codec)))
            if len(waiting) > AHEAD * workers:
                yield waiting.popleft().result()
                progress.update(1)
        while waiting:
            yield waiting.popleft().result()
            progress.update(1)


def as_stored(index: Mapping[str, np.ndarray]) -> list[int]:
    """The rows of an index as their images lie on the disk: read once from start to end, whatever the index's order."""
    places = list(zip(index["archive"], index["offset"].tolist(), strict=True))
    return sorted(range(len(places)), key=places.__getitem__)


def write_tar(out: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write named files as an uncompressed tar, one at a time; the same files give the same bytes.

    A killed run leaves nothing under the tar's name. Errors: `InputError` when it cannot be written.
    """
    try:
        with atomic(out) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as tar:
            for name, content in files:
                info = tarfile.TarInfo(name)  # its defaults are mtime 0, no owner
                info.size = len(content)
                tar.addfile(info, streams.BytesIO(content))
    except OSError as error:
        remedy = "make room there, or choose a folder that you may write to"
        raise InputError(f"{out}: cannot write the images there ({error.strerror or error}); {remedy}") from None


def as_csv(columns: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> bytes:
    buffer = streams.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([columns, *rows])
    return buffer.getvalue().encode()
