"""Webdataset and parquet shards as hubs have them."""

import json
from pathlib import Path

import pytest

from clip_robustness.core.io import InputError
from tests.unit.adapter_samples import BASE, build, contents, jpeg, parsed
from tests.unit.samples import encoded, make_tar, picture


def shards(tmp_path: Path, split: str = "test", extension: str = "cls") -> Path:
    """As CLIP_benchmark writes them: keys count through all shards of a split."""
    labels = {"cls": [b"2", b"0", b"1"], "txt": ["a “dog”\nb\nc\nd\ne\nf\n".encode()] * 3}[extension]
    root = tmp_path / f"wds_{extension}"
    for shard, keys in enumerate(((1, 0), (2,))):
        files = {}
        for key in keys:
            files[f"s{key:07d}.{extension}"] = labels[key]
            files[f"s{key:07d}.webp"] = encoded(picture(16, 12, key), "WEBP", lossless=True)
        (root / split).mkdir(parents=True, exist_ok=True)
        make_tar(root / split / f"{shard}.tar", files)
    (root / split / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("somebody\nelse's\nnames\n")
    return root


def test_webdataset(tmp_path: Path) -> None:
    root = shards(tmp_path)
    sources = [root / "test" / "0.tar", root / "test" / "1.tar", root / "classnames.txt", root / "test" / "nshards.txt"]
    index = build(tmp_path, sources, "webdataset", images=3)
    assert index["image_id"].tolist() == ["s0000001", "s0000002", "s0000000"]
    assert index["label"].tolist() == [0, 1, 2]
    assert contents(index) == [encoded(picture(16, 12, n), "WEBP", lossless=True) for n in (1, 2, 0)]
    shards(tmp_path, "train")
    only = build(tmp_path, [root], "webdataset", images=3, options={"split": "test"})
    assert only["image_id"].tolist() == index["image_id"].tolist()
    assert {Path(path).parent.name for path in only["archive"]} == {"test"}
    space = BASE | {"name": "part", "base": "base", "classes": ["cat", "bee"], "members": [[1], [2]]}
    (root / "test" / "0.tar").unlink()
    part = build(tmp_path, [root], "webdataset", space, options={"split": "test", "labels": "base"})
    assert part["label"].tolist() == [0]


def test_shards_that_count_from_0_each(tmp_path: Path) -> None:
    sources = [make_tar(tmp_path / f"{n}.tar", {"0.jpg": jpeg(n), "0.cls": b"%d" % n}) for n in range(2)]
    index = build(tmp_path, sources, "webdataset")
    assert index["image_id"].tolist() == ["0/0", "1/0"]
    assert contents(index) == [jpeg(0), jpeg(1)]


def test_webdataset_of_captions(tmp_path: Path) -> None:
    index = build(tmp_path, [shards(tmp_path, extension="txt")], "webdataset", images=3, options={"captions": True})
    assert index["image_id"].tolist() == ["s0000000", "s0000001", "s0000002"]
    assert parsed(index, "captions") == [["a “dog”", "b", "c", "d", "e"]] * 3
    assert index["label"].tolist() == [-1, -1, -1]
    options = {"captions": True, "per_image": 0}
    assert len(parsed(build(tmp_path, [tmp_path / "wds_txt"], "webdataset", options=options), "captions")[0]) == 6


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"a.txt": b"x"}, {}, r"0\.tar.*no sample with a \.cls file; set the option 'captions' to true"),
        (
            {"a.cls": b"1"},
            {"captions": True},
            r"0\.tar.*sample 'a': holds cls, jpg, expected one image and one \.txt; fetch",
        ),
        ({"a.cls": b"3"}, {}, r"its class is 3, expected 0\.\.2 of the label space 'base'"),
        ({"a.cls": b"-1"}, {}, r"0\.tar, member 'a\.cls': b'-1' is no class number"),
        ({"a.txt": b"\xff"}, {"captions": True}, r"0\.tar, member 'a\.txt': not plain text"),
        ({"a.txt": b"one\ntwo\n"}, {"captions": True}, r"member 'a\.txt': 2 captions, expected 5 or more; correct"),
        ({"a.cls": b"1", "a.png": b""}, {}, "sample 'a': holds cls, jpg, png, expected one image"),
        ({"a.cls": b"1"}, {"split": "val"}, "no shard of the split 'val'; correct the option 'split'"),
        ({"a.cls": b"1"}, {"labels": "wnid"}, "no kind of label 'wnid'"),
    ],
)
def test_shards_that_do_not_fit(tmp_path: Path, files: dict, options: dict, message: str) -> None:
    tar = make_tar(tmp_path / "0.tar", {"a.jpg": jpeg(0)} | files)
    with pytest.raises(InputError, match=message):
        build(tmp_path, [tar], "webdataset", options=options)


