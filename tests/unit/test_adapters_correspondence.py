"""NAVI, ScanNet-1500 and SPair-71k: official layouts with a few tiny images."""

import io as bytes_io
import json
from pathlib import Path

import numpy as np
import pytest

from clip_robustness.core.io import InputError
from tests.unit.adapter_samples import build, contents, jpeg, make_gzip, parsed, png
from tests.unit.samples import make_folder, make_tar


def navi_entry(file: str, **changes: object) -> dict:
    camera = {"q": [0.5, 0.5, -0.5, 0.5], "t": [1.0, 2, 300.25], "focal_length": 3024.0, "camera_model": "pixel_5"}
    entry = {"object_id": "duck", "camera": camera, "filename": file, "filename_original": "PXL", "occluded": False}
    return entry | {"image_size": [12, 16], "scene_name": "wild_set", "split": "train"} | changes


def navi() -> dict[str, bytes]:
    files = {"navi_v1/duck/3d_scan/duck.jpg": jpeg(0), "navi_v1/custom_splits/pairs.txt": b""}
    for thing, scene, names in (
        ("duck", "wild_set", ["001.jpg", "000.jpg"]),
        ("duck", "multiview-00-pixel_5", ["000.jpg"]),
        ("3d_sink", "wild_set", ["000.jpg"]),
    ):
        folder = f"navi_v1/{thing}/{scene}"
        for n, name in enumerate(names):
            stem = name.removesuffix(".jpg")
            files[f"{folder}/images/{name}"] = jpeg(n)
            files[f"{folder}/depth/{stem}.png"] = png(10 * len(files))
            files[f"{folder}/masks/{stem}.png"] = png(10 * len(files) + 1)
        files[f"{folder}/annotations.json"] = json.dumps([navi_entry(name) for name in names]).encode()
    return files


def test_navi(tmp_path: Path) -> None:
    files = navi()
    files["navi_v1/duck/wild_set/images/downsampled_000.jpg"] = jpeg(5)  # Probe3D's script leaves these behind
    index = build(tmp_path, [make_gzip(tmp_path / "navi_v1.0.tar.gz", files)], "navi", images=3)
    ids = ["3d_sink/wild_set/000.jpg", "duck/wild_set/000.jpg", "duck/wild_set/001.jpg"]
    assert index["image_id"].tolist() == ids
    assert index["object"].tolist() == ["3d_sink", "duck", "duck"]
    assert index["scene"].tolist() == ["wild_set"] * 3
    assert index["split"].tolist() == ["train"] * 3
    assert index["occluded"].tolist() == [0, 0, 0]
    assert parsed(index, "camera")[0] == {"q": [0.5, 0.5, -0.5, 0.5], "t": [1.0, 2, 300.25], "focal_length": 3024.0}
    assert parsed(index, "image_size") == [[12, 16]] * 3
    stems = [f"navi_v1/{i.rpartition('/')[0]}/{{}}/{i.rpartition('/')[2][:3]}" for i in ids]
    assert contents(index) == [files[stem.format("images") + ".jpg"] for stem in stems]
    assert contents(index, "depth_") == [files[stem.format("depth") + ".png"] for stem in stems]
    assert contents(index, "mask_") == [files[stem.format("masks") + ".png"] for stem in stems]
    local = make_folder(tmp_path / "f", files) / "navi_v1"
    assert build(tmp_path, [local], "navi")["image_id"].tolist() == ids
    views = build(tmp_path, [local], "navi", options={"collection": "multiview"})
    assert views["image_id"].tolist() == ["duck/multiview-00-pixel_5/000.jpg"]
    assert len(build(tmp_path, [local], "navi", options={"collection": "all"})["image_id"]) == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"filename": "009.jpg"}, r"entry 0: there is no file 'navi_v1/duck/wild_set/images/009\.jpg'"),
        ({"camera": {"q": [1, 0, 0], "t": [0, 0, 0], "focal_length": 1}}, r"entry 0, camera q: expected 4 numbers"),
        (
            {"camera": {"q": [1, 0, 0, 0], "t": [0, 0, "0"], "focal_length": 1}},
            r"entry 0, camera t: expected 3 numbers",
        ),
        ({"camera": {"q": [1, 0, 0, 0], "t": [0, 0, 0]}}, r"entry 0, camera: 'focal_length' is missing"),
        ({"split": None}, r"entry 0: 'split' is missing or of the wrong type"),
    ],
)
def test_navi_annotations_that_do_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    source = "navi_v1/duck/wild_set/annotations.json"
    files = navi() | {source: json.dumps([navi_entry("000.jpg", **changes)]).encode()}
    with pytest.raises(InputError, match=rf"a\.tar, member '{source}', {message}"):
        build(tmp_path, [make_tar(tmp_path / "a.tar", files)], "navi")


