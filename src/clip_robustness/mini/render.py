"""Draw scenes: batched sphere tracing of signed distance functions, in plain torch.

images, depth, normals, mask = render(sample_scenes(world))
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clip_robustness.mini.camera import DISTANCE, FOCAL, SIZE, rays_of_pixels, rotation, screen
from clip_robustness.mini.solids import SOLIDS
from clip_robustness.mini.styles import (
    TEXTURE_FREQUENCY,
    background,
    cartoon,
    occlude,
    rgb,
    sketch,
    textured,
)

AMBIENT = 0.45
TWIN_OFFSET, TWIN_SCALE = 0.95, 0.45
BATCH = 384
STEPS = 32


class Rendered(NamedTuple):
    images: np.ndarray  # uint8 [n, 48, 48, 3]
    depth: np.ndarray  # float16 [n, 48, 48], along the optical axis, world units; infinite off the solid
    normals: np.ndarray  # int8 [n, 48, 48, 3], camera frame, 127 times the unit normal; 0 off the solid
    mask: np.ndarray  # bool [n, 48, 48], the solid as far as it is visible


class _Surface(NamedTuple):
    """What the rays of a batch of images met: flat [n * 48 * 48] buffers."""

    depth: Tensor
    normal: Tensor
    point: Tensor  # object frame
    object_normal: Tensor
    cover: Tensor  # 0..1, the share of the pixel inside the silhouette


def render(scenes: Mapping[str, np.ndarray]) -> Rendered:
    """Render every scene (columns of `world.sample_scenes`); the result does not depend on their number."""
    n = len(scenes["label"])
    parts = []
    with torch.inference_mode():
        for start in range(0, n, BATCH):
            parts.append(_render_batch({k: v[start : start + BATCH] for k, v in scenes.items()}))
    return Rendered(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _render_batch(scenes: Mapping[str, np.ndarray]) -> tuple[np.ndarray, ...]:
    n = len(scenes["label"])
    f = {k: torch.from_numpy(np.ascontiguousarray(v)).float() for k, v in scenes.items() if v.dtype.kind in "fi"}
    turn = rotation(f["yaw"], f["elevation"], f["roll"])
    centre = torch.stack([f["x"], f["y"], torch.full_like(f["x"], -DISTANCE)], dim=1)
    surface = _empty(n)
    _trace(surface, scenes["shape"], np.arange(n), turn, centre, f["scale"], f["stretch"])
    twins = np.flatnonzero(scenes["objects"] == 2)
    if len(twins):
        side = torch.where(f["x"][twins] > 0, -1.0, 1.0)
        offset = torch.stack([side * TWIN_OFFSET, -0.4 + 0 * side, 0.3 + 0 * side], dim=1)
        place, scale = centre[twins] + offset, f["scale"][twins] * TWIN_SCALE
        _trace(surface, scenes["shape"][twins], twins, turn[twins], place, scale, f["stretch"][twins])

    shaded = _shade(scenes, f, surface)
    colour = torch.lerp(background(scenes, f).reshape(-1, 3), shaded, surface.cover[:, None]).reshape(n, SIZE, SIZE, 3)
    depth, normal = surface.depth.reshape(n, SIZE, SIZE), surface.normal.reshape(n, SIZE, SIZE, 3)
    for name, draw in (("sketch", sketch), ("rendition", cartoon)):
        rows = np.flatnonzero(scenes["style"] == name)
        if len(rows):
            colour[rows] = draw(colour[rows], depth[rows], normal[rows])
    mask = depth.isfinite()
    occlude(scenes, colour, depth, normal, mask)
    images = (colour.clamp(0, 1) * 255).round().to(torch.uint8)
    return images.numpy(), depth.half().numpy(), (normal * 127).round().to(torch.int8).numpy(), mask.numpy()


def _empty(n: int) -> _Surface:
    size = n * SIZE * SIZE
    normal, point, object_normal = (torch.zeros(size, 3) for _ in range(3))
    return _Surface(torch.full((size,), math.inf), normal, point, object_normal, torch.zeros(size))


def _trace(
    surface: _Surface,
    shape: np.ndarray,
    image: np.ndarray,
    turn: Tensor,
    centre: Tensor,
    size: Tensor,
    stretch: Tensor,
) -> None:
    """Trace one solid an image and enter into `surface` what lies in front of what is there."""
    rays = rays_of_pixels()
    for name in np.unique(shape):
        rows = torch.from_numpy(np.flatnonzero(shape == name))
        sdf, radius = SOLIDS[name]
        c, s = centre[rows], size[rows]
        along = c @ rays.T
        bound = (radius + 0.02) * s * stretch[rows].clamp(min=1)
        chord = along**2 - (c**2).sum(dim=1, keepdim=True) + bound[:, None] ** 2
        which, pixel = torch.nonzero(chord > 0, as_tuple=True)
        half = chord[which, pixel].sqrt()
        # A row vector times `turn`, whose rows are the camera's axes, goes from camera to object.
        direction = (rays @ turn[rows])[which, pixel]
        origin = ((-c[:, None] @ turn[rows])[:, 0] / s[:, None])[which]
        near, far = ((along[which, pixel] + sign * half) / s[which] for sign in (-1, 1))
        tall = stretch[rows][which]
        t, nearness = _march(sdf, origin, direction, near, far, tall)
        footprint = 1 / FOCAL  # width of a pixel at distance 1
        cover = (1.0 - nearness / footprint).clamp(0, 1)
        point = origin + t[:, None] * direction
        depth = t * s[which] * -rays[pixel, 2]
        flat = torch.from_numpy(image)[rows][which] * SIZE * SIZE + pixel
        keep = (cover > 0) & (depth < surface.depth[flat])
        flat, cover, point, depth = flat[keep], cover[keep], point[keep], depth[keep]
        normal = _normal(sdf, point, tall[keep])
        camera_normal = torch.einsum("nij,nj->ni", turn[rows][which[keep]], normal)
        # A finite difference across an edge may lean away from the camera by a hair; such a normal is turned.
        facing = (camera_normal * rays[pixel[keep]]).sum(dim=1, keepdim=True)
        camera_normal = camera_normal - rays[pixel[keep]] * (facing.clamp(min=0) * 1.01 + (facing > 0) * 1e-2)
        camera_normal = camera_normal / camera_normal.norm(dim=1, keepdim=True)
        solid = cover == 1
        surface.depth[flat[solid]] = depth[solid]
        surface.normal[flat[solid]] = camera_normal[solid]
        # A pixel that the silhouette only grazes is coloured, but belongs to no solid.
        fresh = solid | (surface.cover[flat] < cover)
        flat = flat[fresh]
        surface.cover[flat] = cover[fresh]
        surface.point[flat] = point[fresh]
        surface.object_normal[flat] = normal[fresh]
        grazed = fresh & ~solid
        surface.normal[flat[grazed[fresh]]] = 0


def _march(sdf, origin: Tensor, direction: Tensor, near: Tensor, far: Tensor, tall: Tensor) -> tuple[Tensor, Tensor]:
    """Distance along each ray to the surface, or to where it comes nearest; and that gap over the distance (0 hit)."""
    n = len(near)
    best, best_t = torch.full((n,), math.inf), near.clone()
    active = torch.arange(n)
    t = near.clone()
    shrink = tall.clamp(max=1)
    scale = torch.stack([torch.ones_like(tall), 1 / tall, torch.ones_like(tall)], dim=1)
    o, d, end = origin * scale, direction * scale, far
    for step in range(STEPS):
        gap = sdf(o + t[:, None] * d) * shrink
        hit = gap < 1.5e-3
        ratio = torch.where(hit, torch.zeros_like(gap), gap / t)
        better = ratio < best[active]
        best[active[better]] = ratio[better]
        best_t[active[better]] = t[better]
        t = t + gap
        going = ~hit & (t < end)
        if step % 3 == 2 or step == STEPS - 1:
            active, t, o, d, end, shrink = (x[going] for x in (active, t, o, d, end, shrink))
            if not len(active):
                break
    return best_t, best


def _normal(sdf, point: Tensor, tall: Tensor) -> Tensor:
    """Outward unit normals [n, 3] from differences at a tetrahedron's corners."""
    corners = torch.tensor([[1.0, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    scale = torch.stack([torch.ones_like(tall), 1 / tall, torch.ones_like(tall)], dim=1)
    gradient = torch.zeros_like(point)
    for corner in corners:
        gradient += corner * sdf((point + 4e-3 * corner) * scale)[:, None]
    return gradient / gradient.norm(dim=1, keepdim=True).clamp(min=1e-9)


def _shade(scenes: Mapping[str, np.ndarray], f: Mapping[str, Tensor], surface: _Surface) -> Tensor:
    """Colours [n * 48 * 48, 3] of the solids: texture on the dominant side, Lambert's law and ambient light."""
    pixels = SIZE * SIZE
    result = torch.zeros(len(surface.cover), 3)
    flat = torch.nonzero(surface.cover > 0).squeeze(1)
    image = flat // pixels
    point, normal = surface.point[flat], surface.object_normal[flat].abs()
    side = normal.argmax(dim=1, keepdim=True)
    u = torch.where(side == 0, point[:, 2:], point[:, :1]).squeeze(1)
    v = torch.where(side == 1, point[:, 2:], point[:, 1:2]).squeeze(1)
    frequency = TEXTURE_FREQUENCY * f["texture_scale"][image]
    stylized = torch.from_numpy(scenes["style"] == "stylized")[image]
    if stylized.any():  # painted on the picture, not on the solid
        su, sv = screen(flat % pixels)
        u, v = torch.where(stylized, su, u), torch.where(stylized, sv, v)
    blur = frequency * (DISTANCE / FOCAL) / f["scale"][image]
    blend = textured(scenes["texture"], image, u * frequency, v * frequency, blur, f["texture_phase"][image])
    colour = torch.lerp(rgb(scenes["colour"])[image], rgb(scenes["second_colour"])[image], blend[:, None])
    azimuth, height = f["light_azimuth"].deg2rad(), f["light_elevation"].deg2rad()
    light = torch.stack([azimuth.sin() * height.cos(), height.sin(), azimuth.cos() * height.cos()], dim=1)
    turn = rotation(f["yaw"], f["elevation"], f["roll"])
    object_light = torch.einsum("ni,nij->nj", light, turn)
    lit = (surface.object_normal[flat] * object_light[image]).sum(dim=1).clamp(min=0)
    shade = (AMBIENT + (1 - AMBIENT) * 1.15 * lit) * f["brightness"][image]
    result[flat] = colour * shade[:, None]
    return result