def parquet(path: Path, names: list[str] | None = None, kept: bool = True, **columns: list) -> Path:
    import pyarrow
    import pyarrow.parquet

    count = len(next(iter(columns.values())))
    images = [{"bytes": jpeg(n), "path": f"{path.stem[:4]}_{n}.jpg" if kept else None} for n in range(count)]
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array(images, kind), **columns})
    features = {"label": {"names": names, "_type": "ClassLabel"}} if names else {}
    metadata = {"huggingface": json.dumps({"info": {"features": {"image": {"_type": "Image"}, **features}}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=2)
    return path


def test_hub_parquet(tmp_path: Path) -> None:
    first = parquet(tmp_path / "data" / "test-00000-of-00002.parquet", label=[2, 0, 1], source=["x", "y", "z"])
    second = parquet(tmp_path / "data" / "test-00001-of-00002.parquet", label=[1], source=["w"], kept=False)
    index = build(tmp_path, [first, second], "hub_parquet", images=4, options={"attributes": ["source"]})
    ids = ["test-00000-of-00002/00000001/test_1.jpg", "test-00000-of-00002/00000002/test_2.jpg"]
    ids += ["test-00001-of-00002/00000000", "test-00000-of-00002/00000000/test_0.jpg"]
    assert index["image_id"].tolist() == ids
    assert index["label"].tolist() == [0, 1, 1, 2]
    assert index["source"].tolist() == ["y", "z", "w", "x"]
    assert contents(index) == [jpeg(1), jpeg(2), jpeg(0), jpeg(0)]
    assert build(tmp_path, [first], "hub_parquet", options={"unlabelled": True})["label"].tolist() == [-1, -1, -1]
    parquet(tmp_path / "data" / "train-00000-of-00001.parquet", label=[0])
    assert len(build(tmp_path, [tmp_path / "data"], "hub_parquet", options={"split": "test"})["image_id"]) == 4


def test_labels_of_a_hub_by_index_by_name_and_by_wordnet_id(tmp_path: Path) -> None:
    space = BASE | {"base": "base", "classes": ["cat", "bee"], "members": [[2], [1]], "wnids": ["n2", "n1"]}
    numbers = parquet(tmp_path / "a.parquet", names=["bee", "cat"], label=[1, 0, 1])
    assert build(tmp_path, [numbers], "hub_parquet", space)["label"].tolist() == [0, 1, 1]
    assert build(tmp_path, [numbers], "hub_parquet", space, options={"labels": "name"})["label"].tolist() == [0, 0, 1]
    indices = parquet(tmp_path / "b.parquet", label=[1, 2])
    by_base = build(tmp_path, [indices], "hub_parquet", space, options={"labels": "base"})
    assert by_base["image_id"].tolist() == ["b/00000001/b_1.jpg", "b/00000000/b_0.jpg"]
    wnids = parquet(tmp_path / "c.parquet", wnid=["n1", "n1", "n2"])
    assert build(tmp_path, [wnids], "hub_parquet", space, options={"column": "wnid"})["label"].tolist() == [0, 1, 1]


def test_captions_of_a_hub(tmp_path: Path) -> None:
    texts = [[f"{n} {c}" for c in range(6)] for n in range(3)]
    shard = parquet(tmp_path / "TEST.parquet", caption=texts, split=["train", "test", "test"])
    options: dict = {"captions": "caption", "rows": {"split": "test"}}
    index = build(tmp_path, [shard], "hub_parquet", images=2, options=options)
    assert index["image_id"].tolist() == ["TEST/00000001/TEST_1.jpg", "TEST/00000002/TEST_2.jpg"]
    assert parsed(index, "captions") == [texts[1][:5], texts[2][:5]]
    assert contents(index) == [jpeg(1), jpeg(2)]
    single = build(tmp_path, [shard], "hub_parquet", options={"captions": "split", "per_image": 1})
    assert parsed(single, "captions") == [["train"], ["test"], ["test"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"column": "class"}, r"a\.parquet: no column 'class', it has label, text; correct the data set's options"),
        (
            {},
            r"member '00000001/a_1\.jpg': its class is 7, expected 0\.\.2 of the label space 'base'",
        ),
        ({"column": "text"}, r"a\.parquet, row 0.*'one' is not a class of the label space 'base'"),
        ({"labels": "name"}, r"a\.parquet: does not name the classes of 'label'"),
        ({"labels": "names"}, r"a\.parquet.*no kind of label 'names'"),
        ({"captions": "label"}, r"a\.parquet, row 0: the captions are no list of texts"),
        ({"captions": "text"}, r"a\.parquet, row 0: 1 captions, expected 5 or more"),
        ({"rows": {"text": "three"}}, r"no row has the values of the option 'rows', {'text': 'three'}"),
        ({"split": "val"}, "no shard of the split 'val'"),
    ],
)
def test_parquet_that_does_not_fit(tmp_path: Path, options: dict, message: str) -> None:
    shard = parquet(tmp_path / "a.parquet", label=[0, 7], text=["one", "two"])
    with pytest.raises(InputError, match=message):
        build(tmp_path, [shard], "hub_parquet", options=options)


def test_labels_that_are_missing_in_a_parquet_file(tmp_path: Path) -> None:
    shard = parquet(tmp_path / "a.parquet", label=[0, None])
    with pytest.raises(InputError, match=r"a\.parquet, row 1: its class is nan, expected a number or a name"):
        build(tmp_path, [shard], "hub_parquet")
    tar = make_tar(tmp_path / "a.tar", {"a.jpg": jpeg(0)})
    with pytest.raises(InputError, match=r"a\.tar.*no parquet file with a column of images"):
        build(tmp_path, [tar], "hub_parquet")
