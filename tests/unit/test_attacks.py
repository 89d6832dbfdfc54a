"""Attacks on small models: budgets and boxes, exact answers of linear models, and foolbox's trajectories."""

import functools

import foolbox
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from clip_robustness.core.io import InputError
from clip_robustness.core.schema import load_yaml, schema
from clip_robustness.inference import gradients
from clip_robustness.inference.attack_settings import Settings
from clip_robustness.inference.attacks import NOT_FINITE, TOLERANCE, ZERO_GRADIENT, Problem, run_attack
from clip_robustness.inference.gradients import Draws, Scores
from clip_robustness.inference.victims import SPACES, in_space, to_space

CPU = torch.device("cpu")
SIZE = 12
CLASSES = 5
BUDGETS = (1.0, 2.0, 4.0, 8.0, 16.0)
KINDS = {
    "fgsm": {"method": "gradient", "steps": 1, "step": 1},
    "bim": {"method": "gradient"},
    "mim": {"method": "gradient", "decay": 1.0},
    "dim": {"method": "gradient", "decay": 1.0, "diversity": 0.5},
    "pgd": {"method": "gradient", "losses": ["cross_entropy", "margin"], "starts": ["clean", "random"]},
    "deepfool": {"method": "deepfool", "steps": 50},
    "nes": {"method": "score", "pairs": 20},
    "spsa": {"method": "score", "pairs": 20, "directions": "signs"},
    "noise": {"method": "noise"},
}
L2 = {
    "method": "gradient",
    "norm": "l2",
    "step": 0.1,
    "steps": 20,
    "starts": ["clean", "random"],
    "budgets": [0.1, 0.5],
}


def settings(kind="bim", **more):
    given = {"budgets": list(BUDGETS), "reported": BUDGETS[0], **KINDS.get(kind, {}), **more}
    return Settings.parse(kind, {**given, "reported": given["budgets"][0]})


def small_net(seed=0, gain=8.0):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2), nn.Tanh(), nn.Flatten()]
    net = nn.Sequential(*layers, nn.LazyLinear(CLASSES)).eval()
    net(torch.zeros(1, 3, SIZE, SIZE))
    return lambda points: gain * net.requires_grad_(False)(points - 0.5)


def linear_net(seed=0):
    """(model, weight [K, 3 SIZE SIZE], bias [K])."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(CLASSES, 3 * SIZE * SIZE, generator=generator)
    bias = torch.randn(CLASSES, generator=generator)
    return lambda points: points.flatten(1) @ weight.T + bias, weight, bias


def make(model, n=24, source=None, low=0.0, high=1.0, batch_size=64, wrong=0):
    """A problem whose labels are the model's own answers, but for the first `wrong`."""
    points = torch.rand(n, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) * (high - low) + low
    victim = Scores(model, CPU, batch_size)
    labels = victim.logits(points).argmax(1)
    labels[:wrong] = (labels[:wrong] + 1) % CLASSES
    substitute = victim if source is None else Scores(source, CPU, batch_size)
    return Problem(victim, substitute, points, labels, list(range(100, 100 + n)))


def part(problem, rows, batch_size=64):
    victim = Scores(problem.victim._logits, CPU, batch_size)
    return Problem(victim, victim, problem.points[rows], problem.labels[rows], [problem.seeds[i] for i in rows])


# Budgets and verification


