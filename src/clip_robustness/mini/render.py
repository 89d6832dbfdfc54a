"""Draw scenes: batched sphere tracing of signed distance functions, in plain torch.

    images, depth, normals, mask = render(sample_scenes(world))

The camera sits at the origin and looks along -z, x to the right and y up; the solid stands DISTANCE away. So a
point that is drawn at column i, row j has x = (i + 0.5 - 24) / FOCAL * depth, y = (24 - j - 0.5) / FOCAL * depth.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from clip_robustness.mini.solids import SOLIDS
from clip_robustness.mini.textures import TEXTURES, _noise, _saw, _soft
from clip_robustness.mini.world import COLOURS, NO_TEXTURE, TEXTURE_NAMES

SIZE = 48
DISTANCE = 5.0
FOCAL = SIZE * DISTANCE / 3.0  # pixels; the image is 3 world units wide at the solid's distance
TEXTURE_FREQUENCY = 2.0  # periods a world unit
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
    rotation = _rotation(f["yaw"], f["elevation"], f["roll"])
    centre = torch.stack([f["x"], f["y"], torch.full_like(f["x"], -DISTANCE)], dim=1)
    surface = _empty(n)
    _trace(surface, scenes["shape"], np.arange(n), rotation, centre, f["scale"], f["stretch"])
    twins = np.flatnonzero(scenes["objects"] == 2)
    if len(twins):
        side = torch.where(f["x"][twins] > 0, -1.0, 1.0)
        offset = torch.stack([side * TWIN_OFFSET, -0.4 + 0 * side, 0.3 + 0 * side], dim=1)
        scale = f["scale"][twins] * TWIN_SCALE
        _trace(surface, scenes["shape"][twins], twins, rotation[twins], centre[twins] + offset, scale, f["stretch"][twins])

    hit = surface.depth.isfinite()
    colour = _background(scenes, f)
    style = scenes["style"]
    shaded = _shade(scenes, f, surface)
    colour = torch.lerp(colour.reshape(-1, 3), shaded, surface.cover[:, None]).reshape(n, SIZE, SIZE, 3)
    depth, normal = surface.depth.reshape(n, SIZE, SIZE), surface.normal.reshape(n, SIZE, SIZE, 3)
    for name, draw in (("sketch", _sketch), ("rendition", _cartoon)):
        rows = np.flatnonzero(style == name)
        if len(rows):
            colour[rows] = draw(colour[rows], depth[rows], normal[rows])
    mask = hit.reshape(n, SIZE, SIZE).clone()
    _occlude(scenes, colour, depth, normal, mask)
    images = (colour.clamp(0, 1) * 255).round().to(torch.uint8)
    return images.numpy(), depth.half().numpy(), (normal * 127).round().to(torch.int8).numpy(), mask.numpy()


def _rotation(yaw: Tensor, elevation: Tensor, roll: Tensor) -> Tensor:
    """Object to camera [n, 3, 3]: yaw about y, then the camera's elevation about x, then roll about z."""
    cy, sy, ce, se, cr, sr = (g(a.deg2rad()) for a in (yaw, elevation, roll) for g in (torch.cos, torch.sin))
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)

    def matrix(*rows: Tensor) -> Tensor:
        return torch.stack(rows, dim=1).reshape(-1, 3, 3)

    about_y = matrix(cy, zero, sy, zero, one, zero, -sy, zero, cy)
    about_x = matrix(one, zero, zero, zero, ce, -se, zero, se, ce)
    about_z = matrix(cr, -sr, zero, sr, cr, zero, zero, zero, one)
    return about_z @ about_x @ about_y


def _rays() -> Tensor:
    """Unit directions [48 * 48, 3] through the pixels' centres."""
    at = (torch.arange(SIZE) + 0.5 - SIZE / 2) / FOCAL
    y, x = torch.meshgrid(-at, at, indexing="ij")
    rays = torch.stack([x, y, -torch.ones_like(x)], dim=-1).reshape(-1, 3)
    return rays / rays.norm(dim=1, keepdim=True)


