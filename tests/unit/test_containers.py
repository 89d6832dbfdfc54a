"""Parquet files of a hub, and the same images through every container."""

import io as streams
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from clip_robustness.core import io
from clip_robustness.core.archive import ArchiveReader
from clip_robustness.core.io import InputError
from clip_robustness.core.preprocessing import Preprocessing
from clip_robustness.data import members
from clip_robustness.inference import images, pixels
from tests.unit.packed import encrypted_zip, make_zip, write_parquet
from tests.unit.samples import broken_images, encoded, make_folder, make_tar, picture


def contents(source: Path, password: str | None = None) -> dict[str, bytes]:
    return {member.name: members.read(member) for member in members.list_members([source], password)}


ROWS = {f"n0144/x_{i}.JPEG": bytes([i]) * (i + 1) for i in range(7)}


@pytest.mark.parametrize("column", ["image", "img"])
def test_rows_of_a_parquet_file_are_members(tmp_path: Path, column: str) -> None:
    shards = [write_parquet(tmp_path / f"val-0000{i}-of-00002.parquet", ROWS, column=column) for i in range(2)]
    found = members.list_members(shards)
    assert found == members.list_members([tmp_path])
    assert [member.name for member in found[::2]] == [f"{row:08d}/{name}" for row, name in enumerate(ROWS)]
    assert [(member.archive, member.offset) for member in found[:4]] == [
        (str(s), row) for row in (0, 1) for s in shards
    ]
    assert list(members.read_all(found)) == [content for content in ROWS.values() for _ in shards]
    assert members.read(found[-1]) == ROWS["n0144/x_6.JPEG"]
    assert members.images(found) == found
    assert members.columns(str(shards[0]))["label"].tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert list(members.columns(str(shards[0]))) == ["label"]
    assert members.label_names(str(shards[0])) == ["cat", "dog", "eel"]


def test_rows_without_a_path_and_columns_of_bytes(tmp_path: Path) -> None:
    table = {"image": pyarrow.array([b"0", b"1"]), "label": [1, 2]}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "a.parquet")
    found = members.list_members([tmp_path / "a.parquet"])
    assert [(member.name, members.read(member)) for member in found] == [("00000000", b"0"), ("00000001", b"1")]
    assert members.label_names(str(tmp_path / "a.parquet")) is None
    write_parquet(tmp_path / "b.parquet", {None: b"only"})
    assert contents(tmp_path / "b.parquet") == {"00000000": b"only"}


def test_a_row_group_is_read_once_and_no_other_stays(tmp_path: Path, monkeypatch) -> None:
    shards = [write_parquet(tmp_path / f"{i}.parquet", ROWS, group=3) for i in range(2)]
    reads = []
    real = pyarrow.parquet.ParquetFile.iter_batches

    def counted(file, *arguments, row_groups, **options):
        reads.extend(row_groups)
        return real(file, *arguments, row_groups=row_groups, **options)

    monkeypatch.setattr(pyarrow.parquet.ParquetFile, "iter_batches", counted)
    with ArchiveReader(most_open=4) as reader:
        for shard in shards:
            for row, content in enumerate(ROWS.values()):
                assert reader.read(str(shard), row, 0, "x", "parquet") == content
        assert reads == [0, 1, 2] * 2
        assert reader.read(str(shards[0]), 6, 0, "x", "parquet") == ROWS["n0144/x_6.JPEG"]
    assert reads == [0, 1, 2] * 2 + [2]


def test_faults_of_parquet_files(tmp_path: Path, monkeypatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", ROWS | {"gone.jpg": None})
    with ArchiveReader() as reader:
        with pytest.raises(InputError, match=r"a\.parquet, image 'g': row 7 holds no bytes"):
            reader.read(str(path), 7, 0, "g", "parquet")
        with pytest.raises(InputError, match=r"a\.parquet, image 'h': row 8 of a parquet file of 8 rows"):
            reader.read(str(path), 8, 0, "h", "parquet")
        with pytest.raises(InputError, match=r"gone\.parquet, image 'x': cannot read it \(No such file"):
            reader.read(str(tmp_path / "gone.parquet"), 0, 0, "x", "parquet")
    import clip_robustness.core.archive as core

    monkeypatch.setattr(core, "LARGEST_GROUP", 10)
    with pytest.raises(InputError, match=r"a\.parquet: row group 0 holds more than 10 bytes of images"):
        contents(path)
    monkeypatch.undo()
    raw = path.read_bytes()
    path.write_bytes(raw[:4] + b"\xff" * 40 + raw[44:])
    with pytest.raises(InputError, match=r"a\.parquet, image '.*': damaged row group 0"):
        contents(path)
    for content in (raw[:-9], b"<html>", b""):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"a\.parquet: not a whole parquet file"):
            members.list_members([path])
    with pytest.raises(InputError, match=r"row 0: its name leads out"):
        members.list_members([write_parquet(path, {"../x.jpg": b"x"})])