@pytest.mark.parametrize("kind", [*KINDS, "l2"])
def test_examples_lie_within_budget_and_box_and_change_the_answer(kind):
    problem = make(small_net(), wrong=3)
    made = settings("l2", **L2) if kind == "l2" else settings(kind)
    outcome = run_attack(problem, made)
    deltas = (outcome.examples - problem.points).flatten(1)
    sizes = deltas.abs().amax(1) if made.norm == "linf" else deltas.norm(dim=1)
    found = outcome.distance.isfinite() & (outcome.distance > 0)
    assert found.sum() > (2 if kind == "noise" else 10)
    assert torch.allclose(sizes[found], outcome.distance[found], atol=1e-7)
    if kind != "deepfool":
        assert sizes.max() <= made.radius(made.budgets[-1]) + TOLERANCE
    assert outcome.examples.min() >= -TOLERANCE and outcome.examples.max() <= 1 + TOLERANCE
    answers = problem.victim.logits(outcome.examples).argmax(1)
    assert (answers[found] != problem.labels[found]).all() and (answers[found] == outcome.prediction[found]).all()
    assert (outcome.distance[:3] == 0).all() and (outcome.queries[:3] == 1).all()  # wrong already: left alone
    assert (outcome.prediction[~found] == -1).all() and not outcome.fault.any()


@pytest.mark.parametrize("kind", ["fgsm", "bim", "noise", "nes"])
def test_an_image_that_one_budget_breaks_is_broken_at_all_larger_ones(kind):
    problem = make(small_net())
    whole = run_attack(problem, settings(kind, bisections=0)).distance
    for budget in BUDGETS:
        alone = run_attack(problem, settings(kind, budgets=[budget], bisections=0)).distance
        assert (whole[alone.isfinite()] <= budget / 255 + TOLERANCE).all()
    shares = [(whole <= budget / 255 + TOLERANCE).float().mean() for budget in BUDGETS]
    assert shares == sorted(shares) and shares[0] < shares[-1]


def test_bisection_narrows_the_distance_and_keeps_what_it_knows():
    problem = make(small_net())
    coarse, fine = (run_attack(problem, settings("bim", bisections=n)).distance for n in (0, 8))
    known = coarse.isfinite()
    assert torch.equal(known, fine.isfinite()) and (fine <= coarse).all()
    assert (fine[known] < 0.95 * coarse[known]).float().mean() > 0.7


def test_strong_attacks_need_less_than_weak_ones():
    problem = make(small_net(), n=40)
    distance = {kind: run_attack(problem, settings(kind)).distance for kind in KINDS}
    median = {kind: float(values.median()) for kind, values in distance.items()}
    assert median["pgd"] <= median["bim"] <= median["fgsm"] < median["noise"]
    assert median["nes"] < median["noise"] and median["spsa"] < median["noise"]
    assert float((distance["pgd"] <= distance["fgsm"] * 1.02).float().mean()) > 0.9


def test_a_transfer_lies_between_white_box_and_noise_and_asks_the_victim_once_a_budget():
    victim, other, noise = small_net(0), small_net(1), torch.Generator().manual_seed(0)
    mixed = lambda points: 0.6 * victim(points) + 0.4 * other(points) + torch.randn(1, generator=noise)  # noqa: E731
    given = settings("bim", substitute=True, bisections=0)
    transferred = run_attack(make(victim, source=mixed), given)
    white, random = (run_attack(make(victim), settings(kind, bisections=0)).distance for kind in ("bim", "noise"))
    broken = [int((values <= 4 / 255 + TOLERANCE).sum()) for values in (white, transferred.distance, random)]
    assert broken[0] > broken[1] > broken[2]
    tried = torch.tensor([sum(b / 255 <= d + TOLERANCE for b in BUDGETS) for d in transferred.distance.tolist()])
    assert (transferred.queries <= 1 + tried + 1).all() and transferred.queries.max() == 1 + len(BUDGETS)


# Exact answers


def least_distance(problem, weight, bias, p):
    """Of a linear model, where the box does not matter: min over classes of the gap over the dual norm."""
    logits = problem.points.flatten(1).double() @ weight.T.double() + bias.double()
    best = []
    for z, label in zip(logits, problem.labels, strict=True):
        apart = weight.double() - weight[label].double()
        others = [k for k in range(CLASSES) if k != label]
        best.append(min(float((z[label] - z[k]) / apart[k].norm(p=p)) for k in others))
    return torch.tensor(best)