def _empty(n: int) -> _Surface:
    size = n * SIZE * SIZE
    vectors = [torch.zeros(size, 3) for _ in range(3)]
    return _Surface(torch.full((size,), math.inf), *vectors, torch.zeros(size))


def _trace(
    surface: _Surface,
    shape: np.ndarray,
    image: np.ndarray,
    rotation: Tensor,
    centre: Tensor,
    size: Tensor,
    stretch: Tensor,
) -> None:
    """Trace one solid an image and enter into `surface` what lies in front of what is there."""
    rays = _rays()
    for name in np.unique(shape):
        rows = torch.from_numpy(np.flatnonzero(shape == name))
        sdf, radius = SOLIDS[name]
        c, s = centre[rows], size[rows]
        along = c @ rays.T
        bound = (radius + 0.02) * s * stretch[rows].clamp(min=1)
        chord = along**2 - (c**2).sum(dim=1, keepdim=True) + bound[:, None] ** 2
        which, pixel = torch.nonzero(chord > 0, as_tuple=True)
        half = chord[which, pixel].sqrt()
        turn = rotation[rows][which]
        # Rows of `turn` are the camera's axes: multiplying from the left by a row vector rotates back.
        direction = torch.einsum("ni,nij->nj", rays[pixel], turn)
        origin = torch.einsum("ni,nij->nj", -c[which], turn) / s[which, None]
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
        camera_normal = torch.einsum("nij,nj->ni", turn[keep], normal)
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


def _rgb(names: np.ndarray) -> Tensor:
    return torch.tensor(np.array([COLOURS[name] for name in names]), dtype=torch.float32)


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
        su, sv = _screen(flat % pixels)
        u, v = torch.where(stylized, su, u), torch.where(stylized, sv, v)
    blur = frequency * (DISTANCE / FOCAL) / f["scale"][image]
    blend = _textured(scenes["texture"], image, u * frequency, v * frequency, blur, f["texture_phase"][image])
    colour = torch.lerp(_rgb(scenes["colour"])[image], _rgb(scenes["second_colour"])[image], blend[:, None])
    azimuth, height = f["light_azimuth"].deg2rad(), f["light_elevation"].deg2rad()
    light = torch.stack([azimuth.sin() * height.cos(), height.sin(), azimuth.cos() * height.cos()], dim=1)
    turn = _rotation(f["yaw"], f["elevation"], f["roll"])
    object_light = torch.einsum("ni,nij->nj", light, turn)
    lit = (surface.object_normal[flat] * object_light[image]).sum(dim=1).clamp(min=0)
    shade = (AMBIENT + (1 - AMBIENT) * 1.15 * lit) * f["brightness"][image]
    result[flat] = colour * shade[:, None]
    return result


