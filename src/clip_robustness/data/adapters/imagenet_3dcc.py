"""ImageNet-3DCC (Kar et al. 2022): the validation images under 12 corruptions that know depth, 5 severities each.

Layout of near_focus.tar.gz and so on, one archive a corruption: ``near_focus/1/n01440764/*.JPEG``, 224 x 224 pixels.
Options as of `imagenet_c`. The first six need the scene's geometry; the others are noise and video.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.data.adapters.imagenet_c import corrupted
from clip_robustness.data.rows import Member, Row

GEOMETRIC = ("near_focus", "far_focus", "xy_motion_blur", "z_motion_blur", "flash", "fog_3d")
OTHERS = ("color_quant", "low_light", "iso_noise", "bit_error", "h265_abr", "h265_crf")


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Label = the class of the folder; attributes `corruption` and `severity`. Errors: as of `corrupted`."""
    archives = {corruption: f"{corruption}.tar.gz" for corruption in (*GEOMETRIC, *OTHERS)}
    return corrupted(members, space, where, options, archives)