def test_what_is_no_navi(tmp_path: Path) -> None:
    files = navi()
    del files["navi_v1/3d_sink/wild_set/depth/000.png"]
    with pytest.raises(InputError, match=r"there is no file 'navi_v1/3d_sink/wild_set/depth/000\.png'; fetch it again"):
        build(tmp_path, [make_tar(tmp_path / "a.tar", files)], "navi")
    bare = make_tar(tmp_path / "b.tar", {k: v for k, v in files.items() if not k.endswith(".json")})
    with pytest.raises(InputError, match=r"b\.tar.*no OBJECT/SCENE/annotations\.json of the collection 'wild_set'"):
        build(tmp_path, [bare], "navi")
    with pytest.raises(InputError, match="no collection 'wild'"):
        build(tmp_path, [bare], "navi", options={"collection": "wild"})
    files["navi_v1/3d_sink/wild_set/annotations.json"] = b"{}"
    with pytest.raises(InputError, match="expected a list with one entry an image"):
        build(tmp_path, [make_tar(tmp_path / "c.tar", files)], "navi")


POSE = np.array([[0, -1, 0, 1.5], [1, 0, 0, 2.5], [0, 0, 1, 0.25], [0, 0, 0, 1]])
PAIRS = [(707, 0, 15, 585), (707, 0, 15, 45), (712, 1, 585, 30)]


def npz(**arrays: np.ndarray) -> bytes:
    buffer = bytes_io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def scannet(tmp_path: Path) -> tuple[dict[str, bytes], list[Path]]:
    files = {"scannet_test_1500/scene0707_00/intrinsic/intrinsic_color.txt": b"1 0\n0 1\n"}
    for scene, frames in (("scene0707_00", (15, 45, 585, 700)), ("scene0712_01", (30, 585))):
        for frame in frames:
            folder, pose = f"scannet_test_1500/{scene}", POSE + np.eye(4) * frame
            files[f"{folder}/color/{frame}.jpg"] = jpeg(frame)
            files[f"{folder}/depth/{frame}.png"] = png(frame)
            files[f"{folder}/pose/{frame}.txt"] = "\n".join(" ".join(map(str, row)) for row in pose).encode()
    cameras = {name: np.diag([577.5, 578.25, 1.0]) + n for n, name in enumerate(("scene0707_00", "scene0712_01"))}
    (tmp_path / "test.npz").write_bytes(npz(name=np.array(PAIRS, np.uint16), rel_pose=np.zeros((3, 12), np.float32)))
    (tmp_path / "intrinsics.npz").write_bytes(npz(**cameras))
    return files, [tmp_path / "test.npz", tmp_path / "intrinsics.npz"]