def test_deepfool_meets_the_least_distance_of_a_linear_model():
    model, weight, bias = linear_net()
    problem = make(model, n=40, low=0.4, high=0.6)
    least = least_distance(problem, weight, bias, p=1)
    outcome = run_attack(problem, settings("deepfool"))
    assert (outcome.distance >= least * (1 - 1e-4)).all()
    assert (outcome.distance <= least * 1.02 + 1e-6).all()
    assert (outcome.queries == 3).all()  # clean, one linearisation, the check


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "deepfool"])
def test_no_attack_beats_the_least_distance_of_a_linear_model(kind):
    model, weight, bias = linear_net()
    problem = make(model, n=30, low=0.4, high=0.6)
    least = least_distance(problem, weight, bias, p=1)
    distance = run_attack(problem, settings(kind, budgets=[1, 4, 16], bisections=10)).distance
    assert (distance >= least * (1 - 1e-4)).all()
    if kind == "pgd":
        assert (distance <= least * 1.05).all()


def test_the_l2_attack_meets_the_least_distance_of_a_linear_model():
    model, weight, bias = linear_net()
    problem = make(model, n=30, low=0.4, high=0.6)
    least = least_distance(problem, weight, bias, p=2)
    given = {"budgets": [0.1, 0.2, 0.4, 0.8, 1.6], "losses": ["margin", "cross_entropy"], "bisections": 10}
    distance = run_attack(problem, settings("l2", **{**L2, **given})).distance
    assert (distance >= least * (1 - 1e-4)).all() and (distance <= least * 1.05).all()


def test_an_l2_budget_grows_with_the_side_where_it_is_calibrated():
    problem = make(small_net())
    plain = run_attack(problem, settings("l2", **L2))
    double = run_attack(problem, settings("l2", **{**L2, "budgets": [0.2, 1.0], "calibrated_size": 2 * SIZE}))
    assert torch.allclose(2 * plain.distance, double.distance, rtol=1e-4)


# Independent implementations


def trajectory(attack, problem, epsilon, steps, **options):
    """What foolbox has after 1, 2, ... steps, [steps, n, 3, h, w]."""
    model = foolbox.PyTorchModel(nn.Sequential(Wrapped(problem.victim._logits)).eval(), problem.box, device="cpu")
    criterion = foolbox.criteria.Misclassification(problem.labels)
    return torch.stack(
        [attack(steps=n, **options).run(model, problem.points, criterion, epsilon=epsilon) for n in range(1, steps + 1)]
    )


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, points):
        return self.function(points)


def check_first_on(path, problem, outcome, tolerance=2e-6):
    """The attack's example is the first point of the path with another answer; without one, so it is there."""
    answers = torch.stack([problem.victim.logits(points).argmax(1) for points in path]) != problem.labels
    agree = 0
    for i in range(len(problem.labels)):
        hits = torch.nonzero(answers[:, i])
        assert bool(len(hits)) == bool(outcome.distance[i].isfinite())
        if len(hits):
            assert (path[hits[0, 0], i] - outcome.examples[i]).abs().max() <= tolerance
            agree += 1
    assert 4 <= agree < len(problem.labels)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_bim_and_pgd_follow_foolboxs_path(norm):
    problem, eps = make(small_net(), n=30), {"linf": 3 / 255, "l2": 0.12}[norm]
    made = settings("bim", norm=norm, steps=6, step=0.25, bisections=0, budgets=[eps * 255 if norm == "linf" else eps])
    attack = {
        "linf": foolbox.attacks.LinfBasicIterativeAttack,
        "l2": foolbox.attacks.L2BasicIterativeAttack,
    }[norm]
    path = trajectory(attack, problem, eps, 6, rel_stepsize=0.25, random_start=False)
    check_first_on(path, problem, run_attack(problem, made))


def test_fgsm_is_foolboxs():
    problem, eps = make(small_net(), n=30), 3 / 255
    model = foolbox.PyTorchModel(Wrapped(problem.victim._logits).eval(), (0, 1), device="cpu")
    points = foolbox.attacks.FGSM().run(model, problem.points, problem.labels, epsilon=eps)
    check_first_on(points[None], problem, run_attack(problem, settings("fgsm", budgets=[3], bisections=0)))


