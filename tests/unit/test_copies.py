"""Planted copies: each is what its transform says of the image that it names, and data sets that derive from others."""

import collections
import io as streams
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_robustness.core import io
from clip_robustness.core.archive import load_index, read_member
from clip_robustness.core.io import InputError
from clip_robustness.data.copies import TRANSFORMS, write_copies
from clip_robustness.data.derive import check_derive, derive_dataset
from clip_robustness.data.index import build_index
from tests.unit.samples import broken_images, encoded, make_tar, picture

CLASSES = ["cube", "arch", "torus"]
SPACE = {"name": "few", "base": None, "classes": CLASSES, "members": [[0], [1], [2]], "pool": "max", "wnids": []}
WIDTH, HEIGHT = 60, 40


def source(folder: Path, count: int) -> Path:
    """Smooth images, so that a resized one can be compared."""
    small = [picture(6, 4, seed).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC) for seed in range(count)]
    files = {f"{CLASSES[i % 3]}/{i:03d}.png": encoded(image, "PNG") for i, image in enumerate(small)}
    return indexed(folder, files)


def indexed(folder: Path, files: dict[str, bytes], family: str = "class_folders", name: str = "source") -> Path:
    io.write_json(folder / "labels.json", SPACE)
    tar = make_tar(folder / f"{name}.tar", files)
    return index_of(tar, family)


def index_of(tar: Path, family: str = "copies") -> Path:
    out = tar.with_suffix(".parquet")
    build_index({"name": "c", "family": family}, [tar], tar.with_name("labels.json"), out)
    return out


def pictures(index: Path) -> dict[str, Image.Image]:
    columns = load_index(index)
    places = zip(*(columns[name] for name in ("archive", "offset", "size", "image_id", "codec")), strict=True)
    images = (Image.open(streams.BytesIO(read_member(*place))) for place in places)
    return dict(zip(columns["image_id"], images, strict=True))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[Image.Image, Image.Image]]]:
    """(copy, the image that it names) by transform, 12 of each."""
    folder = tmp_path_factory.mktemp("planted")
    index = source(folder, 84)
    assert write_copies(index, folder / "c.tar", seed=3, workers=2) == 84
    copies = load_index(index_of(folder / "c.tar"))
    images, sources = pictures(folder / "c.parquet"), pictures(index)
    found: dict[str, list[tuple[Image.Image, Image.Image]]] = collections.defaultdict(list)
    for image_id, kind, of in zip(copies["image_id"], copies["transform"], copies["source"], strict=True):
        found[kind].append((images[image_id], sources[of]))
    assert {kind: len(pairs) for kind, pairs in found.items()} == dict.fromkeys(TRANSFORMS, 12)
    return found


def test_resized_and_mirrored_copies(planted: dict) -> None:
    for kind, low, high in (("downscale", 0.5, 0.75), ("upscale", 1.5, 2.0)):
        factors = {copy.width / WIDTH for copy, _ in planted[kind]}
        assert len(factors) > 5 and low - 0.01 <= min(factors) and max(factors) <= high + 0.01
        for copy, image in planted[kind]:
            assert abs(copy.height / HEIGHT - copy.width / WIDTH) < 0.02
            back = pixels(copy.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))
            assert np.abs(back - pixels(image)).mean() < 3
    for copy, image in planted["mirror"]:
        assert (pixels(copy) == pixels(image)[:, ::-1]).all()


def test_recompressed_copies_are_jpegs_of_quality_30_to_60(planted: dict) -> None:
    tables = {}
    for quality in range(30, 61):
        written = Image.open(streams.BytesIO(encoded(picture(8, 8), quality=quality)))
        tables[json.dumps(written.quantization)] = quality
    qualities = [tables[json.dumps(copy.quantization)] for copy, _ in planted["recompress"]]
    assert len(set(qualities)) > 5
    for copy, image in planted["recompress"]:
        difference = np.abs(pixels(copy) - pixels(image))
        assert copy.size == image.size and 0 < difference.mean() < 12
    others = (copy for kind in TRANSFORMS if kind != "recompress" for copy, _ in planted[kind])
    assert {copy.format for copy in others} == {"PNG"}


def test_cropped_copies_are_windows_of_80_to_95_percent(planted: dict) -> None:
    corners = set()
    for copy, image in planted["crop"]:
        part, whole = pixels(copy), pixels(image)
        assert 0.8 <= part.shape[0] * part.shape[1] / (WIDTH * HEIGHT) < 0.99
        found = [
            (x, y)
            for y in range(HEIGHT - part.shape[0] + 1)
            for x in range(WIDTH - part.shape[1] + 1)
            if (whole[y : y + part.shape[0], x : x + part.shape[1]] == part).all()
        ]
        assert len(found) == 1
        corners |= set(found)
    assert len(corners) > 5


