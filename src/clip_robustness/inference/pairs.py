"""Which images of a data set are matched with which: Probe3D's choice of pairs of NAVI, ScanNet-1500 and SPair-71k."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from clip_robustness.core.io import InputError
from clip_robustness.inference.views import object_pose, turn_between

AGAIN = "index the data set again"
EVERY = 4  # of NAVI's images one has a pair
WIDEST = 120.0  # degrees between two views of an object
PER_CLASS = 200  # pairs of keypoints, in all and with each viewpoint variation


class Pair(NamedTuple):
    number: int
    rows: tuple[int, int]  # of the index
    cluster: str  # the object, scene or category that it shares with other pairs
    viewpoint: float  # degrees, or SPair's class of variation
    overall: bool = True  # False: only counts with its viewpoint
    keypoints: Mapping[str, Any] | None = None


def pairs_of(what: str, columns: Mapping[str, np.ndarray], seed: int, where: str) -> list[Pair]:
    """The pairs of an index of `objects`, `scenes` or `keypoints`.

    Errors: `InputError` for a column, or an image of a pair, that the index lacks, and when there is no pair.
    """
    listed = {"objects": object_pairs, "scenes": scene_pairs, "keypoints": keypoint_pairs}[what]
    needed = {
        "objects": ("object", "scene", "camera", "image_size", "depth_archive"),
        "scenes": ("scene", "pose", "intrinsics", "pairs", "depth_archive"),
        "keypoints": ("category", "pairs"),
    }[what]
    if missing := [name for name in needed if name not in columns]:
        raise InputError(f"{where}: the column '{missing[0]}' is missing; {AGAIN}")
    pairs = listed(columns, seed)
    if not pairs:
        raise InputError(f"{where}: there is no pair of images in it; {AGAIN}")
    return pairs


def object_pairs(columns: Mapping[str, np.ndarray], seed: int) -> list[Pair]:
    """Every fourth image, by object, scene and id, with a partner of its scene within WIDEST degrees, drawn by `seed`.

    An image without such a partner has no pair. Numbers are positions among all that have one.
    """
    poses = np.stack([object_pose(json.loads(text)) for text in columns["camera"]])
    keys = list(zip(columns["object"], columns["scene"], columns["image_id"], strict=True))
    groups: dict[tuple[str, str], list[int]] = {}
    for row in sorted(range(len(keys)), key=keys.__getitem__):
        groups.setdefault(keys[row][:2], []).append(row)
    rng = np.random.default_rng(seed)
    found: list[Pair] = []
    for (thing, _), rows in groups.items():
        for row in rows:
            turns = turn_between(poses[row], poses[rows])
            near = np.flatnonzero((turns > 0) & (turns <= WIDEST) & (np.array(rows) != row))
            if len(near):
                chosen = int(rng.choice(near))
                found.append(Pair(len(found), (row, rows[chosen]), str(thing), float(turns[chosen])))
    return found[::EVERY]


def scene_pairs(columns: Mapping[str, np.ndarray], seed: int) -> list[Pair]:
    """The pairs that the index lists, by number."""
    poses = np.stack([np.array(json.loads(text), float) for text in columns["pose"]])
    row_of = {image_id: row for row, image_id in enumerate(columns["image_id"])}
    found = []
    for row, text in enumerate(columns["pairs"]):
        for number, name in json.loads(text):
            other = _row(row_of, name, number)
            turn = float(turn_between(poses[row], poses[other]))
            found.append(Pair(int(number), (row, other), str(columns["scene"][row]), turn))
    return sorted(found, key=lambda pair: pair.number)


def keypoint_pairs(columns: Mapping[str, np.ndarray], seed: int) -> list[Pair]:
    """PER_CLASS pairs of each category, and as many of each of its viewpoint variations, drawn by `seed`.

    The order of a category's pairs is drawn once, so what is drawn in all is among what is drawn by variation.
    """
    row_of = {image_id: row for row, image_id in enumerate(columns["image_id"])}
    by_class: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}
    for row, text in enumerate(columns["pairs"]):
        listed = by_class.setdefault(str(columns["category"][row]), [])
        listed += [(pair["number"], row, pair) for pair in json.loads(text)]
    rng, found = np.random.default_rng(seed), []
    for category in sorted(by_class):
        listed = sorted(by_class[category], key=lambda entry: entry[0])
        drawn: dict[int, int] = {}
        for position, k in enumerate(rng.permutation(len(listed))):
            number, row, pair = listed[k]
            variation = pair["viewpoint_variation"]
            drawn[variation] = drawn.get(variation, 0) + 1
            if drawn[variation] <= PER_CLASS:
                rows = (row, _row(row_of, pair["target"], number))
                found.append(Pair(number, rows, category, variation, position < PER_CLASS, pair))
    return sorted(found, key=lambda pair: (pair.cluster, pair.rows, pair.number))


def _row(row_of: Mapping[str, int], name: str, number: int) -> int:
    if name not in row_of:
        raise InputError(f"pair {number}: there is no image '{name}' in the index; {AGAIN}")
    return row_of[name]
