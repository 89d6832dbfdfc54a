"""Matched pairs of CLIP models, and the statistics of such pairs.

A pair is two models that are the same in everything else that the models table knows: equal in EXACT, and within a
ratio in CLOSE (what is unknown equals only what is unknown), but for the columns that the factor itself changes:

    architecture  network, family        CNN -> ViT
    source        source                 the contrasts of SOURCES
    size          train_images           one distribution, from each size to the next larger one; per factor of ten
    finetuning    (a model's parent)     zero-shot parent -> child by route, at one image size
                  finetuned_on           children of one parent: ImageNet-1k -> ImageNet-12k, then 1k
    loss          loss                   softmax -> sigmoid

All but fine-tuning compares zero-shot models. Models that the table cannot tell apart (another seed, another run) are
one side of a pair together.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from clip_robustness.core import statistics
from clip_robustness.core.statistics import LEVEL, RESAMPLES

EXACT = ("group", "library", "network", "family", "source", "finetuning", "finetuned_on", "loss", "parent", "prompts")
# The largest ratio between two models that still count as the same.
CLOSE = {"image_size": 1.0, "params_m": 1.5, "gflops": 2.0, "train_images": 2.0, "samples": 1.1}
FREE = {
    "architecture": {"network", "family"},
    "source": {"source"},
    "size": {"train_images", "source"},
    "finetuning": {"finetuned_on"},
    "loss": {"loss"},
}
CNN = ("resnet", "convnext", "cnn", "efficientnet", "regnet")
SOURCES = {
    "WIT → LAION": ("WIT", "LAION*"),
    "WIT → MetaCLIP": ("WIT", "MetaCLIP"),
    "LAION → MetaCLIP": ("LAION*", "MetaCLIP"),
    "LAION → DataComp": ("LAION*", "DataComp"),
    "CommonPool → DataComp": ("CommonPool", "DataComp"),
    "DataComp → DFN": ("DataComp", "DFN"),
    "biased → unbiased": ("*_biased", "*_unbiased"),
}
ROUTES = {
    "zero-shot → cross entropy": "cross_entropy",
    "zero-shot → contrastive": "contrastive",
    "zero-shot → parameter-efficient": "parameter_efficient",
    "zero-shot → interpolation": "interpolation",
}
TWO_STAGES = ("ImageNet-1k", "ImageNet-12k+ImageNet-1k")
CONTRASTS = {
    "architecture": ("CNN → ViT",),
    "source": tuple(SOURCES),
    "size": ("ten times the images",),
    "finetuning": (*ROUTES, "on 1k → on 12k, then 1k"),
    "loss": ("softmax → sigmoid",),
}
# Image-text pairs seen in training, for tags that do not say (Radford et al. 2021; Xu et al. 2024; Fang et al. 2024).
SAMPLES = dict.fromkeys(("openai", "metaclip_400m", "metaclip_fullcc", "dfn2b"), 12.8e9)
# Random sign flips where there are too many to try all.
SIGN_FLIPS = 10_000

Facts = Mapping[str, Any]


class Pair(NamedTuple):
    """Models on one side, models on the other, and how much of the factor lies between them."""

    before: tuple[str, ...]
    after: tuple[str, ...]
    step: float = 1.0


Pairs = dict[tuple[str, str], list[Pair]]  # (factor, contrast) -> pairs


def matched_pairs(models: pd.DataFrame) -> Pairs:
    """All pairs of the CLIP models in the models table, by factor and contrast; columns may be missing."""
    facts = clip_facts(models)
    same = [cell.sort_values("model") for _, cell in facts.groupby([*EXACT, *CLOSE], sort=True)]
    cells: list[tuple[Facts, tuple[str, ...]]] = [
        ({str(name): value for name, value in cell.iloc[0].items()}, tuple(cell["model"])) for cell in same
    ]
    pairs: Pairs = defaultdict(list)
    for contrast, children in _children(facts).items():
        pairs["finetuning", contrast] = children
    for before, some in cells:
        for factor in FREE:
            others = [(after, names) for after, names in cells if _same(before, after, FREE[factor])]
            found = [(label, after, names) for after, names in others for label in _labels(factor, before, after)]
            next_size = min((after["train_images"] for _, after, _ in found), default=0)
            for label, after, names in found:
                if factor != "size":
                    pairs[factor, label].append(Pair(some, names))
                elif after["train_images"] == next_size:
                    step = float(np.log10(next_size / before["train_images"]))
                    pairs[factor, label].append(Pair(some, names, step))
    order = [(factor, label) for factor, labels in CONTRASTS.items() for label in labels]
    return {key: pairs[key] for key in order if key in pairs}


def clip_facts(models: pd.DataFrame) -> pd.DataFrame:
    """The CLIP models with every column of EXACT and CLOSE: text "" and numbers 0 where nothing is known."""
    names = dict.fromkeys(("model", "architecture", *EXACT, *CLOSE))
    facts = models.reindex(columns=list(names)).drop_duplicates("model")
    for name in names:
        if name in CLOSE:
            facts[name] = pd.to_numeric(facts[name], errors="coerce").fillna(0.0)
        else:
            facts[name] = facts[name].astype(object).where(facts[name].notna(), "").astype(str)
    facts = facts[facts["group"].isin(["clip_zero_shot", "clip_finetuned"])].reset_index(drop=True)
    parts = [name.split(".") for name in facts["model"]]
    own = pd.Series([name[1] if len(name) > 2 else "" for name in parts], dtype=str)  # library.architecture.tag
    network = facts["architecture"].where(facts["architecture"] != "", own).str.split(".").str[0].str.lower()
    # The activation goes with who trained the model, and the loss has a column of its own.
    facts["network"] = network.str.replace(r"[-_](quickgelu|siglip|sigmoid)", "", regex=True)
    facts["samples"] = [
        _samples(model, images) for model, images in zip(facts["model"], facts["train_images"], strict=True)
    ]
    return facts


def _samples(model: str, images: float) -> float:
    """Image-text pairs seen in training, to two digits: as the name says, else as of SAMPLES; 0 when unknown."""
    stated = re.search(r"_(?:s|\d+[mb]_)(\d+)([mb])(?=_|$)", model)
    epochs = re.search(r"_e(\d+)$", model)
    seen = SAMPLES.get(model.split(".")[-1], 0.0)
    if stated:
        seen = float(stated[1]) * (1e9 if stated[2] == "b" else 1e6)
    elif epochs:
        seen = float(epochs[1]) * images
    return float(f"{seen:.1e}")


def _same(a: Facts, b: Facts, free: set[str]) -> bool:
    def close(one: float, other: float, ratio: float) -> bool:
        return one == other or (min(one, other) > 0 and max(one, other) <= ratio * min(one, other))

    exact = all(a[name] == b[name] for name in EXACT if name not in free)
    return exact and all(close(a[name], b[name], ratio) for name, ratio in CLOSE.items() if name not in free)


def _labels(factor: str, a: Facts, b: Facts) -> list[str]:
    """The contrasts of `factor` that have `a` on the one side and `b` on the other."""
    if (factor == "finetuning") != (a["finetuning"] not in ("", "none")):
        return []
    if factor == "source":
        sources = a["source"], b["source"]
        return [label for label, pair in SOURCES.items() if all(map(fnmatchcase, sources, pair))]
    holds = {
        "architecture": a["family"] in CNN and b["family"] == "vit",
        "size": _larger(a, b),
        "finetuning": (a["finetuned_on"], b["finetuned_on"]) == TWO_STAGES,
        "loss": (a["loss"], b["loss"]) == ("softmax", "sigmoid"),
    }
    return [CONTRASTS[factor][-1]] if holds[factor] else []


def _larger(a: Facts, b: Facts) -> bool:
    """Whether `b` saw more images of the same distribution. CommonPool's sizes are its filters: another one each."""
    same = _distribution(a["source"]) == _distribution(b["source"]) != "CommonPool"
    return same and b["train_images"] > 1.5 * a["train_images"] > 0


