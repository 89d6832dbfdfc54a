"""The 12 corruptions of ImageNet-3DCC at five severities, made for 48 pixels from the renderer's own depth.

    write_corrupted_3d(index, geometry, out_archive, out_index, images=72, corruptions=GEOMETRIC)

Types: Kar et al., "3D common corruptions and data augmentation", arXiv 2203.01441; names as in ImageNet-3DCC, code
and strengths our own, set as in `corruptions`. As there, `near_focus` is a camera focused on what is near, so that it
blurs what is far, and `far_focus` the other way round.

The scene is the solid before a wall at the depth WALL, behind every solid. What the solid hides of the wall is filled
in from around it. A bar that occludes the solid is no part of the geometry and counts as painted on the wall.

The originals of the last three types come from a video codec. Here they are stand-ins that need none: one frame, coded
in blocks of 8 x 8 by cosine transform and a flat quantiser. There is no prediction over time, no filter across blocks
and no coarser colour.
"""

import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clip_robustness.core.io import InputError
from clip_robustness.mini.camera import DISTANCE, FOCAL, SIZE
from clip_robustness.mini.corruptions import choose, convolve, disc, sample, write_settings
from clip_robustness.mini.dataset import read_images

WALL = 1.5 * DISTANCE  # world units
_VIEWS = 9  # of a moving camera
_AT = np.arange(SIZE, dtype=np.float32)
_MIDDLE = (SIZE - 1) / 2


class Scene(NamedTuple):
    """What a camera could see from nearby; float32. Depths are along the optical axis, world units."""

    image: np.ndarray  # [48, 48, 3] in 0..1
    depth: np.ndarray  # [48, 48], the wall's off the solid
    solid: np.ndarray  # [48, 48], 1 on the solid and the rim that it shares with the wall, else 0
    surface: np.ndarray  # [48, 48], depth of the solid, continued beyond its silhouette
    wall: np.ndarray  # [48, 48, 3], the wall, also behind the solid


