"""Eleven attacks and their yardsticks, as functions on tensors: the smallest perturbation that changes an answer.

One loop serves the attacks by gradient. It follows the gradient of a loss, from the model itself or from a substitute,
by steps of a fixed share of the budget eps, and stays in the ball of radius eps around the image and in the box:

    FGSM   one step of size eps                                          Goodfellow et al. 2015
    BIM    several steps                                                 Kurakin et al. 2017
    PGD    from a random start as well, with several losses, L2 too      Madry et al. 2018; margin: Carlini, Wagner 2017
    MIM    with momentum of gradients of L1 norm 1                       Dong et al. 2018
    DIM    MIM through random resizing and padding                       Xie et al. 2019
    NES    by a gradient estimated from scores, Gaussian directions      Ilyas et al. 2018
    SPSA   the same, directions of random signs                          Uesato et al. 2018

DeepFool (Moosavi-Dezfooli et al. 2016) goes from one linearised boundary to the next, here in L-inf; `noise` is random
signs of size eps.

Every image has its own budget. Budgets ascend, and an image that is broken is not attacked again: its example lies in
all larger balls, so accuracy never rises with eps. Bisection between the last failure and the first success then
narrows the distance down. A success counts only when a plain forward pass at that very point gives another answer, and
its distance is the norm of what was added, not the budget. Random numbers belong to an image: a result depends on
neither its batch nor its shard.

An image whose gradient is zero everywhere or not finite, at which no attack by gradient says anything, is a `fault`.

Why not a library's attacks: foolbox and torchattacks attack a batch at one budget and answer with its images. Neither
has budgets for each image, reports faults, or counts queries, no foolbox attack takes gradients from another model than
it fools, and neither has NES; torchattacks pins a release of requests that other dependencies exclude. Both are
oracles of the tests.
"""

import dataclasses
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from clip_robustness.inference.attack_settings import Settings
from clip_robustness.inference.gradients import Draws, Scores, estimate

TOLERANCE = 1e-6  # of budget and box: float32 rounds a pixel by less
CLOSE = 1e-3  # bisection ends where failure and success are that near, relatively
ZERO_GRADIENT, NOT_FINITE = 1, 2  # faults


@dataclasses.dataclass
class Problem:
    """Images to attack: points [n, 3, h, w] in a box (lowest, highest), labels int64 [n], a seed for each.

    `source` is the model whose gradients are followed: the victim, or a substitute.
    """

    victim: Scores
    source: Scores
    points: Tensor
    labels: Tensor
    seeds: Sequence[int]
    box: tuple[float, float] = (0.0, 1.0)


class Outcome:
    """What is known of each image so far. `examples` holds the nearest verified example, or the image itself.

    distance: 0 where the answer is wrong already, inf where no example was found. clean, prediction: -1 for none.
    """

    def __init__(self, problem: Problem, settings: Settings):
        self.problem, self.settings = problem, settings
        n, device = len(problem.labels), problem.points.device
        self.unit = problem.points.shape[2] / settings.calibrated_size if settings.calibrated_size else 1.0
        self.examples = problem.points.clone()
        self.fault = torch.zeros(n, dtype=torch.long, device=device)
        self.queries = torch.ones_like(self.fault)
        self.prediction = torch.full_like(self.fault, -1)
        self.logits = problem.victim.logits(problem.points)
        finite = self.logits.isfinite().all(1)
        self.fault[~finite] = NOT_FINITE
        self.clean = torch.where(finite, self.logits.argmax(1), -1)
        self.distance = torch.zeros(n, device=device)
        self.distance[self.clean == problem.labels] = torch.inf

    @property
    def open(self) -> Tensor:
        """Rows that no example is known for."""
        return torch.nonzero((self.fault == 0) & self.distance.isinf())[:, 0]

    def check(self, rows: Tensor, points: Tensor, eps: Tensor) -> Tensor:
        """Ask the victim at `points`; note the examples among them, and return where they are.

        Errors: RuntimeError for a point outside its budget or the box, which is a mistake of the attack.
        """
        if not len(rows):
            return torch.zeros(0, dtype=torch.bool, device=points.device)
        sizes = self.norm(points - self.problem.points[rows])
        low, high = self.problem.box
        if (sizes > eps + TOLERANCE).any() or points.min() < low - TOLERANCE or points.max() > high + TOLERANCE:
            raise RuntimeError("an attack left its budget or the box")
        logits = self.problem.victim.logits(points)
        self.queries[rows] += 1
        finite, answers = logits.isfinite().all(1), logits.argmax(1)
        self.fault[rows[~finite]] = NOT_FINITE
        broken = finite & (answers != self.problem.labels[rows])
        nearer = broken & (sizes < self.distance[rows])
        found = rows[nearer]
        self.examples[found], self.distance[found] = points[nearer], sizes[nearer]
        self.prediction[found] = answers[nearer]
        return broken

    def norm(self, deltas: Tensor) -> Tensor:
        flat = deltas.flatten(1)
        return flat.abs().amax(1) if self.settings.norm == "linf" else flat.norm(dim=1) / self.unit

    def project(self, rows: Tensor, points: Tensor, eps: Tensor) -> Tensor:
        """Into the ball of radius eps [n] around each image, then into the box."""
        images = self.problem.points[rows]
        deltas = points - images
        if self.settings.norm == "linf":
            deltas = deltas.clamp(-_wide(eps), _wide(eps))
        else:
            deltas = deltas * _wide((eps / self.norm(deltas).clamp(min=1e-30)).clamp(max=1))
        return (images + deltas).clamp(*self.problem.box)


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def run_attack(problem: Problem, settings: Settings) -> Outcome:
    """Attack the images that the victim answers right. No fault of one image stops the others."""
    outcome = Outcome(problem, settings)
    if settings.method == "deepfool":
        _deepfool(outcome, outcome.open)
    else:
        _Search(outcome).run()
    outcome.fault[(outcome.distance > 0) & outcome.distance.isfinite()] = 0  # an example was found all the same
    return outcome


