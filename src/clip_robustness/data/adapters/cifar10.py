"""CIFAR-10 (Krizhevsky 2009), from its binary version, cifar-10-binary.tar.gz. The Python version is pickles: not read.

``test_batch.bin`` (and ``data_batch_1.bin`` to ``_5``) has records of one label byte and 3,072 bytes of a 32 x 32
image: its red plane, then green, then blue; ``batches.meta.txt`` has the ten names. A record is no image file, so the
images are written as PNGs into one tar beside the archive, once (10,000 take 37 MB), and indexed there.

Option `split`: ``test`` (default) or ``train``.
"""

import struct
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core.io import InputError, atomic
from clip_robustness.data.adapters._files import AGAIN, find, label_of, read_text
from clip_robustness.data.members import list_members, read
from clip_robustness.data.rows import Member, Row

SPLITS = {"test": ("test_batch",), "train": tuple(f"data_batch_{i}" for i in range(1, 6))}
SIDE = 32
RECORD = 1 + 3 * SIDE * SIDE


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Label = the record's; the id is ``test_batch/00000.png``.

    Errors: `InputError` for the Python version, a damaged batch, and names that are not those of the label space.
    """
    split = options.get("split", "test")
    if split not in SPLITS:
        raise InputError(f"{where}: option 'split' is {split!r}, expected {' or '.join(SPLITS)}")
    if not any(member.name.endswith(".bin") for member in members):
        raise InputError(f"{where}: holds no batch in binary form; use cifar-10-binary.tar.gz")
    names_at = find(members, "batches.meta.txt", where)
    names = read_text(names_at).split()
    if names != list(space["classes"]):
        found, known = ", ".join(names), f"those of the label space '{space.get('name', '?')}'"
        raise InputError(f"{label_of(names_at)}: the classes are {found}, not {known}; correct 'labels'")
    rows = []
    for batch in SPLITS[split]:
        member = find(members, f"{batch}.bin", where)
        data = read(member)
        if len(data) % RECORD or not data:
            raise InputError(f"{label_of(member)}: {len(data)} bytes are no records of {RECORD}; {AGAIN}")
        records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
        if (highest := int(records[:, 0].max())) >= len(names):
            raise InputError(f"{label_of(member)}: label {highest}, expected 0..{len(names) - 1}; {AGAIN}")
        pictures = {m.name: m for m in _pictures(batch, records, Path(member.archive))}
        for number, label in enumerate(records[:, 0].tolist()):
            name = f"{batch}/{number:05d}.png"
            rows.append(Row(name, pictures[name], label))
    return rows


def _pictures(batch: str, records: np.ndarray, archive: Path) -> list[Member]:
    """The members of the tar of PNGs; it is made when it is not there, or older than the archive."""
    out = archive.with_name(f"{batch}.png.tar")
    if not out.exists() or out.stat().st_mtime_ns < archive.stat().st_mtime_ns:
        try:
            with atomic(out) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
                for number, content in enumerate(_pngs(records)):
                    info = tarfile.TarInfo(f"{batch}/{number:05d}.png")
                    info.size = len(content)
                    tar.addfile(info, BytesIO(content))
        except OSError as error:
            remedy = "name a copy under 'local:' whose folder you may write to"
            raise InputError(f"{out}: cannot write the images there ({error.strerror}); {remedy}") from None
    found = list_members([out])
    if len(found) != len(records):
        raise InputError(f"{out}: {len(found)} images of {len(records)}; delete it")
    return found


def _pngs(records: np.ndarray) -> Iterator[bytes]:
    """PNG files without compression, which is the same for every version of zlib; noise hardly compresses."""
    pixels = records[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1).reshape(-1, SIDE, 3 * SIDE)
    lines = np.zeros((len(pixels), SIDE, 1 + 3 * SIDE), np.uint8)  # each line begins with filter 0: none
    lines[:, :, 1:] = pixels
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0))
    for image in lines:
        yield b"\x89PNG\r\n\x1a\n" + header + _chunk(b"IDAT", zlib.compress(image.tobytes(), 0)) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
