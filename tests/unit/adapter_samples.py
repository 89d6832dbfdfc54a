"""Archives of any kind, indexed and read back: what the tests of the adapters share."""

import gzip
import json
import tarfile
import zipfile
from pathlib import Path

from clip_robustness.core import archive, io
from clip_robustness.data.index import build_index
from tests.unit.samples import download, encoded, make_tar, picture

BASE = {"name": "base", "base": None, "classes": ["ant", "bee", "cat"], "members": [[0], [1], [2]], "pool": "max"}


def jpeg(seed: int) -> bytes:
    return encoded(picture(16, 12, seed))


def png(seed: int) -> bytes:
    return encoded(picture(8, 8, seed), "PNG")


def make_gzip(path: Path, files: dict[str, bytes]) -> Path:
    tar = make_tar(path.with_suffix(".plain"), files, tarfile.PAX_FORMAT)
    path.write_bytes(gzip.compress(tar.read_bytes()))
    tar.unlink()
    return path


def make_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as target:
        for name, content in files.items():
            target.writestr(name, content)
    return path


def build(tmp_path: Path, sources: list[Path], family: str, space: dict | None = None, **dataset: object) -> dict:
    io.write_json(tmp_path / "space.json", space or BASE)
    entry = {"name": "x", "family": family} | dataset
    count = build_index(entry, download(sources, tmp_path), tmp_path / "space.json", tmp_path / "index.parquet")
    index = archive.load_index(tmp_path / "index.parquet")
    assert count == len(index["image_id"])
    return index


def contents(index: dict, prefix: str = "") -> list[bytes]:
    columns = [index[prefix + name].tolist() for name in ("archive", "offset", "size", "codec")]
    with archive.ArchiveReader() as reader:
        return [reader.read(a, o, s, codec=c) for a, o, s, c in zip(*columns, strict=True)]


def parsed(index: dict, column: str) -> list:
    return [json.loads(text) for text in index[column]]