def test_a_parquet_file_of_other_things_is_a_file(tmp_path: Path) -> None:
    io.write_parquet(tmp_path / "captions.parquet", {"image": ["a.jpg"], "caption": ["a cat"]})
    (member,) = members.list_members([tmp_path / "captions.parquet"])
    assert (member.name, member.codec) == ("captions.parquet", "")
    assert members.read(member) == (tmp_path / "captions.parquet").read_bytes()
    assert members.columns(member.archive)["caption"].tolist() == ["a cat"]
    with pytest.raises(InputError, match=r"captions\.parquet, image 'x': the parquet file has no column image or img"):
        ArchiveReader().read(member.archive, 0, 0, "x", "parquet")


def awkward() -> dict[str, bytes]:
    rgb = picture(31, 23)
    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "a/grey.jpg": encoded(rgb.convert("L")),
        "a/cmyk.jpg": encoded(rgb.convert("CMYK")),
        "a/png_by_another_name.JPEG": encoded(rgb, "PNG"),
        "a/turned.jpg": encoded(rgb, exif=turned),
    }


def source_of(kind: str, folder: Path, files: dict[str, bytes]) -> Path:
    make = {
        "tar": lambda: make_tar(folder / "a.tar", files),
        "zip": lambda: make_zip(folder / "a.zip", files),
        "deflated": lambda: make_zip(folder / "a.zip", files, zipfile.ZIP_DEFLATED),
        "parquet": lambda: write_parquet(folder / "a.parquet", files, group=9),
        "folder": lambda: make_folder(folder / "f", files),
        "encrypted": lambda: encrypted_zip(folder / "a.zip", files, deflate=True),
    }
    return make[kind]()


KINDS = ("tar", "zip", "deflated", "parquet", "folder", "encrypted")


@pytest.mark.parametrize(("kind", "workers"), [*((kind, 1) for kind in KINDS), ("deflated", 2), ("parquet", 2)])
def test_every_container_gives_the_same_pixels_and_the_same_faults(tmp_path: Path, kind: str, workers: int) -> None:
    """Through the index, as the workflow does it; the reference is what PIL makes of the bytes themselves."""
    broken = {f"b/{name}": content for name, content in broken_images().items() if not name.endswith("pcx")}
    files = awkward() | broken
    found = members.list_members([source_of(kind, tmp_path, files)], "secret")
    ids = ["/".join(member.name.split("/")[-2:]) for member in found]
    columns = {
        "image_id": ids,
        "archive": [member.archive for member in found],
        "offset": np.array([member.offset for member in found]),
        "size": np.array([member.size for member in found]),
        "codec": [member.codec for member in found],
        "label": np.zeros(len(found), np.int32),
    }
    io.write_parquet(tmp_path / "index.parquet", columns)
    spec = "resize(16,bicubic)|center_crop(16)"
    with pytest.raises(InputError, match=rf"{len(broken)} of {len(files)} images cannot be read"):
        pixels.cache_pixels(tmp_path / "index.parquet", spec, tmp_path / "c.npy", workers)
    pixels.cache_pixels(tmp_path / "index.parquet", spec, tmp_path / "c.npy", workers, on_error="mask")
    array, manifest = pixels.open_pixels(tmp_path / "c.npy", ids)
    assert sorted(manifest["masked"]) == sorted(broken)
    for name, content in awkward().items():
        image = Image.open(streams.BytesIO(content)).convert("RGB")
        assert np.array_equal(array[ids.index(name)], images.preprocess(image, Preprocessing.parse(spec)))