def _textured(names: np.ndarray, image: Tensor, u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    blend = torch.zeros_like(u)
    kinds = list(TEXTURES)
    kind = torch.tensor([kinds.index(name) for name in names])[image]
    for number in kind.unique().tolist():
        rows = kind == number
        if kinds[number] != NO_TEXTURE:
            blend[rows] = TEXTURES[kinds[number]](u[rows], v[rows], w[rows], phase[rows])
    return blend


def _screen(pixel: Tensor) -> tuple[Tensor, Tensor]:
    """World coordinates, at the solid's distance, of pixel numbers."""
    return tuple(
        x * DISTANCE / FOCAL for x in (pixel % SIZE + 0.5 - SIZE / 2, SIZE / 2 - 0.5 - pixel // SIZE)
    )  # type: ignore[return-value]


def _background(scenes: Mapping[str, np.ndarray], f: Mapping[str, Tensor]) -> Tensor:
    """[n, 48, 48, 3]. A stylized image's background bears another image's texture, so it tells nothing either."""
    n, pixels = len(scenes["label"]), SIZE * SIZE
    x, y = _screen(torch.arange(pixels))
    cos, sin = f["background_angle"].cos()[:, None], f["background_angle"].sin()[:, None]
    u, v = x * cos + y * sin, y * cos - x * sin
    phase = f["background_phase"][:, None].expand(n, pixels)
    width = torch.full_like(u, 0.06)
    kinds = {
        "plain": lambda r: torch.zeros_like(u[r]),
        "gradient": lambda r: 0.6 * (0.5 + u[r] / 4),
        "blobs": lambda r: 0.7 * _soft(_noise(u[r] * 1.3, v[r] * 1.3, phase[r]) - 0.55, width[r] * 4),
        "tiles": lambda r: 0.6 * _soft(0.06 - torch.minimum(_saw(u[r] + phase[r]), _saw(v[r])), width[r]),
        "stripes": lambda r: 0.6 * _soft(_saw(u[r] * 0.8 + phase[r]) - 0.25, width[r]),
    }
    blend = torch.zeros(n, pixels)
    for kind, pattern in kinds.items():
        rows = np.flatnonzero(scenes["background"] == kind)
        if len(rows):
            blend[rows] = pattern(rows)
    rows = np.flatnonzero(scenes["style"] == "stylized")
    if len(rows):
        # The other texture is a function of the phase, not of the neighbours in a batch.
        number = (scenes["background_phase"][rows] * len(TEXTURE_NAMES)).astype(int) % len(TEXTURE_NAMES)
        image = torch.arange(len(rows)).repeat_interleave(pixels)
        g = [(TEXTURE_FREQUENCY * a[rows]).reshape(-1) for a in (u, v)]
        w = torch.full_like(g[0], TEXTURE_FREQUENCY * DISTANCE / FOCAL)
        painted = _textured(np.array(TEXTURE_NAMES)[number], image, *g, w, phase[rows].reshape(-1))
        blend[rows] = 0.8 * painted.reshape(len(rows), pixels)
    first, second = _rgb(scenes["background_colour"]), _rgb(scenes["second_background_colour"])
    return torch.lerp(first[:, None], second[:, None], blend[:, :, None]).reshape(n, SIZE, SIZE, 3)


def _lines(depth: Tensor, normal: Tensor) -> Tensor:
    """[n, 48, 48] bool: pixels beside a jump of depth, of the mask, or a crease of the normals."""
    edge = torch.zeros(depth.shape, dtype=torch.bool)
    near = torch.where(depth.isfinite(), depth, torch.tensor(2 * DISTANCE))
    for axis in (1, 2):
        length = depth.shape[axis] - 1
        a, b = (x.narrow(axis, 0, length) for x in (near, normal))
        c, d = (x.narrow(axis, 1, length) for x in (near, normal))
        both = (a < 2 * DISTANCE) & (c < 2 * DISTANCE)
        crease = both & ((b * d).sum(dim=-1) < 0.8)
        edge.narrow(axis, 0, length).logical_or_(crease | (c - a > 0.25))
        edge.narrow(axis, 1, length).logical_or_(a - c > 0.25)
    return edge


def _sketch(colour: Tensor, depth: Tensor, normal: Tensor) -> Tensor:
    ink = _lines(depth, normal)[..., None].float()
    return (1 - 0.9 * ink).expand_as(colour)


def _cartoon(colour: Tensor, depth: Tensor, normal: Tensor) -> Tensor:
    """Two tones by the light from the upper left, black outlines."""
    lit = (normal * torch.tensor([-0.4, 0.7, 0.59])).sum(dim=-1, keepdim=True) > 0.45
    solid = depth.isfinite()[..., None]
    peak = colour.amax(dim=-1, keepdim=True).clamp(min=0.05)
    flat = torch.where(lit, colour / peak * 0.95, colour / peak * 0.65)
    return torch.where(_lines(depth, normal)[..., None], 0.03, torch.where(solid, flat, colour))


def _occlude(scenes: Mapping[str, np.ndarray], colour: Tensor, depth: Tensor, normal: Tensor, mask: Tensor) -> None:
    """An opaque grey bar from top to bottom; what it hides is no longer part of depth, normals and mask."""
    for row in np.flatnonzero(scenes["occlusion"] > 0):
        wide = max(1, round(float(scenes["occlusion"][row]) * SIZE))
        left = round(float(scenes["occlusion_at"][row]) * (SIZE - wide))
        bar = slice(left, left + wide)
        colour[row, :, bar] = 0.35
        depth[row, :, bar] = math.inf
        normal[row, :, bar] = 0
        mask[row, :, bar] = False
