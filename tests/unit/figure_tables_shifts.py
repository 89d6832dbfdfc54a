"""Tables of natural and synthetic shifts to draw from: like the mini study's, and like published ones."""

import functools

import numpy as np
import pandas as pd

from clip_robustness.core import statistics
from clip_robustness.figures import frames
from tests.unit.figure_tables import MODELS, measure

SHIFTS = ("mini_pose", "mini_sketch", "mini_video")
CORRUPTIONS = ("blur", "jpeg_compression", "noise")
SYNTHETIC = ("mini_stylized", "mini_c", "mini_pgd")
PUBLISHED_SHIFTS = (
    *("imagenet_v2", "imagenet_r", "imagenet_a", "imagenet_sketch", "objectnet"),
    *("imagenet_vid_pm0", "imagenet_vid_pm10", "ytbb_pm0", "ytbb_pm10"),
)
PUBLISHED_SYNTHETIC = ("stylized_imagenet", "imagenet_c", "imagenet_greyscale", "imagenet_pgd")
FIFTEEN = (
    *("brightness", "contrast", "defocus_blur", "elastic_transform", "fog", "frost", "gaussian_noise", "glass_blur"),
    *("impulse_noise", "jpeg_compression", "motion_blur", "pixelate", "shot_noise", "snow", "zoom_blur"),
)


def study():
    return dict(_study())


def crowd():
    return dict(_crowd())


@functools.cache
def _study():
    columns = ["model", "title", "architecture", "group", "family", "source", "train_images", "parent", "score"]
    models = pd.DataFrame(MODELS, columns=columns)
    return _tables(models, "mini_val", SHIFTS, SYNTHETIC, CORRUPTIONS, "rn")


@functools.cache
def _crowd():
    """Two CLIPs, as in imagenet-testbed, none of which was run on corruptions or attacks; and many others."""
    rng = np.random.default_rng(3)
    rows = [("clip_rn", "CLIP RN50", "r", "clip_zero_shot", "resnet", "WIT", 4e8, "", 0.6)]
    rows += [("clip_vit", "CLIP ViT-B/32", "v", "clip_zero_shot", "vit", "WIT", 4e8, "", 0.63)]
    for number in range(120):
        group = ("standard", "more_data", "robust")[number % 3]
        family = ("resnet", "vit", "cnn", "resnet")[number % 4]
        rows.append((f"m{number:03d}", f"model_number_{number}", "s", group, family, "ImageNet-1k", 1.3e6, "",
                     float(rng.uniform(0.56, 0.88))))  # fmt: skip
    columns = ["model", "title", "architecture", "group", "family", "source", "train_images", "parent", "score"]
    models = pd.DataFrame(rows, columns=columns)
    without = {"imagenet_c", "imagenet_pgd"}
    return _tables(models, "imagenet_val", PUBLISHED_SHIFTS, PUBLISHED_SYNTHETIC, FIFTEEN, "m000", without)


def _tables(models, home, shifts, synthetic, corruptions, yardstick, without_clip=frozenset()):
    rng = np.random.default_rng(0)
    accuracy, table = [], []
    for row in models.itertuples():
        clip = row.group == "clip_zero_shot"
        accuracy.append(measure(row.model, home, "accuracy", row.score))
        for number, shift in enumerate(shifts):
            if shift.endswith("_pm10"):
                continue
            value = float(np.clip(row.score - 0.15 - 0.02 * number + 0.1 * clip + 0.02 * rng.normal(), 0.02, 0.98))
            accuracy.append(measure(row.model, shift, "reference_accuracy", row.score, convention="class_subset"))
            accuracy.append(measure(row.model, shift, "accuracy", value))
            whole = float(np.clip(value - 0.12 - 0.05 * clip, 0.01, 0.97))
            if shift == "mini_video":
                accuracy[-1] = measure(row.model, shift, "accuracy", (value + whole) / 2)
                accuracy.append(measure(row.model, shift, "pm0_accuracy", value))
                accuracy.append(measure(row.model, shift, "pm10_accuracy", whole))
            if shift.endswith("_pm0"):
                later = shift.replace("pm0", "pm10")
                accuracy.append(measure(row.model, later, "accuracy", whole))
                accuracy.append(measure(row.model, later, "reference_accuracy", row.score, convention="class_subset"))
        for number, shift in enumerate(synthetic):
            if clip and shift in without_clip:
                continue
            value = float(np.clip(row.score - 0.3 - 0.03 * number - 0.08 * clip + 0.03 * rng.normal(), 0.02, 0.98))
            table += [measure(row.model, shift, "accuracy", value)]
            table += [measure(row.model, shift, "retention", value / row.score, convention="val")]
            if shift not in ("mini_c", "imagenet_c"):
                continue
            for c, name in enumerate(corruptions):
                own = float(np.clip(value + 0.05 - 0.02 * c, 0.01, 0.99))
                table.append(measure(row.model, shift, "accuracy", own, name))
                table.append(measure(row.model, shift, "retention", own / row.score, name, convention="val"))
            for s in (1, 3, 5):
                own = float(np.clip(value + 0.1 - 0.05 * s, 0.01, 0.99))
                table.append(measure(row.model, shift, "accuracy", own, f"severity:{s}"))
            for metric in ("mce", "relative_mce"):
                own = (1 - value) / 0.6
                table.append(measure(row.model, shift, metric, 0.5, convention=yardstick)
                             | {"value": own, "low": own - 0.02, "high": own + 0.02})  # fmt: skip
    tables = {"models": models.drop(columns="score"), "accuracy": pd.DataFrame(accuracy)}
    tables["synthetic"] = pd.DataFrame(table)
    every = pd.concat([tables["accuracy"], tables["synthetic"][tables["synthetic"]["slice"] == ""]])
    standard = set(models.loc[models["group"] == "standard", "model"])
    above = {"natural_average": _average(every, shifts, home)}
    robust = _robustness(
        pd.concat([every, above["natural_average"]]), (*shifts, *synthetic, "natural_average"), standard
    )
    ours = robust["dataset"].isin(synthetic)
    tables["effective_robustness"] = pd.concat([robust[~ours], above["natural_average"]], ignore_index=True)
    tables["synthetic"] = pd.concat([tables["synthetic"], robust[ours]], ignore_index=True)
    return tables


def _average(accuracy, shifts, home):
    rows = []
    for metric in ("accuracy", "reference_accuracy"):
        some = accuracy[(accuracy["metric"] == metric) & accuracy["dataset"].isin(shifts)]
        for model, value in some.groupby("model")["value"].mean().items():
            rows.append(measure(model, "natural_average", metric, float(value), convention=f"mean_of_{len(shifts)}"))
    return pd.DataFrame(rows)


def _robustness(accuracy, shifts, standard):
    known, rows = frames.table({"accuracy": accuracy}, "accuracy"), []
    for shift in shifts:
        for reference in ("val", "class_subset"):
            if (
                reference == "class_subset"
                and not ((known["dataset"] == shift) & (known["metric"] != "accuracy")).any()
            ):
                continue
            points = frames.against_reference(known, shift, reference)
            fitted = points[points["model"].isin(standard)]
            line = statistics.fit_line(fitted["x"], fitted["y"])
            for point in points.itertuples():
                value = float(statistics.effective_robustness(line, point.x, point.y))
                row = measure(point.model, shift, "effective_robustness", 0.5, reference, 1000, "logit-ols")
                rows.append(row | {"value": value, "low": value - 0.03, "high": value + 0.02})
    return pd.DataFrame(rows)