def test_deepfool_finds_what_foolboxs_finds():
    problem = make(small_net(), n=30)
    model = foolbox.PyTorchModel(Wrapped(problem.victim._logits).eval(), (0, 1), device="cpu")
    attack = foolbox.attacks.LinfDeepFoolAttack(steps=50, candidates=CLASSES, overshoot=0.02)
    points = attack.run(model, problem.points, foolbox.criteria.Misclassification(problem.labels))
    theirs = (points - problem.points).abs().flatten(1).amax(1)
    ours = run_attack(problem, settings("deepfool")).distance
    # Theirs adds 1e-4 to every step "for numerical stability".
    assert (ours <= theirs + 1e-6).all() and (ours >= theirs - 3e-4).all()


def test_the_normalized_space_is_an_attack_after_normalisation():
    """By hand: foolbox on a model that takes normalised images, in RoZ's box, at RoZ's kind of budget."""
    pixels = make(small_net(), n=30)
    points, eps = to_space(pixels.points, "normalized"), 12 / 255
    victim = Scores(in_space(pixels.victim._logits, "normalized"), CPU, 64)
    problem = Problem(victim, victim, points, pixels.labels, pixels.seeds, SPACES["normalized"])
    made = settings("bim", steps=6, step=0.25, bisections=0, budgets=[12])
    outcome = run_attack(problem, made)
    path = trajectory(foolbox.attacks.LinfBasicIterativeAttack, problem, eps, 6, rel_stepsize=0.25, random_start=False)
    check_first_on(path, problem, outcome, 5e-6)
    assert outcome.examples.min() >= -1.8 - TOLERANCE and outcome.examples.max() <= 2.15 + TOLERANCE
    assert torch.allclose(in_space(lambda x: x, "normalized")(points), pixels.points, atol=1e-6)


@pytest.mark.parametrize("diversity", [0.0, 0.5])
def test_mim_and_dim_follow_their_formula(diversity):
    """Image by image: g <- g + grad / |grad|_1, x <- clip(x + alpha sign g), the gradient through the same places."""
    problem, eps, steps = make(small_net(), n=20), 3 / 255, 6
    given = {"decay": 1.0, "diversity": diversity, "steps": steps, "step": 0.25, "budgets": [3], "bisections": 0}
    path = torch.zeros(steps, *problem.points.shape)
    for i, (image, label) in enumerate(zip(problem.points, problem.labels, strict=True)):
        draws = Draws([problem.seeds[i] + 1], CPU)
        x, momentum = image[None].clone(), torch.zeros(1, *image.shape)
        for step in range(steps):
            leaf = x.clone().requires_grad_()
            seen = leaf
            if diversity:
                ((h, w, top, left),) = draws.places([0], (SIZE, SIZE), diversity, 0.9).tolist()
                small = functional.interpolate(leaf, (h, w), mode="bilinear")
                seen = functional.pad(small, (left, SIZE - w - left, top, SIZE - h - top))
            functional.cross_entropy(problem.victim._logits(seen), label[None]).backward()
            momentum = momentum + leaf.grad / leaf.grad.abs().sum()
            x = torch.minimum(torch.maximum(x + 0.25 * eps * momentum.sign(), image - eps), image + eps).clamp(0, 1)
            path[step, i] = x[0]
    check_first_on(path, problem, run_attack(problem, settings("mim", **given)))


def test_places_are_within_the_image_and_change_half_of_them():
    draws = Draws(range(400), CPU)
    places = draws.places(range(400), (40, 60), 0.5, 0.9)
    h, w, top, left = places.T
    assert h.min() == 36 and h.max() == 40 and ((h + top) <= 40).all() and ((w + left) <= 60).all()
    assert 0.3 < float((h < 40).float().mean()) < 0.5  # one in five of the resized ones keeps its size
    assert top.max() == 4 and (places[h == 40] == torch.tensor([40, 60, 0, 0])).all()


