import gzip
import inspect
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from clip_robustness.core import archive, io
from clip_robustness.core.io import InputError
from clip_robustness.data import adapters
from clip_robustness.data import index as index_module
from clip_robustness.data.index import _attributes, _below, build_index, find_adapter
from clip_robustness.data.members import list_members
from clip_robustness.data.rows import Member, Row
from tests.unit.samples import make_folder, make_tar

WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361"]
BASE = {
    "name": "imagenet",
    "base": None,
    "classes": ["tench", "goldfish", "great white shark", "tiger shark"],
    "members": [[0], [1], [2], [3]],
    "pool": "max",
    "wnids": WNIDS,
}
SUBSET = {
    "name": "imagenet_a",
    "base": "imagenet",
    "classes": ["goldfish", "tiger shark"],
    "members": [[1], [3]],
    "pool": "max",
    "wnids": [WNIDS[1], WNIDS[3]],
}
CUES = {
    "name": "cue_conflict",
    "base": "imagenet",
    "classes": ["airplane", "bear", "bicycle"],
    "members": [[0], [1], [2, 3]],
    "pool": "mean_probability",
    "wnids": [],
}


def build(tmp_path: Path, source: Path | list[Path], space: dict, **dataset: object) -> dict:
    io.write_json(tmp_path / "space.json", space)
    entry = {"name": "x", "family": "class_folders"} | dataset
    sources = source if isinstance(source, list) else [source]
    count = build_index(entry, sources, tmp_path / "space.json", tmp_path / "index.parquet")
    index = archive.load_index(tmp_path / "index.parquet")
    assert count == len(index["image_id"])
    return index


def test_wordnet_folders(tmp_path: Path) -> None:
    files = {f"imagenet-a/{w}/{n}.jpg": b"%d" % n for w in (WNIDS[3], WNIDS[1]) for n in (10, 9)}
    index = build(tmp_path, make_tar(tmp_path / "a.tar", files | {"imagenet-a/README.txt": b""}), SUBSET)
    assert index["image_id"].tolist() == [f"{WNIDS[c]}/{n}.jpg" for c in (1, 3) for n in (10, 9)]
    assert index["label"].tolist() == [0, 0, 1, 1]
    read = [archive.read_member(*row) for row in zip(index["archive"], index["offset"], index["size"], strict=True)]
    assert read == [b"10", b"9", b"10", b"9"]


def test_class_index_folders_are_ordered_by_number(tmp_path: Path) -> None:
    space = BASE | {"classes": [f"c{i}" for i in range(12)], "members": [[i] for i in range(12)], "wnids": []}
    files = {f"imagenetv2-matched-frequency-format-val/{c}/x.jpeg": b"%d" % c for c in range(12)}
    index = build(tmp_path, make_tar(tmp_path / "a.tar", files), space, images=12)
    assert index["label"].tolist() == list(range(12))
    assert index["image_id"].tolist() == [f"{c}/x.jpeg" for c in range(12)]
    assert {c: index[c].dtype.name for c in ("offset", "size", "label")} == {
        "offset": "int64",
        "size": "int64",
        "label": "int32",
    }


def test_index_folders_in_a_subset_are_indices_of_the_base_space(tmp_path: Path) -> None:
    index = build(tmp_path, make_folder(tmp_path / "f", {"1/x.jpg": b"1", "3/x.jpg": b"3"}), SUBSET)
    assert index["label"].tolist() == [0, 1]


def test_tar_and_folder_give_the_same_index_but_for_the_places(tmp_path: Path) -> None:
    files = {f"top/{w}/{n}.jpg": os.urandom(50) for w in WNIDS for n in range(3)}
    from_tar = build(tmp_path, make_tar(tmp_path / "a.tar", files), BASE)
    from_folder = build(tmp_path, make_folder(tmp_path / "f", files) / "top", BASE)
    for name in ("image_id", "label", "size"):
        assert from_tar[name].tolist() == from_folder[name].tolist()


def test_the_same_index_whatever_the_order_in_the_tar(tmp_path: Path) -> None:
    files = {f"{w}/{n}.jpg": b"x" for w in WNIDS for n in range(3)}
    build(tmp_path, make_tar(tmp_path / "a.tar", files), BASE)
    first = (tmp_path / "index.parquet").read_bytes()
    build(tmp_path, tmp_path / "a.tar", BASE)
    assert (tmp_path / "index.parquet").read_bytes() == first
    backwards = build(tmp_path, make_tar(tmp_path / "a.tar", dict(reversed(files.items()))), BASE)
    assert backwards["image_id"].tolist() == list(files)


