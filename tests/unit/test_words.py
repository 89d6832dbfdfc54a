"""Words printed on images: what stands there, where, whose name it is, and what happens to the rest."""

import collections
import io as streams
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image

from clip_robustness.core import io
from clip_robustness.core.archive import load_index, read_member
from clip_robustness.core.io import InputError
from clip_robustness.data.derive import derive_dataset
from clip_robustness.data.index import build_index
from clip_robustness.data.targets import read_record
from clip_robustness.data.words import draw_words, places, stamp
from tests.unit.layouts import WNIDS, base_space
from tests.unit.samples import broken_images, encoded, make_tar, picture

ROOT = Path(__file__).resolve().parents[2]
IMAGENET_T, CIFAR10_T = (ROOT / "config" / "typographic" / name for name in ("imagenet_t.csv", "cifar10_t.csv"))
CLASSES = ["cube", "arch", "torus", "star fish", "pyramid"]
CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def space(classes: list[str]) -> dict:
    members = [[i] for i in range(len(classes))]
    return {"name": "few", "base": None, "classes": classes, "members": members, "pool": "max", "wnids": []}


def dark(width: int, height: int, seed: int) -> Image.Image:
    """Noise that is nowhere white."""
    return picture(width, height, seed).point(lambda value: value // 3)


def source(folder: Path, sizes: list[tuple[int, int]], form: str = "PNG", classes: list[str] = CLASSES) -> Path:
    """An index of one image a size, of the classes in turn, by the adapter of folders."""
    files = {
        f"{classes[i % len(classes)]}/{i:03d}.{form.lower()}": encoded(dark(*size, i), form)
        for i, size in enumerate(sizes)
    }
    return indexed(folder, files, space(classes))


def indexed(folder: Path, files: dict[str, bytes], labels: dict, family: str = "class_folders") -> Path:
    io.write_json(folder / "labels.json", labels)
    tar = make_tar(folder / "source.tar", files)
    build_index({"name": "s", "family": family}, [tar], folder / "labels.json", folder / "source.parquet")
    return folder / "source.parquet"


def many(index: Path, count: int) -> Path:
    """The same few images under `count` ids."""
    columns = load_index(index)
    rows = np.arange(count) % len(columns["image_id"])
    repeated = {name: column[rows] for name, column in columns.items()}
    repeated["image_id"] = np.array([f"{i:05d}" for i in range(count)], dtype=object)
    io.write_parquet(index, repeated)
    return index


def draw(index: Path, out: str = "t.tar", **options: object) -> tuple[int, Path]:
    settings: dict = {"copies": 3, "size": 12, "seed": 5} | options
    path = index.with_name(out)
    return draw_words(index, index.with_name("labels.json"), path, **settings), path


def read_back(tar: Path, labels: Path) -> dict[str, tuple[Image.Image, int, int]]:
    """(image, label, target) by id, by the real adapter."""
    out = tar.with_suffix(".parquet")
    build_index({"name": "t", "family": "typographic"}, [tar], labels, out)
    index = load_index(out)
    names = ("archive", "offset", "size", "image_id", "codec")
    contents = [read_member(*place) for place in zip(*(index[name] for name in names), strict=True)]
    pictures = [Image.open(streams.BytesIO(content)) for content in contents]
    found = zip(pictures, index["label"].tolist(), index["target_class"].tolist(), strict=True)
    return dict(zip(index["image_id"], found, strict=True))


def contents(tar: Path) -> dict[str, tuple[bytes, int]]:
    """(pixels, target) by id."""
    found = read_back(tar, tar.with_name("labels.json"))
    return {image_id: (image.tobytes(), target) for image_id, (image, _, target) in found.items()}


def pixels_of(index: Path) -> dict[str, np.ndarray]:
    columns = load_index(index)
    places_of = zip(*(columns[name] for name in ("archive", "offset", "size", "image_id", "codec")), strict=True)
    images = [np.asarray(Image.open(streams.BytesIO(read_member(*place))).convert("RGB")) for place in places_of]
    return dict(zip(columns["image_id"], images, strict=True))


def found_at(image: np.ndarray, word: str, size: int, slack: int = 1) -> list[tuple[int, int]]:
    """Corners (x, y) where every pixel is as white as the word makes it, or more: reading, without a model."""
    ink = np.asarray(stamp(word, size)).astype(int)
    if ink.shape[0] > image.shape[0] or ink.shape[1] > image.shape[1]:
        return []
    windows = sliding_window_view(image.min(axis=2), ink.shape)
    return [(int(x), int(y)) for y, x in np.argwhere((windows >= ink - slack).all(axis=(2, 3)))]


@pytest.mark.parametrize(("side", "size", "copies"), [((64, 48), 9, 2), ((200, 150), 24, 8)])
def test_the_word_stands_on_the_image_and_nothing_else_changes(
    tmp_path: Path, side: tuple[int, int], size: int, copies: int
) -> None:
    index = source(tmp_path, [side] * 10)
    count, tar = draw(index, copies=copies, size=size)
    before, after = pixels_of(index), read_back(tar, tmp_path / "labels.json")
    assert count == len(after) == 10
    for image_id, (image, label, target) in after.items():
        new, word = np.asarray(image), CLASSES[target]
        ink = np.asarray(stamp(word, size))
        assert new.shape == (side[1], side[0], 3) and (ink > 200).sum() > 4 * len(word)
        corners = found_at(new, word, size)
        assert 0 < len(corners) <= copies
        assert label != target and not found_at(new, CLASSES[label], size)
        boxes = np.zeros(new.shape[:2], bool)
        for x, y in corners:
            boxes[y : y + ink.shape[0], x : x + ink.shape[1]] = True
        changed = (new != before[image_id]).any(axis=2)
        assert changed.any() and not (changed & ~boxes).any()


def test_capitals_are_as_high_as_opencvs() -> None:
    """FONT_HERSHEY_DUPLEX draws them 21 units high: 16.8 px at scale 0.8, and a stroke of 1 px."""
    assert abs(stamp("H", 25).height - 17.8) < 1
    letters = {word: np.asarray(stamp(word, 24)) for word in CLASSES}
    assert all(ink[0].any() and ink[-1].any() and ink[:, 0].any() and ink[:, -1].any() for ink in letters.values())


def test_places_reach_every_edge_and_never_leave_the_image() -> None:
    corners = np.array(places((20, 14), (17, 11), 600, np.random.default_rng(0)))
    assert {tuple(c) for c in corners.tolist()} == {(x, y) for x in range(4) for y in range(4)}
    assert places((17, 11), (17, 11), 2, np.random.default_rng(0)) == [(0, 0), (0, 0)]


def test_the_seed_decides_and_order_and_workers_do_not(tmp_path: Path) -> None:
    index = source(tmp_path, [(80, 60), (60, 90), (50, 50)] * 8)
    first = draw(index)[1].read_bytes()
    assert draw(index, "three.tar", workers=3)[1].read_bytes() == first
    columns = load_index(index)
    half = {name: column[::-2] for name, column in columns.items()}
    io.write_parquet(index, {name: column[::-1] for name, column in columns.items()})
    again = draw(index, "shuffled.tar", workers=2)[1]
    assert again.read_bytes() == first
    io.write_parquet(index, half)
    some = contents(draw(index, "half.tar")[1])
    assert len(some) == 12 and some.items() <= contents(again).items()
    assert draw(index, "other.tar", seed=6)[1].read_bytes() != (tmp_path / "half.tar").read_bytes()


def test_a_wrong_class_is_drawn_evenly(tmp_path: Path) -> None:
    index = many(source(tmp_path, [(90, 40)] * 5), 1000)
    for words, wrong in (("any", 4), ("single", 3)):
        found = read_back(draw(index, f"{words}.tar", words=words, copies=1)[1], tmp_path / "labels.json").values()
        pairs = collections.Counter((label, target) for _, label, target in found)
        targets = {target for _, target in pairs}
        assert targets == set(range(5)) - ({3} if words == "single" else set())
        assert all(label != target for label, target in pairs)
        # 200 images a true class: the count of a target is binomial, five standard deviations wide
        for (label, _), n in pairs.items():
            p = 1 / (4 if label == 3 and words == "single" else wrong)
            assert abs(n - 200 * p) < 5 * np.sqrt(200 * p * (1 - p))


def test_a_class_without_room_is_not_drawn_and_no_room_at_all_drops_the_image(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    narrow = stamp("cube", 12).width + 2
    index = source(tmp_path, [(100, 40), (100, 8), (narrow, 40), (9, 40), (narrow, 40)])
    count, tar = draw(index)
    found = read_back(tar, tmp_path / "labels.json")
    assert count == len(found) == 3 and set(found) == {"cube/000.png", "torus/002.png", "pyramid/004.png"}
    assert all(CLASSES[found[name][2]] in ("cube", "arch") for name in ("torus/002.png", "pyramid/004.png"))
    said = capsys.readouterr().err
    assert "2 of 5 images dropped: no room for the word" in said
    assert "arch/001.png: 100 x 8 px, any wrong class" in said and "star fish/003.png: 9 x 40 px" in said


def test_a_share_of_the_side_and_enlarging(tmp_path: Path) -> None:
    index = source(tmp_path, [(32, 32), (300, 240)])
    found = read_back(draw(index, size=0.1, enlarge=200, copies=1)[1], tmp_path / "labels.json")
    assert [found[name][0].size for name in sorted(found)] == [(300, 240), (200, 200)]
    for (image, _, target), size in zip((found[name] for name in sorted(found)), (24, 20), strict=True):
        assert len(found_at(np.asarray(image), CLASSES[target], size)) == 1


def test_jpegs_are_jpegs_without_the_sources_metadata(tmp_path: Path) -> None:
    plain = dark(90, 60, 1)
    files = {
        "cube/0.jpg": encoded(plain, comment=b"hello", dpi=(300, 300)),
        "arch/1.png": encoded(plain.convert("L"), "PNG"),
    }
    tar = draw(indexed(tmp_path, files, space(CLASSES)), format="jpg", quality=95)[1]
    assert b"hello" not in tar.read_bytes()
    found = read_back(tar, tmp_path / "labels.json")
    assert set(found) == {"cube/0.jpg", "arch/1.png"}
    assert all(image.format == "JPEG" and image.mode == "RGB" for image, *_ in found.values())


def imagenet_ids() -> list[str]:
    return [f"ILSVRC2012_val_{i:08d}" for i in range(1, 50_001)]


def test_the_records_are_whole() -> None:
    """Counts: arXiv 2403.10499's released record, which has 127 to 206 images a class."""
    record = read_record(IMAGENET_T, imagenet_ids(), base_space())
    counts = collections.Counter(target.label for target in record.values())
    assert (len(record), len(counts), min(counts.values()), max(counts.values())) == (49_727, 309, 127, 206)
    assert len({target.word for target in record.values()}) == 308  # both cranes have one name
    assert not any(set(target.word) & set(" ,") for target in record.values())
    assert record["ILSVRC2012_val_00000001"] == (404, "airliner") and record["ILSVRC2012_val_00050000"].label == 255
    cifar = read_record(CIFAR10_T, [f"test_batch/{i:05d}.png" for i in range(10_000)], space(CIFAR))
    counts = collections.Counter(target.label for target in cifar.values())
    assert (len(cifar), min(counts.values()), max(counts.values())) == (10_000, 947, 1053)
    assert all(CIFAR[target.label] == target.word for target in cifar.values())
    assert [cifar[f"test_batch/{i:05d}.png"].label for i in range(6)] == [5, 9, 7, 5, 2, 7]


def test_imagenet_t_from_the_validation_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    record = read_record(IMAGENET_T, imagenet_ids(), base_space())
    unnamed = next(name for name in imagenet_ids() if name not in record)
    names = [*imagenet_ids()[:6], unnamed]
    sizes = [(300, 200), (250, 333), (300, 200), (24, 30), (500, 375), (300, 200), (300, 200)]
    files = {f"{name}_{WNIDS[3]}.JPEG": encoded(dark(*size, 1)) for name, size in zip(names, sizes, strict=True)}
    index = indexed(tmp_path, files, base_space(), "imagenet_val")
    entry = {"from": "imagenet_val", "by": "words", "copies": 8, "size": 24, "seed": 1, "format": "jpg"}
    count = derive_dataset(entry, index, tmp_path / "labels.json", tmp_path / "t.tar", IMAGENET_T)
    found = read_back(tmp_path / "t.tar", tmp_path / "labels.json")
    assert count == 5 and sorted(found) == sorted(set(names[:6]) - {names[3]})
    assert {name: (label, target) for name, (_, label, target) in found.items()} == {
        name: (3, record[name].label) for name in found
    }
    said = capsys.readouterr().err
    assert "1 of 7 images are not in" in said and f"{names[3]}: 24 x 30 px, '{record[names[3]].word}'" in said
    # The word is the record's, not the label space's "class 404"; JPEG leaves it nearly white.
    image = np.asarray(found[names[0]][0])
    assert len(found_at(image, "airliner", 24, slack=40)) >= 4


def test_cifar10_t_from_the_binary_version(tmp_path: Path) -> None:
    truth = [3, 8, 8, 0, 6, 6]  # the first of CIFAR-10's test images
    pixels = [np.asarray(dark(32, 32, i)).transpose(2, 0, 1).tobytes() for i in range(6)]
    files = {
        "test_batch.bin": b"".join(bytes([label]) + data for label, data in zip(truth, pixels, strict=True)),
        "batches.meta.txt": "\n".join(CIFAR).encode(),
    }
    index = indexed(tmp_path, files, space(CIFAR), "cifar10")
    count, tar = draw(index, targets=CIFAR10_T, copies=4, size=17, enlarge=224)
    found = read_back(tar, tmp_path / "labels.json")
    assert count == 6 and [found[f"test_batch/{i:05d}.png"][1:] for i in range(6)] == list(
        zip(truth, [5, 9, 7, 5, 2, 7], strict=True)
    )
    for image, _, target in found.values():
        assert image.size == (224, 224) and found_at(np.asarray(image), CIFAR[target], 17)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("9,x,cube/000.png,", "row 1: the target '9' is no class of the label space 'few'"),
        ("1,x,cube/###.png,", "row 1: image 'cube/###.png' with 0 numbers; expected an id with one run of #"),
        ("1,x,cube/000.png,4", "with 1 numbers"),
        ("1,x,cube/###.png,0 zero", "with 2 numbers"),
        ("1,x,#/#.png,1", "with 1 numbers"),
        ("1,x,cube/###.png,0 0", "row 1: the image 'cube/000.png' stands there twice"),
        ("1,x,other/###.png,0 1", r"names 2 images \(such as 'other/000.png'\), and none of those of the data set"),
        ("1,x", "row 1: 2 fields"),
        ("1,böse,cube/000.png,", "the font cannot print 'böse'"),
        ("0,x,cube/###.png,0", "the image 'cube/000.png' has its true class 'cube' as target"),
    ],
)
def test_a_record_that_does_not_fit(tmp_path: Path, line: str, message: str) -> None:
    record = tmp_path / "record.csv"
    record.write_text(f"# a comment\ntarget,word,image,numbers\n{line}\n", encoding="utf-8")
    index = source(tmp_path, [(90, 60)] * 3)
    with pytest.raises(InputError, match=message):
        draw(index, targets=record)
    assert not (tmp_path / "t.tar").exists()


