"""Each classification set in its official layout, with a few tiny images: ids, labels, order, attributes, errors."""

import csv
import io as streams
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.inference.label_spaces import write_label_space
from tests.unit.layouts import INFO, PICTURES, WNIDS, base_space, build, contents, parquet, space_of, tar_gz
from tests.unit.samples import make_folder, make_tar


@pytest.mark.parametrize(
    ("letter", "top"), [("a", "imagenet-a"), ("r", "imagenet-r")], ids=["imagenet_a", "imagenet_r"]
)
def test_all_200_classes_of_the_masked_sets(tmp_path: Path, letter: str, top: str) -> None:
    wnids = (INFO / f"imagenet_{letter}_synsets.txt").read_text().split()
    space = space_of(tmp_path, f"timm:imagenet_{letter}")
    files = {f"{top}/{wnid}/art_{i}.jpg": b"%d" % i for i, wnid in enumerate(wnids)} | {f"{top}/README.txt": b"r"}
    index = build(tmp_path, [make_tar(tmp_path / "x.tar", files)], space, "class_folders", images=200)
    assert index["label"] == list(range(200))
    assert [WNIDS[space["members"][label][0]] for label in index["label"]] == wnids
    outside = next(wnid for wnid in WNIDS if wnid not in wnids)
    with pytest.raises(InputError, match=f"its folder '{outside}' is not a class of the label space 'x'"):
        build(tmp_path, [make_tar(tmp_path / "y.tar", {f"{outside}/x.jpg": b""})], space, "class_folders")


def test_imagenet_v2_folders_are_indices_in_numerical_order(tmp_path: Path) -> None:
    top = "imagenetv2-matched-frequency-format-val"
    files = {f"{top}/{i}/{i:04x}.jpeg": b"%d" % i for i in (999, 2, 10, 100, 0)}
    index = build(tmp_path, [tar_gz(tmp_path / "v2.tar.gz", files)], base_space(), "class_folders")
    assert index["label"] == [0, 2, 10, 100, 999]
    assert contents(index) == [b"0", b"2", b"10", b"100", b"999"]


def test_imagenet_o_has_no_labels(tmp_path: Path) -> None:
    files = {f"imagenet-o/{WNIDS[i]}/n07695742_{i}.JPEG": b"%d" % i for i in (3, 1)}
    tar = make_tar(tmp_path / "o.tar", files)
    index = build(tmp_path, [tar], base_space(), "class_folders", options={"unlabelled": True})
    assert index["label"] == [-1, -1] and contents(index) == [b"1", b"3"]


def test_the_16_class_stylized_set(tmp_path: Path) -> None:
    io.write_json(tmp_path / "base.json", base_space())
    entry = {"base": "imagenet_1k", "classes": {"car": "436, 511, 817", "cat": "281-286", "keyboard": "508, 878"}}
    write_label_space("cue_conflict", entry, tmp_path / "base.json", tmp_path / "cue.json")
    space = io.read_json(tmp_path / "cue.json")
    names = ["0350_sty_dnn_0_keyboard_00_keyboard-0149-ILSVRC2012-val-00049427.png", "0001_sty_dnn_0_cat_00_c.png"]
    flat_files = {f"stylized/dnn/session-1/{name}": b"x" for name in names}
    index = build(tmp_path, [make_tar(tmp_path / "s.tar", flat_files)], space, "class_folders")
    assert index["label"] == [1, 2] and index["image_id"][0] == f"cat/{names[1]}"
    sorted_files = {f"stylized/dnn/session-1/car/{names[1].replace('cat', 'car')}": b"x"}
    assert build(tmp_path, [make_tar(tmp_path / "t.tar", sorted_files)], space, "class_folders")["label"] == [0]