def test_colours_change_by_one_gain_or_by_three(planted: dict) -> None:
    def gains(copy: Image.Image, image: Image.Image) -> np.ndarray:
        new, old = pixels(copy), pixels(image)
        fitted = []
        for channel in range(3):
            a, b = old[..., channel], new[..., channel]
            inside = (b < 255) & (a > 0)
            gain = (a * b)[inside].sum() / (a * a)[inside].sum()
            assert np.abs(np.minimum(a * gain, 255) - b).max() < 2
            fitted.append(gain)
        return np.array(fitted)

    bright = np.array([gains(*pair) for pair in planted["brightness"]])
    assert np.ptp(bright, axis=1).max() < 0.02
    assert all(0.59 < gain < 0.81 or 1.19 < gain < 1.41 for gain in bright[:, 0])
    assert (bright[:, 0] < 1).any() and (bright[:, 0] > 1).any()
    colour = np.array([gains(*pair) for pair in planted["colour"]])
    assert 0.74 < colour.min() < 0.9 and 1.1 < colour.max() < 1.26 and np.ptp(colour, axis=1).mean() > 0.1


def test_the_index_has_source_transform_and_label(tmp_path: Path) -> None:
    index = source(tmp_path, 30)
    truth = dict(zip(*(load_index(index)[name] for name in ("image_id", "label")), strict=True))
    assert write_copies(index, tmp_path / "c.tar", seed=1, share=0.4, transforms=["mirror", "crop", "recompress"]) == 12
    copies = load_index(index_of(tmp_path / "c.tar"))
    assert collections.Counter(copies["transform"]) == {"mirror": 4, "crop": 4, "recompress": 4}
    assert len(set(copies["source"])) == 12
    assert [truth[of] for of in copies["source"]] == copies["label"].tolist()
    endings = {"recompress": "jpg"}
    assert sorted(copies["image_id"]) == [
        f"{i:05d}-{kind}.{endings.get(kind, 'png')}" for i, kind in enumerate(["mirror", "crop", "recompress"] * 4)
    ]


