"""Tables of attacks and printed words to draw from: a small study, and one with the papers' numbers of models."""

import functools

import numpy as np
import pandas as pd

from tests.unit import figure_tables
from tests.unit.figure_tables import measure

BUDGETS = np.array([0.25, 0.5, 1.0, 2.0, 4.0, 8.0])
# How many times the distance of BIM an attack needs: white-box attacks, transferred ones, by scores, yardsticks.
REACH = {
    "fgsm": 1.6, "bim": 1.0, "mim": 1.05, "dim": 1.15, "deepfool": 0.9,
    "fgsm_transfer": 40, "bim_transfer": 45, "mim_transfer": 25, "dim_transfer": 20,
    "nes": 2.5, "spsa": 2.7, "pgd": 0.8, "noise": 120,
}  # fmt: skip
_TOUGHNESS = {"clip_zero_shot": 0.25, "clip_finetuned": 0.35, "standard": 0.5, "more_data": 0.7, "self_supervised": 0.6}


def study():
    """The tables of figure_tables.study with those of attacks: twelve models, the human one not attacked."""
    return dict(_study())


def crowd():
    """84 zero-shot CLIPs, 44 fine-tuned ones and 127 classifiers."""
    return dict(_crowd())


@functools.cache
def _study():
    tables = figure_tables.study()
    return tables | _attacks(tables["models"], 200, "mini_val") | _printed(tables["models"], {"mini_typographic": 400})


@functools.cache
def _crowd():
    tables = figure_tables.crowd()
    groups = {"clip_zero_shot": 84, "clip_finetuned": 44, "standard": 80, "more_data": 35, "self_supervised": 12}
    kept = [tables["models"][tables["models"]["group"] == group].head(n) for group, n in groups.items()]
    models = pd.concat(kept, ignore_index=True)
    printed = _printed(models, {"imagenet_t": 49727, "cifar10_t": 10000})
    return tables | {"models": models} | _attacks(models, 1000, "imagenet_val") | printed


def _attacks(models, n, dataset):
    rng, rows = np.random.default_rng(4), []
    for model in models[models["group"] != "human"].itertuples():
        clean = float(rng.uniform(0.6, 0.95))
        toughness = _TOUGHNESS[model.group] * (1.4 if model.family == "vit" else 1) * rng.lognormal(0, 0.3)
        distance = rng.lognormal(np.log(toughness), 0.9, n) * (rng.random(n) < clean)
        rows.append(measure(model.model, dataset, "clean_accuracy", (distance > 0).mean(), "", n))
        for attack, reach in REACH.items():
            found = distance * reach * rng.lognormal(0, 0.05, n)
            rows.append(measure(model.model, dataset, "faults", 0.0, attack, n))
            budgets = BUDGETS * (2 if "transfer" in attack or attack == "noise" else 0.5 if attack == "pgd" else 1)
            for eps in budgets:
                rows.append(
                    measure(model.model, dataset, "accuracy_at", (found > eps).mean(), f"{attack}:{eps:g}", n, "linf")
                )
            rows.append(measure(model.model, dataset, "accuracy", (found > 2).mean(), attack, n, "linf_2"))
            median = float(np.median(found))
            beyond = median > budgets[-1]
            value, low, high = (min(v, budgets[-1]) / 255 for v in (median, 0.8 * median, 1.25 * median))
            row = measure(
                model.model, dataset, "median_distance", 0.5, attack, n, "linf_censored" if beyond else "linf"
            )
            rows.append(row | {"value": value, "low": low, "high": high})
    return {"adversarial": pd.DataFrame(rows)}


def _printed(models, datasets):
    rng, rows = np.random.default_rng(6), []
    for dataset, n in datasets.items():
        for model in models[models["group"] != "human"].itertuples():
            clean = float(rng.uniform(0.6, 0.95))
            believed = 0.45 * rng.uniform(0.4, 1.2) if model.group == "clip_zero_shot" else 0.06 * rng.uniform(0.2, 2)
            accuracy = clean * (1 - believed) - 0.03
            for metric, value in (
                ("accuracy", accuracy), ("attack_success_rate", believed), ("clean_accuracy", clean),
                ("clean_success_rate", 0.1 * (1 - clean)), ("accuracy_drop", clean - accuracy),
            ):  # fmt: skip
                rows.append(measure(model.model, dataset, metric, value, "", n, "1000_way"))
    return {"typographic": pd.DataFrame(rows)}
