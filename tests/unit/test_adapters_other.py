"""Out-of-distribution sets, captions and ImageNet-D: official layouts with a few tiny images."""

import csv
import io as bytes_io
import json
import zipfile
from pathlib import Path

import pytest

from clip_robustness.core.io import InputError
from tests.unit.adapter_samples import BASE, build, contents, jpeg, make_gzip, make_zip, parsed, png
from tests.unit.samples import make_folder, make_tar

# ---- out-of-distribution sets -------------------------------------------------------------------------------


def mos(name: str = "SUN") -> dict[str, bytes]:
    return {f"{name}/images/sun_{letter}.jpg": jpeg(n) for n, letter in enumerate("cab")}


def test_mos_subset(tmp_path: Path) -> None:
    files = mos()
    index = build(tmp_path, [make_gzip(tmp_path / "SUN.tar.gz", files)], "unlabelled", images=3)
    assert index["image_id"].tolist() == ["sun_a.jpg", "sun_b.jpg", "sun_c.jpg"]
    assert index["label"].tolist() == [-1, -1, -1]
    assert contents(index) == [files[f"SUN/images/sun_{x}.jpg"] for x in "abc"]
    folder = make_folder(tmp_path / "mine", files)
    for source in (folder, folder / "SUN", folder / "SUN" / "images"):
        assert build(tmp_path, [source], "unlabelled")["image_id"].tolist() == index["image_id"].tolist()


