"""What the tests of the adapters share: label spaces, archives and parquet files as others write them."""

import gzip
import importlib.util
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

from clip_robustness.core import archive, io
from clip_robustness.data.index import build_index
from clip_robustness.inference.label_spaces import write_label_space
from tests.unit.samples import download, encoded, make_tar, picture

INFO = Path(importlib.util.find_spec("timm").submodule_search_locations[0]) / "data" / "_info"
WNIDS = (INFO / "imagenet_synsets.txt").read_text().split()
PICTURES = [encoded(picture(8, 8, seed)) for seed in range(12)]


def base_space() -> dict:
    names = [f"class {i}" for i in range(1000)]
    members = [[i] for i in range(1000)]
    return {"name": "imagenet_1k", "base": None, "classes": names, "members": members, "pool": "max", "wnids": WNIDS}


def space_of(tmp_path: Path, classes: str, **more: object) -> dict:
    io.write_json(tmp_path / "base.json", base_space())
    entry = {"base": "imagenet_1k", "classes": classes, **more}
    write_label_space("x", entry, tmp_path / "base.json", tmp_path / "x.json")
    return io.read_json(tmp_path / "x.json")


def build(tmp_path: Path, sources: list[Path], space: dict, family: str, **dataset: object) -> dict:
    io.write_json(tmp_path / "space.json", space)
    entry = {"name": "x", "family": family} | dataset
    count = build_index(entry, download(sources, tmp_path), tmp_path / "space.json", tmp_path / "index.parquet")
    index = archive.load_index(tmp_path / "index.parquet")
    assert count == len(index["image_id"])
    return {name: column.tolist() for name, column in index.items()}


def contents(index: dict) -> list[bytes]:
    places = zip(index["archive"], index["offset"], index["size"], index["image_id"], index["codec"], strict=True)
    return [archive.read_member(*place) for place in places]


def by_id(index: dict, *columns: str) -> dict:
    return dict(zip(index["image_id"], zip(*(index[name] for name in columns), strict=True), strict=True))


def tar_gz(path: Path, files: dict[str, bytes]) -> Path:
    path.write_bytes(gzip.compress(make_tar(path.with_suffix(".plain"), files).read_bytes()))
    return path


def parquet(path: Path, rows: list[tuple[str | None, bytes, object]], names: list[str] | None = None) -> Path:
    """As the library `datasets` writes them: a struct of bytes and path, a label, features in the metadata."""
    images = [{"bytes": content, "path": file} for file, content, _ in rows]
    table = pyarrow.table({"image": images, "label": [label for *_, label in rows]})
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pyarrow.parquet.write_table(table, path, row_group_size=2)
    return path
