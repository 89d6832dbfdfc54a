"""Tables to draw from: a small study like the mini one, and one as crowded as the papers'; and drawing them."""

import functools
import importlib

import numpy as np
import pandas as pd

from clip_robustness.core import statistics
from clip_robustness.figures import frames

SHIFTS = ("mini_sketch", "mini_pose")
# model, title, architecture, group, family, training, images, parent, accuracy
MODELS = [
    ("clip_a", "CLIP ViT, world A", "v", "clip_zero_shot", "vit", "A", 6e3, "", 0.93),
    ("clip_b", "CLIP ViT, world B", "v", "clip_zero_shot", "vit", "B", 6e3, "", 0.91),
    ("clip_rn", "CLIP ResNet, world A", "r", "clip_zero_shot", "resnet", "A", 6e3, "", 0.88),
    ("clip_third", "CLIP ViT, a third of the data", "v", "clip_zero_shot", "vit", "A", 2e3, "", 0.85),
    ("tuned", "CLIP ViT, fine-tuned", "v", "clip_finetuned", "vit", "A", 6e3, "clip_a", 0.96),
    ("tuned_b", "CLIP ViT, world B, fine-tuned", "v", "clip_finetuned", "vit", "B", 6e3, "clip_b", 0.95),
    ("rn", "ResNet, supervised", "s", "standard", "resnet", "A", 6e3, "", 0.94),
    ("vit", "ViT, supervised", "s", "standard", "vit", "A", 6e3, "", 0.90),
    ("cnx", "ConvNeXt, supervised", "s", "standard", "convnext", "A", 6e3, "", 0.92),
    ("small", "ResNet, 3,000 images", "s", "standard", "resnet", "A", 3e3, "", 0.82),
    ("person", "Human observers", "", "human", "human", "", np.nan, "", 0.99),
]
PAPER_SHIFTS = (
    *("imagenet_v2", "imagenet_v2_threshold", "imagenet_v2_top", "imagenet_r"),
    *("imagenet_a", "imagenet_sketch", "objectnet", "imagenet_vid_pm0"),
)
PAPER_OOD = ("inaturalist", "sun", "places", "textures", "imagenet_o", "ninco")
PAPER_FACTORS = {
    "pose": 15064, "background": 14751, "color": 6150, "pattern": 5972, "smaller": 1450, "shape": 679,
    "partial_view": 638, "subcategory": 585, "texture": 282, "larger": 150, "darker": 122,
}  # fmt: skip
SIXTEEN = (
    *("airplane", "bear", "bicycle", "bird", "boat", "bottle", "car", "cat"),
    *("chair", "clock", "dog", "elephant", "keyboard", "knife", "oven", "truck"),
)


def measure(model, dataset, metric, value, slice_="", n=1000, convention=""):
    low, high = statistics.clopper_pearson(round(np.clip(value, 0, 1) * n), n)
    return {
        "study": "test", "model": model, "dataset": dataset, "metric": metric, "slice": slice_,
        "value": float(value), "low": min(float(low), value), "high": max(float(high), value), "n": n,
        "convention": convention, "source": "measured",
    }  # fmt: skip


def study():
    """All tables of a small study, with the columns of the contracts."""
    return dict(_study())


def crowd():
    """All tables of a study with the papers' numbers of models, sets and factors."""
    return dict(_crowd())


def draw(name, tables):
    return importlib.import_module(f"clip_robustness.figures.{name}").draw(tables)


def texts(figure):
    own = [text.get_text() for axes in figure.axes for text in axes.texts]
    return own + [axes.get_title() for axes in figure.axes]


@functools.cache
def _study():
    columns = ["model", "title", "architecture", "group", "family", "source", "train_images", "parent", "score"]
    models = pd.DataFrame(MODELS, columns=columns)
    models = models.assign(library="local", finetuning="none", params_m=1.0, image_size=48, loss="softmax")
    factors = {"pose": 900, "texture": 500, "larger": 150}
    return _tables(models, "mini_val", SHIFTS, ("mini_unseen", "mini_unseen_solids"), factors, ("cube", "cone"))


