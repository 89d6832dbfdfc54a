"""Adversarial attacks: accuracy at a budget, and the smallest perturbation that changes the answer.

An attack's file (.parquet, with its settings in the .json beside it) has a row for each attacked image: the smallest
perturbation found that leads the answer away from the label; 0 where it is wrong already, infinity where none was
found.

    accuracy_at eps   share of images whose distance exceeds eps                      (Dong et al. 2020, section 3)
    median_distance   median of the distances over images                             (arXiv 2403.10499)

Pixels lie in [0, 1]; slices and conventions name an L-inf budget in 255ths of that, an L2 budget as it is.

An image with a fault (its gradient is zero everywhere or something is not finite, and no example was found) could not
be attacked: its survival says that the gradient is masked, not that the model is robust (Athalye et al. 2018). So all
rows of an attack but `faults` are over the images without a fault, and their n says how many these are. With a share f
of faults, the accuracy over all images lies between a (1 - f) and a (1 - f) + f, where a is the row's value.
"""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.statistics import LEVEL
from clip_robustness.metrics.rows import Row, proportion_row, row

# Attacks with the model's own gradient, whose worst case is the row `white_box_union`.
WHITE_BOX = ("fgsm", "bim", "mim", "dim", "deepfool", "pgd")
UNION = "white_box_union"
FAULTS = {1: "zero_gradient", 2: "not_finite"}
# Adding a perturbation to float32 pixels rounds it by about this much.
SLACK = 1e-6
_COLUMNS = ("image_id", "label", "clean", "distance", "fault", "queries")
_FACTS = ("model", "dataset", "attack", "norm", "eps_space", "budgets", "reported", "ids_sha256")


class Attack(NamedTuple):
    """One attack on one model: its manifest, and a value an image of each column."""

    path: Path
    facts: Mapping[str, Any]
    image_ids: np.ndarray
    label: np.ndarray
    clean: np.ndarray
    distance: np.ndarray  # float64
    fault: np.ndarray
    queries: np.ndarray

    @property
    def name(self) -> str:
        return self.facts["attack"]

    @property
    def norm(self) -> str:
        """`linf` or `l2`; `linf_normalized` where the budget is one of pixels after the model's normalisation."""
        space = self.facts["eps_space"]
        return self.facts["norm"] + ("" if space == "pixel" else f"_{space}")

    @property
    def attacked(self) -> np.ndarray:
        """The images without a fault, bool [n]."""
        return self.fault == 0

    def broken(self, eps: float) -> np.ndarray:
        """Whether a perturbation of at most `eps` changes the answer, bool [n]."""
        return self.distance <= eps + SLACK

    def budget(self, eps: float) -> str:
        """`eps` as slices and conventions name it."""
        return f"{eps * 255 if self.facts['norm'] == 'linf' else eps:g}"