def test_shards_of_a_masked_set_number_its_own_classes(tmp_path: Path) -> None:
    space = space_of(tmp_path, "timm:imagenet_a")
    files = {"s0000000.jpg": PICTURES[0], "s0000000.cls": b"199", "s0000001.webp": PICTURES[1], "s0000001.cls": b"0"}
    index = build(tmp_path, [make_tar(tmp_path / "0.tar", files)], space, "class_folders")
    assert index["label"] == [0, 199] and contents(index) == [PICTURES[1], PICTURES[0]]
    wnid = space["wnids"][5]
    named = parquet(tmp_path / "a.parquet", [("a.jpg", PICTURES[0], wnid)])
    assert build(tmp_path, [named], space, "class_folders")["label"] == [5]
    other = parquet(tmp_path / "b.parquet", [("a.jpg", PICTURES[0], 0)], names=["cat", "dog"])
    with pytest.raises(InputError, match="counts 2 classes, not the 200 of the label space 'x'; fix 'labels'"):
        build(tmp_path, [other], space, "class_folders")
    files["s0000000.cls"] = b"200"
    with pytest.raises(InputError, match=r"its class is 200, expected 0\.\.199"):
        build(tmp_path, [make_tar(tmp_path / "0.tar", files)], space, "class_folders")


