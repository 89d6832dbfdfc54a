"""ImageNet's validation set in every layout that people have it in, and the annotations of ImageNet-X."""

import io as streams
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.data.adapters import imagenet_x
from tests.unit.layouts import PICTURES, WNIDS, base_space, build, contents, parquet, tar_gz
from tests.unit.samples import make_folder, make_tar

# The devkit's own numbers of four classes (its list begins with them), which are not in the order of WordNet ids.
DEVKIT = {1: "n02119789", 2: "n02100735", 3: "n02110185", 4: "n02096294"}
TRUTH = [3, 1, 4, 1, 2]
STEMS = [f"ILSVRC2012_val_{i:08d}" for i in range(1, 6)]
TRUE_WNIDS = [DEVKIT[number] for number in TRUTH]
LABELS = [WNIDS.index(wnid) for wnid in TRUE_WNIDS]


def meta_mat() -> bytes:
    """synsets.mat as the devkit has it: the classes, then synsets above them with children and higher numbers."""
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    rows = [(number, wnid, f"word {number}", 0) for number, wnid in DEVKIT.items()]
    rows += [(1001, "n02083346", "canine", 2)]
    buffer = streams.BytesIO()
    scipy.io.savemat(buffer, {"synsets": np.array(rows, dtype=kinds)[:, None]})
    return buffer.getvalue()


def devkit(top: str = "ILSVRC2012_devkit_t12") -> dict[str, bytes]:
    truth = "".join(f"{number}\n" for number in TRUTH).encode()
    return {f"{top}/data/ILSVRC2012_validation_ground_truth.txt": truth, f"{top}/data/meta.mat": meta_mat()}


def flat(folder: str = "") -> dict[str, bytes]:
    return {f"{folder}{stem}.JPEG": content for stem, content in zip(STEMS, PICTURES, strict=False)}


def in_wnid_folders(top: str = "") -> dict[str, bytes]:
    return {f"{top}{w}/{s}.JPEG": p for w, s, p in zip(TRUE_WNIDS, STEMS, PICTURES, strict=False)}


def with_wnids() -> dict[str, bytes]:
    return {f"{s}_{w}.JPEG": p for w, s, p in zip(TRUE_WNIDS, STEMS, PICTURES, strict=False)}


def flat_tar_and_devkit(tmp: Path) -> list[Path]:
    packed = tar_gz(tmp / "ILSVRC2012_devkit_t12.tar.gz", devkit())
    return [make_tar(tmp / "ILSVRC2012_img_val.tar", flat()), packed]


def folder_with_unpacked_devkit(tmp: Path) -> list[Path]:
    return [make_folder(tmp / "imagenet", flat("val/") | devkit())]


def folder_with_packed_devkit(tmp: Path) -> list[Path]:
    root = make_folder(tmp / "imagenet", flat("val/"))
    tar_gz(root / "ILSVRC2012_devkit_t12.tar.gz", devkit())
    return [root]


def kaggle(tmp: Path) -> list[Path]:
    lines = "".join(f"{s},{w} 85 1 499 272 \n" for s, w in zip(STEMS, TRUE_WNIDS, strict=True))
    table = {"LOC_val_solution.csv": f"ImageId,PredictionString\n{lines}".encode()}
    return [make_folder(tmp / "kaggle", flat("ILSVRC/Data/CLS-LOC/val/") | table)]


def list_of_indices(tmp: Path) -> list[Path]:
    lines = "".join(f"{s}.JPEG {label}\n" for s, label in zip(STEMS, LABELS, strict=True))
    return [make_folder(tmp / "mm", flat("val/") | {"meta/val.txt": lines.encode()})]


def hub_tar(tmp: Path) -> list[Path]:
    return [tar_gz(tmp / "val_images.tar.gz", with_wnids())]


def wnid_tar(tmp: Path) -> list[Path]:
    return [make_tar(tmp / "val.tar", in_wnid_folders("val/"))]


def torchvision_root(tmp: Path) -> list[Path]:
    others = {"meta.bin": b"\x80\x02.", f"train/{WNIDS[5]}/{WNIDS[5]}_18.JPEG": PICTURES[9]}
    root = make_folder(tmp / "torchvision", in_wnid_folders("val/") | others)
    tar_gz(root / "ILSVRC2012_devkit_t12.tar.gz", devkit())
    return [root]


def hub_parquet(tmp: Path) -> list[Path]:
    rows = list(zip(with_wnids(), PICTURES, LABELS, strict=False))
    names = [f"class {i}" for i in range(1000)]
    shards = (("validation-00000-of-00002", rows[:3]), ("validation-00001-of-00002", rows[3:]))
    return [parquet(tmp / f"{name}.parquet", part, names) for name, part in shards]


