"""What is painted rather than traced: textures' blends, backgrounds, line drawings, cartoons, occluding bars."""

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from clip_robustness.mini.camera import DISTANCE, FOCAL, SIZE, screen
from clip_robustness.mini.textures import TEXTURES, noise, saw, soft
from clip_robustness.mini.world import COLOURS, NO_TEXTURE, TEXTURE_NAMES

TEXTURE_FREQUENCY = 2.0  # periods a world unit


def rgb(names: np.ndarray) -> Tensor:
    """[n, 3] in 0..1."""
    return torch.tensor(np.array([COLOURS[name] for name in names]), dtype=torch.float32)


def textured(names: np.ndarray, image: Tensor, u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    """The blend [m] of points u, v [m], each with its image's texture; `names` [n], `image` [m] says whose it is."""
    blend = torch.zeros_like(u)
    kinds = list(TEXTURES)
    kind = torch.tensor([kinds.index(name) for name in names])[image]
    for number in kind.unique().tolist():
        rows = kind == number
        if kinds[number] != NO_TEXTURE:
            blend[rows] = TEXTURES[kinds[number]](u[rows], v[rows], w[rows], phase[rows])
    return blend


def background(scenes: Mapping[str, np.ndarray], f: Mapping[str, Tensor]) -> Tensor:
    """[n, 48, 48, 3]. Behind a stylized solid stands a second texture, unrelated to the solid and to its texture."""
    n, pixels = len(scenes["label"]), SIZE * SIZE
    x, y = screen(torch.arange(pixels))
    cos, sin = f["background_angle"].cos()[:, None], f["background_angle"].sin()[:, None]
    u, v = x * cos + y * sin, y * cos - x * sin
    phase = f["background_phase"][:, None].expand(n, pixels)
    width = torch.full_like(u, 0.06)
    kinds = {
        "plain": lambda r: torch.zeros_like(u[r]),
        "gradient": lambda r: 0.6 * (0.5 + u[r] / 4),
        "blobs": lambda r: 0.7 * soft(noise(u[r] * 1.3, v[r] * 1.3, phase[r]) - 0.55, width[r] * 4),
        "tiles": lambda r: 0.6 * soft(0.06 - torch.minimum(saw(u[r] + phase[r]), saw(v[r])), width[r]),
        "stripes": lambda r: 0.6 * soft(saw(u[r] * 0.8 + phase[r]) - 0.25, width[r]),
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
        across, down = ((TEXTURE_FREQUENCY * a[rows]).reshape(-1) for a in (u, v))
        w = torch.full_like(across, TEXTURE_FREQUENCY * DISTANCE / FOCAL)
        names = np.array(TEXTURE_NAMES)[number]
        painted = textured(names, image, across, down, w, phase[rows].reshape(-1))
        blend[rows] = 0.8 * painted.reshape(len(rows), pixels)
    first, second = rgb(scenes["background_colour"]), rgb(scenes["second_background_colour"])
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


def sketch(colour: Tensor, depth: Tensor, normal: Tensor) -> Tensor:
    """Black on white; a pixel beside a line is grey, as a pen two pixels wide leaves it."""
    ink = _lines(depth, normal).float()[:, None]
    beside = torch.nn.functional.max_pool2d(ink, 3, stride=1, padding=1)
    return (1 - 0.35 * ink - 0.6 * beside)[:, 0, :, :, None].expand_as(colour)


def cartoon(colour: Tensor, depth: Tensor, normal: Tensor) -> Tensor:
    """Two tones by the light from the upper left, black outlines."""
    lit = (normal * torch.tensor([-0.4, 0.7, 0.59])).sum(dim=-1, keepdim=True) > 0.45
    solid = depth.isfinite()[..., None]
    peak = colour.amax(dim=-1, keepdim=True).clamp(min=0.05)
    flat = torch.where(lit, colour / peak * 0.95, colour / peak * 0.65)
    return torch.where(_lines(depth, normal)[..., None], 0.03, torch.where(solid, flat, colour))


def occlude(scenes: Mapping[str, np.ndarray], colour: Tensor, depth: Tensor, normal: Tensor, mask: Tensor) -> None:
    """An opaque grey bar from top to bottom; what it hides is no longer part of depth, normals and mask."""
    for row in np.flatnonzero(scenes["occlusion"] > 0):
        wide = max(1, round(float(scenes["occlusion"][row]) * SIZE))
        left = round(float(scenes["occlusion_at"][row]) * (SIZE - wide))
        bar = slice(left, left + wide)
        colour[row, :, bar] = 0.35
        depth[row, :, bar] = math.inf
        normal[row, :, bar] = 0
        mask[row, :, bar] = False
