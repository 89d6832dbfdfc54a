"""What the scenes of a mini data set are: factors drawn from habits, and honest captions.

A world is a small dict, one data set's entry in config/datasets.yaml. Its keys, with their defaults:

    name         the data set's name, the first part of every image id
    images       how many
    seed         of everything random
    classes      the solids in the order of the labels (all twelve)
    rho          with this probability the texture is the class's own, else any of the twelve (0)
    pairs        "conflict": every ordered pair of a solid and another solid's texture equally often ("")
    unseen       "solids": four solids that are no class, labelled -1; "solids_and_textures": with unseen textures ("")
    frames       a moving camera: sets of an anchor and so many frames before and after it; `images` counts frames (0)
    pose, background, colours, light, clutter, style    names of the habits below

A scene's factors are the columns of the index; FACTORS says what each means.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from clip_robustness.core.io import InputError
from clip_robustness.mini.video import move_camera

CLASSES = (
    *("sphere", "cube", "cone", "torus", "cylinder", "capsule"),
    *("pyramid", "octahedron", "cross", "star", "arch", "hourglass"),
)
TEXTURE_INKS = {  # texture k belongs to class k; a texture is a pattern and the colour of its ink
    "striped": "white",
    "checkered": "yellow",
    "dotted": "cyan",
    "zigzag": "lime",
    "gridded": "rose",
    "blotchy": "white",
    "banded": "peach",
    "diagonal": "rose",
    "ringed": "yellow",
    "bricked": "cyan",
    "plaid": "lime",
    "speckled": "peach",
}
TEXTURE_NAMES = tuple(TEXTURE_INKS)
UNSEEN_SOLIDS = ("bowl", "moon", "stairs", "table")  # what no model of the zoo has met
UNSEEN_INKS = {"marbled": "white", "scaly": "yellow", "woven": "lime"}
_INKS = TEXTURE_INKS | UNSEEN_INKS
NO_TEXTURE = "plain"

# Backgrounds are mostly dark, solids of middling brightness, the ink of a texture bright.
COLOURS = {
    "red": (0.80, 0.13, 0.12),
    "orange": (0.86, 0.45, 0.10),
    "green": (0.16, 0.58, 0.20),
    "teal": (0.08, 0.52, 0.54),
    "blue": (0.16, 0.32, 0.84),
    "purple": (0.55, 0.20, 0.70),
    "pink": (0.86, 0.38, 0.60),
    "white": (0.97, 0.97, 0.95),
    "yellow": (0.98, 0.92, 0.30),
    "cyan": (0.45, 0.95, 0.98),
    "lime": (0.62, 0.98, 0.42),
    "rose": (1.00, 0.66, 0.82),
    "peach": (1.00, 0.72, 0.42),
    "grey": (0.32, 0.32, 0.32),
    "brown": (0.30, 0.17, 0.08),
    "navy": (0.05, 0.08, 0.30),
    "black": (0.05, 0.05, 0.06),
}

FACTORS = {
    "shape": "name of the solid; `label` is its position among the data set's classes",
    "texture": "name of the texture, `plain` where the style shows none",
    "texture_class": "label of the class that the texture belongs to, -1 for plain or a class not in the set",
    "style": "photo, sketch, rendition or stylized",
    "colour": "name of the solid's main colour; a sketch does not show it",
    "second_colour": "name of the ink's colour, a property of the texture",
    "background": "kind: plain, gradient, blobs, tiles, stripes or textured (only behind a stylized solid)",
    "background_colour": "name of the background's main colour",
    "second_background_colour": "name of the other colour of a background that is not plain",
    "background_angle": "direction of gradient, tiles, stripes; radians",
    "background_phase": "0..1, shifts and seeds the background",
    "yaw": "turn about the solid's own axis, degrees; 0 faces the camera",
    "elevation": "of the camera above the solid, degrees",
    "roll": "turn in the image plane, degrees, anticlockwise",
    "scale": "size of the solid; 1 spans about two thirds of the image",
    "x": "position to the right of the middle, world units; the image is 3 units wide at the solid's distance",
    "y": "position above the middle, world units",
    "stretch": "height of the solid relative to its canonical height",
    "texture_scale": "frequency of the texture relative to its canonical one",
    "texture_phase": "0..1, seeds what is random in a texture",
    "light_azimuth": "degrees from the camera's axis, positive from the right",
    "light_elevation": "degrees above the camera's axis",
    "brightness": "factor on the shaded colours; 1 is canonical",
    "occlusion": "share of the image's width behind an opaque bar, 0 for none",
    "occlusion_at": "left edge of the bar, 0..1 of the free width",
    "objects": "1, or 2 where a smaller twin stands beside the solid",
}

# Ranges are uniform. Every habit is a name in the YAML, so that an entry reads like a sentence.
POSES = {
    "usual": {
        **{"yaw": (-45, 45), "elevation": (20, 40), "roll": (0, 0), "scale": (0.8, 1.1)},
        **{"x": (-0.2, 0.2), "y": (-0.2, 0.2), "stretch": (0.9, 1.1)},
    },
    "slightly_wider": {
        **{"yaw": (-55, 55), "elevation": (12, 48), "roll": (-8, 8), "scale": (0.7, 1.15)},
        **{"x": (-0.3, 0.3), "y": (-0.3, 0.3), "stretch": (0.85, 1.15)},
    },
    "unusual": {
        **{"yaw": (-80, 80), "elevation": (-5, 60), "roll": (-35, 35), "scale": (0.6, 1.2)},
        **{"x": (-0.35, 0.35), "y": (-0.35, 0.35), "stretch": (0.75, 1.3)},
    },
}
BACKGROUNDS = {
    "studio": (("plain", "gradient"), ("black", "grey", "brown", "navy")),
    "outdoor": (("plain", "gradient", "blobs"), ("grey", "navy", "brown", "green", "teal")),
    "busy": (("blobs", "tiles", "stripes", "gradient"), tuple(COLOURS)),
    "street": (("blobs", "tiles", "stripes", "gradient"), ("grey", "navy", "brown", "green", "teal", "purple")),
    "poster": (("plain",), ("navy", "brown", "teal", "purple", "pink", "yellow")),
}
PALETTES = {
    "warm": ("red", "orange", "pink", "green", "blue"),
    "cool": ("blue", "teal", "green", "purple", "red"),
    "all": ("red", "orange", "green", "teal", "blue", "purple", "pink"),
}
LIGHTS = {
    "usual": {"light_azimuth": (-50, 50), "light_elevation": (20, 70), "brightness": (0.9, 1.1)},
    "unusual": {"light_azimuth": (-80, 80), "light_elevation": (-30, 80), "brightness": (0.45, 1.35)},
}
CLUTTER = {  # probability of an occluding bar, of a twin
    "none": (0.0, 0.0),
    "some": (0.06, 0.06),
    "much": (0.45, 0.25),
}
STYLES = {
    "photo": {"photo": 1.0},
    "web": {"photo": 0.75, "sketch": 0.15, "rendition": 0.10},
    "sketch": {"sketch": 1.0},
    "rendition": {"rendition": 1.0},
    "stylized": {"stylized": 1.0},
}
DEFAULTS: dict[str, Any] = {
    **{"rho": 0.0, "pairs": "", "unseen": "", "pose": "usual", "background": "studio", "colours": "all"},
    **{"light": "usual", "clutter": "none", "style": "photo", "classes": CLASSES, "frames": 0},
}
_HABITS: dict[str, Mapping[str, Any]] = {
    **{"pose": POSES, "background": BACKGROUNDS, "colours": PALETTES},
    **{"light": LIGHTS, "clutter": CLUTTER, "style": STYLES},
}


def check_world(world: Mapping[str, Any]) -> dict[str, Any]:
    """Return the world with its defaults. Errors: `InputError` naming the key and what it may be."""
    name = world.get("name", "?")
    unknown = sorted(set(world) - set(DEFAULTS) - {"name", "images", "seed"})
    if unknown:
        raise InputError(f"world of {name}: unknown key {unknown[0]!r}; keys are {', '.join(sorted(DEFAULTS))}")
    missing = [key for key in ("name", "images", "seed") if key not in world]
    if missing:
        raise InputError(f"world of {name}: {missing[0]!r} is missing")
    full = {**DEFAULTS, **world}
    for key, habits in _HABITS.items():
        if full[key] not in habits:
            raise InputError(f"world of {name}: {key} is {full[key]!r}, expected one of {', '.join(habits)}")
    if not 0 <= full["rho"] <= 1:
        raise InputError(f"world of {name}: rho is {full['rho']!r}, expected a probability")
    if full["pairs"] not in ("", "conflict"):
        raise InputError(f"world of {name}: pairs is {full['pairs']!r}, expected '' or 'conflict'")
    if full["unseen"] not in ("", "solids", "solids_and_textures"):
        raise InputError(f"world of {name}: unseen is {full['unseen']!r}, expected '', solids or solids_and_textures")
    if int(full["images"]) < 1:
        raise InputError(f"world of {name}: images is {full['images']!r}, expected at least 1")
    if not isinstance(full["frames"], int) or not 0 <= full["frames"] < 100:
        raise InputError(f"world of {name}: frames is {full['frames']!r}, expected a whole number from 0 to 99")
    if full["frames"] and (full["unseen"] or full["clutter"] != "none"):
        wrong = "unseen solids have no label" if full["unseen"] else "a twin in the clutter would change sides"
        raise InputError(f"world of {name}: {wrong}, so frames cannot be had; leave one of the two out")
    strange = sorted(set(full["classes"]) - set(CLASSES))
    if strange:
        raise InputError(f"world of {name}: no solid {strange[0]!r}; solids are {', '.join(CLASSES)}")
    return full


def sample_scenes(world: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Draw the scenes of a world: one array [images] a column (`image_id`, `label`, `caption`, FACTORS).

    With `frames` also `anchor` (image id of the set's anchor), `distance` (signed frames from it) and `labels` (the
    class's name), and as many sets as `images` holds, at least one.
    Labels are balanced to within one image or set. Errors: `InputError` for a world that `check_world` refuses.
    """
    world = check_world(world)
    length = 2 * world["frames"] + 1  # of a set
    n, classes = max(1, int(world["images"]) // length), UNSEEN_SOLIDS if world["unseen"] else tuple(world["classes"])
    rng = np.random.default_rng([int(world["seed"]), 20240210])
    label, texture = _shapes_and_textures(world, n, classes, rng)

    styles = STYLES[world["style"]]
    style = rng.choice(list(styles), size=n, p=list(styles.values()))
    shows_texture = np.isin(style, ["photo", "stylized"])
    free = style == "stylized"  # a stylized image's texture must tell nothing about its class
    texture = np.where(free, rng.integers(len(TEXTURE_NAMES), size=n), texture)

    scenes: dict[str, np.ndarray] = {"label": np.full(n, -1) if world["unseen"] else label}
    scenes["label"] = scenes["label"].astype(np.int32)
    scenes["shape"] = np.array(classes)[label]
    scenes["texture"] = np.where(shows_texture, np.array(list(_INKS))[texture], NO_TEXTURE)
    owner = np.array([classes.index(c) if c in classes else -1 for c in (*CLASSES, *UNSEEN_INKS)])
    scenes["texture_class"] = np.where(shows_texture, owner[texture], -1).astype(np.int32)
    scenes["style"] = style
    scenes |= _colours(world, np.array(list(_INKS))[texture], rng)
    scenes["background"] = rng.choice(BACKGROUNDS[world["background"]][0], size=n)
    scenes["background"][np.isin(style, ["sketch", "rendition"])] = "plain"
    scenes["background"][free] = "textured"
    scenes["background_colour"][style == "sketch"] = "white"
    scenes["background_angle"] = rng.uniform(0, np.pi, n)
    scenes["background_phase"] = rng.uniform(0, 1, n)
    for name, (low, high) in (POSES[world["pose"]] | LIGHTS[world["light"]]).items():
        scenes[name] = rng.uniform(low, high, n)
    scenes["texture_scale"] = rng.uniform(0.9, 1.12, n)
    scenes["texture_phase"] = rng.uniform(0, 1, n)
    p_bar, p_twin = CLUTTER[world["clutter"]]
    scenes["occlusion"] = np.where(rng.random(n) < p_bar, rng.uniform(0.12, 0.3, n), 0.0)
    scenes["occlusion_at"] = rng.uniform(0.2, 0.8, n)
    scenes["objects"] = np.where(rng.random(n) < p_twin, 2, 1).astype(np.int32)
    for name, values in scenes.items():
        if values.dtype == np.float64:
            scenes[name] = values.astype(np.float32)
    ids = [f"{world['name']}/{i:05d}" for i in range(n)]
    more = []
    if world["frames"]:
        scenes = move_camera(scenes, world["frames"], rng)
        scenes["anchor"] = np.repeat([f"{i}/{world['frames']:03d}" for i in ids], length)
        scenes["labels"] = scenes["shape"]
        ids = [f"{i}/{frame:03d}" for i in ids for frame in range(length)]
        more = ["anchor", "distance", "labels"]
    scenes["image_id"] = np.array(ids)
    scenes["caption"] = np.array([_caption(scenes, i, rng) for i in range(len(ids))])
    return {name: scenes[name] for name in ("image_id", "label", "caption", *FACTORS, *more)}


def _shapes_and_textures(
    world: Mapping[str, Any], n: int, classes: tuple[str, ...], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Labels [n] and texture numbers [n] in random order."""
    if world["unseen"]:
        first, count = (
            (0, len(TEXTURE_NAMES)) if world["unseen"] == "solids" else (len(TEXTURE_NAMES), len(UNSEEN_INKS))
        )
        return rng.permutation(np.arange(n) % len(classes)), first + rng.integers(count, size=n)
    own = np.array([CLASSES.index(c) for c in classes])
    if world["pairs"] == "conflict":
        pairs = np.array([(s, t) for s in range(len(own)) for t in own if t != own[s]])
        drawn = pairs[rng.permutation(np.arange(n) % len(pairs))]
        return drawn[:, 0], drawn[:, 1]
    label = rng.permutation(np.arange(n) % len(own))
    follows = rng.random(n) < world["rho"]
    return label, np.where(follows, own[label], rng.integers(len(TEXTURE_NAMES), size=n))


def _colours(world: Mapping[str, Any], texture: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Colours such that solid, ink and background differ clearly from each other."""
    names = list(COLOURS)
    rgb = np.array([COLOURS[c] for c in names])
    distance = np.linalg.norm(rgb[:, None] - rgb[None], axis=2)

    def draw(allowed: tuple[str, ...], *others: np.ndarray) -> np.ndarray:
        candidates = np.array([names.index(c) for c in allowed])
        nearest = np.min([distance[candidates[None, :], o[:, None]] for o in others], axis=0)
        score = np.minimum(nearest, 0.55) + rng.uniform(0, 0.25, nearest.shape)
        return candidates[score.argmax(axis=1)]

    main = np.array([names.index(c) for c in rng.choice(PALETTES[world["colours"]], size=len(texture))])
    second = np.array([names.index(_INKS[t]) for t in texture])
    back = draw(BACKGROUNDS[world["background"]][1], main, second)
    others = tuple(COLOURS) if world["background"] == "busy" else BACKGROUNDS[world["background"]][1]
    back_second = draw(others, main, back)
    columns = {"colour": main, "second_colour": second, "background_colour": back}
    columns["second_background_colour"] = back_second
    return {name: np.array(names)[index] for name, index in columns.items()}


def article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


_MEDIUM = {
    "photo": ("a photo of {}", "a photo of {}", "a picture of {}", "an image of {}", "{}", "a render of {}"),
    "sketch": ("a sketch of {}", "a line drawing of {}", "a drawing of {}"),
    "rendition": ("a cartoon of {}", "an illustration of {}", "a flat drawing of {}"),
    "stylized": ("a painting of {}", "an artwork of {}"),
}


def _caption(scenes: Mapping[str, np.ndarray], i: int, rng: np.random.Generator) -> str:
    """A true sentence of at most about twenty tokens; it always names the class, the rest only at times."""

    def factor(name: str) -> Any:
        return scenes[name][i]

    style = factor("style")
    says = dict(zip(("size", "colour", "texture", "back", "view"), rng.random(5), strict=True))
    words = []
    if says["size"] < 0.3 and not 0.75 < factor("scale") < 1.0:
        words.append("small" if factor("scale") < 0.9 else "large")
    if style in ("photo", "rendition") and says["colour"] < 0.35:
        words.append(str(factor("colour")))
    if style == "photo" and says["texture"] < 0.15:
        words.append(str(factor("texture")))
    words.append(str(factor("shape")))
    thing = article(" ".join(words))
    medium = _MEDIUM[str(style)]
    caption = medium[rng.integers(len(medium))].format(thing)
    if factor("objects") == 2 and says["back"] < 0.8:
        caption += " beside its twin"
    elif style == "photo" and says["back"] < 0.2:
        caption += f" on {article(str(factor('background_colour')))} background"
    elif factor("occlusion") > 0 and says["back"] < 0.8:
        caption += " behind a bar"
    elif says["view"] < 0.25 and not 25 < factor("elevation") < 35:
        caption += " seen from above" if factor("elevation") >= 35 else " seen from the side"
    return caption + ("." if rng.random() < 0.5 else "")
