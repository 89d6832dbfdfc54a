"""ImageNet-Vid-Robust and YTBB-Robust (Shankar et al. 2021): video frames, in sets of an anchor and its neighbours.

Layout of imagenet_vid_ytbb_robust.tar.gz, which holds both: ``imagenet-vid-robust/val/ILSVRC2015_val_00000000/*.JPEG``
with ``imagenet-vid-robust/metadata/labels.json`` and ``pmsets.json``; ``ytbb-robust/ytbb_videos/VIDEO_MS/frame-*.jpg``.
The reviews of the latter (anchor_labels.json, pmk_labels.json, ytbb_robustness_test_anchors_full.csv) come with the
repositories that define the metric (mlfoundations/wise-ft, src/datasets/ytbb-robust_metadata): a second source.

Option `set`: ``vid`` or ``ytbb``. Each frame belongs to one set, so an image has three attributes: `anchor` (the id of
its set's anchor), `distance` in frames (-10..10, 0 = the anchor) and `labels`, the names of all its right classes
joined by '|', because a frame may show several. pm-k accuracy counts a set as right when its anchor and all frames
with |distance| <= k are answered by one of their `labels`; pm-0 by the anchor alone.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, find, label_of, parse_csv, parse_json
from clip_robustness.data.members import images, read
from clip_robustness.data.rows import Member, Row

# A reviewed neighbour must be called similar and none of these; an anchor called bad in any review is dropped.
PROBLEMS = {
    "dissimilar",
    "problematic",
    "incorrect",
    "dont know",
    "deformation",
    "background-change",
    "occlusion-increased",
    "blur-increase",
    "bad-anchor",
}
LARGEST_DISTANCE = 10
ANCHORS = "ytbb_robustness_test_anchors_full.csv"
NUMBER = re.compile(r"(\d+)\.\w+$")


class Frame(NamedTuple):
    key: str
    anchor: str
    labels: tuple[str, ...]


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Label = the first of the frame's classes that the space has, in its order; -1 if none (the frame still counts).

    The id is ``ILSVRC2015_val_00000000/000432.JPEG`` or ``VIDEO_MS/frame-1117.jpg``.
    Errors: `InputError` for missing or damaged lists, a class that is not in the space, and a frame of the lists that
    is not among the images.
    """
    readers = {"vid": _vid_frames, "ytbb": _ytbb_frames}
    if options.get("set") not in readers:
        raise InputError(f"{where}: option 'set' is {options.get('set')!r}, expected {' or '.join(readers)}")
    frames = readers[options["set"]](members, space, where)
    positions = {name: label for label, name in enumerate(space["classes"])}
    pictures = {"/".join(member.name.split("/")[-2:]): member for member in images(members)}
    rows = []
    for frame in frames:
        if frame.key not in pictures:
            missing = sum(frame.key not in pictures for frame in frames)
            raise InputError(f"{where}: {missing} of {len(frames)} frames are missing, such as '{frame.key}'; {AGAIN}")
        label = min((positions[name] for name in frame.labels if name in positions), default=-1)
        distance = _number(frame.key, where) - _number(frame.anchor, where)
        attributes = {"anchor": frame.anchor, "distance": distance, "labels": "|".join(frame.labels)}
        rows.append(Row(frame.key, pictures[frame.key], label, attributes))
    return rows


def _vid_frames(members: Sequence[Member], space: Mapping[str, Any], where: str) -> list[Frame]:
    """pmsets.json: anchor to neighbours; labels.json: frame to positions among the 30 classes, for every frame."""
    sets_at, labels_at = (_list(members, name, "vid", where) for name in ("pmsets.json", "labels.json"))
    sets, labels = _mapping(sets_at, str), _mapping(labels_at, int)
    frames = []
    for anchor, neighbours in sets.items():
        for key in (anchor, *neighbours):
            wrong = [i for i in labels.get(key, ["no label"]) if i not in range(len(space["classes"]))]
            if wrong:
                known = f"0..{len(space['classes']) - 1}"
                raise InputError(f"{label_of(labels_at)}: '{key}' has {wrong[0]!r}, expected some of {known}; {AGAIN}")
            names = tuple(space["classes"][i] for i in sorted(set(labels[key])))
            frames.append(Frame(_two(key), _two(anchor), names))
    return frames


