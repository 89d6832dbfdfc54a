"""Accuracy under corruptions of several severities (Hendrycks and Dietterich 2019), and what a study makes of it."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.statistics import RESAMPLES, bootstrap_sums, clopper_pearson, percentile_interval
from clip_robustness.core.tables import KEY, MEASUREMENT
from clip_robustness.metrics import measure
from clip_robustness.metrics.effective_robustness import fit_baselines
from clip_robustness.metrics.gather import write_table
from clip_robustness.metrics.logits import restriction
from clip_robustness.metrics.rows import Row, proportion_row, row

# AlexNet's top-1 errors on ImageNet-C, means over five severities: hendrycks/robustness, as google-research/augmix
# (imagenet.py) lists them. They are of the published 224-pixel images without another resize.
ALEXNET = {
    **{"gaussian_noise": 0.886428, "shot_noise": 0.894468, "impulse_noise": 0.922640},
    **{"defocus_blur": 0.819880, "glass_blur": 0.826268, "motion_blur": 0.785948, "zoom_blur": 0.798360},
    **{"snow": 0.866816, "frost": 0.826572, "fog": 0.819324, "brightness": 0.564592},
    **{"contrast": 0.853204, "elastic_transform": 0.646056, "pixelate": 0.717840, "jpeg_compression": 0.606500},
}
# Its error on the validation images: torchvision's documentation of AlexNet_Weights.IMAGENET1K_V1.
ALEXNET_CLEAN = 1 - 0.56522

SUBSET, SEVERITY = "reference_accuracy", "severity:"
Cells = dict[tuple[str, str], dict[str, Row]]  # (data set, slice) -> model -> row


def corruption_rows(
    correct: np.ndarray,
    corruption: np.ndarray,
    severity: np.ndarray,
    photograph: np.ndarray | None,
    convention: str = "",
    seed: int = 0,
    resamples: int = RESAMPLES,
    kinds: Sequence[str] = (),
) -> list[Row]:
    """Rows `accuracy` of slice "" and of each `{corruption}` and `{corruption}:{severity}`; all arrays are [n].

    corruption: names, or positions in `kinds`, which take a tenth of the memory.

    A setting has the interval of Clopper and Pearson. A corruption is the mean over its severities, and "" the mean
    over corruptions. Their intervals are bootstraps: over photographs, when `photograph` numbers the source image of
    each row, since all settings then show the same ones; else (None) over the images of each setting. n of a mean is
    the number of photographs, or of images. Where a mean is 0 or 1, no resample differs, and it has the interval of
    Clopper and Pearson over n.
    """
    levels, level = np.unique(severity, return_inverse=True)
    names, name = np.unique(corruption, return_inverse=True)
    names = np.asarray(kinds)[names] if kinds else names
    settings, setting = np.unique(name * len(levels) + level, return_inverse=True)
    right, n = np.bincount(setting, weights=correct), np.bincount(setting)
    if photograph is None:
        draws = np.random.default_rng(seed).binomial(n, right / n, size=(resamples, len(n))) / n
    else:
        # A photograph that could not be read in some setting is absent there: hence the second half of columns.
        values = np.zeros((photograph.max() + 1, 2 * len(n)), np.float32)
        values[photograph, setting] = correct
        values[photograph, len(n) + setting] = 1
        sums = bootstrap_sums(values, resamples, seed)
        draws = sums[:, : len(n)] / np.maximum(sums[:, len(n) :], 1)
    of_name = settings // len(levels)
    each = (of_name[:, None] == np.arange(len(names))) / np.bincount(of_name)
    weights = np.column_stack([each.mean(axis=1), each])
    means, (lows, highs) = right / n @ weights, percentile_interval(draws @ weights)
    images = (
        [len(correct), *np.bincount(name)] if photograph is None else [len(np.unique(photograph))] * (len(names) + 1)
    )
    found = []
    for text, mean, low, high, count in zip(("", *names), means, lows, highs, images, strict=True):
        value = round(float(mean), 12)
        if value in (0, 1):
            low, high = clopper_pearson(value * count, count)
        found.append(row("accuracy", value, min(low, value), max(high, value), count, str(text), convention))
    slices = [f"{names[code // len(levels)]}:{levels[code % len(levels)]}" for code in settings]
    counts = zip(right, n, slices, strict=True)
    return found + [proportion_row("accuracy", int(k), int(total), text, convention) for k, total, text in counts]


def measure_corruption(
    embeddings: Path,
    index: Path,
    labels: Path,
    out: Path,
    head: Path | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> None:
    """Write the rows of `corruption_rows` to `out` (.json), over the images that have a label.

    The index needs the columns `corruption` and `severity`. Image ids are `{corruption}/{severity}/{photograph}`.
    The manifest's `resampled` says what the bootstrap is over: "photographs", when each is in every setting once,
    else "images". Memory: a block of logits, and a few numbers an image.
    Errors: InputError as of `measure.join`, and when no image has a label.
    """
    images = measure.join(embeddings, index, labels, head)
    columns = io.read_parquet(index, ["corruption", "severity"])
    rows = images.labelled
    if not len(rows):
        raise InputError(f"{index}: no image has a label of {labels}; index the data set again")
    pool, correct = restriction(images.members, images.classes), np.empty(len(rows), bool)
    for part, block in images.blocks(rows):
        correct[part] = pool(block).argmax(axis=1) == images.labels[rows[part]]
    corruption, severity = (columns[name] for name in ("corruption", "severity"))
    names = {name: number for number, name in enumerate(sorted(set(corruption)))}
    number = np.fromiter((names[name] for name in corruption), np.int64, len(corruption))
    photograph = _photographs(images.image_ids, corruption, severity)
    found = corruption_rows(
        correct, number[rows], severity[rows],
        None if photograph is None else photograph[rows],
        f"{len(images.members)}_way", seed, resamples, list(names),
    )  # fmt: skip
    resampled = "images" if photograph is None else "photographs"
    measure.write_rows(out, images, found, measured=len(rows), resampled=resampled, seed=seed)


def _photographs(ids: np.ndarray, corruption: np.ndarray, severity: np.ndarray) -> np.ndarray | None:
    """A number for the source image of each row; None unless each is in every setting exactly once."""
    seen: dict[str, int] = {}
    number = np.empty(len(ids), np.int64)
    settings: dict[tuple[str, int], int] = {}
    setting = np.empty(len(ids), np.int64)
    for i, (image_id, name, level) in enumerate(zip(ids, corruption, severity.tolist(), strict=True)):
        photograph = image_id.removeprefix(f"{name}/{level}/")
        number[i] = seen.setdefault(photograph, len(seen))
        setting[i] = settings.setdefault((name, level), len(settings))
    if len(seen) * len(settings) != len(ids):
        return None
    once = np.zeros((len(seen), len(settings)), bool)
    once[number, setting] = True
    return number if once.all() else None


def summarise_corruptions(
    accuracy: Path,
    models: Path,
    out: Path,
    shifts: Sequence[str],
    reference: str,
    adversarial: Path | None = None,
    normaliser: str | None = None,
    population: str = "standard",
    sources: Sequence[str] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> None:
    """Tables of measurements to the table `out` (.parquet and .csv) of synthetic shifts: three views of each.

    shifts: such as "stylized_imagenet", "imagenet_c=imagenet_c_noise+imagenet_c_blur" or
    "imagenet_pgd=imagenet_val:pgd_linf_2+imagenet_val:pgd_l2_0.5": a name, and the data sets or slices of them that
    it is made of (by default the data set of that name). reference: the in-distribution data set. accuracy,
    adversarial: tables with `accuracy` rows. For each shift and model that has all of its parts:

      accuracy              slice "", each part, and for corruptions `severity:{s}`, the mean over corruptions
      retention             accuracy / in-distribution accuracy, of "" and each part. Convention `class_subset`: on the
                            shift's own classes, where the table knows that accuracy; else `val`
      effective_robustness  of "", as of `effective_robustness.fit_baselines` (slice: reference)
      mce, relative_mce     mean over corruptions of error / the normaliser's error; and of (error - clean error) / the
                            same of the normaliser (Hendrycks and Dietterich 2019, section 3). Fractions: 0.765 is what
                            papers write as 76.5. Convention: the normaliser

    normaliser: a model of the tables; by default the constants ALEXNET, for exactly these fifteen corruptions. They
    are a fixed yardstick here, so that their own error is in no interval. A shift made of parts is the mean of them.
    All parts show the same photographs, so distances of their limits add plainly, which is the worst case; of
    retention, relative distances add in squares.
    Errors: InputError for a shift without rows, and an unknown normaliser. What cannot be computed is said on stderr.
    """
    cells = _cells([accuracy] if adversarial is None else [accuracy, adversarial])
    home = cells.get((reference, ""), {})
    known = io.read_parquet(models, ["model", "group"])
    groups = dict(zip(known["model"], known["group"], strict=True))
    found: list[Row] = []
    fitted = list(home.values())
    for entry in shifts:
        name, parts = _parts(entry, cells)
        if not parts:
            raise InputError(f"{accuracy}: no accuracy on {entry}; measure it, or leave it out of the synthetic shifts")
        subset = cells.get((name, SUBSET), {})
        rows = [{**one, "dataset": name, "slice": text} for text, some in parts.items() for one in some.values()]
        found += rows
        for one in rows:
            partner = subset.get(one["model"]) or home.get(one["model"])
            if partner is not None and partner["value"] > 0 and not one["slice"].startswith(SEVERITY):
                found.append(_retention(one, partner, "class_subset" if one["model"] in subset else "val"))
        fitted += [one for one in rows if not one["slice"]] + list(subset.values())
        found += _corruption_errors(name, parts, home, normaliser)
    names = [entry.partition("=")[0] for entry in shifts]
    fits = fit_baselines(fitted, groups, names, reference, population, sources,
                         estimators=("ols",), resamples=resamples, seed=seed)  # fmt: skip
    for note in fits.notes:
        print(note, file=sys.stderr)
    found += fits.rows
    found.sort(key=lambda r: [r[column] for column in KEY])
    study = "+".join(sorted({str(one["study"]) for one in fitted}))
    write_table(out, {column: [{**one, "study": study}[column] for one in found] for column in MEASUREMENT})


def _cells(tables: Sequence[Path]) -> Cells:
    """Accuracies by (data set, slice) and model; SUBSET stands in the place of a slice.

    A model that was reported more than once keeps its measured row, else the first by source and convention.
    """
    rows: list[Row] = []
    for path in tables:
        columns = io.read_parquet(path, MEASUREMENT)
        wanted = [metric in ("accuracy", SUBSET) for metric in columns["metric"]]
        values = zip(*(column[wanted] for column in columns.values()), strict=True)
        rows += [dict(zip(columns, one, strict=True)) for one in values]
    cells: Cells = {}
    for one in sorted(rows, key=lambda r: (r["source"] != "measured", str(r["source"]), str(r["convention"]))):
        text = one["slice"] if one["metric"] == "accuracy" else SUBSET
        cells.setdefault((one["dataset"], text), {}).setdefault(one["model"], one)
    return cells


def _parts(entry: str, cells: Cells) -> tuple[str, dict[str, Mapping[str, Row]]]:
    """The name of a shift, and its rows by slice and model."""
    name, _, members = entry.partition("=")
    parts: dict[str, Mapping[str, Row]] = {}
    severities: dict[str, list[Mapping[str, Row]]] = {}
    for member in (members or name).split("+"):
        dataset, _, wanted = member.partition(":")
        for (own, text), some in sorted(cells.items()):
            if own != dataset or text == SUBSET or (wanted and text != wanted):
                continue
            if ":" in text:
                severities.setdefault(text.partition(":")[2], []).append(some)
            elif text or member == (members or name):
                parts[text] = some
    if parts and "" not in parts:
        parts[""] = _mean(list(parts.values()))
    return name, parts | {f"{SEVERITY}{level}": _mean(some) for level, some in sorted(severities.items())}


def _mean(parts: Sequence[Mapping[str, Row]]) -> dict[str, Row]:
    """The mean over parts, for each model that has them all. n: of the smallest part."""
    found = {}
    for model in sorted(set.intersection(*map(set, parts))):
        own = [part[model] for part in parts]
        value, low, high = (sum(float(one[name]) for one in own) / len(own) for name in ("value", "low", "high"))
        words = {name: "+".join(sorted({str(one[name]) for one in own})) for name in ("convention", "source")}
        found[model] = {**own[0], **words, "value": value, "low": low, "high": high, "n": min(one["n"] for one in own)}
    return found


def _retention(one: Row, partner: Row, convention: str) -> Row:
    ratio = one["value"] / partner["value"]
    below = np.hypot(one["value"] - one["low"], ratio * (partner["high"] - partner["value"])) / partner["value"]
    above = np.hypot(one["high"] - one["value"], ratio * (partner["value"] - partner["low"])) / partner["value"]
    measured = row("retention", ratio, max(ratio - below, 0), ratio + above, one["n"], one["slice"], convention)
    return {**one, **measured}


def _corruption_errors(
    name: str, parts: Mapping[str, Mapping[str, Row]], home: Mapping[str, Row], normaliser: str | None
) -> list[Row]:
    """Rows `mce` and `relative_mce` of a shift, for models that have all its corruptions."""
    slices = [text for text in parts if text and not text.startswith(SEVERITY)]
    fifteen = set(slices) == set(ALEXNET)
    if not fifteen and not any(text.startswith(SEVERITY) for text in parts):
        return []
    if normaliser is None:
        if not fifteen:
            return []
        errors, clean = np.array([ALEXNET[text] for text in slices]), ALEXNET_CLEAN
    else:
        if normaliser not in home or any(normaliser not in parts[text] for text in slices):
            raise InputError(f"normaliser {normaliser!r}: no accuracy on all of {name}; name another model")
        errors = np.array([1 - parts[text][normaliser]["value"] for text in slices])
        clean = 1 - home[normaliser]["value"]
    found = []
    for model in sorted(set.intersection(*(set(parts[text]) for text in slices))):
        own = [parts[text][model] for text in slices]
        limits = [1 - np.array([one[key] for one in own], float) for key in ("value", "high", "low")]
        lost = [1 - float(home[model][key]) for key in ("value", "low", "high")] if model in home else []
        for metric, top, bottom in (
            ("mce", limits, errors),
            ("relative_mce", [error - one for error, one in zip(limits, lost, strict=False)], errors - clean),
        ):
            if top and np.all(bottom > 0):
                value, low, high = (float(np.mean(error / bottom)) for error in top)
                measured = row(metric, value, low, high, own[0]["n"], convention=normaliser or "alexnet")
                found.append({**own[0], **measured, "dataset": name})
            elif model == normaliser:
                print(f"{name}: no {metric}: {normaliser} makes no more errors there than without", file=sys.stderr)
    return found
