"""ImageNet-C (Hendrycks and Dietterich 2019): the validation images under 15 + 4 corruptions, 5 severities each.

Layout of noise.tar, blur.tar, weather.tar, digital.tar and extra.tar:
``gaussian_noise/1/n01440764/ILSVRC2012_val_00000293.JPEG``, 224 x 224 pixels. Folders above do not matter.

Options: `corruptions` and `severities`, lists of what to keep (default: all that the sources hold).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from clip_robustness.core.io import InputError
from clip_robustness.data.adapters._files import AGAIN, label_of
from clip_robustness.data.adapters.class_folders import folder_label, folder_labels
from clip_robustness.data.members import images
from clip_robustness.data.rows import Member, Row

ARCHIVES = {
    "noise.tar": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur.tar": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather.tar": ("snow", "frost", "fog", "brightness"),
    "digital.tar": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra.tar": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
SEVERITIES = (1, 2, 3, 4, 5)


def adapt(members: Sequence[Member], space: Mapping[str, Any], where: str, options: Mapping[str, Any]) -> list[Row]:
    """Label = the class of the folder; attributes `corruption` and `severity`.

    The id is ``gaussian_noise/1/ILSVRC2012_val_00000293``. Errors: as of `corrupted`.
    """
    archives = {corruption: archive for archive, names in ARCHIVES.items() for corruption in names}
    return corrupted(members, space, where, options, archives)


def corrupted(
    members: Sequence[Member],
    space: Mapping[str, Any],
    where: str,
    options: Mapping[str, Any],
    archives: Mapping[str, str],
) -> list[Row]:
    """Rows of images ``{corruption}/{severity}/{class}/{file}``; `archives` says which one holds a corruption.

    Errors: `InputError` for another layout, an unknown corruption, severity or class, and for one that the options
    ask for and the sources do not hold.
    """
    corruptions = _choice(options, "corruptions", tuple(archives), where)
    severities = _choice(options, "severities", SEVERITIES, where)
    labels = folder_labels(space)
    levels = {str(severity): severity for severity in SEVERITIES}
    seen: dict[tuple[str, int], dict[str, Any]] = {}
    rows = []
    for member in images(members):
        corruption, level, folder, file = ("", "", "", *member.name.split("/"))[-4:]
        if corruption not in archives or level not in levels:
            expected = f"{next(iter(archives))}/1/n01440764/ILSVRC2012_val_00000293.JPEG"
            raise InputError(f"{label_of(member)}: expected a name such as {expected}; {AGAIN}")
        if corruption in corruptions and levels[level] in severities:
            attributes = {"corruption": corruption, "severity": levels[level]}
            # Millions of rows share one mapping a setting.
            attributes = seen.setdefault((corruption, levels[level]), attributes)
            image_id = f"{corruption}/{level}/{file.rpartition('.')[0]}"
            rows.append(Row(image_id, member, folder_label(folder, member, labels, space, where), attributes))
    if not rows:
        raise InputError(f"{where}: holds none of the images that the options ask for; {AGAIN}")
    for corruption in corruptions if "corruptions" in options else dict.fromkeys(name for name, _ in seen):
        for severity in severities:
            if (corruption, severity) not in seen:
                source = archives[corruption]
                raise InputError(f"{where}: no image of {corruption}/{severity}; it is in {source}, {AGAIN}")
    return rows


def _choice(options: Mapping[str, Any], name: str, known: Sequence[Any], where: str) -> Sequence[Any]:
    chosen = options.get(name, known)
    if not isinstance(chosen, list | tuple) or not chosen or (wrong := [c for c in chosen if c not in known]):
        found = wrong[0] if isinstance(chosen, list | tuple) and chosen else chosen
        raise InputError(f"{where}: option '{name}': {found!r}; expected some of {', '.join(map(str, known))}")
    return chosen