class _Search:
    """Budgets upwards, then bisection. Whatever the method, an attempt is one budget for each of some rows."""

    def __init__(self, outcome: Outcome):
        self.outcome, self.problem, self.settings = outcome, outcome.problem, outcome.settings
        self.white_box = self.problem.source is self.problem.victim
        self.first: dict[str, Tensor] = {}

    def run(self) -> None:
        outcome, settings = self.outcome, self.settings
        if settings.method != "noise":
            self._look_at_the_images(outcome.open)
        failed = torch.zeros_like(outcome.distance)
        for eps in map(settings.radius, settings.budgets):
            rows = outcome.open
            self._attempt(rows, torch.full_like(failed[rows], eps))
            failed[outcome.open] = eps
        for _ in range(settings.bisections):
            known = outcome.distance.isfinite() & (outcome.distance > failed * (1 + CLOSE))
            rows = torch.nonzero(known)[:, 0]
            middle = (failed[rows] + outcome.distance[rows]) / 2
            broken = self._attempt(rows, middle)
            failed[rows[~broken]] = middle[~broken]

    def _look_at_the_images(self, rows: Tensor) -> None:
        """Gradients at the images, where attacks of every budget begin; what is wrong with them is a fault."""
        draws = Draws([self.problem.seeds[row] for row in rows.tolist()], self.problem.points.device)
        everyone = torch.arange(len(rows), device=rows.device)
        images = self.problem.points[rows]
        zero, finite = torch.ones_like(everyone, dtype=torch.bool), torch.ones_like(everyone, dtype=torch.bool)
        for loss in self.settings.losses if len(rows) else ():
            gradient, _ = self._direction(rows, everyone, images, loss, draws, plain=True)
            self.first[loss] = torch.zeros_like(self.problem.points).index_copy_(0, rows, gradient)
            zero &= (gradient == 0).flatten(1).all(1)
            finite &= gradient.isfinite().flatten(1).all(1)
        self.outcome.fault[rows[zero]] = ZERO_GRADIENT
        self.outcome.fault[rows[~finite]] = NOT_FINITE

    def _attempt(self, rows: Tensor, eps: Tensor) -> Tensor:
        """Attack `rows` within eps [n] each; where an example was found."""
        # The same numbers at every budget, other ones than at first sight.
        draws = Draws([self.problem.seeds[row] + 1 for row in rows.tolist()], self.problem.points.device)
        broken = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if not len(rows):
            return broken
        images = self.problem.points[rows]
        if self.settings.method == "noise":
            signs = torch.stack([draws.signs(i, images.shape[1:]) for i in range(len(rows))])
            points = self.outcome.project(rows, images + _wide(eps) * signs, eps)
            return self.outcome.check(rows, points, eps)
        for start in self.settings.starts:
            for loss in self.settings.losses:
                left = torch.nonzero(~broken)[:, 0]
                if not len(left):
                    return broken
                broken[left] = self._ascend(rows, left, eps, start == "random", loss, draws)
        return broken

    def _ascend(self, rows: Tensor, left: Tensor, eps: Tensor, random: bool, loss: str, draws: Draws) -> Tensor:
        """The loop, for `left` of `rows`; where it found an example. With a substitute, the victim is asked once."""
        settings, outcome = self.settings, self.outcome
        points = self.problem.points[rows]
        if random:
            points[left] = self._random(rows, left, eps, draws)
        momentum = torch.zeros_like(points)
        broken = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        plain = self.white_box and settings.method == "gradient" and not settings.diversity
        active = left

        def ask(some: Tensor) -> None:
            broken[some] = outcome.check(rows[some], points[some], eps[some])

        for step in range(settings.steps + 1):
            last, moved = step == settings.steps, step > 0 or random
            if last or (moved and self.white_box and not plain):
                ask(active)
                active = active[~broken[active]]
            if last or not len(active):
                break
            if moved or settings.diversity:
                gradient, logits = self._direction(rows, active, points[active], loss, draws)
            else:
                gradient, logits = self.first[loss][rows[active]], None
            if plain and logits is not None:  # the pass for the gradient has told the answers too
                ask(active[logits.argmax(1) != self.problem.labels[rows[active]]])
            finite = gradient.isfinite().flatten(1).all(1)
            outcome.fault[rows[active[~finite]]] = NOT_FINITE
            keep = finite & ~broken[active]
            active, gradient = active[keep], gradient[keep]
            scale = gradient.abs().flatten(1).sum(1).clamp(min=torch.finfo(gradient.dtype).tiny)
            momentum[active] = settings.decay * momentum[active] + gradient / _wide(scale)
            moves = momentum[active].sign()
            if settings.norm == "l2":
                lengths = outcome.norm(momentum[active])
                moves = momentum[active] / _wide(lengths.clamp(min=1e-30))
            there = points[active] + _wide(settings.step * eps[active]) * moves
            points[active] = outcome.project(rows[active], there, eps[active])
        return broken[left]

    def _random(self, rows: Tensor, left: Tensor, eps: Tensor, draws: Draws) -> Tensor:
        """Uniform in the L-inf ball; on the sphere of the L2 ball, where nearly all of its volume is."""
        shape = self.problem.points.shape[1:]
        draw = draws.uniform if self.settings.norm == "linf" else draws.normal
        deltas = torch.stack([draw(i, shape) for i in left.tolist()])
        radius = eps[left] if self.settings.norm == "linf" else eps[left] / self.outcome.norm(deltas)
        return self.outcome.project(rows[left], self.problem.points[rows[left]] + _wide(radius) * deltas, eps[left])

    def _direction(
        self, rows: Tensor, some: Tensor, points: Tensor, loss: str, draws: Draws, plain: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """(gradient of the loss at `points` of `some` of `rows`, or its estimate; logits there if it told them)."""
        labels = self.problem.labels[rows[some]]
        if self.settings.method == "score":
            self.outcome.queries[rows[some]] += 2 * self.settings.pairs
            draw = draws.normal if self.settings.directions == "gaussian" else draws.signs
            numbers = (self.settings.pairs, self.settings.sigma)
            estimates = [
                estimate(self.problem.victim, point, label, functools.partial(draw, row), *numbers)
                for point, label, row in zip(points, labels, some.tolist(), strict=True)
            ]
            return torch.stack(estimates), None
        self.outcome.queries[rows[some]] += self.white_box
        places, diversity = None, 0.0 if plain else self.settings.diversity
        if diversity:
            size = (points.shape[2], points.shape[3])
            places = draws.places(some.tolist(), size, diversity, self.settings.smallest)
        gradient, logits = self.problem.source.gradient(points, labels, loss, places)
        return gradient, None if diversity else logits


def _deepfool(outcome: Outcome, rows: Tensor) -> None:
    """For `rows`, L-inf: the nearest of the linearised boundaries, again and again, until the answer changes.

    As in the paper, the overshoot is no part of the iteration: what is tested lies beyond the point reached. Released
    code linearises at the overshot point; that creeps up to a boundary that bends away, and may never cross it.
    """
    problem, settings = outcome.problem, outcome.settings
    images, labels = problem.points[rows], problem.labels[rows]
    others = outcome.logits[rows].scatter(1, labels[:, None], -torch.inf)
    ranked = others.topk(min(settings.classes, others.shape[1]) - 1, 1).indices
    total, active = torch.zeros_like(images), torch.arange(len(rows), device=rows.device)

    def beyond(some: Tensor, factor: float) -> Tensor:
        return (images[some] + factor * total[some]).clamp(*problem.box)

    for step in range(settings.steps):
        if not len(active):
            return
        apart, gradients = problem.victim.differences(beyond(active, 1), labels[active], ranked[active])
        outcome.queries[rows[active]] += 1
        lengths = gradients.abs().flatten(2).sum(2)
        finite, zero = (lengths.isfinite() & apart.isfinite()).all(1), (lengths == 0).all(1)
        outcome.fault[rows[active[~finite]]] = NOT_FINITE
        if step == 0:
            outcome.fault[rows[active[finite & zero]]] = ZERO_GRADIENT
        keep = torch.nonzero(finite & ~zero)[:, 0]
        active, apart, gradients, lengths = active[keep], apart[keep], gradients[keep], lengths[keep]
        distances = torch.where(lengths > 0, apart.abs() / lengths, torch.inf)
        nearest = distances.argmin(1)
        everyone = torch.arange(len(active), device=rows.device)
        total[active] += _wide(distances[everyone, nearest]) * gradients[everyone, nearest].sign()
        anywhere = torch.full_like(distances[:, 0], torch.inf)
        broken = outcome.check(rows[active], beyond(active, 1 + settings.overshoot), anywhere)
        active = active[~broken & (outcome.fault[rows[active]] == 0)]