def test_the_seed_decides_and_order_and_workers_do_not(tmp_path: Path) -> None:
    index = source(tmp_path, 20)
    write_copies(index, tmp_path / "a.tar", seed=1, number=9)
    columns = load_index(index)
    io.write_parquet(index, {name: column[::-1] for name, column in columns.items()})
    write_copies(index, tmp_path / "b.tar", seed=1, number=9, workers=3)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    write_copies(index, tmp_path / "c.tar", seed=2, number=9)
    write_copies(index, tmp_path / "d.tar", seed=1, share=0.75)
    first, other, more = (set(load_index(index_of(tmp_path / f"{n}.tar"))["source"]) for n in "acd")
    assert first != other and first < more and len(more) == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"number": 6}, r"6 copies of 5 images; expected 1 to 5"),
        ({"number": 0}, "0 copies of 5 images"),
        ({"number": 2, "share": 0.5}, "both 'share' and 'number' are given"),
        ({"transforms": ["mirror", "rotate"]}, "'rotate' is not one of downscale, upscale"),
        ({"transforms": []}, "'none' is not one of"),
    ],
)
def test_copies_that_cannot_be_made(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_copies(source(tmp_path, 5), tmp_path / "c.tar", seed=1, **options)
    assert not (tmp_path / "c.tar").exists()


def test_a_damaged_source_leaves_no_tar(tmp_path: Path) -> None:
    good = encoded(picture(30, 20), "PNG")
    index = indexed(tmp_path, {"cube/0.png": good, "arch/1.png": broken_images()["cut.png"]})
    with pytest.raises(InputError, match=r"source\.tar, image 'arch/1\.png': cannot decode it"):
        write_copies(index, tmp_path / "c.tar", seed=1)
    index = source(tmp_path, 3)
    data = (tmp_path / "source.tar").read_bytes()
    (tmp_path / "source.tar").write_bytes(data[: len(data) // 3])
    with pytest.raises(InputError, match=r"source\.tar, image "):
        write_copies(index, tmp_path / "c.tar", seed=1)
    assert not [path for path in tmp_path.iterdir() if path.name.endswith("c.tar") or path.name.startswith(".")]


def test_the_adapter_without_labels_and_what_it_refuses(tmp_path: Path) -> None:
    image = encoded(picture(8, 8), "PNG")
    files = {"d/0-crop.png": image, "d/1-crop.png": image}

    def adapted(table: str) -> dict[str, np.ndarray]:
        return load_index(indexed(tmp_path, files | {"d/copies.csv": table.encode()}, "copies", "c"))

    index = adapted("image,source,transform\n0-crop.png,a,crop\n1-crop.png,b,crop\n")
    assert index["label"].tolist() == [-1, -1] and index["source"].tolist() == ["a", "b"]
    head = "image,source,transform,label\n0-crop.png,a,crop,2\n"
    assert adapted(f"{head}1-crop.png,b,crop,\n")["label"].tolist() == [-1, 2]
    cases = [
        (head, "has no line of its own for the image '1-crop.png'"),
        (f"{head}1-crop.png,b,crop,1\n2-crop.png,b,crop,1\n", "1 images are missing, such as '2-crop.png'"),
        (f"{head}0-crop.png,b,crop,1\n", "the image '0-crop.png' stands there twice"),
        (f"{head}1-crop.png,,crop,1\n", "'1-crop.png' stands there twice, or without source"),
        (f"{head}1-crop.png,b,crop,3\n", r"image '1-crop.png': label '3', expected -1\.\.2 of the label space 'few'"),
        (f"{head}1-crop.png,b,crop,cube\n", "label 'cube', expected"),
        ("image,source\n", "expected the columns image, source, transform"),
    ]
    for table, message in cases:
        with pytest.raises(InputError, match=message):
            adapted(table)


WORDS = {"from": "a", "by": "words", "copies": 2, "size": 9, "seed": 1}
COPIES = {"from": "a", "by": "copies", "seed": 1}


def test_entries_that_hold() -> None:
    record = WORDS | {"targets": "config/typographic/imagenet_t.csv", "format": "jpg", "quality": 95}
    assert check_derive(record, "x") == {name: value for name, value in record.items() if name not in ("from", "by")}
    assert check_derive(WORDS | {"size": 0.15, "words": "single", "enlarge": 224}, "x")["size"] == 0.15
    assert check_derive(COPIES | {"share": 0.05, "transforms": list(TRANSFORMS)}, "x")["share"] == 0.05


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (WORDS | {"by": "word"}, r"x\.by: 'word', expected words or copies"),
        ({"from": "a"}, r"x\.by: None"),
        ({"from": "a", "by": ["words"]}, r"x\.by: \['words'\], expected words or copies"),
        ({"by": "copies", "seed": 1}, r"x\.from: None, expected the name of the data set"),
        (WORDS | {"sizes": 9}, r"x: 'sizes' is no field of by: words; did you mean 'size'\?"),
        (COPIES | {"copies": 2}, "x: 'copies' is no field of by: copies"),
        ({"from": "a", "by": "words", "copies": 2, "seed": 1}, r"x\.size: is missing, expected whole pixels"),
        ({"from": "a", "by": "copies"}, r"x\.seed: is missing, expected a whole number of at least 0"),
        (WORDS | {"copies": 0}, r"x\.copies: 0, expected a whole number of at least 1"),
        (WORDS | {"copies": True}, r"x\.copies: True"),
        (WORDS | {"size": 24.5}, r"x\.size: 24\.5"),
        (WORDS | {"size": 3}, r"x\.size: 3"),
        (WORDS | {"seed": "1"}, r"x\.seed: '1'"),
        (WORDS | {"words": "short"}, r"x\.words: 'short', expected one of any, single"),
        (WORDS | {"format": "gif"}, r"x\.format: 'gif', expected one of png, jpg"),
        (WORDS | {"quality": 100}, r"x\.quality: 100"),
        (WORDS | {"targets": "t.csv", "words": "single"}, "both 'targets' and 'words'"),
        (COPIES | {"share": 0}, r"x\.share: 0, expected above 0, at most 1"),
        (COPIES | {"share": 0.1, "number": 3}, "both 'share' and 'number'"),
        (COPIES | {"transforms": ["flip"]}, r"x\.transforms: \['flip'\], expected a list of some of downscale"),
        (COPIES | {"transforms": [["mirror"]]}, r"x\.transforms"),
    ],
)
def test_entries_that_do_not_hold(entry: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_derive(entry, "x")


def test_deriving_by_either_maker(tmp_path: Path) -> None:
    index, labels = source(tmp_path, 10), tmp_path / "labels.json"
    assert derive_dataset(COPIES | {"share": 0.5}, index, labels, tmp_path / "c.tar", workers=2) == 5
    assert len(load_index(index_of(tmp_path / "c.tar"))["image_id"]) == 5
    assert derive_dataset(WORDS, index, labels, tmp_path / "w.tar") == 10
    assert len(load_index(index_of(tmp_path / "w.tar", "typographic"))["target_class"]) == 10
    with pytest.raises(InputError, match=r"^mini_copies: derive: 'typo' is no field of by: copies"):
        derive_dataset(COPIES | {"typo": 1}, index, labels, tmp_path / "mini_copies.tar")