def write_corrupted_3d(
    index: Path,
    geometry: Path,
    out_archive: Path,
    out_index: Path,
    images: int,
    seed: int = 0,
    corruptions: Sequence[str] = (),
) -> None:
    """Corrupt `images` of the images of `index`, drawn with `seed`, by `corruptions` (default: all) at every severity.

    geometry: what `dataset.render_dataset` wrote beside `index`. Outputs: see `corruptions.write_settings`; with the
    same seed, the images are those of `corruptions.write_corrupted`.
    Errors: `InputError` for an unknown type, when `index` has too few images, and for another data set's geometry.
    """
    names = list(corruptions or CORRUPTIONS_3D)
    unknown = sorted(set(names) - set(CORRUPTIONS_3D))
    if unknown:
        raise InputError(f"{out_index}: no 3D corruption {unknown[0]!r}; expected some of {', '.join(CORRUPTIONS_3D)}")
    rows, chosen = choose(index, images, seed)
    depth = _depths(geometry)
    if depth.ndim != 3 or depth.shape[1:] != (SIZE, SIZE) or len(depth) <= chosen[-1]:
        raise InputError(f"{geometry}: depth is {depth.shape}, and is not of the images of {index}; render both again")
    scenes = [scene(*each) for each in zip(read_images(rows, index), depth[chosen], strict=True)]

    def made(image: int, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
        return corrupt_3d(scenes[image], name, severity, rng)

    write_settings(rows, names, made, out_archive, out_index, seed)


def _depths(geometry: Path) -> np.ndarray:
    try:
        with np.load(geometry, allow_pickle=False) as arrays:
            return arrays["depth"]
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{geometry}: no geometry of rendered images ({error}); render the data set again") from None


def scene(image: np.ndarray, depth: np.ndarray) -> Scene:
    """image uint8 [48, 48, 3], depth [48, 48] as rendered: infinite off the solid.

    The rim of a silhouette shows the solid too, but has no depth: it takes that of the nearest neighbour.
    """
    colour, depth = image.astype(np.float32) / 255, depth.astype(np.float32)
    around = np.pad(depth, 1, constant_values=np.inf)
    rim = np.min([around[i : i + SIZE, j : j + SIZE] for i in range(3) for j in range(3)], axis=0)
    depth = np.where(np.isfinite(depth), depth, rim)
    solid = np.isfinite(depth)
    surface = (
        _filled(np.where(solid, depth, 0)[:, :, None], solid)[:, :, 0] if solid.any() else np.full_like(depth, WALL)
    )
    wall = colour if solid.all() else _filled(colour, ~solid)
    return Scene(colour, np.where(solid, depth, np.float32(WALL)), solid.astype(np.float32), surface, wall)


def corrupt_3d(clean: Scene, name: str, severity: int, rng: np.random.Generator) -> np.ndarray:
    """One image, uint8 [48, 48, 3], by the type `name` at `severity` 1..5."""
    function, strengths = CORRUPTIONS_3D[name]
    result = function(clean, strengths[severity - 1], rng)
    return np.rint(np.clip(result, 0, 1) * 255).astype(np.uint8)


def _filled(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """`values` [s, s, c], each unknown one from the mean of the known ones in the smallest block that has any."""
    if known.all() or len(known) % 2:
        rest = values[known].mean(axis=0) if known.any() else 0
        return np.where(known[:, :, None], values, rest)
    half = len(known) // 2
    blocks, weights = values.reshape(half, 2, half, 2, -1), known.reshape(half, 2, half, 2, 1)
    count = weights.sum(axis=(1, 3))
    coarse = _filled((blocks * weights).sum(axis=(1, 3)) / np.maximum(count, 1), count[:, :, 0] > 0)
    return np.where(known[:, :, None], values, coarse.repeat(2, axis=0).repeat(2, axis=1)).astype(np.float32)


# Depth of field: a thin lens that is small against all depths. A point at depth d is a disc whose radius in pixels is
# aperture * FOCAL * |1/d - 1/focus|, where `aperture` is the radius of the lens in world units.


def _near_focus(clean: Scene, aperture: float, rng: np.random.Generator) -> np.ndarray:
    return _defocused(clean, aperture, float(clean.depth.min()))


def _far_focus(clean: Scene, aperture: float, rng: np.random.Generator) -> np.ndarray:
    return _defocused(clean, aperture, WALL)


def _defocused(clean: Scene, aperture: float, focus: float) -> np.ndarray:
    """Slabs of about equal blur, each spread by its disc and laid from near to far into the room that is left.

    A slab reaches on under the one before it, so that the wall does not shine through between them.
    """
    step = 0.5  # pixels
    radii = aperture * FOCAL * abs(1 / np.append(clean.depth, np.float32(WALL)) - 1 / focus)
    levels = np.rint(radii / step).astype(int)
    level, of_wall = levels[:-1].reshape(SIZE, SIZE), levels[-1]
    inside = clean.solid > 0
    slabs = sorted(set(level[inside].tolist()), reverse=focus == WALL)
    result, room = np.zeros_like(clean.image), np.ones((SIZE, SIZE, 1), np.float32)
    for place, slab in enumerate(slabs):
        cover = (np.isin(level, slabs[max(place - 1, 0) : place + 1]) & inside).astype(np.float32)[:, :, None]
        spread = np.concatenate([clean.image * cover, cover], axis=2)
        if slab > 1:  # a disc of half a pixel is a point
            spread = convolve(spread, disc(slab * step))
        cover = np.maximum(spread[:, :, 3:], 1e-6)
        taken = np.minimum(np.where(cover > 1e-3, cover, 0), room)
        result += spread[:, :, :3] * (taken / cover)
        room -= taken
    wall = convolve(clean.wall, disc(of_wall * step)) if of_wall > 1 else clean.wall
    return result + room * wall


# A moving camera: the mean of the views along its path.


def view(clean: Scene, offset: np.ndarray) -> np.ndarray:
    """The scene from cameras at `offset` [v, 3] (right, up, forward; world units) of the first: [v, 48, 48, 3].

    A point at column u and depth d comes to u' with (u' - middle) * (d - forward) = (u - middle) * d - FOCAL * right.
    Each view is sought backwards: on the wall in one step, on the solid by a few steps of a fixed point.
    """
    right, up, forward = (offset[:, axis, None, None].astype(np.float32) for axis in range(3))

    def source(depth: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
        rows = ((_AT[:, None] - _MIDDLE) * (depth - forward) - FOCAL * up) / depth + _MIDDLE
        columns = ((_AT - _MIDDLE) * (depth - forward) + FOCAL * right) / depth + _MIDDLE
        return rows, columns

    behind = sample(clean.wall, *source(WALL))
    if not clean.solid.any():
        return behind
    depth = clean.surface
    for _ in range(2):
        depth = sample(clean.surface[:, :, None], *source(depth))[..., 0]
    cover = clean.solid[:, :, None]
    front = sample(np.concatenate([clean.image * cover, cover], axis=2), *source(depth))
    return front[..., :3] + (1 - front[..., 3:]) * behind


def _xy_motion_blur(clean: Scene, length: float, rng: np.random.Generator) -> np.ndarray:
    """Sideways in any direction, over `length` world units about the place of the clean image."""
    along = rng.uniform(0, np.pi)
    path = np.linspace(-length / 2, length / 2, _VIEWS)[:, None]
    return view(clean, path * [np.cos(along), np.sin(along), 0]).mean(axis=0)


def _z_motion_blur(clean: Scene, length: float, rng: np.random.Generator) -> np.ndarray:
    """Forwards, over `length` world units from the place of the clean image."""
    return view(clean, np.linspace(0, length, _VIEWS)[:, None] * [0, 0, 1]).mean(axis=0)


# Light and weather.


def _fog_3d(clean: Scene, density: float, rng: np.random.Generator) -> np.ndarray:
    """Light through fog falls by exp(-density * depth); the fog is as bright as the image's mean."""
    left = np.exp(-density * clean.depth)[:, :, None]
    return left * clean.image + (1 - left) * clean.image.mean()


def _flash(clean: Scene, power: float, rng: np.random.Generator) -> np.ndarray:
    """A lamp at the camera adds `power` times the light at DISTANCE, by the square less elsewhere; white saturates."""
    return clean.image * (1 + power * (DISTANCE / clean.depth) ** 2)[:, :, None]


# Sensor.


def _low_light(clean: Scene, brightest: float, rng: np.random.Generator) -> np.ndarray:
    """Tones to the power of 1.5, up to `brightest`, by few photons (120 of white) and with noise of the electronics."""
    dark = brightest * (clean.image / max(float(clean.image.max()), 1 / 255)) ** 1.5
    return rng.poisson(dark * 120) / 120 + 0.018 * rng.standard_normal(dark.shape, np.float32)


def _iso_noise(clean: Scene, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """The noise of photons (120 of white) stays, that of the electronics grows with the sensitivity."""
    return rng.poisson(clean.image * 120) / 120 + sigma * rng.standard_normal(clean.image.shape, np.float32)


def _color_quant(clean: Scene, bits: int, rng: np.random.Generator) -> np.ndarray:
    return np.floor(np.minimum(clean.image, 1 - 1e-6) * 2**bits) / 2**bits


# Coded blocks.

_STEPS = 2.0 ** (np.arange(12, 72, 2) / 6)  # quantiser steps, 255ths: 4 to 3251
_TURNS = np.pi / 16 * np.arange(8)[:, None] * (2 * np.arange(8) + 1)
_WAVES = np.cos(_TURNS) * np.where(np.arange(8), 0.5, 0.125**0.5)[:, None]
_LUMA = np.array([0.299, 0.587, 0.114])  # of red, green, blue
_SIDE = SIZE // 8  # blocks


def _coefficients(image: np.ndarray) -> np.ndarray:
    """Cosine coefficients [3, 36, 8, 8] of an image in 0..1: of luma, red less luma and blue less luma."""
    values = image.astype(float) * 255 - 128
    luma = (values * _LUMA).sum(axis=2)
    planes = np.stack([luma, values[:, :, 0] - luma, values[:, :, 2] - luma])
    blocks = planes.reshape(3, _SIDE, 8, _SIDE, 8).swapaxes(2, 3).reshape(3, -1, 8, 8)
    return np.einsum("cnux,vx->cnuv", np.einsum("uy,cnyx->cnux", _WAVES, blocks), _WAVES)


def _decoded(coefficients: np.ndarray) -> np.ndarray:
    blocks = np.einsum("cnyv,vx->cnyx", np.einsum("uy,cnuv->cnyv", _WAVES, coefficients), _WAVES)
    luma, red, blue = blocks.reshape(3, _SIDE, _SIDE, 8, 8).swapaxes(2, 3).reshape(3, SIZE, SIZE)
    red, blue = red + luma, blue + luma
    green = (luma - _LUMA[0] * red - _LUMA[2] * blue) / _LUMA[1]
    return (np.stack([red, green, blue], axis=2) + 128) / 255


def _bits(numbers: np.ndarray) -> float:
    """Length of coded blocks: of each number that is not 0, 6 bits for its place and Golomb's exponential code."""
    size = abs(numbers[numbers != 0])
    return float((6 + 2 * np.floor(np.log2(2 * size)) + 1).sum())


def _h265_crf(clean: Scene, step: float, rng: np.random.Generator) -> np.ndarray:
    """One quantiser step (255ths) for every image: constant quality."""
    return _decoded(np.rint(_coefficients(clean.image) / step) * step)


def _h265_abr(clean: Scene, less: float, rng: np.random.Generator) -> np.ndarray:
    """The finest step that codes the image in a `less`-th of the bits that the first takes: an average rate."""
    coefficients = _coefficients(clean.image)
    most = _bits(np.rint(coefficients / _STEPS[0])) / less
    step = next(step for step in _STEPS if _bits(np.rint(coefficients / step)) <= most)  # the last leaves nothing
    return _decoded(np.rint(coefficients / step) * step)


def _bit_error(clean: Scene, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Among the 15 lowest coefficients of a block, each has with probability `rate` one of its bits flipped.

    The mean of a block is coded as its difference from the block before, so that its error runs on to the end of the
    row of blocks.
    """
    step = 8.0
    numbers = np.rint(_coefficients(clean.image) / step)
    rows = numbers[:, :, 0, 0].reshape(3, _SIDE, _SIDE)
    numbers[:, :, 0, 0] = np.diff(rows, axis=2, prepend=0).reshape(3, -1)
    low = np.add.outer(np.arange(8), np.arange(8)) < 5
    hit = (rng.random(numbers.shape) < rate) & low
    numbers += np.where(hit, rng.choice([-1, 1], hit.shape) * 2 ** rng.integers(0, 6, hit.shape), 0)
    numbers[:, :, 0, 0] = np.cumsum(numbers[:, :, 0, 0].reshape(rows.shape), axis=2).reshape(3, -1)
    return _decoded(numbers * step)


GEOMETRIC = ("near_focus", "far_focus", "xy_motion_blur", "z_motion_blur", "fog_3d", "flash")
CORRUPTIONS_3D: dict[str, tuple[Callable[..., np.ndarray], Sequence]] = {
    "near_focus": (_near_focus, (0.22, 0.35, 0.5, 0.7, 0.95)),  # radius of the lens, world units
    "far_focus": (_far_focus, (0.1, 0.16, 0.25, 0.38, 0.55)),
    "xy_motion_blur": (_xy_motion_blur, (0.12, 0.22, 0.36, 0.55, 0.8)),  # path, world units
    "z_motion_blur": (_z_motion_blur, (0.25, 0.5, 0.8, 1.15, 1.5)),
    "fog_3d": (_fog_3d, (0.04, 0.09, 0.15, 0.23, 0.33)),  # a world unit's share, nearly
    "flash": (_flash, (0.15, 0.35, 0.65, 1.1, 1.8)),
    "low_light": (_low_light, (1.0, 0.8, 0.6, 0.42, 0.28)),
    "iso_noise": (_iso_noise, (0.02, 0.05, 0.1, 0.16, 0.24)),  # standard deviation
    "color_quant": (_color_quant, (5, 4, 3, 2, 1)),  # bits
    "bit_error": (_bit_error, (0.003, 0.012, 0.03, 0.07, 0.14)),
    "h265_abr": (_h265_abr, (3, 6, 12, 20, 32)),
    "h265_crf": (_h265_crf, tuple(2.0 ** (np.array([28, 34, 40, 46, 51]) / 6 - 4 / 6))),
}
