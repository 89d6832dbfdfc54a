"""Label spaces as files: class names, and which logits of the base space each class pools.

Lists that a dependency ships are taken from it: OpenAI's 1000 class names from open_clip, WordNet ids and the two
200-class subsets of ImageNet-A and -R from timm. Maps that none ships are facts in config/label_maps.json.
"""

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_robustness.core import io

MAPS = Path(__file__).resolve().parents[3] / "config" / "label_maps.json"
MOST_MEMBERS = 100_000  # of one range: enough for a check to find those that no base space has
# What an unmapped class of the set counts as: it can never win, or it wins over negative logits.
FILLS = {"-inf": None, "0": 0.0}


def write_label_space(name: str, space: Mapping[str, Any], base: Path | None, out: Path, *, maps: Path = MAPS) -> None:
    """Write a label space as JSON: name, base, classes, members (base indices per class), pool, wnids.

    `space` is the entry of datasets.yaml, `base` the file of its base space. Without a base the space is its own.
    `classes` is

    * a list of names: classes of the base space, or of a space of its own;
    * ``open_clip:imagenet``, ``timm:imagenet_a``, ``timm:imagenet_r``: a list that the dependency ships;
    * ``map:NAME``: a map of `maps`; each class is the largest of its base classes' logits;
    * names to base classes ("8, 10-16") whose probabilities are averaged.

    A map may add `folders` (the folder of each class in the data set) and, where the data set has classes without
    a base class, `unmapped` (their names) and `fill`, their logit: null for minus infinity (they are never
    answered), or 0.0, which the released code of YTBB-Robust had by mistake (entry ``fill: 0``).
    Errors: `InputError` for an unknown list, map or class, or an index that the base space does not have.
    """
    classes, pool = space["classes"], "max"
    wnids: list[Any]
    more: dict[str, Any] = {}
    if base is None:
        classes, wnids = _base_classes(name, classes)
        members = [[i] for i in range(len(classes))]
    else:
        parent = io.read_json(base)
        if isinstance(classes, str) and classes.startswith("map:"):
            classes, members, more = _mapped(name, space, maps)
            wnids = [[parent["wnids"][i] for i in member if i < len(parent["wnids"])] for member in members]
        else:
            classes, members, pool = _subset(name, classes, parent)
            wnids = [parent["wnids"][m[0]] for m in members] if parent["wnids"] and pool == "max" else []
        _check(name, classes, members, parent)
    facts = {"name": name, "base": space.get("base"), "classes": classes, "members": members, "pool": pool}
    io.write_json(out, {**facts, "wnids": wnids, **more})


def _base_classes(name: str, classes: Any) -> tuple[list[str], list[str]]:
    if isinstance(classes, list):
        return classes, []
    if classes == "open_clip:imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES), _timm_list("imagenet_synsets.txt")
    raise io.InputError(f"label space '{name}': '{classes}' needs a base space")


def _subset(name: str, classes: Any, parent: Mapping[str, Any]) -> tuple[list[str], list[list[int]], str]:
    if isinstance(classes, list):
        unknown = [c for c in classes if c not in parent["classes"]]
        if unknown:
            raise io.InputError(f"label space '{name}': {unknown} are no classes of '{parent['name']}'")
        return classes, [[parent["classes"].index(c)] for c in classes], "max"
    if isinstance(classes, dict):
        return list(classes), [_numbers(text) for text in classes.values()], "mean_probability"
    if classes not in ("timm:imagenet_a", "timm:imagenet_r"):
        raise io.InputError(f"label space '{name}': no list '{classes}'; expected timm:imagenet_a, timm:imagenet_r")
    wnids = _timm_list(f"{classes.removeprefix('timm:')}_synsets.txt")
    chosen = [parent["wnids"].index(wnid) for wnid in wnids]
    return [parent["classes"][i] for i in chosen], [[i] for i in chosen], "max"


def _mapped(name: str, space: Mapping[str, Any], maps: Path) -> tuple[list[str], list[list[int]], dict[str, Any]]:
    known, wanted = io.read_json(maps), space["classes"].removeprefix("map:")
    if wanted not in known:
        raise io.InputError(f"label space '{name}': no map '{wanted}' in {maps}; expected {', '.join(known)}")
    entry = known[wanted]
    more: dict[str, Any] = {}
    classes = list(entry["classes"])
    if "folders" in entry:
        more["folders"] = [entry["folders"].get(c) or _folder(c) for c in classes]
    if "columns" in entry:
        fill = str(space.get("fill", "-inf"))
        if fill not in FILLS:
            raise io.InputError(f"label space '{name}': fill is {fill}, expected {' or '.join(FILLS)}")
        more["unmapped"] = [column for column in entry["columns"] if column not in entry["classes"]]
        more["columns"] = entry["columns"]
        more["fill"] = FILLS[fill]
    elif "fill" in space:
        raise io.InputError(f"label space '{name}': 'fill' is for a map with unmapped classes; leave it out")
    return classes, [_numbers(text) for text in entry["classes"].values()], more


def _check(name: str, classes: Sequence[str], members: Sequence[Sequence[int]], parent: Mapping[str, Any]) -> None:
    for known, indices in zip(classes, members, strict=True):
        if wrong := [i for i in indices if i >= len(parent["classes"])]:
            where = f"0..{len(parent['classes']) - 1} of '{parent['name']}'"
            raise io.InputError(f"label space '{name}', class '{known}': {wrong} not in {where}")


def _folder(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def _numbers(text: str) -> list[int]:
    """'8, 10-12' -> [8, 10, 11, 12]."""
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return [i for first, *last in ends for i in range(first, min((last or [first])[0], first + MOST_MEMBERS) + 1)]


def _timm_list(name: str) -> list[str]:
    text = importlib.resources.files("timm").joinpath("data", "_info", name).read_text(encoding="utf-8")
    return text.split()