def _ytbb_frames(members: Sequence[Member], space: Mapping[str, Any], where: str) -> list[Frame]:
    """Anchors that the review calls good, with their first labels and those that the review added."""
    reviews = _reviews(_list(members, "anchor_labels.json", "ytbb", where))
    pairs = _reviews(_list(members, "pmk_labels.json", "ytbb", where))
    columns = space.get("columns")
    if not columns:
        known = f"the label space '{space.get('name', '?')}' does not number the set's 24 classes"
        raise InputError(f"{where}: {known}; set 'labels' to a space of map:ytbb_robust_19")
    first = _first_labels(_list(members, ANCHORS, "ytbb", where), columns)
    bad = {_two(pair.partition(",")[0]) for pair, words in pairs.items() if "bad-anchor" in words}
    neighbours: dict[str, list[str]] = {}
    for pair, words in pairs.items():
        if "similar" in words and not words & PROBLEMS:
            anchor, _, key = pair.partition(",")
            neighbours.setdefault(_two(anchor), []).append(_two(key))
    frames: list[Frame] = []
    for path, words in reviews.items():
        anchor = _two(path)
        if "good" not in words or words & {"bad", "unsure"} or anchor in bad:
            continue
        video = anchor.partition("/")[0]
        if video not in first:
            raise InputError(f"{where}: the anchor '{anchor}' has no label in the list of anchors; {AGAIN}")
        names = tuple(name for name in columns if name == first[video] or name in words)
        near = [key for key in neighbours.get(anchor, ()) if _near(key, anchor, where)]
        frames.extend(Frame(key, anchor, names) for key in (anchor, *near))
    return frames


def _list(members: Sequence[Member], name: str, part: str, where: str) -> Member:
    """The list of that name. The archive holds two sets, and a second source may repeat a list: equal ones are one."""
    found = [member for member in members if f"/{member.name}".endswith(f"/{name}")]
    own = [member for member in found if part in member.name.rpartition("/")[0]] or found
    return own[0] if len({read(member) for member in own}) == 1 else find(own, name, where)


def _reviews(member: Member) -> dict[str, set[str]]:
    """What reviewers said of each key, in words; the last review of a key counts."""
    document = parse_json(member)
    try:
        names = [str(name) for name in document["labels"]]
        return {str(entry["key"]): {names[i] for i in entry["labels"]} for entry in document["annotations"]}
    except (TypeError, KeyError, IndexError) as error:
        raise InputError(f"{label_of(member)}: no list of reviews ({error!r}); {AGAIN}") from None


def _first_labels(member: Member, classes: Sequence[str]) -> dict[str, str]:
    """``VIDEO_MS`` to class. This list has the numbers of the last two classes, none and car, the other way round."""
    columns = [*classes[:-2], classes[-1], classes[-2]]
    labels = {}
    for number, row in enumerate(parse_csv(member, ("ytid", "time_ms", "label")), 2):
        try:
            labels[f"{row['ytid']}_{row['time_ms']}"] = columns[int(row["label"])]
        except (KeyError, TypeError, ValueError, IndexError) as error:
            expected = f"expected ytid,time_ms,label with a label in 0..{len(columns) - 1}"
            raise InputError(f"{label_of(member)}, line {number}: {expected} ({error!r}); {AGAIN}") from None
    return labels


def _mapping(member: Member, kind: type) -> dict[str, list[Any]]:
    value = parse_json(member)
    whole = isinstance(value, dict) and all(isinstance(entry, list) for entry in value.values())
    if not whole or not all(isinstance(item, kind) for entry in value.values() for item in entry):
        what = {str: "frames' names", int: "whole numbers"}[kind]
        raise InputError(f"{label_of(member)}: expected a list of {what} for each frame; {AGAIN}")
    return value


def _near(key: str, anchor: str, where: str) -> bool:
    """Of the anchor's own folder, and at most ten frames away."""
    same = key.partition("/")[0] == anchor.partition("/")[0]
    return same and 0 < abs(_number(key, where) - _number(anchor, where)) <= LARGEST_DISTANCE


def _number(key: str, where: str) -> int:
    match = NUMBER.search(key)
    if not match:
        raise InputError(f"{where}: the frame '{key}' has no number; {AGAIN}")
    return int(match[1])


def _two(path: str) -> str:
    """The last two parts: the video's folder and the frame."""
    return "/".join(path.strip().split("/")[-2:])