def objectnet_zip(path: Path, files: dict[str, bytes], mapping: dict[str, str] | None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(f"objectnet-1.0/images/{name}", content)
        if mapping is not None:
            file.writestr("objectnet-1.0/mappings/folder_to_objectnet_label.json", json.dumps(mapping))
    return path


def test_objectnet_keeps_the_113_classes(tmp_path: Path) -> None:
    space = space_of(tmp_path, "map:objectnet_113")
    mapping = dict(zip(space["folders"], space["classes"], strict=True)) | {"squeegee": "Squeegee"}
    files = {f"{folder}/0a1b.png": b"%d" % i for i, folder in enumerate(space["folders"])}
    files |= {"squeegee/ff.png": b"no"}
    source = objectnet_zip(tmp_path / "objectnet-1.0.zip", files, mapping)
    index = build(tmp_path, [source], space, "objectnet", images=113)
    assert index["label"] == list(range(113))
    assert contents(index) == [b"%d" % i for i in range(113)]
    camera = index["image_id"].index("still_camera/0a1b.png")
    assert space["members"][index["label"][camera]] == [732, 759]
    everything = build(tmp_path, [source], space, "objectnet", options={"others": True}, images=114)
    assert (everything["label"][0], everything["image_id"][0]) == (-1, "squeegee/ff.png")
    bare = objectnet_zip(tmp_path / "bare.zip", files, None)
    assert build(tmp_path, [bare], space, "objectnet")["image_id"] == index["image_id"]


def test_what_is_no_objectnet(tmp_path: Path) -> None:
    space = space_of(tmp_path, "map:objectnet_113")
    mapping = dict(zip(space["folders"], space["classes"], strict=True))
    picture_only = {"wok/1.png": b"x"}
    cases = [
        (picture_only | {"new/1.png": b"x"}, mapping, space, "its folder 'new' is none of folder_to_objectnet_label"),
        (picture_only, {"wok": "Wok"}, space, "has no folder for the class 'Alarm clock' of the label space 'x'"),
        (picture_only, None, base_space(), "label space 'imagenet_1k' names no folders; .*map:objectnet_113"),
        ({"squeegee/1.png": b"x"}, None, space, "holds no image in a folder such as 'alarm_clock'"),
    ]
    for number, (files, folders, labels, message) in enumerate(cases):
        source = objectnet_zip(tmp_path / f"{number}.zip", files, folders)
        with pytest.raises(InputError, match=message):
            build(tmp_path, [source], labels, "objectnet")


def corrupted(*corruptions: str, severities: str = "12345") -> dict[str, bytes]:
    return {
        f"{corruption}/{severity}/{WNIDS[label]}/ILSVRC2012_val_{label:08d}.JPEG": b"%s%s%d"
        % (corruption.encode(), severity.encode(), label)
        for corruption in corruptions
        for severity in severities
        for label in (7, 0)
    }


def test_corruptions_from_several_archives(tmp_path: Path) -> None:
    noise = make_tar(tmp_path / "noise.tar", corrupted("gaussian_noise", "shot_noise"))
    weather = make_tar(tmp_path / "weather.tar", corrupted("snow"))
    index = build(tmp_path, [noise, weather], base_space(), "imagenet_c", images=30)
    assert len(set(zip(index["corruption"], index["severity"], strict=True))) == 15
    assert index["label"] == [0] * 15 + [7] * 15
    place = index["image_id"].index("snow/3/ILSVRC2012_val_00000007")
    assert (index["corruption"][place], index["severity"][place], index["label"][place]) == ("snow", 3, 7)
    assert contents(index)[place] == b"snow37" and index["archive"][place].endswith("/weather.tar")
    options = {"corruptions": ["snow"], "severities": [1, 5]}
    some = build(tmp_path, [noise, weather], base_space(), "imagenet_c", options=options, images=4)
    assert sorted(set(zip(some["corruption"], some["severity"], strict=True))) == [("snow", 1), ("snow", 5)]
    nested = make_folder(tmp_path / "imagenet-c", {f"noise/{k}": v for k, v in corrupted("shot_noise").items()})
    assert len(build(tmp_path, [nested], base_space(), "imagenet_c")["label"]) == 10


def test_3d_corruptions(tmp_path: Path) -> None:
    names = ("near_focus", "fog_3d")
    sources = [tar_gz(tmp_path / f"{name}.tar.gz", corrupted(name)) for name in names]
    index = build(tmp_path, sources, base_space(), "imagenet_3dcc", images=20)
    assert sorted(set(index["corruption"])) == ["fog_3d", "near_focus"] and set(index["severity"]) == {1, 2, 3, 4, 5}
    with pytest.raises(InputError, match="expected a name such as near_focus/1/"):
        build(tmp_path, [make_tar(tmp_path / "n.tar", corrupted("snow"))], base_space(), "imagenet_3dcc")


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (corrupted("snow"), {"corruptions": ["snow", "fog"]}, "no image of fog/1; it is in weather.tar"),
        (corrupted("snow", severities="124"), {}, "no image of snow/3; it is in weather.tar"),
        (corrupted("snow"), {"corruptions": ["rain"]}, "option 'corruptions': 'rain'; expected some of gaussian_noise"),
        (corrupted("snow"), {"severities": [6]}, "option 'severities': 6; expected some of 1, 2, 3, 4, 5"),
        (corrupted("snow"), {"severities": 3}, "option 'severities': 3; expected some of"),
        (corrupted("rain"), {}, "expected a name such as gaussian_noise/1/n01440764/"),
        (corrupted("snow", severities="6"), {}, "expected a name such as gaussian_noise/1/n01440764/"),
        ({f"snow/{WNIDS[0]}/x.JPEG": b""}, {}, "expected a name such as"),
        ({"snow/1/n00000000/x.JPEG": b""}, {}, "its folder 'n00000000' is not a class"),
    ],
)
def test_what_is_no_corrupted_set(tmp_path: Path, files: dict, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build(tmp_path, [make_tar(tmp_path / "x.tar", files)], base_space(), "imagenet_c", options=options)


CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR_SPACE = {"name": "cifar10", "base": None, "classes": CIFAR, "members": [[i] for i in range(10)], "pool": "max"}


def cifar_files(labels: list[int], names: list[str] = CIFAR) -> tuple[dict[str, bytes], np.ndarray]:
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 32, 32, 3), np.uint8)
    planes = pixels.transpose(0, 3, 1, 2).reshape(len(labels), -1)
    records = np.concatenate([np.array(labels, np.uint8)[:, None], planes], axis=1)
    top = "cifar-10-batches-bin"
    files = {f"{top}/batches.meta.txt": "\n".join([*names, "", ""]).encode(), f"{top}/readme.html": b"<html>"}
    batches = ("test_batch", *(f"data_batch_{i}" for i in range(1, 6)))
    return files | {f"{top}/{batch}.bin": records.tobytes() for batch in batches}, pixels


