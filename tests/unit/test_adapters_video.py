"""ImageNet-Vid-Robust and YTBB-Robust: sets of frames, their labels and distances, and what is missing."""

import json
from pathlib import Path

import pytest

from clip_robustness.core.io import InputError
from tests.unit.layouts import PICTURES, WNIDS, base_space, build, by_id, contents, space_of, tar_gz
from tests.unit.samples import make_tar

VID = "imagenet_vid_ytbb_robust/imagenet-vid-robust"
SNIPPETS = ["ILSVRC2015_val_00000000", "ILSVRC2015_val_00000001"]


def vid_files() -> dict[str, bytes]:
    """Two sets, and a frame of neither."""
    first, second = SNIPPETS
    keys = [f"val/{first}/{i:06d}.JPEG" for i in (432, 440, 442, 452)] + [f"val/{second}/000010.JPEG"]
    sets = {keys[2]: [keys[0], keys[1], keys[3]], keys[4]: []}
    labels = {key: [26] for key in keys[:4]} | {keys[4]: [9, 4]}
    labels[keys[0]] = [26, 16]
    files = {f"{VID}/{key}": PICTURES[i] for i, key in enumerate(keys)}
    files |= {f"{VID}/val/{second}/000011.JPEG": PICTURES[8]}
    files |= {f"{VID}/metadata/labels.json": json.dumps(labels).encode()}
    return files | {f"{VID}/metadata/pmsets.json": json.dumps(sets).encode()}


YTBB = "imagenet_vid_ytbb_robust/ytbb-robust/ytbb_videos"
WORDS = ["good", "unsure", "bad", "person", "car", "giraffe"]
FIRST = "ytbb_robustness_test_anchors_full.csv"
PAIR_WORDS = ["similar", "dissimilar", "correct", "bad-anchor", "dont know"]


def ytbb_files() -> dict[str, bytes]:
    """Anchors: a_1000 (good), b_2000 (bad), c_3000 (a neighbour's review calls it bad), d_4000 (a giraffe only)."""
    frames = [f"a_1000/frame-{i}.jpg" for i in (5, 14, 15, 16, 25, 26)]
    frames += ["b_2000/frame-30.jpg", "c_3000/frame-45.jpg", "c_3000/frame-46.jpg", "d_4000/frame-60.jpg"]
    anchors = {"a_1000/frame-15.jpg": [0, 3], "b_2000/frame-30.jpg": [0, 2], "c_3000/frame-45.jpg": [0]}
    anchors |= {"d_4000/frame-60.jpg": [0]}
    pairs = [
        ("a_1000/frame-15.jpg", "a_1000/frame-5.jpg", [0, 2]),
        ("a_1000/frame-15.jpg", "a_1000/frame-14.jpg", [0, 4]),  # similar, but the reviewer did not know the class
        ("a_1000/frame-15.jpg", "a_1000/frame-16.jpg", [1]),
        ("a_1000/frame-15.jpg", "a_1000/frame-25.jpg", [0]),
        ("a_1000/frame-15.jpg", "a_1000/frame-26.jpg", [0]),  # eleven frames away
        ("c_3000/frame-45.jpg", "c_3000/frame-46.jpg", [3]),
    ]
    entries = [{"key": f"somewhere/{key}", "notes": "", "labels": labels} for key, labels in anchors.items()]
    entries.insert(0, {"key": "a_1000/frame-15.jpg", "notes": "an older review", "labels": [2]})
    reviews = [{"key": f"up/{one},up/{other}", "notes": "", "labels": words} for one, other, words in pairs]
    first = "ytid,time_ms,label\na,1000,22\nb,2000,0\nc,3000,0\nd,4000,8\n"
    files = {f"{YTBB}/{frame}": PICTURES[i] for i, frame in enumerate(frames)}
    files["meta/anchor_labels.json"] = json.dumps({"labels": WORDS, "annotations": entries}).encode()
    files["meta/pmk_labels.json"] = json.dumps({"labels": PAIR_WORDS, "annotations": reviews}).encode()
    return files | {f"meta/{FIRST}": first.encode()}


def test_sets_of_video_frames(tmp_path: Path) -> None:
    space = space_of(tmp_path, "map:vid_robust_30")
    source = tar_gz(tmp_path / "imagenet_vid_ytbb_robust.tar.gz", vid_files() | ytbb_files())
    index = build(tmp_path, [source], space, "video_robust", options={"set": "vid"}, images=5)
    rows = by_id(index, "label", "labels", "distance", "anchor")
    anchor = f"{SNIPPETS[0]}/000442.JPEG"
    assert rows == {
        f"{SNIPPETS[0]}/000432.JPEG": (16, "lizard|turtle", -10, anchor),
        f"{SNIPPETS[0]}/000440.JPEG": (26, "turtle", -2, anchor),
        anchor: (26, "turtle", 0, anchor),
        f"{SNIPPETS[0]}/000452.JPEG": (26, "turtle", 10, anchor),
        f"{SNIPPETS[1]}/000010.JPEG": (4, "bird|domestic cat", 0, f"{SNIPPETS[1]}/000010.JPEG"),
    }
    turtles = {WNIDS[i] for i in range(33, 38)}
    assert set(space["wnids"][26]) == turtles
    assert contents(index)[index["image_id"].index(anchor)] == PICTURES[2]


