"""NAVI (Jampani et al. 2023): photographs of 36 scanned objects with exact camera poses and depth.

Layout of navi_v1.0.tar.gz and navi_v1.5.tar.gz, by the readme of google/navi: ``OBJECT/SCENE/`` has
``images/000.jpg``, ``depth/000.png``, ``masks/000.png`` and ``annotations.json``, a list with one entry an image.
A scene is ``wild_set``, ``multiview-00-CAMERA`` or ``video-00-CAMERA-ID``; ``OBJECT/3d_scan`` has no photograph.

Facts that a reader of the rows needs, all of google/navi: `q` (w, x, y, z) and `t` (millimetres) make the
matrix from object to camera coordinates, rotation first; `focal_length` is in pixels and the principal point is
the centre; `image_size` is (height, width) **after** the EXIF rotation, which many photographs need; a depth map
is a 16-bit PNG of inverse depth: depth in millimetres = 655350 / value, and 0 stands for no surface.

Option `collection`: ``wild_set`` (the default, the test set of Probe3D), ``multiview``, ``video`` or ``all``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, compact, label_of, numbers, parse_json, place, require
from clip_robustness.data.rows import Member, Row

COLLECTIONS = ("wild_set", "multiview", "video", "all")
NUMBER = (int, float)


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """One row an annotated image, label -1, id ``OBJECT/SCENE/000.jpg``.

    Attributes: `object`, `scene`, `split` (train or val), `camera` (JSON: q, t, focal_length), `image_size`
    (JSON: height, width), `occluded` (0 or 1), and where depth and mask lie (`depth_archive`, `depth_offset`,
    `depth_size`, `depth_codec`, and the same of `mask`).
    """
    collection = options.get("collection", "wild_set")
    if collection not in COLLECTIONS:
        raise InputError(f"{where}: no collection '{collection}'; set it to one of {', '.join(COLLECTIONS)}")
    by_name = {member.name: member for member in members}
    rows = []
    for member in members:
        *_, thing, scene, file = ("", "", *member.name.split("/"))
        if file == "annotations.json" and (collection == "all" or scene.split("-")[0] == collection):
            rows += _rows(member, thing, scene, by_name)
    if not rows:
        layout = f"no OBJECT/SCENE/annotations.json of the collection '{collection}' that names an image"
        raise InputError(f"{where}: {layout}; {AGAIN}")
    return rows


def _rows(source: Member, thing: str, scene: str, by_name: Mapping[str, Member]) -> list[Row]:
    folder = source.name.rpartition("/")[0]
    entries = parse_json(source)
    if not isinstance(entries, list):
        raise InputError(f"{label_of(source)}: expected a list with one entry an image; {AGAIN}")
    rows = []
    for number, entry in enumerate(entries):
        where = f"{label_of(source)}, entry {number}"
        require(entry, {"filename": str, "camera": dict, "image_size": list, "split": str}, where)
        require(entry["camera"], {"focal_length": NUMBER}, f"{where}, camera")
        camera = {
            "q": numbers(entry["camera"].get("q"), 4, f"{where}, camera q"),
            "t": numbers(entry["camera"].get("t"), 3, f"{where}, camera t"),
            "focal_length": entry["camera"]["focal_length"],
        }
        file, stem = entry["filename"], entry["filename"].rpartition(".")[0]
        image, depth, mask = (
            _part(by_name, f"{folder}/{part}", where)
            for part in (f"images/{file}", f"depth/{stem}.png", f"masks/{stem}.png")
        )
        attributes = {
            "object": thing,
            "scene": scene,
            "split": entry["split"],
            "camera": compact(camera),
            "image_size": compact(numbers(entry["image_size"], 2, f"{where}, image_size")),
            "occluded": int(bool(entry.get("occluded"))),
            **place("depth", depth),
            **place("mask", mask),
        }
        rows.append(Row(f"{thing}/{scene}/{file}", image, -1, attributes))
    return rows


def _part(by_name: Mapping[str, Member], name: str, where: str) -> Member:
    if name not in by_name:
        raise InputError(f"{where}: there is no file '{name}'; {AGAIN}")
    return by_name[name]