def test_cifar10_records_become_images(tmp_path: Path) -> None:
    files, pixels = cifar_files([3, 8, 8, 0])
    source = tar_gz(tmp_path / "cifar-10-binary.tar.gz", files)
    index = build(tmp_path, [source], CIFAR_SPACE, "cifar10", images=4)
    assert index["label"] == [0, 3, 8, 8]
    assert index["image_id"] == [f"test_batch/{i:05d}.png" for i in (3, 0, 1, 2)]
    for content, number in zip(contents(index), (3, 0, 1, 2), strict=True):
        image = Image.open(streams.BytesIO(content))
        assert image.format == "PNG" and np.array_equal(np.asarray(image), pixels[number])
    made = Path(index["archive"][0])
    assert made.name == "test_batch.png.tar"
    written = (made.read_bytes(), made.stat().st_mtime_ns)
    build(tmp_path, [source], CIFAR_SPACE, "cifar10")
    assert (made.read_bytes(), made.stat().st_mtime_ns) == written
    made.unlink()
    build(tmp_path, [source], CIFAR_SPACE, "cifar10")
    assert made.read_bytes() == written[0]
    train = build(tmp_path, [source], CIFAR_SPACE, "cifar10", options={"split": "train"}, images=20)
    assert len(set(train["archive"])) == 5


def test_what_is_no_cifar10(tmp_path: Path) -> None:
    files, _ = cifar_files([1, 2])
    cut = files | {"cifar-10-batches-bin/test_batch.bin": files["cifar-10-batches-bin/test_batch.bin"][:-1]}
    cases = [
        ({"cifar-10-batches-py/test_batch": b"\x80\x02."}, {}, "holds no batch in binary form; use cifar-10-binary"),
        (cut, {}, "6145 bytes are no records of 3073"),
        (cifar_files([1, 10])[0], {}, "label 10, expected 0..9"),
        (cifar_files([1], CIFAR[::-1])[0], {}, "the classes are truck, .* not those of the label space 'cifar10'"),
        (files, {"split": "val"}, "option 'split' is 'val', expected test or train"),
    ]
    for number, (content, options, message) in enumerate(cases):
        source = make_tar(tmp_path / f"{number}.tar", content)
        with pytest.raises(InputError, match=message):
            build(tmp_path, [source], CIFAR_SPACE, "cifar10", options=options)


def typographic(targets: dict[str, str]) -> dict[str, bytes]:
    buffer = streams.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([("image", "target"), *targets.items()])
    pictures = {f"{WNIDS[i]}/{i:05d}.png": PICTURES[i] for i in range(2)}
    return {f"imagenet-t/{k}": v for k, v in pictures.items()} | {"imagenet-t/targets.csv": buffer.getvalue().encode()}


def test_typographic_images_have_a_target(tmp_path: Path) -> None:
    names = [f"{WNIDS[i]}/{i:05d}.png" for i in range(2)]
    tar = make_tar(tmp_path / "t.tar", typographic({names[1]: WNIDS[0], names[0]: WNIDS[900]}))
    index = build(tmp_path, [tar], base_space(), "typographic", images=2)
    assert index["image_id"] == names and index["label"] == [0, 1] and index["target_class"] == [900, 0]
    cases = [
        ({names[0]: WNIDS[3]}, f"no target for the image '{names[1]}'"),
        ({names[0]: WNIDS[0], names[1]: WNIDS[3]}, f"the target '{WNIDS[0]}' of '{names[0]}' is the true class"),
        ({names[0]: "crane", names[1]: WNIDS[3]}, "the target 'crane' .* is no class"),
        ({names[0]: WNIDS[3], names[1]: WNIDS[3], "z/z.png": WNIDS[3]}, "1 images are missing, such as 'z/z.png'"),
    ]
    for number, (targets, message) in enumerate(cases):
        wrong = make_tar(tmp_path / f"{number}.tar", typographic(targets))
        with pytest.raises(InputError, match=message):
            build(tmp_path, [wrong], base_space(), "typographic")


def test_cifar10_t_has_folders_of_names(tmp_path: Path) -> None:
    files = {"bird/1.png": PICTURES[0], "targets.csv": b"image,target\nbird/1.png,ship\n"}
    index = build(tmp_path, [make_folder(tmp_path / "t", files)], CIFAR_SPACE, "typographic")
    assert (index["label"], index["target_class"]) == ([2], [8])