def test_reviewed_youtube_frames(tmp_path: Path) -> None:
    space = space_of(tmp_path, "map:ytbb_robust_19")
    everything = vid_files() | ytbb_files()
    reviews = {name: content for name, content in everything.items() if name.startswith("meta/")}
    frames = {name: content for name, content in everything.items() if name not in reviews}
    sources = [tar_gz(tmp_path / "frames.tar.gz", frames), tar_gz(tmp_path / "wise-ft.tar.gz", reviews)]
    index = build(tmp_path, sources, space, "video_robust", options={"set": "ytbb"}, images=4)
    rows = by_id(index, "labels", "distance", "anchor")
    both, anchor = "person|car", "a_1000/frame-15.jpg"  # 22 in the list of anchors is car, and the review adds person
    assert rows == {
        "a_1000/frame-5.jpg": (both, -10, anchor),
        anchor: (both, 0, anchor),
        "a_1000/frame-25.jpg": (both, 10, anchor),
        "d_4000/frame-60.jpg": ("giraffe", 0, "d_4000/frame-60.jpg"),
    }
    assert dict(zip(index["image_id"], index["label"], strict=True)) == {
        "a_1000/frame-5.jpg": space["classes"].index("person"),
        anchor: space["classes"].index("person"),
        "a_1000/frame-25.jpg": space["classes"].index("person"),
        "d_4000/frame-60.jpg": -1,  # no class of ImageNet is a giraffe: always wrong, and counted
    }


@pytest.mark.parametrize(
    ("options", "drop", "add", "message"),
    [
        ({}, "", {}, "option 'set' is None, expected vid or ytbb"),
        ({"set": "vid"}, "pmsets.json", {}, "there is no file 'pmsets.json'"),
        ({"set": "vid"}, "000440.JPEG", {}, "1 of 5 frames are missing, such as 'ILSVRC2015_val_00000000/000440.JPEG'"),
        ({"set": "vid"}, "labels.json", {"labels.json": b"{}"}, "has 'no label', expected some of"),
        ({"set": "vid"}, "pmsets.json", {"pmsets.json": b"[]"}, "expected a list of frames' names for each frame"),
        ({"set": "vid"}, "pmsets.json", {"pmsets.json": b'{"a/1.jpg": [["b"]]}'}, "expected a list of frames' names"),
        ({"set": "vid"}, "labels.json", {"labels.json": b'{"a/1.jpg": [1.0]}'}, "expected a list of whole numbers"),
        ({"set": "ytbb"}, "_full.csv", {FIRST: b"ytid,time_ms,label\nb,2000,24\n"}, r"line 2: .* label in 0\.\.23"),
        ({"set": "ytbb"}, "_full.csv", {FIRST: b"ytid,time_ms,label\n"}, "'a_1000/frame-15.jpg' has no label"),
        ({"set": "ytbb"}, "anchor_labels.json", {"anchor_labels.json": b"{}"}, "no list of reviews"),
    ],
)
def test_what_is_no_video_set(tmp_path: Path, options: dict, drop: str, add: dict, message: str) -> None:
    space = space_of(tmp_path, "map:vid_robust_30" if options.get("set") == "vid" else "map:ytbb_robust_19")
    everything = vid_files() | ytbb_files()
    files = {name: content for name, content in everything.items() if not drop or not name.endswith(drop)} | add
    with pytest.raises(InputError, match=message):
        build(tmp_path, [make_tar(tmp_path / "x.tar", files)], space, "video_robust", options=options)


def test_youtube_frames_need_the_numbers_of_all_24_classes(tmp_path: Path) -> None:
    source = make_tar(tmp_path / "x.tar", ytbb_files())
    with pytest.raises(InputError, match=r"does not number the set's 24 classes; set 'labels' .* map:ytbb_robust_19"):
        build(tmp_path, [source], base_space(), "video_robust", options={"set": "ytbb"})


def test_a_list_that_two_sources_repeat_is_one_list(tmp_path: Path) -> None:
    space, files = space_of(tmp_path, "map:ytbb_robust_19"), ytbb_files()
    lists = {name: content for name, content in files.items() if name.startswith("meta/")}
    again = {f"wise-ft/src/{name}": content for name, content in lists.items()}
    source = make_tar(tmp_path / "x.tar", files | again | {"other/metadata/labels.json": b"{}"})
    assert len(build(tmp_path, [source], space, "video_robust", options={"set": "ytbb"})["label"]) == 4
    again["wise-ft/src/meta/pmk_labels.json"] += b" "
    with pytest.raises(InputError, match=r"2 files end in 'pmk_labels\.json', expected exactly one"):
        build(tmp_path, [make_tar(tmp_path / "y.tar", files | again)], space, "video_robust", options={"set": "ytbb"})
