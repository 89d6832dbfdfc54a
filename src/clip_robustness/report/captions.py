"""Captions: a template a figure, whose numbers come from the tables that the figure is drawn from.

A template is reStructuredText with `$name` places: $study, $models, $datasets, $images, $groups,
$conventions and $fits.
"""

from collections.abc import Mapping
from pathlib import Path
from string import Template

import pandas as pd

from clip_robustness.core.io import InputError
from clip_robustness.report import claims, reproduction

# Table and metrics behind each figure: what "n models" and "n images" in its caption count.
MEASURED = {
    "effective_robustness": ("effective_robustness", ("effective_robustness",)),
    "shape_bias": ("shape_bias", ("shape_bias",)),
    "calibration": ("calibration", ("ece", "nll")),
    "visual_factors": ("factors", ("factor_accuracy",)),
    "retrieval": ("retrieval", ("image_recall@1", "text_recall@1")),
    "ood_detection": ("ood", ("auroc",)),
    "prompts": ("prompts", ("accuracy", "auroc")),
    "natural_shifts": ("effective_robustness", ("effective_robustness",)),
    "synthetic_shifts": ("synthetic", ("retention",)),
    "corruption_3d": ("accuracy", ("accuracy",)),
    "correspondence": ("correspondence", ("recall",)),
    "lmm": ("choice", ("accuracy",)),
    "adversarial": ("adversarial", ("accuracy",)),
    "typographic": ("typographic", ("accuracy",)),
    "data_overlap": ("data_overlap", ("gain", "overlap_share")),
}
# Figures whose captions have places of their own.
_OWN = {"claims": claims.caption_numbers, "reproduction": reproduction.caption_numbers}
_NOTHING = "an unstated number of"


def caption(figure: str, template: Path, tables: Mapping[str, pd.DataFrame], study: str) -> str:
    """The caption of `figure` with its numbers.

    Errors: `InputError` when the template is missing, or has a place that no number is known for.
    """
    try:
        text = template.read_text(encoding="utf-8")
    except OSError:
        raise InputError(f"{template}: no such file; every figure needs a caption template") from None
    try:
        return " ".join(Template(text).substitute(numbers(figure, tables, study)).split())
    except (KeyError, ValueError) as error:
        raise InputError(f"{template}: place {error} is unknown; expected one of ${', $'.join(_PLACES)}") from None


_PLACES = ("study", "models", "datasets", "images", "groups", "conventions", "fits")


def numbers(figure: str, tables: Mapping[str, pd.DataFrame], study: str) -> dict[str, str]:
    """What a template can name, for the rows that `figure` shows."""
    if figure in _OWN:
        return {"study": study} | _OWN[figure](tables[figure])
    name, metrics = MEASURED.get(figure, ("", ()))
    rows = tables.get(name, pd.DataFrame())
    if len(rows):
        rows = rows[rows["metric"].isin(metrics)]
    if not len(rows):
        return dict.fromkeys(_PLACES, "no") | {"study": study, "images": "0", "fits": "none"}
    overall = rows[rows["slice"] == ""] if (rows["slice"] == "").any() else rows
    return {
        "study": study,
        "models": f"{rows['model'].nunique():,}",
        "datasets": f"{rows['dataset'].nunique():,}",
        "images": _span(overall["n"]),
        "groups": _groups(rows, tables.get("models", pd.DataFrame())),
        "conventions": _listed(rows["convention"]),
        "fits": _fits(tables.get("baselines", pd.DataFrame())),
    }


def _span(n: pd.Series) -> str:
    counts = pd.to_numeric(n, errors="coerce").dropna()
    if not len(counts):
        return _NOTHING
    low, high = int(counts.min()), int(counts.max())
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _listed(values: pd.Series) -> str:
    names = sorted({str(value) for value in values.dropna() if str(value)})
    return ", ".join(names) if names else "not stated"


def _groups(rows: pd.DataFrame, models: pd.DataFrame) -> str:
    """Such as "clip_zero_shot n = 6, standard n = 3"."""
    if not len(models):
        return f"n = {rows['model'].nunique():,}"
    known = models[models["model"].isin(set(rows["model"]))].drop_duplicates("model")
    counts = known.groupby("group")["model"].size().sort_index()
    return ", ".join(f"{str(group).replace('_', ' ')} n = {count:,}" for group, count in counts.items())


def _fits(baselines: pd.DataFrame) -> str:
    if not len(baselines):
        return "none"
    kinds = sorted({f"{row.transform} axes, {row.estimator}" for row in baselines.itertuples()})
    return f"{'; '.join(kinds)}; n = {_span(baselines['n'])} models"
