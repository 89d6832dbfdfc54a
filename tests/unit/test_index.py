import gzip
import os
import tarfile
from pathlib import Path

import pytest

from clip_robustness.core import archive, io
from clip_robustness.core.io import InputError
from clip_robustness.data.index import build_index
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


def build(tmp_path: Path, source: Path, space: dict, **dataset: object) -> dict:
    io.write_json(tmp_path / "space.json", space)
    entry = {"name": "x", "family": "class_folders"} | dataset
    count = build_index(entry, source, tmp_path / "space.json", tmp_path / "index.parquet")
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
        ({"0/x.jpg": b""}, {"images": 2}, "1 images, expected 2"),
        ({"a/0/x.jpg": b"", "b/0/x.jpg": b""}, {}, "'0/x.jpg' stands there 2 times"),
        ({"0/x.jpg": b""}, {"family": "none"}, "no adapter for the family 'none'"),
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