def test_a_record_of_users(tmp_path: Path) -> None:
    record = tmp_path / "record.csv"
    record.write_text("target,word,image,numbers\ntorus,doughnut,cube/000.png,\n4,,arch/###.png,1\n")
    found = read_back(draw(source(tmp_path, [(90, 60)] * 3), targets=record)[1], tmp_path / "labels.json")
    assert {name: target for name, (*_, target) in found.items()} == {"cube/000.png": 2, "arch/001.png": 4}
    assert found_at(np.asarray(found["cube/000.png"][0]), "doughnut", 12)
    assert found_at(np.asarray(found["arch/001.png"][0]), "pyramid", 12)
    for text, message in (("target,image\n", "the columns are target, image"), ("\xff", "the columns are")):
        record.write_text(text)
        with pytest.raises(InputError, match=message):
            draw(tmp_path / "source.parquet", targets=record)
    with pytest.raises(InputError, match=r"absent\.csv: cannot read it"):
        draw(tmp_path / "source.parquet", targets=tmp_path / "absent.csv")


@pytest.mark.parametrize("name", sorted(broken_images()))
def test_a_damaged_image_is_named(tmp_path: Path, name: str) -> None:
    suffix = name.rpartition(".")[2].replace("pcx", "png")
    files = {"cube/0.png": encoded(dark(60, 40, 1), "PNG"), f"arch/1.{suffix}": broken_images()[name]}
    index = indexed(tmp_path, files, space(CLASSES))
    with pytest.raises(InputError, match=rf"source\.tar, image 'arch/1\.{suffix}': cannot decode it"):
        draw(index, workers=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["labels.json", "source.parquet", "source.tar"]


def test_a_cut_archive_and_other_faults_of_the_source(tmp_path: Path) -> None:
    index = source(tmp_path, [(90, 60)] * 3)
    columns = load_index(index)
    cases: list[tuple[dict, dict, str]] = [
        ({"label": np.array([0, -1, 2], np.int32)}, {}, r"the image '.*' has the label -1, expected 0\.\.4"),
        ({"label": np.array([0, 1, 5], np.int32)}, {}, r"the label 5, expected 0\.\.4 of .*labels\.json"),
        ({}, {"size": 200}, r"no image of 3 has room for its word; take a smaller 'size'"),
        ({"image_id": np.array(["a.png", "a.jpg", "b"], object), "label": np.zeros(3, np.int32)}, {}, "would both be"),
    ]
    for change, options, message in cases:
        io.write_parquet(index, columns | change)
        with pytest.raises(InputError, match=message):
            draw(index, **options)
    io.write_parquet(index, columns)
    io.write_json(tmp_path / "labels.json", space(["cube", "Würfel", "torus"]))
    with pytest.raises(InputError, match="the font cannot print 'Würfel'"):
        draw(index)
    tar = tmp_path / "source.tar"
    tar.write_bytes(tar.read_bytes()[:9000])
    with pytest.raises(InputError, match=re.escape(f"{tar}, image ")):
        draw(index)
    assert not (tmp_path / "t.tar").exists()


def test_an_unwritable_place_is_named(tmp_path: Path) -> None:
    index = source(tmp_path, [(90, 60)])
    (tmp_path / "out.tar").mkdir()
    (tmp_path / "out.tar" / "kept").write_text("")
    with pytest.raises(InputError, match=r"out\.tar: cannot write the images there"):
        draw(index, "out.tar")
    assert not list(tmp_path.glob(".out*"))


def test_a_killed_run_leaves_no_half_tar(tmp_path: Path) -> None:
    index = many(source(tmp_path, [(400, 300)] * 3), 600)
    code = "import sys; from pathlib import Path; from clip_robustness.data.words import draw_words\n"
    code += "draw_words(*map(Path, sys.argv[1:]), copies=8, size=24, seed=1)"
    paths = [index, tmp_path / "labels.json", tmp_path / "t.tar"]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, paths)], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not any(half.stat().st_size > 1 << 20 for half in tmp_path.glob(".t.*.tar")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "t.tar").exists()
    few = many(source(tmp_path, [(400, 300)] * 3), 9)
    draw_words(few, tmp_path / "labels.json", tmp_path / "t.tar", copies=8, size=24, seed=1)
    assert len(read_back(tmp_path / "t.tar", tmp_path / "labels.json")) == 9
