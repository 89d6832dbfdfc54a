"""ImageNet-D (Zhang et al. 2024): diffusion images of 113 objects on odd backgrounds, of odd textures and materials.

Layout, by chenshuang-zhang/imagenet_d: ``ImageNet-D/background/alarm_clock/*.png``, the same of ``texture`` and
``material``, and ``questions/background.csv`` and so on: tables with tabs and the columns image_dir, gt_category,
top1_pred_cate and top2_pred_cate, the two likeliest classes by a CLIP. The 113 folder names and their order are
those of its preprocessing/imgnet_d_dir2imgnet_d_id.txt, the names in alphabetical order.

Option `variation`: background, texture or material, to keep only one of the three.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, class_and_file, images_below, label_of, parse_csv
from clip_robustness.data.rows import Member, Row

VARIATIONS = ("background", "texture", "material")
COLUMNS = ("image_dir", "gt_category", "top1_pred_cate", "top2_pred_cate")


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Label = the class that the folder names; id ``background/alarm_clock/FILE.png``.

    Attributes: `variation`, and `distractor`: the wrong class that the release's two-way question offers
    (the likeliest by CLIP that is not the true one), "" when the questions are not there.
    """
    only = options.get("variation")
    if only is not None and only not in VARIATIONS:
        raise InputError(f"{where}: no variation '{only}'; set the option to one of {', '.join(VARIATIONS)}")
    positions = {folder_name(name): position for position, name in enumerate(space["classes"])}
    rows = []
    for variation in VARIATIONS:
        if only not in (None, variation):
            continue
        inside = [member for member in members if variation in member.name.split("/")[:-2]]
        if not inside:
            raise InputError(f"{where}: no folder '{variation}' with one folder a class; {AGAIN}")
        distractors = _distractors(members, variation)
        for path, member in images_below(inside, variation, where, depth=2):
            folder, _ = class_and_file(path, member, f"{variation}/CLASS/FILE.png")
            if folder not in positions:
                known = f"a class of the label space '{space.get('name', '?')}'"
                raise InputError(f"{label_of(member)}: '{folder}' is not {known}; correct 'labels' of the data set")
            image_id = f"{variation}/{path}"
            attributes = {"variation": variation, "distractor": distractors.get(image_id, "")}
            rows.append(Row(image_id, member, positions[folder], attributes))
    return rows


def folder_name(name: str) -> str:
    """The folder of a class name: "binder (closed)" lies in ``binder_closed``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower().replace("/", " or ")).strip("_")


def _distractors(members: Sequence[Member], variation: str) -> dict[str, str]:
    """By image id: the first of the two predicted classes that is not the true one."""
    found = [member for member in members if f"/{member.name}".endswith(f"/questions/{variation}.csv")]
    if not found:
        return {}
    wrong = {}
    for row in parse_csv(found[0], COLUMNS, delimiter="\t"):
        first, second = row["top1_pred_cate"], row["top2_pred_cate"]
        wrong[row["image_dir"]] = second if first == row["gt_category"] else first
    return wrong
