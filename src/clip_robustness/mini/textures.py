"""Procedural textures: functions of the plane with values in 0..1 that blend a solid's two colours.

A function takes u, v [n] in periods of the texture, the blur w [n] (a pixel's width in periods, so that edges are
soft and do not alias) and a phase [n] in 0..1 that seeds what is random.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def soft(x: Tensor, w: Tensor) -> Tensor:
    """0 below, 1 above zero, linear over a pixel."""
    return (x / w + 0.5).clamp(0, 1)


def saw(x: Tensor) -> Tensor:
    """Distance to the nearest whole number: 0 at each, 0.5 between."""
    return (x - x.round()).abs()


def _hash(i: Tensor, j: Tensor, phase: Tensor) -> Tensor:
    """A value in 0..1 for each lattice cell; whole numbers and doubles keep it the same on every machine."""
    mixed = i.double() * 127.1 + j.double() * 311.7 + (phase * 64).floor().double() * 74.7
    return torch.remainder(torch.sin(mixed) * 43758.5453, 1.0).float()


def noise(u: Tensor, v: Tensor, phase: Tensor) -> Tensor:
    """Smooth value noise."""
    i, j = u.floor(), v.floor()
    a, b = u - i, v - j
    a, b = a * a * (3 - 2 * a), b * b * (3 - 2 * b)
    low = _hash(i, j, phase) * (1 - a) + _hash(i + 1, j, phase) * a
    high = _hash(i, j + 1, phase) * (1 - a) + _hash(i + 1, j + 1, phase) * a
    return low * (1 - b) + high * b


def striped(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    return soft(saw(v) - 0.25, w)


def diagonal(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    return soft(saw((u + v) * math.sqrt(0.5)) - 0.25, w)


def checkered(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    a, b = 0.25 - saw(u * 0.8), 0.25 - saw(v * 0.8)
    return soft(torch.sign(a * b) * torch.minimum(a.abs(), b.abs()), w)


def dotted(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    return soft(0.3 - ((u - u.round()) ** 2 + (v - v.round()) ** 2).sqrt(), w)


def gridded(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    return soft(0.14 - torch.minimum(saw(u * 0.8), saw(v * 0.8)), w)


def zigzag(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    return soft(saw(v * 0.9 + 1.3 * saw(u * 0.7)) - 0.25, w)


def bricked(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    row = v.round()
    joint = torch.minimum(0.5 - saw(v), (0.5 - saw(u * 0.5 + 0.5 * torch.remainder(row, 2))) * 2)
    return soft(joint - 0.12, w)


def ringed(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    return soft(saw((u**2 + v**2).sqrt()) - 0.25, w)


def blotchy(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    return soft(noise(u * 0.9, v * 0.9, phase) - 0.5, w * 2)


def speckled(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    return (_hash((u * 2.6).floor(), (v * 2.6).floor(), phase) > 0.72).float()


def plaid(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    across, down = soft(saw(u * 0.6) - 0.25, w), soft(saw(v * 0.6) - 0.25, w)
    return 0.5 * across + 0.5 * down


def banded(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    """One broad band around the middle."""
    return soft(0.65 - v.abs(), w)


def marbled(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    return 0.5 + 0.5 * torch.sin(2 * math.pi * (0.5 * u + 1.6 * noise(u * 0.6, v * 0.6, phase)))


def scaly(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    row = v.floor()
    across = u + 0.5 * torch.remainder(row, 2)
    return soft(((across - across.round()) ** 2 + (v - row) ** 2).sqrt() - 0.55, w)


def woven(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    even = torch.remainder(u.floor() + v.floor(), 2) > 0.5
    return soft(saw(torch.where(even, u, v) * 2) - 0.25, w * 2)


def plain(u: Tensor, v: Tensor, w: Tensor, phase: Tensor) -> Tensor:
    return torch.zeros_like(u)


TEXTURES: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    f.__name__: f
    for f in (
        *(striped, checkered, dotted, zigzag, gridded, blotchy, banded, diagonal, ringed, bricked, plaid, speckled),
        *(marbled, scaly, woven, plain),
    )
}