@functools.cache
def _crowd():
    rng = np.random.default_rng(5)
    sources = ("WIT", "LAION-400M", "LAION-2B", "LAION-80M", "DataComp", "CommonPool", "WebLI", "MetaCLIP", "DFN")
    rows = []
    for number in range(284):
        group = ("clip_zero_shot", "standard", "clip_finetuned", "more_data", "self_supervised")[
            np.searchsorted([113, 193, 237, 272], number, side="right")
        ]
        clip = group.startswith("clip")
        source = sources[number % 9 if number % 3 else 2] if clip else ("ImageNet-1k", "ImageNet-21k")[number % 2]
        family = ("vit", "resnet", "convnext", "swin")[int(rng.choice(4, p=[0.55, 0.2, 0.2, 0.05]))]
        parent = f"model_{number - 193:03d}" if group == "clip_finetuned" else ""
        rows.append((
            f"model_{number:03d}", f"{family}_large_patch14_clip_336.{source.lower()}_ft_{number}", f"{family}{number}",
            group, family, source, 10 ** rng.uniform(6, 9.5), parent, float(rng.beta(14, 5)),
        ))  # fmt: skip
    columns = ["model", "title", "architecture", "group", "family", "source", "train_images", "parent", "score"]
    models = pd.DataFrame(rows, columns=columns)
    size = np.array([224, 256, 336, 384, 448])[rng.integers(5, size=len(models))]
    models = models.assign(library="timm", finetuning="none", params_m=100.0, image_size=size, loss="softmax")
    return _tables(models, "imagenet_val", PAPER_SHIFTS, PAPER_OOD, PAPER_FACTORS, SIXTEEN)


def _tables(models, home, shifts, ood_sets, factors, classes):
    rng = np.random.default_rng(0)
    rows = {name: [] for name in ("accuracy", "shape_bias", "calibration", "factors", "retrieval", "ood")}
    own = {
        "A": 0.02, "B": -0.01, "WIT": 0.03, "LAION-2B": -0.02, "DataComp": 0.0, "CommonPool": -0.04,
    }  # fmt: skip
    captioned = (home,) if home.startswith("mini") else ("coco", "flickr30k")
    for row in models.itertuples():
        clip, averaged = row.group.startswith("clip"), row.group not in ("clip_zero_shot", "human")
        rows["accuracy"].append(measure(row.model, home, "accuracy", row.score))
        for number, shift in enumerate(shifts):
            value = np.clip(row.score - 0.2 - 0.03 * number + 0.06 * clip + 0.02 * rng.normal(), 0.01, 0.99)
            rows["accuracy"].append(measure(row.model, shift, "accuracy", value))
            rows["accuracy"].append(measure(row.model, shift, "reference_accuracy", row.score, convention="val"))
        share = 0.95 if row.group == "human" else rng.uniform(0.2, 0.7)
        for name in ("", *classes):
            n, convention = (80, "1000_way_mean_probability" if averaged else "16_way")
            value = share if not name else np.clip(share + 0.15 * rng.normal(), 0, 1)
            rows["shape_bias"].append(measure(row.model, "cue", "shape_bias", value, name, n, convention))
        rows["calibration"] += _calibration(rng, row, (home, *shifts), home)
        for factor, n in ({"": 46110} | factors).items():
            metric = "factor_accuracy" if factor else "accuracy"
            value = np.clip(row.score - (rng.uniform(0.02, 0.2) if factor else 0), 0.01, 0.99)
            dataset = "mini_factors" if home.startswith("mini") else "imagenet_x"
            rows["factors"].append(measure(row.model, dataset, metric, value, factor, n, "top"))
        for number, name in enumerate(ood_sets):
            base = 0.55 + 0.4 * row.score - 0.05 * number + own.get(row.source, 0) + 0.015 * rng.normal()
            rows["ood"] += _ood(row, name, float(np.clip(base, 0.01, 0.99)))
        if row.group == "clip_zero_shot":
            for dataset in captioned:
                for metric in ("image_recall@1", "text_recall@1", "image_recall@5", "text_recall@10"):
                    value = row.score - 0.25 + own.get(row.source, 0) + 0.02 * rng.normal()
                    for convention in ("own_captions", "duplicates_positive"):
                        rows["retrieval"].append(measure(row.model, dataset, metric, value, convention=convention))
    tables = {"models": models.drop(columns="score")} | {name: pd.DataFrame(some) for name, some in rows.items()}
    standard = set(models.loc[models["group"] == "standard", "model"])
    return tables | _baselines(tables, shifts, standard) | _factor_fits(tables, standard)