def test_only_the_folder_that_the_data_set_names(tmp_path: Path) -> None:
    files = {f"repo-1/{part}/{WNIDS[0]}/x.jpg": part.encode() for part in ("good/set", "other")}
    index = build(tmp_path, make_tar(tmp_path / "a.tar", files), BASE, path="good/set")
    assert index["image_id"].tolist() == [f"{WNIDS[0]}/x.jpg"]
    bare = make_folder(tmp_path / "f", {f"{WNIDS[2]}/x.jpg": b""})
    assert build(tmp_path, bare, BASE, path="good/set")["label"].tolist() == [2]
    with pytest.raises(InputError, match="no image below 'bad'"):
        build(tmp_path, tmp_path / "a.tar", BASE, path="bad")


@pytest.mark.parametrize(
    ("files", "dataset", "message"),
    [
        ({"n99999999/x.jpg": b""}, {}, "its folder 'n99999999' is not a class of the label space 'imagenet'"),
        ({"x.jpg": b""}, {}, "its folder '' is not a class"),
        (
            {"0/x.jpg": b""},
            {"images": 4},
            r"1 images, expected 4 \(3 missing; no image at all of goldfish, great white",
        ),
        ({"0/x.jpg": b"", "1/x.jpg": b""}, {"images": 1}, r"2 images, expected 1 \(1 too many; no image at all of "),
        ({"README.txt": b""}, {}, r"holds no image of the data set \(\.bmp, \.gif"),
        (
            {"a/0/x.jpg": b"", "b/0/x.jpg": b""},
            {},
            r"'0/x.jpg' stands there 2 times: 'a/0/x.jpg' of .* and 'b/0/x.jpg'",
        ),
        ({"0/x.jpg": b""}, {"family": "none"}, "no adapter for the family 'none', expected .*class_folders"),
        ({"0/x.jpg": b""}, {"family": "_files"}, "no adapter for the family '_files'"),
    ],
)
def test_what_does_not_fit_writes_no_index(tmp_path: Path, files: dict, dataset: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(tmp_path, make_tar(tmp_path / "a.tar", files), BASE, **dataset)
    assert not (tmp_path / "index.parquet").exists()


STIMULI = "texture-vs-shape-ccd0c01/stimuli/style-transfer-preprocessed-512"


def test_cue_conflicts(tmp_path: Path) -> None:
    files = {
        f"{STIMULI}/bicycle/bicycle1-bear10.png": b"1",
        f"{STIMULI}/airplane/airplane10-bicycle2.png": b"2",
        f"{STIMULI}/bear/bear2-bear3.png": b"3",
        "texture-vs-shape-ccd0c01/stimuli/edges/airplane/airplane1.png": b"no",
    }
    tar = make_tar(tmp_path / "a.tar", files, tarfile.PAX_FORMAT)
    packed = tmp_path / "github.tar.gz"
    packed.write_bytes(gzip.compress(tar.read_bytes()))
    index = build(tmp_path, packed, CUES, family="cue_conflict", images=3)
    assert index["image_id"].tolist() == [
        "airplane/airplane10-bicycle2.png",
        "bear/bear2-bear3.png",
        "bicycle/bicycle1-bear10.png",
    ]
    assert index["label"].tolist() == [0, 1, 2]
    assert index["texture_class"].tolist() == [2, 1, 1]
    folder = make_folder(tmp_path / "f", files) / STIMULI
    assert build(tmp_path, folder, CUES, family="cue_conflict")["texture_class"].tolist() == [2, 1, 1]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("airplane/bear1-bicycle2.png", "expected SHAPE/SHAPEi-TEXTUREj.png"),
        ("airplane/airplane1.png", "expected SHAPE/SHAPEi-TEXTUREj.png"),
        ("airplane/airplane1-zebra2.png", "'zebra' is not a class of the label space 'cue_conflict'"),
        ("airplane1-bear2.png", "expected SHAPE/SHAPEi-TEXTUREj.png"),
    ],
)
def test_what_is_no_cue_conflict(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(tmp_path, make_folder(tmp_path / "f", {name: b""}), CUES, family="cue_conflict")


def test_several_archives_are_one_data_set(tmp_path: Path) -> None:
    parts = [make_tar(tmp_path / f"{part}.tar", {f"{part}/{w}/x.jpg": b"" for w in WNIDS[part::2]}) for part in (0, 1)]
    index = build(tmp_path, parts, BASE, images=4)
    assert index["label"].tolist() == [0, 1, 2, 3]
    assert index["archive"].tolist() == [str(parts[0]), str(parts[1])] * 2
    first = (tmp_path / "index.parquet").read_bytes()
    build(tmp_path, parts[::-1], BASE)
    assert (tmp_path / "index.parquet").read_bytes() == first
    make_tar(parts[1], {f"1/{WNIDS[0]}/x.jpg": b""})
    with pytest.raises(InputError, match=r"0\.tar and 1 more .*'0/n.*' of .*/0\.tar and '1/n.*' of .*/1\.tar; remove"):
        build(tmp_path, parts, BASE)
    with pytest.raises(InputError, match="no source to index"):
        build(tmp_path, [], BASE)


def test_the_path_of_a_data_set_restricts_images_and_no_other_file(tmp_path: Path) -> None:
    files = {f"val/{WNIDS[0]}/x.jpg": b"", f"train/{WNIDS[0]}/x.jpg": b"", "labels/list.csv": b""}
    sources = [make_tar(tmp_path / "a.tar", files), make_tar(tmp_path / "b.tar", {"notes.txt": b""})]
    kept = _below(list_members(sources), "val", sources)
    assert [member.name for member in kept] == ["labels/list.csv", "notes.txt", f"val/{WNIDS[0]}/x.jpg"]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_index_of_a_zip_reads_in_place(tmp_path: Path, method: int) -> None:
    files = {f"sketch/{w}/x.JPEG": w.encode() * 20 for w in WNIDS}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", method) as packed:
        for name, content in files.items():
            packed.writestr(name, content)
    index = build(tmp_path, tmp_path / "a.zip", BASE, images=4)
    assert set(index["codec"]) == {"deflate" if method else ""}
    names = ("archive", "offset", "size", "image_id", "codec")
    assert [archive.read_member(*row) for row in zip(*(index[n] for n in names), strict=True)] == list(files.values())


def test_the_password_is_among_the_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(
        index_module, "list_members", lambda sources, password: seen.append(password) or list_members(sources)
    )
    make_folder(tmp_path / "f", {"0/x.jpg": b""})
    build(tmp_path, tmp_path / "f", BASE, options={"password": "secret"})
    build(tmp_path, tmp_path / "f", BASE)
    assert seen == ["secret", None]


def rows_with(*attributes: dict) -> list[Row]:
    return [Row(f"{i}.jpg", Member("x", "a.tar", 0, 1), 0, values) for i, values in enumerate(attributes)]


def test_attributes_become_columns_of_their_kind() -> None:
    values = {"cue": 3, "big": 2**40, "share": 0.5, "mixed": 1, "text": "é", "rest": "x", "some": 1.5, "flag": True}
    other = {
        "cue": np.int64(-1),
        "big": 1,
        "share": 1.0,
        "mixed": 2.5,
        "text": "",
        "rest": None,
        "some": None,
        "flag": False,
    }
    columns = _attributes(rows_with(values, other), frozenset({"label"}), "x")
    kinds = {name: column.dtype.name for name, column in columns.items()}
    assert kinds == {
        "cue": "int32",
        "big": "int64",
        "share": "float64",
        "mixed": "float64",
        "text": "object",
        "rest": "object",
        "some": "float64",
        "flag": "int32",
    }
    assert columns["rest"].tolist() == ["x", None]
    assert np.isnan(columns["some"][1])
    assert columns["flag"].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (({"a": 1}, {}), r"image '1\.jpg': attributes ; the first row has a"),
        (({"a": 1}, {"a": 1, "b": 2}), "attributes a, b; the first row has a"),
        (({"label": 1}, {"label": 1}), r"image '0\.jpg': .*none of \['label'\]"),
        (({"a": 1}, {"a": "x"}), "attribute 'a' mixes int, str"),
        (({"a": [1]}, {"a": [2]}), "attribute 'a' mixes list; expected numbers, or text"),
    ],
)
def test_attributes_that_make_no_column(attributes: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _attributes(rows_with(*attributes), frozenset({"label"}), "a.tar")


def test_every_adapter_has_the_contracts_signature() -> None:
    folder = Path(adapters.__path__[0])
    families = [path.stem for path in folder.glob("[a-z]*.py") if "\ndef adapt(" in path.read_text()]
    assert {"class_folders", "cue_conflict"} <= set(families)
    for family in families:
        assert list(inspect.signature(find_adapter(family, "x")).parameters) == ["members", "space", "where", "options"]
