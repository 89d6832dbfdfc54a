"""SPair-71k (Min et al. 2019): pairs of images of one class with annotated keypoints, for correspondence.

Layout of SPair-71k.tar.gz, by its public readers (Probe3D's among them): below ``SPair-71k/`` are
``JPEGImages/aeroplane/2008_000585.jpg``, ``Segmentation/aeroplane/2008_000585.png`` and
``PairAnnotation/{trn,val,test}/000001-2008_000585-2009_005060:aeroplane.json``, a file a pair. The 1,800 images
of 18 classes are shared by 70,958 pairs, 12,234 of them in the test split.

Option `split`: trn, val or test (the default).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import (
    AGAIN,
    class_and_file,
    compact,
    images_below,
    label_of,
    numbers,
    parse_json,
    place,
    require,
)
from clip_robustness.data.rows import Member, Row

FOLDER = "JPEGImages"
SPLITS = ("trn", "val", "test")
DIFFICULTY = ("viewpoint_variation", "scale_variation", "truncation", "occlusion")


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """One row an image of JPEGImages, label -1, id ``aeroplane/2008_000585.jpg``.

    Attributes: `category`; where the segmentation lies (`mask_archive`, ...); `pairs`: a JSON list of the
    pairs of the split whose source this image is, in the order of their files. Each has `number`, `target` (an
    id) and, named as in the release, `src_kps` and `trg_kps` (x, y in pixels of the stored images, row by row
    the same keypoint), `kps_ids`, `src_bndbox` and `trg_bndbox` (left, top, right, bottom),
    `viewpoint_variation` (0 to 2), `scale_variation`, `truncation` and `occlusion`.
    """
    split = options.get("split", "test")
    if split not in SPLITS:
        raise InputError(f"{where}: no split '{split}'; set the option 'split' to one of {', '.join(SPLITS)}")
    by_tail = {"/".join(member.name.split("/")[-3:]): member for member in members}
    pictures = {}
    for path, member in images_below(members, FOLDER, where, depth=2):
        class_and_file(path, member, f"{FOLDER}/CLASS/FILE.jpg")
        pictures[path] = member
    pairs: dict[str, list[dict[str, Any]]] = {path: [] for path in pictures}
    for member in members:
        *_, parent, folder, file = ("", "", *member.name.split("/"))
        if parent == "PairAnnotation" and folder == split and file.endswith(".json") and not file.startswith("."):
            source, pair = _pair(member, pictures)
            pairs[source].append(pair)
    if not any(pairs.values()):
        raise InputError(f"{where}: no file PairAnnotation/{split}/*.json; {AGAIN}")
    rows = []
    for path, member in pictures.items():
        mask = by_tail.get(f"Segmentation/{path.rpartition('.')[0]}.png")
        if mask is None:
            raise InputError(f"{label_of(member)}: no segmentation of '{path}' in Segmentation; {AGAIN}")
        attributes = {"category": path.partition("/")[0], "pairs": compact(pairs[path]), **place("mask", mask)}
        rows.append(Row(path, member, -1, attributes))
    return rows


def _pair(source: Member, pictures: Mapping[str, Member]) -> tuple[str, dict[str, Any]]:
    """The id of a pair's source image, and what the row keeps of the pair."""
    where = label_of(source)
    lists = dict.fromkeys(("src_kps", "trg_kps", "kps_ids", "src_bndbox", "trg_bndbox"), list)
    words = dict.fromkeys(("category", "src_imname", "trg_imname"), str)
    whole = dict.fromkeys(("pair_id", *DIFFICULTY), int)
    entry = require(parse_json(source), {**lists, **words, **whole}, where)
    images = [f"{entry['category']}/{entry[name]}" for name in ("src_imname", "trg_imname")]
    for image in images:
        if image not in pictures:
            raise InputError(f"{where}: there is no image '{FOLDER}/{image}'; {AGAIN}")
    if not len(entry["src_kps"]) == len(entry["trg_kps"]) == len(entry["kps_ids"]) > 0:
        raise InputError(f"{where}: src_kps, trg_kps and kps_ids differ in length or are empty; {AGAIN}")
    for point in entry["src_kps"] + entry["trg_kps"]:
        numbers(point, 2, f"{where}, keypoint")
    for box in ("src_bndbox", "trg_bndbox"):
        numbers(entry[box], 4, f"{where}, {box}")
    kept = {name: entry[name] for name in (*lists, *DIFFICULTY)}
    return images[0], {**kept, "number": entry["pair_id"], "target": images[1]}