def test_scannet_pairs(tmp_path: Path) -> None:
    files, lists = scannet(tmp_path)
    index = build(tmp_path, [make_tar(tmp_path / "scannet_test_1500.tar", files), *lists], "scannet_pairs", images=5)
    ids = ["scene0707_00/15.jpg", "scene0707_00/45.jpg", "scene0707_00/585.jpg"]
    ids += ["scene0712_01/30.jpg", "scene0712_01/585.jpg"]
    assert index["image_id"].tolist() == ids
    assert index["frame"].tolist() == [15, 45, 585, 30, 585]
    pairs = parsed(index, "pairs")
    assert pairs == [[[0, ids[2]], [1, ids[1]]], [], [], [], [[2, ids[3]]]]
    np.testing.assert_array_equal(parsed(index, "pose")[1], POSE + np.eye(4) * 45)
    np.testing.assert_array_equal(parsed(index, "intrinsics")[4], np.diag([577.5, 578.25, 1.0]) + 1)
    places = [image_id.replace(".jpg", "").split("/") for image_id in ids]
    assert contents(index) == [files[f"scannet_test_1500/{scene}/color/{frame}.jpg"] for scene, frame in places]
    assert contents(index, "depth_") == [
        files[f"scannet_test_1500/{scene}/depth/{frame}.png"] for scene, frame in places
    ]
    # Probe3D's readme puts everything into one folder
    local = make_folder(tmp_path / "f", files) / "scannet_test_1500"
    for path in lists:
        (local / path.name).write_bytes(path.read_bytes())
    assert build(tmp_path, [local], "scannet_pairs")["pairs"].tolist() == index["pairs"].tolist()


def test_what_is_no_scannet(tmp_path: Path) -> None:
    files, lists = scannet(tmp_path)
    tar = make_tar(tmp_path / "a.tar", files)
    with pytest.raises(InputError, match=r"there is no file 'test\.npz', expected exactly one"):
        build(tmp_path, [tar, lists[1]], "scannet_pairs")
    lost = {k: v for k, v in files.items() if not k.endswith("scene0712_01/color/30.jpg")}
    with pytest.raises(InputError, match=r"b\.tar.*no file 'scene0712_01/color/30\.jpg', which a pair needs; fetch"):
        build(tmp_path, [make_tar(tmp_path / "b.tar", lost), *lists], "scannet_pairs")
    bad = files | {"scannet_test_1500/scene0707_00/pose/15.txt": b"-inf " * 16}
    with pytest.raises(InputError, match=r"c\.tar, member '.*pose/15\.txt': expected a pose of 4 x 4 finite numbers"):
        build(tmp_path, [make_tar(tmp_path / "c.tar", bad), *lists], "scannet_pairs")
    lists[1].write_bytes(npz(scene0707_00=np.eye(3)))
    with pytest.raises(InputError, match=r"intrinsics\.npz.*no 3 x 3 matrix of the scene 'scene0712_01'"):
        build(tmp_path, [tar, *lists], "scannet_pairs")
    for content in (npz(name=np.array([{}], dtype=object)), b"PK\x03\x04 cut", npz(name=np.eye(4)), npz(x=np.eye(4))):
        lists[0].write_bytes(content)
        with pytest.raises(InputError, match=r"test\.npz.*(not a whole \.npz of arrays|no array 'name' of whole numb)"):
            build(tmp_path, [tar, *lists], "scannet_pairs")


def spair_pair(number: int, source: str, target: str, category: str, **changes: object) -> tuple[str, bytes]:
    entry = {
        "filename": f"{number:06d}-{source}-{target}:{category}",
        "pair_id": number,
        "category": category,
        "src_imname": f"{source}.jpg",
        "trg_imname": f"{target}.jpg",
        "src_imsize": [500, 333, 3],
        "trg_imsize": [500, 332, 3],
        "src_bndbox": [210, 34, 475, 250],
        "trg_bndbox": [36, 92, 500, 200],
        "src_kps": [[212, 153], [300, 40]],
        "trg_kps": [[39, 145], [410, 99]],
        "kps_ids": ["0", "7"],
        "mirror": 0,
        "viewpoint_variation": 2,
        "scale_variation": 0,
        "truncation": 1,
        "occlusion": 2,
    }
    return f"{entry['filename']}.json", json.dumps(entry | changes).encode()


