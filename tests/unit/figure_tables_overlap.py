"""Tables of the overlap figure, by the code that measures them: counts are drawn, and rows computed from them."""

import numpy as np
import pandas as pd

from clip_robustness.metrics.overlap import Pairs, detection_rows, overlap_rows
from tests.unit.figure_tables import MODELS, PAPER_SHIFTS, crowd, study

MINI = {
    # share that overlaps, accuracy gained on overlapping images, control
    "mini_val": (0.03, 0.0, ""),
    "mini_sketch": (0.0, 0.0, ""),
    "mini_planted": (0.3, 0.1, "planted"),
    "mini_disjoint": (0.001, 0.0, "disjoint"),
}
_EFFECTS = (
    (0.022, 0.05),
    (0.03, 0.1),
    (0.021, 0.0),
    (0.215, 0.02),
    (0.001, 0.0),
    (0.12, 0.15),
    (0.0, 0.0),
    (0.01, -0.05),
)
PAPER = {name: (*effect, "") for name, effect in zip(PAPER_SHIFTS, _EFFECTS, strict=True)}


def rows_of(model, accuracy, sets, n, rng):
    rows = []
    for dataset, (share, effect, control) in sets.items():
        overlap = np.arange(n) < round(share * n)
        correct = rng.random(n) < np.clip(accuracy + effect * overlap, 0.01, 0.99)
        who = {"study": "test", "model": model, "dataset": dataset, "source": "measured"}
        rows += [who | row for row in overlap_rows(correct, overlap, len(sets), convention=control or "detected")]
    return rows


def thresholds(sources=300):
    rng = np.random.default_rng(1)
    duplicate = np.concatenate([rng.normal(mean, 0.05, sources) for mean in (0.97, 0.95, 0.87, 0.82)])
    names = np.repeat(["resized", "recompressed", "cropped", "mirrored"], sources)
    pairs = Pairs(duplicate, rng.normal(0.6, 0.07, 4 * sources), np.tile(np.arange(sources), 4), names)
    who = {"study": "test", "model": "detector", "dataset": "copies", "source": "measured"}
    return pd.DataFrame([who | row for row in detection_rows(pairs, 0.8)])


def small():
    rng = np.random.default_rng(0)
    rows = [row for model in MODELS for row in rows_of(model[0], model[-1] - 0.2, MINI, 1500, rng)]
    return {
        "data_overlap": pd.DataFrame(rows),
        "overlap_thresholds": thresholds(),
        "models": study()["models"],
    }


def large():
    rng = np.random.default_rng(0)
    models = crowd()["models"]
    rows = [row for model in models["model"][::12] for row in rows_of(model, rng.uniform(0.4, 0.8), PAPER, 3000, rng)]
    return {"data_overlap": pd.DataFrame(rows), "overlap_thresholds": thresholds(), "models": models}
