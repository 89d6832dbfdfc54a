"""Indexing and random access, by container: python benchmarks/archives.py [members] [bytes]

Writes images of random bytes (50,000 of 20 KB by default) into a temporary folder as a tar, a zip, a folder of files
and a parquet file, one after the other, lists each in a fresh process, then reads `READS` of them in random order
and all in their order, best of three. Everything is in the page cache: what is measured is the software's part.
A parquet file is read by row groups, so its random reads are few; a job reads it in order.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

from clip_robustness.core.archive import ArchiveReader
from clip_robustness.data.members import list_members
from clip_robustness.data.rows import Member

READS = 10_000
READS_OF_PARQUET = 50
ROW_GROUP = 100  # what the library `datasets` writes for images


def images(count: int, size: int) -> Iterator[tuple[str, bytes]]:
    data = np.random.default_rng(0).bytes(size + count)
    for i in range(count):
        yield f"set/n{i % 1000:08d}/{i:08d}.jpg", data[i : i + size]


def write_tar(folder: Path, count: int, size: int) -> Path:
    with tarfile.open(folder / "a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in images(count, size):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    return folder / "a.tar"


def write_zip(folder: Path, count: int, size: int, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(folder / "a.zip", "w", method, compresslevel=1) as archive:
        for name, content in images(count, size):
            archive.writestr(name, content)
    return folder / "a.zip"


def write_deflated(folder: Path, count: int, size: int) -> Path:
    return write_zip(folder, count, size, zipfile.ZIP_DEFLATED)


def write_folder(folder: Path, count: int, size: int) -> Path:
    for i in range(1000):
        (folder / f"f/set/n{i:08d}").mkdir(parents=True)
    for name, content in images(count, size):
        (folder / "f" / name).write_bytes(content)
    return folder / "f"


def write_parquet(folder: Path, count: int, size: int) -> Path:
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("image", kind), ("label", pyarrow.int64())])
    with pyarrow.parquet.ParquetWriter(folder / "a.parquet", schema) as file:
        batch = []
        for name, content in images(count, size):
            batch.append({"image": {"bytes": content, "path": name}, "label": 0})
            if len(batch) == ROW_GROUP:
                file.write_table(pyarrow.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            file.write_table(pyarrow.Table.from_pylist(batch, schema))
    return folder / "a.parquet"


WRITERS: dict[str, Callable[[Path, int, int], Path]] = {
    "folder of files": write_folder,
    "tar": write_tar,
    "zip, stored": write_zip,
    "zip, deflated": write_deflated,
    "parquet": write_parquet,
}


def index_seconds(source: Path) -> tuple[float, float]:
    """Wall and processor seconds of listing, best of three fresh processes, imports left out."""
    code = "import sys, time; from pathlib import Path; from clip_robustness.data.members import list_members\n"
    code += "import pyarrow.parquet; source = Path(sys.argv[1]); t, c = time.perf_counter(), time.process_time()\n"
    code += "list_members([source]); print(time.perf_counter() - t, time.process_time() - c)"
    command = [sys.executable, "-c", code, str(source)]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() for _ in range(3)]
    wall, processor = min((float(wall), float(processor)) for wall, processor in runs)
    return wall, processor


def read_rate(members: list[Member]) -> float:
    """Images a second, best of three."""
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        with ArchiveReader() as reader:
            for member in members:
                reader.read(member.archive, member.offset, member.size, member.name, member.codec)
        rates.append(len(members) / (time.perf_counter() - start))
    return max(rates)


def plain_rate(members: list[Member]) -> float:
    """The same files, unpacked, as other loaders read them: open, read, close."""
    rates = []
    for _ in range(3):
        start = time.perf_counter()
        for member in members:
            with open(member.archive, "rb") as file:  # noqa: PTH123 - as they do it
                file.read()
        rates.append(len(members) / (time.perf_counter() - start))
    return max(rates)


def main() -> None:
    count, size = [*map(int, sys.argv[1:3]), *(50_000, 20_000)[len(sys.argv) - 1 :]]
    print(f"{count:,} images of {size:,} bytes; load of the machine {os.getloadavg()[0]:.1f}")
    print(f"{'':18}{'index s':>9}{'cpu s':>7}{'random /s':>12}{'in order /s':>13}")
    for name, write in WRITERS.items():
        with tempfile.TemporaryDirectory() as folder:
            source = write(Path(folder), count, size)
            wall, processor = index_seconds(source)
            members = list_members([source])
            order = np.random.default_rng(1).permutation(len(members))[
                : READS if name != "parquet" else READS_OF_PARQUET
            ]
            chosen = [members[i] for i in order]
            in_order = sorted(members, key=lambda member: (member.archive, member.offset))[:READS]
            line = f"{wall:9.2f}{processor:7.2f}{read_rate(chosen):12,.0f}{read_rate(in_order):13,.0f}"
            print(f"{name:18}{line}", flush=True)
            if name == "folder of files":
                line = f"{'':16}{plain_rate(chosen):12,.0f}{plain_rate(in_order):13,.0f}"
                print(f"{'  by open/read':18}{line}", flush=True)


if __name__ == "__main__":
    main()