def webdataset(tmp: Path) -> list[Path]:
    files = {}
    for stem, content, label in zip(STEMS, PICTURES, LABELS, strict=False):
        files |= {f"{stem}.jpg": content, f"{stem}.cls": str(label).encode(), f"{stem}.json": b"{}"}
    names = sorted(files)
    shards = [{name: files[name] for name in part} for part in (names[:6], names[6:])]
    return [make_tar(tmp / f"imagenet1k-validation-{i:02d}.tar", shard) for i, shard in enumerate(shards)]


LAYOUTS: list[Callable[[Path], list[Path]]] = [
    flat_tar_and_devkit,
    folder_with_unpacked_devkit,
    folder_with_packed_devkit,
    kaggle,
    list_of_indices,
    hub_tar,
    wnid_tar,
    torchvision_root,
    hub_parquet,
    webdataset,
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_of_the_validation_set_gives_the_same_index(tmp_path: Path, layout: Callable) -> None:
    index = build(tmp_path, layout(tmp_path), base_space(), "imagenet_val", images=5)
    expected = sorted(zip(LABELS, STEMS, PICTURES, strict=False))
    assert index["image_id"] == [stem for _, stem, _ in expected]
    assert index["label"] == [label for label, *_ in expected]
    assert contents(index) == [content for *_, content in expected]


def test_the_devkits_ids_are_not_the_order_of_wordnet_ids() -> None:
    assert list(DEVKIT.values()) != sorted(DEVKIT.values())
    assert [number - 1 for number in TRUTH] != LABELS


def test_shards_that_do_not_name_their_images_have_ids_of_their_own(tmp_path: Path) -> None:
    shards = []
    for number in range(2):  # both count from 0, as some writers do
        files = {"s0000000.jpg": PICTURES[number], "s0000000.cls": b"%d" % (7 + number)}
        shards.append(make_tar(tmp_path / f"{number}.tar", files))
    index = build(tmp_path, shards, base_space(), "imagenet_val", images=2)
    assert index["image_id"] == ["0/s0000000", "1/s0000000"] and index["label"] == [7, 8]
    rows = parquet(tmp_path / "a.parquet", [(None, PICTURES[0], 3), (None, PICTURES[1], 2)])
    index = build(tmp_path, [rows], base_space(), "imagenet_val", images=2)
    assert index["label"] == [2, 3] and contents(index) == [PICTURES[1], PICTURES[0]]
    assert index["image_id"] == ["a/00000001", "a/00000000"]


def test_renamed_files_are_told_by_their_class_folder(tmp_path: Path) -> None:
    renamed = make_folder(tmp_path / "f", {f"val/{WNIDS[3]}/293.JPEG": b"x", f"val/{WNIDS[1]}/7.JPEG": b"y"})
    index = build(tmp_path, [renamed], base_space(), "imagenet_val")
    assert index["image_id"] == [f"{WNIDS[1]}/7.JPEG", f"{WNIDS[3]}/293.JPEG"] and index["label"] == [1, 3]


def truncated_truth() -> dict[str, bytes]:
    return devkit() | {"ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"3\n1\n"}


def strange_truth() -> dict[str, bytes]:
    return devkit() | {"ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": b"3\n1\n1001\n4\n1\n"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (flat(), "in no class folders, and there are no labels; name ILSVRC2012_devkit_t12.tar.gz beside the images"),
        (flat("val/") | truncated_truth(), "ILSVRC2012_val_00000003.JPEG': .* has no label for it"),
        (flat("val/") | strange_truth(), "line 3: '1001' is no class of meta.mat"),
        (flat() | devkit() | {"ILSVRC2012_devkit_t12/data/meta.mat": b"no mat"}, "not the devkit's table of classes"),
        (flat() | {"ILSVRC2012_devkit_t12.tar.gz": b"no gzip"}, r"not a whole \.tar\.gz"),
        (flat() | {"val.txt": b"\xff\xfe"}, "not plain text"),
        (
            flat() | {"val.txt": b"".join(f"{s}.JPEG 1000\n".encode() for s in STEMS)},
            "its folder '1000' is not a class",
        ),
        ({"n00000000/x.JPEG": b""}, "its folder 'n00000000' is not a class of the label space 'imagenet_1k'"),
        ({"readme.txt": b""}, "holds no image"),
    ],
)
def test_what_is_no_validation_set(tmp_path: Path, files: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(tmp_path, [make_folder(tmp_path / "f", files)], base_space(), "imagenet_val")
    assert not (tmp_path / "index.parquet").exists()


def test_shards_of_another_label_space_are_refused(tmp_path: Path) -> None:
    other = parquet(tmp_path / "a.parquet", [("x.jpg", PICTURES[0], 0)], names=["cat", "dog"])
    with pytest.raises(InputError, match="its column 'label' counts 2 classes, not the 1000 of the label space"):
        build(tmp_path, [other], base_space(), "imagenet_val")
    unlabelled = parquet(tmp_path / "b.parquet", [("x.jpg", PICTURES[0], -1)])
    with pytest.raises(InputError, match=r"its class is -1, expected 0\.\.999"):
        build(tmp_path, [unlabelled], base_space(), "imagenet_val")
    with pytest.raises(InputError, match=r"no column 'wnid' with the classes; set the option 'column' .* label"):
        build(tmp_path, [unlabelled], base_space(), "class_folders", options={"column": "wnid"})
    for files, message in (
        ({"a.jpg": b"", "a.cls": b"tench"}, "b'tench' is no class number"),
        ({"a.jpg": b"", "a.cls": b"1", "b.jpg": b""}, "sample 'b': holds jpg, expected one image and one .cls"),
    ):
        with pytest.raises(InputError, match=message):
            build(tmp_path, [make_tar(tmp_path / "w.tar", files)], base_space(), "imagenet_val")


def annotation(number: int, label: int, *factors: str) -> dict:
    values = {factor: int(factor in factors) for factor in sorted(imagenet_x.FACTORS)}
    return {"file_name": f"ILSVRC2012_val_{number:08d}.JPEG", "class": label} | values | {"one_word": "é"}


def wheel(path: Path, top: list[dict], multi: list[dict], prototypes: tuple[int, ...] = ()) -> Path:
    lists = {imagenet_x.TOP: top, imagenet_x.MULTI: multi}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, entries in lists.items():
            text = "".join(json.dumps(entry) + "\n" for entry in entries)
            file.writestr(f"imagenet_x/annotations/{name}", text)
        lines = "".join(f"ILSVRC2012_val_{i:08d}.JPEG\n" for i in prototypes)
        file.writestr("imagenet_x/annotations/prototypical_paths.csv", f"file_name\n{lines}")
    return path


def val_index(tmp_path: Path) -> Path:
    build(tmp_path, wnid_tar(tmp_path), base_space(), "imagenet_val")
    return tmp_path / "index.parquet"


def test_factors_are_joined_to_the_validation_images(tmp_path: Path) -> None:
    top = [annotation(2, LABELS[1], "pose"), annotation(1, LABELS[0], "larger"), annotation(4, LABELS[3])]
    multi = [annotation(2, LABELS[1], "pose"), annotation(1, LABELS[0], "larger", "color"), annotation(4, LABELS[3])]
    source = wheel(tmp_path / "imagenet_x-0.0.7-py3-none-any.whl", top, multi, prototypes=(1,))
    assert imagenet_x.write_factors([source], val_index(tmp_path), tmp_path / "x.parquet") == 3
    table = {name: column.tolist() for name, column in io.read_parquet(tmp_path / "x.parquet").items()}
    expected = sorted([(LABELS[1], STEMS[1]), (LABELS[0], STEMS[0]), (LABELS[3], STEMS[3])])
    assert list(zip(table["label"], table["image_id"], strict=True)) == expected
    rows = dict(zip(table["image_id"], range(3), strict=True))
    assert [table["top_factor"][rows[STEMS[i]]] for i in (0, 1, 3)] == ["larger", "pose", ""]
    assert [table["prototype"][rows[STEMS[i]]] for i in (0, 1, 3)] == [True, False, False]
    assert [sum(table[factor]) for factor in ("pose", "color", "larger", "texture")] == [1, 1, 1, 0]
    assert len(imagenet_x.FACTORS) == len(set(imagenet_x.FACTORS)) == 16
    assert set(table) == {"image_id", "label", "top_factor", "prototype", *imagenet_x.FACTORS}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([annotation(1, LABELS[0] + 1)], "'ILSVRC2012_val_00000001' is of class .* by the annotation"),
        ([annotation(9, 0)], "none of its images is annotated; point imagenet_val at a copy"),
        ([{"file_name": "ILSVRC2012_val_00000001.JPEG", "class": 0}], "line 1: no annotation .KeyError"),
        ([annotation(1, LABELS[0])] * 2, "line 2: 'ILSVRC2012_val_00000001' twice"),
        ([annotation(1, LABELS[0]) | {"pose": 2}], "a factor not 0 or 1"),
    ],
)
def test_what_is_no_annotation(tmp_path: Path, entries: list[dict], message: str) -> None:
    source = wheel(tmp_path / "x.whl", entries, entries)
    with pytest.raises(InputError, match=message):
        imagenet_x.write_factors([source], val_index(tmp_path), tmp_path / "x.parquet")
    assert not (tmp_path / "x.parquet").exists()
