"""The visual factors of a mini data set: what no annotator needs to say, because the world knows it.

An image has a factor when what the factor is about lies outside the habits of a training world. How far, its
deviation, is 0 at the edge of the habit and 1 at the most extreme that any world draws; a kind, colour, texture or
style that the habit does not know deviates by 1. Factors have ImageNet-X's names where the meaning is the same:

    pose                yaw, elevation, roll or place in the image
    background          kind or main colour
    color               main colour of the solid, where the style shows it
    texture             not the class's own, where the habit ties the two (rho > 0) and the style shows one
    shape               proportions: stretch
    smaller, larger     scale
    darker, brighter    brightness
    light               direction that the light comes from
    object_blocking     an opaque bar before the solid
    multiple_objects    a twin beside it
    style               drawn otherwise than the habit knows

The top factor is the one in which the image is most surprising among the images of its data set: the one with the
smallest share of images that deviate in it at least as much (ties: the first in the order above). Deviations of
different factors have no common unit, shares have. A prototype deviates in nothing.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.mini import world as worlds

# Columns are float32: a value at the edge of a habit may be rounded beyond it.
_ROUNDING = 1e-5
# Training worlds never roll: within this many degrees nobody would call an image rolled.
_UPRIGHT = 5.0


def write_mini_factors(index: Path, world: Mapping[str, Any], out: Path) -> int:
    """Write the factor table of the images in `index`, measured by the habits of the training `world`.

    The table has a row an image, in the index's order: image_id, label, top_factor ("" for a prototype), prototype
    (bool) and one bool column a factor. Returns its number of rows. Errors: `InputError` for a world that does not
    hold, and for an index that is not of a rendered world.
    """
    habits = worlds.check_world(world)
    scenes = io.read_parquet(index)
    lacking = [name for name in ("image_id", "label", *worlds.FACTORS) if name not in scenes]
    if lacking:
        raise InputError(f"{index}: no column '{lacking[0]}'; factors are known for rendered data sets only")
    deviation = deviations(scenes, habits)
    columns: dict[str, Any] = {"image_id": scenes["image_id"], "label": scenes["label"].astype(np.int32)}
    columns["top_factor"] = top_factors(deviation)
    columns["prototype"] = columns["top_factor"] == ""
    io.write_parquet(out, columns | {factor: values > 0 for factor, values in deviation.items()})
    return len(scenes["label"])


def deviations(scenes: Mapping[str, np.ndarray], habits: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Factor -> how far each image lies outside the habits [n], 0 inside. `habits`: a whole world."""

    def outside(name: str, side: int = 0, slack: float = _ROUNDING) -> np.ndarray:
        return _outside(scenes[name], name, habits, side, slack)

    kinds, back_colours = worlds.BACKGROUNDS[habits["background"]]
    shows_colour = scenes["style"] != "sketch"
    shows_texture = (scenes["texture"] != worlds.NO_TEXTURE) & (habits["rho"] > 0)
    # A sketch's background is white paper, a rendition's plain: the style's doing, not the background's.
    usual_back = np.isin(scenes["background"], [*kinds, "plain"])
    usual_back &= np.isin(scenes["background_colour"], back_colours) | (scenes["style"] == "sketch")
    flags = {
        "background": ~usual_back,
        "color": shows_colour & ~np.isin(scenes["colour"], worlds.PALETTES[habits["colours"]]),
        "texture": shows_texture & (scenes["texture_class"] != scenes["label"]),
        "object_blocking": scenes["occlusion"] > 0,
        "multiple_objects": scenes["objects"] > 1,
        "style": ~np.isin(scenes["style"], list(worlds.STYLES[habits["style"]])),
    }
    flag = {name: values.astype(float) for name, values in flags.items()}
    places = [outside("yaw"), outside("elevation"), outside("roll", slack=_UPRIGHT), outside("x"), outside("y")]
    return {
        "pose": np.max(places, axis=0),
        "background": flag["background"],
        "color": flag["color"],
        "texture": flag["texture"],
        "shape": outside("stretch"),
        "smaller": outside("scale", -1),
        "larger": outside("scale", +1),
        "darker": outside("brightness", -1),
        "brighter": outside("brightness", +1),
        "light": np.maximum(outside("light_azimuth"), outside("light_elevation")),
        "object_blocking": flag["object_blocking"],
        "multiple_objects": flag["multiple_objects"],
        "style": flag["style"],
    }


def top_factors(deviation: Mapping[str, np.ndarray]) -> np.ndarray:
    """The most surprising factor of each image [n] of str, "" where nothing deviates: see the module."""
    names, values = np.array(list(deviation), dtype=object), np.array(list(deviation.values()))
    n = values.shape[1]
    # Share of the images that deviate at least as much, from the position among the sorted deviations.
    share = np.array([(n - np.searchsorted(np.sort(row), row)) / n for row in values])
    share[values == 0] = np.inf
    return np.where(np.isfinite(share.min(axis=0)), names[share.argmin(axis=0)], "")


def _outside(values: np.ndarray, name: str, habits: Mapping[str, Any], side: int, slack: float) -> np.ndarray:
    """Distance beyond the habit's range, as a share of the way to the widest range; side -1: below, +1: above."""
    key, table = ("light", worlds.LIGHTS) if name in worlds.LIGHTS["usual"] else ("pose", worlds.POSES)
    low, high = table[habits[key]][name]
    low, high = low - slack, high + slack
    lowest, highest = min(ranges[name][0] for ranges in table.values()), max(r[name][1] for r in table.values())
    # Where the habit is itself the widest, nothing lies beyond it.
    below = np.maximum(low - values, 0) / max(low - lowest, _ROUNDING)
    above = np.maximum(values - high, 0) / max(highest - high, _ROUNDING)
    return {-1: below, 0: np.maximum(below, above), 1: above}[side]