def test_only_a_folder_or_a_list(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", mos() | {"SUN/thumbs/sun_a.jpg": jpeg(9), "SUN/thumbs/x/y.jpg": jpeg(8)})
    index = build(tmp_path, [tar], "unlabelled", options={"folder": "thumbs"})
    assert index["image_id"].tolist() == ["sun_a.jpg", "x/y.jpg"]
    assert build(tmp_path, [tar], "unlabelled")["image_id"].tolist()[0] == "images/sun_a.jpg"
    # as OpenOOD writes it: a folder above, and a label behind
    listed = tmp_path / "test_sun.txt"
    listed.write_text("sun/SUN/images/sun_c.jpg -1\nimages/sun_a.jpg\n\n")
    index = build(tmp_path, [tar, listed], "unlabelled", options={"list": "test_sun.txt"})
    assert index["image_id"].tolist() == ["images/sun_a.jpg", "images/sun_c.jpg"]
    listed.write_text("images/sun_z.jpg -1\n")
    with pytest.raises(InputError, match=r"test_sun\.txt.*line 1: the image 'images/sun_z.jpg -1' is not among"):
        build(tmp_path, [tar, listed], "unlabelled", options={"list": "test_sun.txt"})
    listed.write_text("\n")
    with pytest.raises(InputError, match=r"test_sun\.txt.*names no image"):
        build(tmp_path, [tar, listed], "unlabelled", options={"list": "test_sun.txt"})
    with pytest.raises(InputError, match=r"there is no file 'gone\.txt', expected exactly one; fetch it again"):
        build(tmp_path, [tar, listed], "unlabelled", options={"list": "gone.txt"})


def dtd() -> dict[str, bytes]:
    names = ["banded/banded_0002.jpg", "banded/banded_0004.jpg", "polka-dotted/polka-dotted_0001.jpg"]
    lists = {"dtd/labels/test1.txt": b"banded/banded_0004.jpg\npolka-dotted/polka-dotted_0001.jpg\n"}
    return {f"dtd/images/{name}": jpeg(n) for n, name in enumerate(names)} | lists | {"dtd/imdb/imdb.mat": b"MATLAB"}


def test_textures(tmp_path: Path) -> None:
    tar = make_gzip(tmp_path / "dtd-r1.0.1.tar.gz", dtd())
    index = build(tmp_path, [tar], "dtd", images=3)
    assert index["texture"].tolist() == ["banded", "banded", "polka-dotted"]
    assert index["label"].tolist() == [-1, -1, -1]
    assert index["image_id"].tolist()[2] == "polka-dotted/polka-dotted_0001.jpg"
    space = BASE | {"name": "dtd", "classes": ["polka-dotted", "banded"], "members": [[0], [1]]}
    labelled = build(tmp_path, [tar], "dtd", space, options={"keep_labels": True})
    assert labelled["texture"].tolist() == ["polka-dotted", "banded", "banded"]
    assert labelled["label"].tolist() == [0, 1, 1]
    split = build(tmp_path, [tar], "dtd", options={"list": "labels/test1.txt"})
    assert split["image_id"].tolist() == ["banded/banded_0004.jpg", "polka-dotted/polka-dotted_0001.jpg"]
    local = make_folder(tmp_path / "f", dtd()) / "dtd" / "images"
    assert build(tmp_path, [local], "dtd")["image_id"].tolist() == index["image_id"].tolist()


def test_what_is_no_dtd(tmp_path: Path) -> None:
    tar = make_tar(tmp_path / "a.tar", dtd())
    with pytest.raises(InputError, match=r"a\.tar.*the texture 'banded' is not a class.*'base'; correct 'labels'"):
        build(tmp_path, [tar], "dtd", options={"keep_labels": True})
    flat = make_tar(tmp_path / "b.tar", {"dtd/images/banded_0002.jpg": jpeg(0)})
    with pytest.raises(InputError, match=r"b\.tar, member 'dtd/images/banded_0002\.jpg': expected images as images/T"):
        build(tmp_path, [flat], "dtd")


NINCO = {
    "NINCO_OOD_classes/Caracal caracal caracal/Caracal caracal caracal_000_000-10896690.jpg": "a",
    "NINCO_OOD_classes/araneus_gemma/araneus_gemma_008_1733400.JPG": "b",
    "NINCO_popular_datasets_subsamples/Places/Places_000_b_badlands_00000792.jpg": "c",
    "NINCO_popular_datasets_subsamples/ImageNet_1k_OOD_400_ood/x.jpeg": "d",
    "NINCO_OOD_unit_tests/uni/uni_000_uni_00112.png": "e",
}


@pytest.mark.parametrize(
    ("options", "column", "expected"),
    [
        ({}, "ood_class", ["Caracal caracal caracal", "araneus_gemma"]),
        ({"part": "NINCO_popular_datasets_subsamples"}, "origin", ["ImageNet_1k_OOD_400_ood", "Places"]),
        ({"part": "NINCO_popular_datasets_subsamples", "only": ["Places"]}, "origin", ["Places"]),
        ({"part": "NINCO_OOD_unit_tests"}, "unit_test", ["uni"]),
    ],
)
def test_ninco(tmp_path: Path, options: dict, column: str, expected: list[str]) -> None:
    tar = make_gzip(tmp_path / "NINCO_all.tar.gz", {f"NINCO/{name}": jpeg(n) for n, name in enumerate(NINCO)})
    index = build(tmp_path, [tar], "ninco", images=len(expected), options=options)
    assert index[column].tolist() == expected
    assert [image_id.partition("/")[0] for image_id in index["image_id"]] == expected
    assert set(index["label"].tolist()) == {-1}
    part = options.get("part", "NINCO_OOD_classes")
    local = make_folder(tmp_path / "f", {name: jpeg(n) for n, name in enumerate(NINCO)})
    assert build(tmp_path, [local / part], "ninco", options=options)["image_id"].tolist() == index["image_id"].tolist()


def test_what_is_no_ninco(tmp_path: Path) -> None:
    files = {f"NINCO/{name}": jpeg(0) for name in NINCO if "OOD_classes" not in name}
    tar = make_tar(tmp_path / "a.tar", files)
    classes = {"part": "NINCO_OOD_classes"}
    holds = r"a\.tar.*holds NINCO_OOD_unit_tests, NINCO_popular_datasets_subsamples but no folder 'NINCO_OOD_classes'"
    with pytest.raises(InputError, match=holds):
        build(tmp_path, [tar], "ninco", options=classes)
    with pytest.raises(InputError, match="no part 'easy' of NINCO; set the option"):
        build(tmp_path, [tar], "ninco", options={"part": "easy"})
    with pytest.raises(InputError, match=r"no folder 'SUN' in NINCO_popular.*'only' may have"):
        build(tmp_path, [tar], "ninco", options={"part": "NINCO_popular_datasets_subsamples", "only": ["SUN"]})


# ---- captions ---------------------------------------------------------------------------------------------------

COCO = {
    "COCO_val2014_000000391895.jpg": "test",
    "COCO_val2014_000000060623.jpg": "test",
    "COCO_val2014_000000000042.jpg": "val",
}


def karpathy(files: dict[str, str], count: int = 5) -> bytes:
    sentences = [[{"tokens": ["x"], "raw": f"{file} caption, “{n}”"} for n in range(count)] for file in files]
    images = [
        {"filepath": "val2014", "filename": file, "split": split, "sentences": texts, "imgid": n}
        for n, ((file, split), texts) in enumerate(zip(files.items(), sentences, strict=True))
    ]
    return json.dumps({"images": images, "dataset": "coco"}).encode()


def coco(tmp_path: Path, count: int = 6) -> list[Path]:
    pictures = {f"val2014/{file}": jpeg(n) for n, file in enumerate(COCO)}
    splits = {"dataset_coco.json": karpathy(COCO, count), "dataset_flickr8k.json": b"{}"}
    return [
        make_zip(tmp_path / "val2014.zip", pictures),
        make_zip(tmp_path / "caption_datasets.zip", splits, zipfile.ZIP_DEFLATED),
    ]


def test_coco_with_karpathys_split(tmp_path: Path) -> None:
    options = {"annotations": "dataset_coco.json"}
    index = build(tmp_path, coco(tmp_path), "captions", images=2, options=options)
    assert index["image_id"].tolist() == ["COCO_val2014_000000060623.jpg", "COCO_val2014_000000391895.jpg"]
    assert contents(index) == [jpeg(1), jpeg(0)]
    captions = parsed(index, "captions")
    assert [len(texts) for texts in captions] == [5, 5]
    assert captions[1][4] == "COCO_val2014_000000391895.jpg caption, “4”"
    assert index["split"].tolist() == ["test", "test"]
    assert index["label"].tolist() == [-1, -1]
    every = build(tmp_path, coco(tmp_path), "captions", options=options | {"per_image": 0, "split": "val"})
    assert [len(texts) for texts in parsed(every, "captions")] == [6]
    assert every["image_id"].tolist() == ["COCO_val2014_000000000042.jpg"]


def test_flickr30k_as_the_hub_has_it(tmp_path: Path) -> None:
    table = bytes_io.StringIO()
    writer = csv.writer(table)
    writer.writerow(["raw", "sentids", "split", "filename", "img_id"])
    for n, (file, split) in enumerate(
        {"1007129816.jpg": "test", "1009434119.jpg": "test", "36979.jpg": "train"}.items()
    ):
        writer.writerow([json.dumps([f'a "{n}",\n{c}' for c in range(5)]), "[0]", split, file, n])
    (tmp_path / "flickr_annotations_30k.csv").write_text(table.getvalue(), newline="")
    files = {
        f"flickr30k-images/{file}": jpeg(n) for n, file in enumerate(["36979.jpg", "1009434119.jpg", "1007129816.jpg"])
    }
    sources = [make_zip(tmp_path / "flickr30k-images.zip", files), tmp_path / "flickr_annotations_30k.csv"]
    options = {"annotations": "flickr_annotations_30k.csv"}
    index = build(tmp_path, sources, "captions", images=2, options=options)
    assert index["image_id"].tolist() == ["1007129816.jpg", "1009434119.jpg"]
    assert parsed(index, "captions")[1] == [f'a "1",\n{c}' for c in range(5)]
    (tmp_path / "flickr_annotations_30k.csv").write_text("raw,split,filename\nno json,test,36979.jpg\n")
    with pytest.raises(InputError, match=r"flickr_annotations_30k\.csv.*row 2: 'raw' is no JSON list"):
        build(tmp_path, sources, "captions", options=options)
    (tmp_path / "flickr_annotations_30k.csv").write_text("caption,split,filename\n")
    with pytest.raises(InputError, match=r"flickr_annotations_30k\.csv.*no column 'raw', expected the columns raw"):
        build(tmp_path, sources, "captions", options=options)


def test_flickr30k_as_the_owners_give_it(tmp_path: Path) -> None:
    names = {"1007129816.jpg": "test", "36979.jpg": "train"}
    images = make_gzip(
        tmp_path / "flickr30k-images.tar.gz", {f"flickr30k-images/{f}": jpeg(n) for n, f in enumerate(names)}
    )
    splits = make_zip(
        tmp_path / "caption_datasets.zip", {"dataset_flickr30k.json": karpathy(names)}, zipfile.ZIP_DEFLATED
    )
    index = build(tmp_path, [images, splits], "captions", options={"annotations": "dataset_flickr30k.json"})
    assert index["image_id"].tolist() == ["1007129816.jpg"]
    assert contents(index) == [jpeg(0)]


def test_captions_that_do_not_fit(tmp_path: Path) -> None:
    sources = coco(tmp_path, count=4)
    options: dict = {"annotations": "dataset_coco.json"}
    with pytest.raises(
        InputError, match=r"dataset_coco\.json.*COCO_val2014_000000391895\.jpg': 4 captions, expected 5"
    ):
        build(tmp_path, sources, "captions", options=options)
    with pytest.raises(InputError, match=r"dataset_coco\.json.*no image of the split 'tset'; correct the option"):
        build(tmp_path, sources, "captions", options=options | {"split": "tset"})
    with pytest.raises(InputError, match="set the option 'annotations'"):
        build(tmp_path, sources, "captions")
    with pytest.raises(InputError, match=r"dataset_flickr8k\.json.*'images' is missing"):
        build(tmp_path, sources, "captions", options={"annotations": "dataset_flickr8k.json"})
    with pytest.raises(InputError, match=r"there is no file 'dataset_coco\.json'"):
        build(tmp_path, sources[:1], "captions", options=options)
    some = make_zip(tmp_path / "some.zip", {"val2014/COCO_val2014_000000391895.jpg": jpeg(0)})
    with pytest.raises(InputError, match=r"the image 'COCO_val2014_000000060623\.jpg' of the split 'test' is not in"):
        build(tmp_path, [some, sources[1]], "captions", options=options | {"per_image": 4})
    broken = make_zip(tmp_path / "broken.zip", {"dataset_coco.json": b"[{"})
    with pytest.raises(InputError, match=r"broken\.zip, member 'dataset_coco\.json': not valid JSON.*fetch it again"):
        build(tmp_path, [some, broken], "captions", options=options)


# ---- ImageNet-D -----------------------------------------------------------------------------------------------

OBJECTS = {
    "name": "imagenet_d",
    "base": "imagenet_1k",
    "classes": ["alarm_clock", "binder (closed)", "coffee/french press", "t-shirt"],
    "members": [[409, 530], [446], [550], [610]],
    "pool": "max",
}


def imagenet_d() -> dict[str, bytes]:
    columns = "image_dir\tgt_category\ttop1_pred_cate\ttop2_pred_cate\n"
    rows = "background/alarm_clock/8KNN.png\talarm clock\twatch\talarm clock\n"
    rows += "background/t_shirt/a.png\tt shirt\tt shirt\tsweater\n"
    images = ["background/t_shirt/a.png", "background/alarm_clock/8KNN.png", "texture/coffee_or_french_press/b.png"]
    images += ["material/binder_closed/c.png", "material/alarm_clock/8KNN.png"]
    files = {f"ImageNet-D/{name}": png(n) for n, name in enumerate(images)}
    return files | {"ImageNet-D/questions/background.csv": (columns + rows).encode()}


def test_imagenet_d(tmp_path: Path) -> None:
    files = imagenet_d()
    index = build(tmp_path, [make_tar(tmp_path / "ImageNet-D.tar", files)], "imagenet_d", OBJECTS, images=5)
    assert index["image_id"].tolist() == [
        "background/alarm_clock/8KNN.png",
        "material/alarm_clock/8KNN.png",
        "material/binder_closed/c.png",
        "texture/coffee_or_french_press/b.png",
        "background/t_shirt/a.png",
    ]
    assert index["label"].tolist() == [0, 0, 1, 2, 3]
    assert index["variation"].tolist() == ["background", "material", "material", "texture", "background"]
    assert index["distractor"].tolist() == ["watch", "", "", "", "sweater"]
    assert contents(index) == [files[f"ImageNet-D/{image_id}"] for image_id in index["image_id"]]
    local = make_folder(tmp_path / "f", files) / "ImageNet-D"
    only = build(tmp_path, [local], "imagenet_d", OBJECTS, options={"variation": "material"})
    assert only["image_id"].tolist() == ["material/alarm_clock/8KNN.png", "material/binder_closed/c.png"]


def test_what_is_no_imagenet_d(tmp_path: Path) -> None:
    files = imagenet_d()
    strange = files | {"ImageNet-D/material/zebra/a.png": png(1)}
    with pytest.raises(InputError, match=r"a\.tar, member '.*zebra/a\.png': 'zebra' is not a class.*'imagenet_d'"):
        build(tmp_path, [make_tar(tmp_path / "a.tar", strange)], "imagenet_d", OBJECTS)
    with pytest.raises(InputError, match="no variation 'color'"):
        build(tmp_path, [tmp_path / "a.tar"], "imagenet_d", OBJECTS, options={"variation": "color"})
    del files["ImageNet-D/texture/coffee_or_french_press/b.png"]
    with pytest.raises(InputError, match=r"b\.tar.*no folder 'texture' with one folder a class; fetch it again"):
        build(tmp_path, [make_tar(tmp_path / "b.tar", files)], "imagenet_d", OBJECTS)
    files = imagenet_d() | {"ImageNet-D/questions/texture.csv": b"image,answer\n"}
    with pytest.raises(
        InputError, match=r"c\.tar, member '.*questions/texture\.csv': no column '.*', expected the col"
    ):
        build(tmp_path, [make_tar(tmp_path / "c.tar", files)], "imagenet_d", OBJECTS)
