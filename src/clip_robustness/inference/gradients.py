"""Gradients with respect to pixels, exact or estimated from scores, and the random numbers that attacks draw."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from clip_robustness.inference.embed import Batches


class Scores(Batches):
    """Logits of points [n, 3, h, w] and their gradients, in batches that shrink when memory runs out."""

    def __init__(self, logits: Callable[[Tensor], Tensor], device: torch.device, batch_size: int):
        super().__init__(device, batch_size)
        self._logits = logits

    @torch.no_grad()
    def logits(self, points: Tensor) -> Tensor:
        return torch.cat(self.run(self._logits, points))

    def gradient(self, points: Tensor, labels: Tensor, loss: str, places: Tensor | None) -> tuple[Tensor, Tensor]:
        """(gradient of the loss at each point, logits there), through `diverse` where there are `places`."""

        def one(points: Tensor, labels: Tensor, *places: Tensor) -> tuple[Tensor, Tensor]:
            points = points.detach().requires_grad_()
            logits = self._logits(diverse(points, *places) if places else points)
            return _grad(loss_of(logits, labels, loss).sum(), points), logits.detach()

        parts = self.run(one, points, labels, *([] if places is None else [places]))
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])

    def differences(self, points: Tensor, labels: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        """(logits of classes `others` [n, k] less the label's [n, k], their gradients [n, k, 3, h, w])."""

        def one(points: Tensor, labels: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
            points = points.detach().requires_grad_()
            logits = self._logits(points)
            apart = logits.gather(1, others) - logits.gather(1, labels[:, None])
            gradients = [_grad(column.sum(), points, retain_graph=True) for column in apart.unbind(1)]
            return apart.detach(), torch.stack(gradients, 1)

        parts = self.run(one, points, labels, others)
        return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


def _grad(value: Tensor, points: Tensor, **options: Any) -> Tensor:
    """Zero where the value does not depend on the points."""
    found = torch.autograd.grad(value, points, allow_unused=True, **options)[0] if value.requires_grad else None
    return torch.zeros_like(points) if found is None else found


def loss_of(logits: Tensor, labels: Tensor, loss: str) -> Tensor:
    """[n]: cross entropy, or the margin max_{j != y} z_j - z_y, which is positive where the answer is wrong."""
    if loss == "cross_entropy":
        return functional.cross_entropy(logits, labels, reduction="none")
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - logits.gather(1, labels[:, None])[:, 0]


def diverse(points: Tensor, places: Tensor) -> Tensor:
    """Each image resized (bilinear) to height and width and padded with zeros: places [n, 4] = (h, w, top, left)."""
    height, width = points.shape[2:]
    images = []
    for point, (h, w, top, left) in zip(points, places.tolist(), strict=True):
        small = functional.interpolate(point[None], size=(h, w), mode="bilinear", align_corners=False)
        images.append(functional.pad(small, (left, width - w - left, top, height - h - top)))
    return torch.cat(images)


class Draws:
    """Random numbers of each image, from a generator of its own."""

    def __init__(self, seeds: Sequence[int], device: torch.device):
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        self._device = device

    def signs(self, row: int, shape: Sequence[int]) -> Tensor:
        drawn = torch.randint(0, 2, tuple(shape), generator=self._generators[row], device=self._device)
        return drawn.float().mul_(2).sub_(1)

    def normal(self, row: int, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self._generators[row], device=self._device)

    def uniform(self, row: int, shape: Sequence[int]) -> Tensor:
        """In [-1, 1)."""
        return torch.rand(tuple(shape), generator=self._generators[row], device=self._device) * 2 - 1

    def places(self, rows: Sequence[int], size: tuple[int, int], probability: float, smallest: float) -> Tensor:
        """What `diverse` takes [n, 4]: with that probability a height in [smallest h, h], anywhere inside."""
        height, width = size
        found = []
        for row in rows:
            sides, x, y, often = torch.rand(4, generator=self._generators[row], device=self._device).tolist()
            least = math.ceil(smallest * height)
            h = least + int(sides * (height - least + 1)) if often < probability else height
            w = round(width * h / height)
            found.append([h, w, int(y * (height - h + 1)), int(x * (width - w + 1))])
        return torch.tensor(found)


def estimate(
    scores: Scores, point: Tensor, label: Tensor, draw: Callable[..., Tensor], pairs: int, sigma: float
) -> Tensor:
    """The gradient of the margin at one point [3, h, w], from 2 `pairs` forward passes (antithetic pairs).

    Mean over directions u = draw(shape) of (f(x + sigma u) - f(x - sigma u)) / (2 sigma) u: NES where u is Gaussian,
    SPSA where it has random signs.
    """
    total, at_once = torch.zeros_like(point), max(1, scores.batch_size // 2)
    for start in range(0, pairs, at_once):
        # One by one, so that the numbers do not depend on how many fit into a batch.
        several = range(min(at_once, pairs - start))
        u = torch.stack([draw(point.shape) for _ in several])
        points = torch.cat([point + sigma * u, point - sigma * u])
        losses = loss_of(scores.logits(points), label.expand(len(points)), "margin")
        total += torch.einsum("n,nchw->chw", losses[: len(u)] - losses[len(u) :], u)
    return total / (2 * sigma * pairs)