def median_interval(values: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """Exact interval of the median, whatever the distribution: the k-th smallest and the k-th largest value.

    k is the largest number with P(Binomial(n, 1/2) < k) <= (1 - level) / 2 (David and Nagaraja 2003, section 7.1).
    Values may be infinite. Up to five values have no such k at 95 %: (-inf, inf).
    """
    from scipy.special import bdtr

    ordered = np.sort(np.asarray(values, float))
    n = len(ordered)
    k = int(np.searchsorted(bdtr(np.arange(n, dtype=float), n, 0.5), (1 - level) / 2, "right")) if n else 0
    return (float(ordered[k - 1]), float(ordered[n - k])) if k else (-np.inf, np.inf)


def attack_rows(attack: Attack) -> list[Row]:
    """`accuracy` at the reported budget, `accuracy_at` every budget, `median_distance` and `faults` of one attack.

    Slice: {attack}, of `accuracy_at` {attack}:{budget}; convention: the norm, of `accuracy` with the budget (`linf_2`).
    Accuracies and faults have Clopper-Pearson intervals, the median that of `median_interval`. A median beyond the
    largest budget is given as that budget (convention `linf_censored`), and so are limits of the interval. Where all
    images are faults, `faults` is the only row.
    """
    faults = int(np.count_nonzero(~attack.attacked))
    rows = [proportion_row("faults", faults, len(attack.fault), attack.name)]
    n = int(np.count_nonzero(attack.attacked))
    if not n:
        return rows

    def robust(eps: float) -> int:
        return int(np.count_nonzero(attack.attacked & ~attack.broken(eps)))

    reported, budgets = attack.facts["reported"], attack.facts["budgets"]
    convention = f"{attack.norm}_{attack.budget(reported)}"
    rows.append(proportion_row("accuracy", robust(reported), n, attack.name, convention))
    for eps in budgets:
        slice = f"{attack.name}:{attack.budget(eps)}"
        rows.append(proportion_row("accuracy_at", robust(eps), n, slice, attack.norm))
    return [*rows, _median_row(attack, budgets[-1])]


def _median_row(attack: Attack, largest: float) -> Row:
    found = np.where(attack.broken(largest), attack.distance, np.inf)[attack.attacked]
    median, limits = float(np.median(found)), median_interval(found)
    low, high = np.clip(limits, 0, largest)
    convention = attack.norm + ("" if np.isfinite(median) else "_censored")
    return row("median_distance", min(median, largest), low, high, len(found), attack.name, convention)


def union_attacks(attacks: Sequence[Attack]) -> list[Attack]:
    """The white-box attacks, if there are two or more and all are reported at one budget of one norm."""
    white = [attack for attack in attacks if attack.name in WHITE_BOX]
    budgets = {(attack.norm, attack.budget(attack.facts["reported"])) for attack in white}
    return white if len(white) > 1 and len(budgets) == 1 else []


def union_rows(attacks: Sequence[Attack]) -> list[Row]:
    """`accuracy` of slice `white_box_union`: the images that none of `union_attacks` broke at the reported budget.

    An image that one of them broke counts as broken whatever the others met; an image that none broke, and that is a
    fault of any, is left out. So the value never exceeds that of one of the attacks.
    """
    white = union_attacks(attacks)
    if not white:
        return []
    broken = np.any([attack.broken(attack.facts["reported"]) for attack in white], axis=0)
    survived = ~broken & np.all([attack.attacked for attack in white], axis=0)
    hits, n = int(survived.sum()), int(survived.sum() + broken.sum())
    convention = f"{white[0].norm}_{white[0].budget(white[0].facts['reported'])}"
    return [proportion_row("accuracy", hits, n, UNION, convention)] if n else []


def measure_adversarial(attacks: Sequence[Path], out: Path) -> None:
    """Write the rows of one model to `out` (.json) from its `attacks` (.parquet, each with its .json beside it).

    Row `clean_accuracy` (over all images, from the first attack by name), `attack_rows` of every attack and
    `union_rows`. Errors: InputError for a file that is missing, lacks a column or a field, is not what its manifest
    says or holds an impossible value, and for attacks of several models, data sets or samples of images, or one twice.
    """
    if not attacks:
        raise InputError(f"{out}: no attack given; needed: the results of at least one")
    read = sorted((read_attack(Path(path)) for path in attacks), key=lambda attack: attack.name)
    first = read[0]
    for one, other in itertools.pairwise(read):
        _check_same(one, other)
    rows = [proportion_row("clean_accuracy", int(np.sum(first.clean == first.label)), len(first.label))]
    rows += [row for attack in read for row in attack_rows(attack)] + union_rows(read)
    who = {"model": first.facts["model"], "dataset": first.facts["dataset"]}
    manifest = {
        **who,
        "n": len(first.label),
        "ids_sha256": first.facts["ids_sha256"],
        "attacks": {attack.name: _summary(attack) for attack in read},
        UNION: [attack.name for attack in union_attacks(read)],
    }
    io.write_json(out, {"manifest": manifest, "rows": [{**who, "source": "measured", **row} for row in rows]})


def _summary(attack: Attack) -> dict[str, Any]:
    kinds = Counter(FAULTS[int(kind)] for kind in attack.fault[~attack.attacked])
    return {"faults": dict(kinds), "mean_queries": float(attack.queries.mean())}


def read_attack(path: Path) -> Attack:
    """One attack's results, checked. Errors: see `measure_adversarial`."""
    table, facts = io.read_parquet(path), io.read_json(path.with_suffix(".json"))
    for name, given, where in (
        *((name, table, path) for name in _COLUMNS),
        *((name, facts, path.with_suffix(".json")) for name in _FACTS),
    ):
        if name not in given:
            raise InputError(f"{where}: no '{name}' in it; delete it and attack again")
    attack = Attack(path, facts, *(table[name] for name in _COLUMNS))
    attack = attack._replace(distance=attack.distance.astype(float))
    budgets = list(facts["budgets"])
    if not budgets or min(budgets) <= 0 or budgets != sorted(set(budgets)):
        raise InputError(f"{path.with_suffix('.json')}: budgets {budgets}, expected positive numbers that ascend")
    if not len(attack.label) or io.ids_digest(attack.image_ids) != facts["ids_sha256"]:
        raise InputError(f"{path}: not the images that {path.stem}.json lists; delete both and attack again")
    wrong = attack.clean != attack.label
    for bad, expected in (
        (~np.isin(attack.fault, (0, *FAULTS)), f"fault one of 0, {', '.join(map(str, FAULTS))}"),
        (~(attack.distance >= 0), "distance a number of at least 0"),
        (wrong & (attack.distance != 0), "distance 0 where the answer is wrong without attack"),
    ):
        if bad.any():
            at = attack.image_ids[np.flatnonzero(bad)[0]]
            raise InputError(f"{path}: image '{at}': expected {expected}; delete it and attack again")
    return attack


def _check_same(one: Attack, other: Attack) -> None:
    for name in ("model", "dataset", "ids_sha256"):
        if one.facts[name] != other.facts[name]:
            raise InputError(
                f"{other.path}: {name} {other.facts[name]!r}, but {one.path} has {one.facts[name]!r}; "
                "the attacks of a model need one data set and one sample of images: attack again"
            )
    if one.name == other.name:
        raise InputError(f"{other.path}: attack '{other.name}' a second time, after {one.path}; give it once")
    if not np.array_equal(one.label, other.label):
        raise InputError(f"{other.path}: labels differ from {one.path}; index the data set and attack again")