def _calibration(rng, row, datasets, home):
    rows = [measure(row.model, home, "temperature", 0.9) | {"value": 1.4}]
    raw = float(rng.uniform(0.02, 0.15))
    for number, dataset in enumerate(datasets):
        for state, scale in (("before", 1.0), ("after", 0.4)):
            value = raw * scale + 0.02 * number
            rows.append(measure(row.model, dataset, "ece", value, state, convention="15_equal_width"))
            rows.append(measure(row.model, dataset, "adaptive_ece", 1.02 * value, state, convention="15_equal_mass"))
            rows.append(measure(row.model, dataset, "nll", 1.5 - row.score + raw * scale + 0.1 * number, state))
            rows.append(measure(row.model, dataset, "brier", 1.2 - row.score + raw * scale, state))
    for b in range(6, 15):
        for state, offset in (("before", raw), ("after", 0.3 * raw)):
            for metric, value in (("bin_accuracy", (b + 0.5) / 15 - offset), ("bin_confidence", (b + 0.5) / 15)):
                rows.append(measure(row.model, home, metric, value, f"{state}:{b:02d}", 5 * b, "15_equal_width"))
    return rows


def _ood(row, dataset, auroc):
    scores = ("mcm_t1", "msp") if row.group == "clip_zero_shot" else ("msp",)
    rows = []
    for score in scores:
        value = auroc if score == scores[0] else auroc - 0.3  # a score that is not the default must not show
        rows.append(measure(row.model, dataset, "auroc", value, score, 60000, "id_positive"))
        for convention, rate in (("id_recall_at_least", 1 - auroc), ("ood_recall_at_least", 0.5)):
            rows.append(measure(row.model, dataset, "fpr95", rate, score, 60000, convention))
    limits = (0.00101, 0.00132) if len(scores) > 1 else (0.02, 1.0)
    for metric, limit in zip(("score_minimum", "score_maximum"), limits, strict=True):
        rows.append(measure(row.model, dataset, metric, 0.5, scores[0]) | {"value": limit})
    for side, centre in (("id", 28), ("ood", 28 - 20 * (auroc - 0.5))):
        share = np.exp(-0.5 * ((np.arange(40) - centre) / 5) ** 2)
        for b, value in enumerate(share / share.sum()):
            rows.append(measure(row.model, dataset, f"score_histogram_{side}", value, f"{scores[0]}:{b:02d}"))
    return rows


def _line(line, **where):
    kept = {"transform": line.transform, "estimator": line.estimator, "slope": line.slope, "r": line.r, "n": line.n}
    return where | kept | {"intercept": line.intercept, "source": "measured"}


def _robust(point, line, dataset, slice_, convention):
    value = float(statistics.effective_robustness(line, point.x, point.y))
    row = measure(point.model, dataset, "effective_robustness", 0.5, slice_, 1000, convention)
    return row | {"value": value, "low": value - 0.03, "high": value + 0.03}


def _baselines(tables, shifts, standard):
    accuracy, lines, robustness = frames.table(tables, "accuracy"), [], []
    for shift in shifts:
        points = frames.against_reference(accuracy, shift, "val")
        fitted = points[points["model"].isin(standard)]
        line = statistics.fit_line(fitted["x"], fitted["y"])
        lines.append(_line(line, dataset=shift, reference="val"))
        robustness += [_robust(point, line, shift, "val", "logit-ols") for point in points.itertuples()]
    return {"baselines": pd.DataFrame(lines), "effective_robustness": pd.DataFrame(robustness)}


def _factor_fits(tables, standard):
    factors, lines, robustness = tables["factors"], [], []
    overall = factors[factors["slice"] == ""].set_index("model")["value"]
    for (dataset, factor), rows in factors[factors["slice"] != ""].groupby(["dataset", "slice"]):
        points = rows.assign(x=rows["model"].map(overall), y=rows["value"])
        fitted = points[points["model"].isin(standard)]
        line = statistics.fit_line(fitted["x"], fitted["y"], "logit", "huber")
        lines.append(_line(line, dataset=dataset, slice=factor, convention="top"))
        robustness += [_robust(point, line, dataset, factor, "top-logit-huber") for point in points.itertuples()]
    return {"factor_fits": pd.DataFrame(lines), "factor_robustness": pd.DataFrame(robustness)}
