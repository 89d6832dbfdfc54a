"""Label spaces as files: class names, and which logits of the base space each class pools.

Lists that a dependency ships are taken from it: OpenAI's 1000 class names from open_clip, WordNet ids and the two
200-class subsets of ImageNet-A and -R from timm.
"""

import importlib.resources
from pathlib import Path
from typing import Any

from clip_robustness.core import io


def write_label_space(name: str, space: dict[str, Any], base: Path | None, out: Path) -> None:
    """Write a label space as JSON: name, base, classes, members (base indices per class), pool, wnids.

    `space` is the entry of datasets.yaml, `base` the file of its base space. Without a base the space is its own.
    `classes` lists names, or says which dependency does, or maps a name to the base classes whose probabilities
    it averages ("8, 10-16").
    """
    if base is None:
        classes, wnids = _base_classes(space["classes"])
        members = [[i] for i in range(len(classes))]
        pool = "max"
    else:
        parent = io.read_json(base)
        classes, members, pool = _subset(name, space, parent)
        wnids = [parent["wnids"][m[0]] for m in members] if parent["wnids"] and pool == "max" else []
    io.write_json(
        out,
        {
            "name": name,
            "base": space.get("base"),
            "classes": classes,
            "members": members,
            "pool": pool,
            "wnids": wnids,
        },
    )


def _base_classes(classes: Any) -> tuple[list[str], list[str]]:
    if isinstance(classes, list):
        return classes, []
    if classes == "open_clip:imagenet":
        from open_clip import IMAGENET_CLASSNAMES

        return list(IMAGENET_CLASSNAMES), _timm_list("imagenet_synsets.txt")
    raise io.InputError(f"label space: '{classes}' needs a base space")


def _subset(name: str, space: dict[str, Any], parent: dict[str, Any]) -> tuple[list[str], list[list[int]], str]:
    classes = space["classes"]
    if isinstance(classes, list):
        unknown = [c for c in classes if c not in parent["classes"]]
        if unknown:
            raise io.InputError(f"label space '{name}': {unknown} are no classes of '{parent['name']}'")
        return classes, [[parent["classes"].index(c)] for c in classes], "max"
    if isinstance(classes, dict):
        return list(classes), [_numbers(text) for text in classes.values()], "mean_probability"
    chosen = [parent["wnids"].index(wnid) for wnid in _timm_list(f"{classes.removeprefix('timm:')}_synsets.txt")]
    return [parent["classes"][i] for i in chosen], [[i] for i in chosen], "max"


def _numbers(text: str) -> list[int]:
    """'8, 10-12' -> [8, 10, 11, 12]."""
    ends = [[int(end) for end in part.split("-")] for part in text.split(",")]
    return [i for first, *last in ends for i in range(first, (last or [first])[0] + 1)]


def _timm_list(name: str) -> list[str]:
    text = importlib.resources.files("timm").joinpath("data", "_info", name).read_text(encoding="utf-8")
    return text.split()
