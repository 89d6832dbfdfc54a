"""The camera of the mini world.

It sits at the origin and looks along -z, x to the right and y up; the solid stands DISTANCE away. So a point that
is drawn at column i, row j has x = (i + 0.5 - SIZE / 2) / FOCAL * depth and y = (SIZE / 2 - j - 0.5) / FOCAL * depth.
"""

import torch
from torch import Tensor

SIZE = 48  # pixels
DISTANCE = 5.0  # world units
FOCAL = SIZE * DISTANCE / 3.0  # pixels; the image is 3 world units wide at the solid's distance


def rotation(yaw: Tensor, elevation: Tensor, roll: Tensor) -> Tensor:
    """Object to camera [n, 3, 3]: yaw about y, then the camera's elevation about x, then roll about z."""
    cy, sy, ce, se, cr, sr = (g(a.deg2rad()) for a in (yaw, elevation, roll) for g in (torch.cos, torch.sin))
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)

    def matrix(*rows: Tensor) -> Tensor:
        return torch.stack(rows, dim=1).reshape(-1, 3, 3)

    about_y = matrix(cy, zero, sy, zero, one, zero, -sy, zero, cy)
    about_x = matrix(one, zero, zero, zero, ce, -se, zero, se, ce)
    about_z = matrix(cr, -sr, zero, sr, cr, zero, zero, zero, one)
    return about_z @ about_x @ about_y


def rays_of_pixels() -> Tensor:
    """Unit directions [48 * 48, 3] through the pixels' centres."""
    at = (torch.arange(SIZE) + 0.5 - SIZE / 2) / FOCAL
    y, x = torch.meshgrid(-at, at, indexing="ij")
    through = torch.stack([x, y, -torch.ones_like(x)], dim=-1).reshape(-1, 3)
    return through / through.norm(dim=1, keepdim=True)


def screen(pixel: Tensor) -> tuple[Tensor, Tensor]:
    """World coordinates, at the solid's distance, of pixel numbers."""
    unit = DISTANCE / FOCAL
    return (pixel % SIZE + 0.5 - SIZE / 2) * unit, (SIZE / 2 - 0.5 - pixel // SIZE) * unit