def test_a_resized_image_is_bilinear_and_padded_with_zeros():
    image = torch.rand(1, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    out = gradients.diverse(image, torch.tensor([[9, 9, 1, 0]]))[0].numpy()
    expected = np.zeros((3, 10, 10))
    at = [(i + 0.5) * 10 / 9 - 0.5 for i in range(9)]
    for r, y in enumerate(at):
        for c, x in enumerate(at):
            y0, x0 = int(y), int(x)
            a, b = y - y0, x - x0
            corners = image[0, :, y0 : y0 + 2, x0 : x0 + 2].numpy()
            rows = (1 - a) * corners[:, 0] + a * corners[:, -1]
            expected[:, r + 1, c] = (1 - b) * rows[:, 0] + b * rows[:, -1]
    assert np.abs(out - expected).max() < 1e-5 and not out[:, 0].any() and not out[:, :, 9].any()


@pytest.mark.parametrize("name", ["normal", "signs"])
def test_an_estimate_is_the_formula_and_tends_to_the_gradient(name):
    problem, sigma = make(small_net(), n=1), 0.001
    scores, point, label = problem.victim, problem.points[0], problem.labels[0]

    def margin(x):
        z = scores.logits(torch.from_numpy(x).float()[None])[0].double().numpy()
        return np.delete(z, label).max() - z[label]

    draws, total = Draws([7], CPU), np.zeros(point.shape)
    for _ in range(3):
        u, x = getattr(draws, name)(0, point.shape).numpy(), point.numpy()
        total += (margin(x + sigma * u) - margin(x - sigma * u)) * u / (2 * sigma * 3)
    draw = functools.partial(getattr(Draws([7], CPU), name), 0)
    found = gradients.estimate(scores, point, label, draw, 3, sigma).numpy()
    assert np.abs(found - total).max() < 0.01 * np.abs(total).max()

    truth, _ = scores.gradient(problem.points, problem.labels, "margin", None)
    cosines = []
    for pairs in (50, 5000):
        draws = Draws([7], CPU)
        found = gradients.estimate(
            scores, point, label, lambda shape, d=draws: getattr(d, name)(0, shape), pairs, sigma
        )
        cosines.append(float(functional.cosine_similarity(found.flatten(), truth.flatten(), dim=0)))
    assert cosines[0] < cosines[1] and cosines[1] > 0.95
    assert float(found.norm() / truth.norm()) == pytest.approx(1, abs=0.1)


# Faults


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "noise"])
def test_a_gradient_that_is_zero_is_a_fault_and_not_robustness(kind):
    plain = small_net()
    outcome = run_attack(make(lambda points: plain((points * 4).round() / 4)), settings(kind, sigma=1e-6))
    if "score" not in KINDS[kind].values():  # whose differences are zero but at the steps
        assert (outcome.fault == ZERO_GRADIENT).all() and outcome.distance.isinf().all()
    else:
        assert (outcome.fault[outcome.distance.isinf()] == ZERO_GRADIENT).any()
    constant = run_attack(make(lambda points: torch.eye(CLASSES)[:1].expand(len(points), -1)), settings(kind))
    assert (constant.fault == ZERO_GRADIENT).all() and constant.distance.isinf().all()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_logits_are_a_fault_of_their_image_alone(kind):
    plain = small_net()

    def broken(points):
        logits = plain(points)
        return torch.where(points[:, 0, 0, :1] > 0.8, torch.nan, logits)

    problem = make(plain)
    bad = problem.points[:, 0, 0, 0] > 0.8
    problem.victim = problem.source = Scores(broken, CPU, 64)
    outcome = run_attack(problem, settings(kind, budgets=[0.5, 1]))
    assert 0 < bad.sum() < 24
    assert (outcome.fault[bad] == NOT_FINITE).all() and (outcome.clean[bad] == -1).all()
    near = (problem.points[:, 0, 0, 0] - 0.8).abs() < 2 / 255
    assert not outcome.fault[~bad & ~near].any()