def spair(**changes: object) -> dict[str, bytes]:
    files = {}
    for n, image in enumerate(("aeroplane/2008_000585", "aeroplane/2009_005060", "cat/2010_000009")):
        files[f"SPair-71k/JPEGImages/{image}.jpg"] = jpeg(n)
        files[f"SPair-71k/Segmentation/{image}.png"] = png(n)
        files[f"SPair-71k/ImageAnnotation/{image}.json"] = b"{}"
    first, second = "2008_000585", "2009_005060"
    pairs = [
        ("test", spair_pair(2, first, second, "aeroplane", **changes)),
        ("trn", spair_pair(9, second, first, "aeroplane")),
    ]
    pairs.append(("test", spair_pair(1, first, first, "aeroplane")))
    files |= {f"SPair-71k/PairAnnotation/{split}/{name}": content for split, (name, content) in pairs}
    return files | {"SPair-71k/Layout/large/test.txt": b"x\n", "SPair-71k/PairAnnotation/test/._x.json": b"\0"}


def test_spair(tmp_path: Path) -> None:
    files = spair()
    index = build(tmp_path, [make_gzip(tmp_path / "SPair-71k.tar.gz", files)], "spair", images=3)
    assert index["image_id"].tolist() == [
        "aeroplane/2008_000585.jpg",
        "aeroplane/2009_005060.jpg",
        "cat/2010_000009.jpg",
    ]
    assert index["category"].tolist() == ["aeroplane", "aeroplane", "cat"]
    pairs = parsed(index, "pairs")
    assert [[pair["number"] for pair in some] for some in pairs] == [[1, 2], [], []]
    pair = pairs[0][1]
    assert pair["target"] == "aeroplane/2009_005060.jpg"
    assert (pair["src_kps"], pair["trg_kps"]) == ([[212, 153], [300, 40]], [[39, 145], [410, 99]])
    assert (pair["kps_ids"], pair["trg_bndbox"], pair["viewpoint_variation"]) == (["0", "7"], [36, 92, 500, 200], 2)
    assert contents(index) == [jpeg(n) for n in range(3)]
    assert contents(index, "mask_") == [png(n) for n in range(3)]
    local = make_folder(tmp_path / "f", files)
    train = build(tmp_path, [local], "spair", options={"split": "trn"})
    assert [[pair["number"] for pair in some] for some in parsed(train, "pairs")] == [[], [9], []]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trg_imname": "2008_000001.jpg"}, "there is no image 'JPEGImages/aeroplane/2008_000001.jpg'"),
        ({"trg_kps": [[39, 145]]}, "src_kps, trg_kps and kps_ids differ in length"),
        ({"src_kps": [[39, 145], [1]]}, "keypoint: expected 2 numbers"),
        ({"trg_bndbox": {"xmin": 1}}, "'trg_bndbox' is missing or of the wrong type"),
        ({"viewpoint_variation": None}, "'viewpoint_variation' is missing or of the wrong type"),
    ],
)
def test_spair_pairs_that_do_not_fit(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(
        InputError, match=rf"a\.tar, member '.*000002-2008_000585-2009_005060:aeroplane\.json'.*{message}"
    ):
        build(tmp_path, [make_tar(tmp_path / "a.tar", spair(**changes))], "spair")


def test_what_is_no_spair(tmp_path: Path) -> None:
    files = spair()
    tar = make_tar(tmp_path / "a.tar", files)
    with pytest.raises(InputError, match=r"a\.tar.*no file PairAnnotation/val/\*\.json; fetch it again"):
        build(tmp_path, [tar], "spair", options={"split": "val"})
    with pytest.raises(InputError, match="no split 'train'; set the option 'split' to one of trn, val, test"):
        build(tmp_path, [tar], "spair", options={"split": "train"})
    del files["SPair-71k/Segmentation/cat/2010_000009.png"]
    with pytest.raises(InputError, match=r"b\.tar, member '.*/cat/2010_000009\.jpg': no segmentation"):
        build(tmp_path, [make_tar(tmp_path / "b.tar", files)], "spair")