def _distribution(source: str) -> str:
    return re.sub(r"-?\d+(\.\d+)?[MB]$", "", source)


def _children(facts: pd.DataFrame) -> dict[str, list[Pair]]:
    """Zero-shot parents with their fine-tuned children, by route; resolution must not change with the weights."""
    pairs = facts.merge(facts, left_on="parent", right_on="model", suffixes=("", "_parent"))
    pairs = pairs[pairs["finetuning_parent"].isin(["", "none"]) & (pairs["image_size"] == pairs["image_size_parent"])]
    found = {}
    for label, route in ROUTES.items():
        some = pairs[pairs["finetuning"] == route].sort_values("model")
        if len(some):
            found[label] = [
                Pair((parent,), (child,)) for parent, child in zip(some["model_parent"], some["model"], strict=True)
            ]
    return found


def clusters(groups: Sequence[Sequence[str]]) -> np.ndarray:
    """The number of each group's cluster, 0.. in order of appearance: groups that share a name, however indirectly."""
    found: list[set[str]] = []
    for group in groups:
        touching = [one for one in found if one & set(group)]
        found = [one for one in found if one not in touching] + [set(group).union(*touching)]
    first = {name: number for number, one in enumerate(found) for name in one}
    return np.unique([first[group[0]] for group in groups], return_inverse=True)[1]


def cluster_interval(sums: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> tuple[float, float]:
    """95 % interval of a ratio of sums, from each cluster's numerator and denominator [clusters, 2].

    A percentile bootstrap is too narrow with few clusters, as if the normal interval had no n - 1 and no Student's t;
    its percentiles are therefore taken further out by as much (Hesterberg 2015, The American Statistician 69).
    """
    from scipy.special import ndtr, stdtrit

    n = len(sums)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=10 * resamples) @ sums
    tail = ndtr(np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 - LEVEL) / 2))
    low, high = statistics.percentile_interval(draws[:, 0] / draws[:, 1], float(1 - 2 * tail))
    return float(low), float(high)


def sign_flip(sums: np.ndarray, seed: int = 0) -> float:
    """Two-sided p of the hypothesis that each cluster's summed difference [n] might as well have the other sign.

    Exact up to 13 clusters; beyond, from SIGN_FLIPS random flips and the observed signs.
    """
    n = len(sums)
    if n <= 13:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = np.random.default_rng(seed).choice([-1, 1], size=(SIGN_FLIPS, n))
        signs = np.vstack([np.ones((1, n), int), signs])
    totals = np.abs(signs @ sums)
    return float((totals >= abs(sums.sum()) * (1 - 1e-9)).mean())


def holm(p: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down correction of p values, in their order."""
    values = np.asarray(p, float)
    order = np.argsort(values, kind="stable")
    corrected = np.empty(len(values))
    corrected[order] = np.maximum.accumulate(np.minimum(1, values[order] * (len(values) - np.arange(len(values)))))
    return [float(value) for value in corrected]