@pytest.mark.parametrize("kind", ["fgsm", "bim", "deepfool", "pgd"])
def test_a_gradient_that_is_not_finite_is_a_fault(kind):
    plain = small_net()

    def broken(points):
        return plain(points) + (points[:, 0, 0, :1] * 0).sqrt()  # 0, with an infinite slope

    outcome = run_attack(make(broken), settings(kind))
    assert (outcome.fault == NOT_FINITE).all() and outcome.distance.isinf().all() and (outcome.clean >= 0).all()


def test_a_loss_that_is_saturated_is_seen_and_the_margin_gets_through():
    plain = small_net(gain=1e5)
    problem = make(plain)
    assert (run_attack(problem, settings("bim")).fault == ZERO_GRADIENT).sum() > 12
    strong = run_attack(problem, settings("pgd"))
    assert not strong.fault.any() and strong.distance.isfinite().float().mean() > 0.8


# Independence of batches


@pytest.mark.parametrize("kind", ["bim", "dim", "pgd", "deepfool", "nes", "spsa", "noise"])
def test_an_image_depends_on_neither_its_batch_nor_its_neighbours(kind):
    problem = make(small_net(), n=14)
    made = settings(kind, budgets=[2, 8], bisections=2)
    whole = run_attack(problem, made)
    rows = [9, 3, 12]
    few = run_attack(part(problem, rows, batch_size=2), made)
    assert torch.allclose(few.distance, whole.distance[rows], rtol=1e-3)
    assert torch.equal(few.prediction, whole.prediction[rows]) and torch.equal(few.queries, whole.queries[rows])


def test_memory_that_runs_out_halves_the_batch(capsys):
    plain = small_net()

    def hungry(points):
        if len(points) > 5:
            raise torch.OutOfMemoryError("out of memory")
        return plain(points)

    problem = make(plain)
    expected = run_attack(problem, settings("bim")).distance
    problem.victim = problem.source = Scores(hungry, CPU, 64)
    assert torch.allclose(run_attack(problem, settings("bim")).distance, expected, rtol=1e-3)
    assert problem.victim.batch_size == 4 and "out of memory" in capsys.readouterr().err


# Settings


def test_the_configured_attacks_fit_the_schema_and_the_settings(root):
    import jsonschema

    table = load_yaml(root / "config/attacks.yaml")
    assert len(table) == 17
    for name, given in table.items():
        jsonschema.validate(given, schema("attack", root))
        made = Settings.parse(name, given)
        assert made.substitute == name.endswith("_transfer")
    fields = schema("attack", root)["properties"]
    assert list(fields) and set(fields) == set(Settings.__dataclass_fields__)
    assert Settings.parse("pgd_l2_0.5", table["pgd_l2_0.5"]).radius(0.5) == 0.5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"budget": [1]}, "unknown field 'budget'; did you mean 'budgets'"),
        ({"method": "gradients"}, "method is 'gradients', expected gradient"),
        ({"budgets": [2, 1]}, "expected to ascend"),
        ({"budgets": [0, 1]}, "expected to ascend"),
        ({"reported": 3}, "reported 3 is none of its budgets"),
        ({"losses": ["hinge"]}, "losses is 'hinge'"),
        ({"method": "deepfool", "norm": "l2"}, "deepfool has norm linf alone"),
        ({"method": "score", "substitute": True}, "score takes no substitute"),
        ({"calibrated_size": 224}, "calibrated_size is for norm l2"),
    ],
)
def test_wrong_settings_say_what_is_wrong(change, said):
    with pytest.raises(InputError, match=f"attack 'x'.*{said}"):
        Settings.parse("x", {"method": "gradient", "budgets": [1, 2], "reported": 1, **change})
    with pytest.raises(InputError, match="'reported' is missing"):
        Settings.parse("x", {"method": "gradient", "budgets": [1, 2]})
