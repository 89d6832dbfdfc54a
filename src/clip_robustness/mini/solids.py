"""Signed distance functions of the solids, each about two units across, standing upright with y up.

A function takes points [n, 3] and returns a lower bound of the distance to the surface [n], negative inside:
all that sphere tracing asks for (Hart 1996, "Sphere tracing").
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def _box(p: Tensor, x: float, y: float, z: float) -> Tensor:
    q = p.abs() - p.new_tensor([x, y, z])
    return q.clamp(min=0).norm(dim=1) + q.amax(dim=1).clamp(max=0)


def _radius(p: Tensor) -> Tensor:
    return (p[:, 0] ** 2 + p[:, 2] ** 2).sqrt()


def _tapered(r: Tensor, y: Tensor, base: float, bottom: float, top: float) -> Tensor:
    """A cone or pyramid: `r` is the distance from the axis in the norm that makes the base round or square."""
    height = top - bottom
    slant = math.hypot(base, height)
    return torch.maximum((r * height + (y - top) * base) / slant, bottom - y)


def sphere(p: Tensor) -> Tensor:
    return p.norm(dim=1) - 0.85


def cube(p: Tensor) -> Tensor:
    return _box(p, 0.65, 0.65, 0.65)


def cone(p: Tensor) -> Tensor:
    return _tapered(_radius(p), p[:, 1], 0.85, -0.75, 1.0)


def pyramid(p: Tensor) -> Tensor:
    return _tapered(torch.maximum(p[:, 0].abs(), p[:, 2].abs()), p[:, 1], 0.8, -0.65, 0.85)


def cylinder(p: Tensor) -> Tensor:
    return torch.maximum(_radius(p) - 0.55, p[:, 1].abs() - 0.85)


def capsule(p: Tensor) -> Tensor:
    """Lies along x, so that it cannot be taken for the standing cylinder."""
    x = (p[:, 0].abs() - 0.6).clamp(min=0)
    return (x**2 + p[:, 1] ** 2 + p[:, 2] ** 2).sqrt() - 0.42


def torus(p: Tensor) -> Tensor:
    """Stands like a wheel: its hole is seen from the canonical side."""
    ring = (p[:, 0] ** 2 + p[:, 1] ** 2).sqrt() - 0.65
    return (ring**2 + p[:, 2] ** 2).sqrt() - 0.27


def octahedron(p: Tensor) -> Tensor:
    return (p.abs().sum(dim=1) - 1.1) / math.sqrt(3)


def cross(p: Tensor) -> Tensor:
    return torch.minimum(_box(p, 0.95, 0.3, 0.3), _box(p, 0.3, 0.95, 0.3))


def star(p: Tensor) -> Tensor:
    """A five-pointed star, a thick plate facing z."""
    sector = 2 * math.pi / 5
    angle = torch.atan2(p[:, 0], p[:, 1])
    angle = (torch.remainder(angle + sector / 2, sector) - sector / 2).abs()
    r = (p[:, 0] ** 2 + p[:, 1] ** 2).sqrt()
    x, y = r * angle.sin(), r * angle.cos()
    # The edge from the tip (0, 1.05) to the notch at the sector's border.
    notch_x, notch_y = 0.42 * math.sin(sector / 2), 0.42 * math.cos(sector / 2)
    edge_x, edge_y = notch_x, notch_y - 1.05
    flat = ((x * -edge_y) + (y - 1.05) * edge_x) / math.hypot(edge_x, edge_y)
    return torch.maximum(flat, p[:, 2].abs() - 0.25)


def arch(p: Tensor) -> Tensor:
    body = _box(p, 0.85, 0.8, 0.4)
    round_top = (p[:, 0] ** 2 + (p[:, 1] + 0.05).clamp(min=0) ** 2).sqrt() - 0.48
    return torch.maximum(body, -round_top)


def hourglass(p: Tensor) -> Tensor:
    half = (_radius(p) - 0.16 - 0.72 * p[:, 1].abs()) / math.hypot(1, 0.72)
    return torch.maximum(half, p[:, 1].abs() - 0.85)


def bowl(p: Tensor) -> Tensor:
    q = p - p.new_tensor([0.0, 0.35, 0.0])
    return torch.maximum((q.norm(dim=1) - 0.8).abs() - 0.08, q[:, 1])


def moon(p: Tensor) -> Tensor:
    r = (p[:, 0] ** 2 + p[:, 1] ** 2).sqrt()
    bite = ((p[:, 0] - 0.45) ** 2 + p[:, 1] ** 2).sqrt() - 0.7
    return torch.maximum(torch.maximum(r - 0.95, -bite), p[:, 2].abs() - 0.25)


def stairs(p: Tensor) -> Tensor:
    steps = [p.new_tensor([x, y, 0.0]) for x, y in ((0.0, -0.5), (0.25, 0.0), (0.5, 0.5))]
    halves = (0.75, 0.5, 0.25)
    boxes = [_box(p - c, h, 0.25, 0.55) for c, h in zip(steps, halves, strict=True)]
    return torch.stack(boxes).amin(dim=0)


def table(p: Tensor) -> Tensor:
    top = _box(p - p.new_tensor([0.0, 0.55, 0.0]), 0.85, 0.13, 0.6)
    leg = torch.stack([p[:, 0].abs() - 0.68, p[:, 1] + 0.15, p[:, 2].abs() - 0.43], dim=1)
    return torch.minimum(top, _box(leg, 0.12, 0.65, 0.12))


SOLIDS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {  # with the radius of a sphere around it
    "sphere": (sphere, 0.86),
    "cube": (cube, 1.13),
    "cone": (cone, 1.14),
    "torus": (torus, 0.93),
    "cylinder": (cylinder, 1.02),
    "capsule": (capsule, 1.03),
    "pyramid": (pyramid, 1.31),
    "octahedron": (octahedron, 1.11),
    "cross": (cross, 1.05),
    "star": (star, 1.09),
    "arch": (arch, 1.24),
    "hourglass": (hourglass, 1.16),
    # No class of the mini label space: what a classifier has never seen.
    "bowl": (bowl, 0.96),
    "moon": (moon, 0.99),
    "stairs": (stairs, 1.2),
    "table": (table, 1.25),
}
