from pathlib import Path

import numpy as np
import pytest

from clip_robustness.core import archive, io
from clip_robustness.core.io import InputError

CONTENT = bytes(range(256)) * 8


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.tar"
    path.write_bytes(CONTENT)
    return path


def columns(file: Path, **changes: object) -> dict[str, object]:
    whole: dict[str, object] = {
        "image_id": ["one", "two"],
        "archive": [str(file), str(file)],
        "offset": np.array([0, 1000], np.int64),
        "size": np.array([1000, len(CONTENT) - 1000], np.int64),
        "label": np.array([-1, 3], np.int32),
    }
    return whole | changes


def test_reads_the_bytes_that_the_index_names(file: Path, tmp_path: Path) -> None:
    io.write_parquet(tmp_path / "i.parquet", columns(file))
    index = archive.load_index(tmp_path / "i.parquet")
    with archive.ArchiveReader() as reader:
        parts = [reader.read(*row) for row in zip(index["archive"], index["offset"], index["size"], strict=True)]
    assert b"".join(parts) == CONTENT
    assert archive.read_member(file, 5, 0) == b""


def test_no_more_files_stay_open_than_allowed(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(9)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 4)
    before = len(list(Path("/proc/self/fd").iterdir()))
    with archive.ArchiveReader(most_open=3) as reader:
        for i in (*range(9), *range(9)):
            assert reader.read(str(paths[i]), 1, 3) == bytes([i]) * 3
            assert len(list(Path("/proc/self/fd").iterdir())) <= before + 3
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.parametrize(
    ("offset", "size", "message"),
    [
        (len(CONTENT) - 3, 4, "truncated, the file ends 1 bytes before"),
        (len(CONTENT) + 9, 1, "truncated"),
        (-1, 4, "must not be negative"),
        (0, -4, "must not be negative"),
    ],
)
def test_bytes_outside_the_archive(file: Path, offset: int, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        archive.read_member(file, offset, size, "n01/cat.jpg")
    assert str(file) in str(caught.value)
    assert "n01/cat.jpg" in str(caught.value)


def test_a_file_that_shrinks_under_its_reader_is_an_error(file: Path) -> None:
    with archive.ArchiveReader() as reader:
        assert len(reader.read(str(file), 1500, 100)) == 100
        file.write_bytes(CONTENT[:1550])
        with pytest.raises(InputError, match="truncated, the file ends 50 bytes before"):
            reader.read(str(file), 1500, 100, "cat")


def test_a_missing_archive(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"gone\.tar, image 'cat': cannot read it \(No such file"):
        archive.read_member(tmp_path / "gone.tar", 0, 1, "cat")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": np.array([0.0, 1.0])}, "column 'offset' holds float64"),
        ({"offset": np.array([0, -5], np.int64)}, "row 1: offset is -5"),
        ({"size": np.array([-1, 5], np.int64)}, "row 0: size is -1"),
        ({"label": np.array([0, -2], np.int32)}, "row 1: label is -2"),
        ({"image_id": ["one", "one"]}, "'one' stands there 2 times"),
        ({"image_id": ["one", "a\nb"]}, "row 1: image_id is 'a\\\\nb'"),
        ({"image_id": ["one", None]}, "row 1: image_id is None"),
        ({"image_id": np.array([1, 2])}, "expected plain text"),
        ({"archive": ["", "x"]}, "row 0: archive is ''"),
        ({"codec": ["", "lzma"]}, "row 1: codec is 'lzma', expected one of"),
        ({"codec": ["", None]}, "row 1: codec is None"),
        (
            {"codec": ["deflate", ""], "size": np.array([9999, 1], np.int64)},
            "image 'one' .*but the image ends at byte 9999",
        ),
        ({"codec": ["parquet", ""]}, r"a\.tar: not a whole parquet file"),
        ({"size": np.array([1000, len(CONTENT)], np.int64)}, r"image 'two' \(row 1 of .*2048 bytes long"),
        ({"archive": ["/none/such.tar"] * 2}, r"such\.tar, image 'one' .*: no such file"),
    ],
)
def test_an_index_is_validated(file: Path, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    io.write_parquet(tmp_path / "i.parquet", columns(file, **changes))
    with pytest.raises(InputError, match=message):
        archive.load_index(tmp_path / "i.parquet")


@pytest.mark.parametrize("name", archive.REQUIRED)
def test_every_column_is_needed(file: Path, tmp_path: Path, name: str) -> None:
    some = columns(file)
    del some[name]
    io.write_parquet(tmp_path / "i.parquet", some)
    with pytest.raises(InputError, match=f"column '{name}' is missing"):
        archive.load_index(tmp_path / "i.parquet")


def test_labels_can_be_read_where_the_archive_is_gone(file: Path, tmp_path: Path) -> None:
    io.write_parquet(tmp_path / "i.parquet", columns(file, texture_class=np.array([7, 8], np.int32)))
    file.unlink()
    index = archive.load_index(tmp_path / "i.parquet", archives=False)
    assert index["label"].tolist() == [-1, 3]
    assert index["texture_class"].tolist() == [7, 8]
    with pytest.raises(InputError, match="no such file"):
        archive.load_index(tmp_path / "i.parquet")


def test_an_index_without_a_codec_has_plain_images(file: Path, tmp_path: Path) -> None:
    io.write_parquet(tmp_path / "i.parquet", columns(file))
    assert archive.load_index(tmp_path / "i.parquet")["codec"].tolist() == ["", ""]
    io.write_parquet(tmp_path / "i.parquet", columns(file, codec=["deflate", ""]))
    assert archive.load_index(tmp_path / "i.parquet")["codec"].tolist() == ["deflate", ""]


def test_rows_of_a_parquet_file_have_to_be_there(tmp_path: Path) -> None:
    path = tmp_path / "images.parquet"
    io.write_parquet(path, {"image": [b"one", b"two"]})
    rows = columns(path, codec=["parquet"] * 2, offset=np.array([1, 0]), size=np.zeros(2, np.int64))
    io.write_parquet(tmp_path / "i.parquet", rows)
    index = archive.load_index(tmp_path / "i.parquet")
    names = ("archive", "offset", "size", "image_id", "codec")
    with archive.ArchiveReader() as reader:
        assert [reader.read(*row) for row in zip(*(index[name] for name in names), strict=True)] == [b"two", b"one"]
    io.write_parquet(tmp_path / "i.parquet", rows | {"offset": np.array([1, 2])})
    with pytest.raises(InputError, match=r"image 'two' .*: 2 rows long, but the image is row 3;"):
        archive.load_index(tmp_path / "i.parquet")
    path.unlink()
    with pytest.raises(InputError, match="no such file"):
        archive.load_index(tmp_path / "i.parquet")


def test_an_unknown_codec(file: Path) -> None:
    with pytest.raises(InputError, match=r"codec 'lzma' is none of"):
        archive.read_member(file, 0, 1, "x", "lzma")
