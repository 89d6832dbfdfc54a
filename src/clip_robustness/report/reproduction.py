"""Measured against published: the same models on the same data sets, number by number, with what may explain a gap.

    compare_published([tables / "accuracy.parquet"], tables / "models.parquet", Path("config/published"), out)

A model is compared when the models table names its key in `published`; a number, when others published the same metric
by a convention that corresponds (`CORRESPOND`). A difference of more than FLAGGED is flagged. `reasons` names what is
known to cause such differences and holds for the row; it is a list of suspects, not a finding.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pandas as pd

from clip_robustness.core import statistics
from clip_robustness.core.io import InputError
from clip_robustness.core.tables import read_frame
from clip_robustness.report.tables import write_table

FLAGGED = 0.003
COLUMNS = (
    *("model", "published_as", "dataset", "metric", "slice", "measured", "published", "difference", "low", "high"),
    *("n", "published_n", "convention", "published_convention", "source", "flagged", "reasons", "study"),
)
# Data set, convention here, convention there, and what differs between the two; the first that was published counts.
CORRESPOND = (
    ("*", "1000_way", "1000_way", ""),
    ("imagenet_v2", "1000_way", "format_val", "images re-encoded there (format_val)"),
    ("imagenet_[ar]", "200_way", "200_way", ""),
    ("objectnet", "113_way", "113_from_125", ""),
    ("objectnet", "113_way", "113_own_names", "class names (ObjectNet's own 113 there)"),
    ("imagenet_vid_*", "30_way", "30_way", ""),
    ("ytbb_*", "19_way", "24_way", "empty classes count there (24_way)"),
    ("*", "class_subset", "class_subset", ""),
    ("imagenet_x", "top", "top", ""),
    ("imagenet_x", "multi", "multi", ""),
    ("cue_conflict", "1000_way_mean_probability", "1000way_mean", ""),
    ("cue_conflict", "16_way", "16way_80_templates", ""),
    ("coco", "own_captions", "karpathy_test", ""),
    ("flickr30k", "own_captions", "karpathy_test", ""),
)
_TYPES = {
    **dict.fromkeys(("measured", "published", "difference", "low", "high"), "float64"),
    **{"n": "Int64", "published_n": "Int64", "flagged": "bool"},
}
_CUES = ("n_shape", "n_texture", "n_conflict")
_CELL = ("model", "dataset", "metric", "slice", "convention")
# Sources that ran every model with bicubic resizing.
_BICUBIC = ("open_clip", "open_clip_retrieval", "scaling_laws")

Row = Mapping[str, Any]


def compare_published(
    tables: Sequence[Path], models: Path, published: Path, out: Path, precision: str = "", *, pillow: str = ""
) -> None:
    """Write `out` (.parquet, and .csv beside it; COLUMNS) from tables of measurement rows and the folder `published`.

    Rows whose source is not `measured`, and models without a published key, are left out; so the table may be empty.
    measured, published, difference (measured - published), low and high are fractions. The interval takes both
    numbers as independent proportions: on the same images it is too wide. low and high are empty where the published
    n is not known. precision, pillow: how the study embedded (config key; version), for `reasons` only.
    Errors: `InputError` for a file that is missing or lacks a column, and for a published key that is not there.
    """
    listed = read_frame(models)
    facts: dict[str, Row] = {str(row["model"]): row for row in _records(listed)}
    keys = {model: str(row["published"]) for model, row in facts.items() if row.get("published")}
    there = {row["model"]: row for row in _read_csv(published / "models.csv")} if keys else {}
    unknown = sorted({key for key in keys.values() if key not in there})
    if unknown:
        raise InputError(f"{models}: column published: '{unknown[0]}' is no model of {published / 'models.csv'}")
    known = _published_values(published, set(keys.values())) if keys else {}
    how = {"precision": precision, "pillow": pillow}
    rows = []
    for path in tables:
        for measured in _records(read_frame(Path(path))):
            key = keys.get(measured["model"])
            if key is None or measured["source"] != "measured":
                continue
            found = _counterpart(measured, key, known)
            if found is not None:
                other, differs = found
                suspects = [differs, *_reasons(measured, other, facts[measured["model"]], there[key], how)]
                rows.append(_compare(measured, other, key) | {"reasons": "; ".join(filter(None, suspects))})
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype(_TYPES)
    table = table.sort_values([*_CELL], kind="stable", ignore_index=True)
    write_table(table, out)


def caption_numbers(table: pd.DataFrame) -> dict[str, str]:
    """What the figure's caption says in numbers: numbers compared, flagged, models, and the suspects by frequency."""
    flagged = table[table["flagged"].astype(bool)]
    suspects = flagged["reasons"].str.split("; ").explode().str.partition(" (")[0] if len(flagged) else pd.Series()
    counts = suspects[suspects != ""].value_counts().sort_index().sort_values(ascending=False, kind="stable")
    return {
        "compared": f"{len(table):,}",
        "flagged": f"{len(flagged):,}",
        "compared_models": f"{table['model'].nunique():,}",
        "suspects": ", ".join(f"{name} ({count:,})" for name, count in counts.items()) or "none",
    }


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as dicts, "" where nothing is known."""
    filled = table.astype(object).where(table.notna(), "")
    return [{str(name): value for name, value in row.items()} for row in filled.to_dict("records")]


def _read_csv(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise InputError(f"{path}: cannot read it ({error.strerror}); expected published tables there") from None


def _published_values(folder: Path, keys: set[str]) -> dict[tuple[str, ...], dict[str, Any]]:
    """_CELL -> published row of the models `keys`; counts of cue-conflict decisions become two proportions."""
    values: dict[tuple[str, ...], dict[str, Any]] = {}
    decisions: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob("*.csv")):
        if path.name in ("models.csv", "sources.csv"):
            continue
        for row in _read_csv(path):
            try:
                if row["model"] in keys and row["metric"] in _CUES:
                    cell = (row["model"], row["dataset"], row["slice"], row["convention"])
                    decisions.setdefault(cell, dict(row))[row["metric"]] = int(row["value"])
                elif row["model"] in keys:
                    number = {"value": float(row["value"]), "n": float(row["n"]) if row["n"] else math.nan}
                    values.setdefault(tuple(row[name] for name in _CELL), {**row, **number})
            except (KeyError, ValueError) as error:
                raise InputError(f"{path}, {row}: {error}; import-published says what it should be") from None
    for row in decisions.values():
        shape, texture, conflicts = (int(row[name]) for name in _CUES)
        decided = shape + texture
        for metric, hits, n in (("shape_bias", shape, decided), ("cue_accuracy", decided, conflicts)):
            if n:
                found = {**row, "metric": metric, "value": hits / n, "n": float(n)}
                values.setdefault(tuple(str(found[name]) for name in _CELL), found)
    return values


def _counterpart(
    measured: Row, key: str, known: Mapping[tuple[str, ...], dict[str, Any]]
) -> tuple[dict[str, Any], str] | None:
    """The published number that a measured one may be compared with, and what differs between their conventions."""
    for dataset, here, there, differs in CORRESPOND:
        if measured["convention"] == here and fnmatchcase(measured["dataset"], dataset):
            other = known.get((key, measured["dataset"], measured["metric"], measured["slice"], there))
            if other is not None:
                return other, differs
    return None


def _compare(measured: Row, other: Row, key: str) -> dict[str, Any]:
    value, difference = other["value"], measured["value"] - other["value"]
    low = high = math.nan
    if not math.isnan(other["n"]):
        below, above = map(float, statistics.clopper_pearson(value * other["n"], other["n"]))
        low = difference - math.hypot(measured["value"] - measured["low"], above - value)
        high = difference + math.hypot(measured["high"] - measured["value"], value - below)
    return {
        **{name: measured[name] for name in (*_CELL, "n", "study")},
        **{"published_as": key, "measured": measured["value"], "published": value, "difference": difference},
        **{"low": low, "high": high, "flagged": bool(abs(difference) > FLAGGED)},
        **{"published_n": None if math.isnan(other["n"]) else int(other["n"])},
        **{"published_convention": other["convention"], "source": other["source"]},
    }


def _reasons(measured: Row, other: Row, here: Row, there: Row, how: Mapping[str, str]) -> Iterable[str]:
    """What is known to move a number and holds for this one. `here`, `there`: the model in either models table."""
    key = str(there["model"])
    preprocess, architecture = str(here.get("preprocess", "")), str(here.get("architecture", ""))
    if "bilinear" in preprocess and other["source"] in _BICUBIC:
        yield "interpolation (bilinear here, bicubic there)"
    # open_clip gives OpenAI's own weights their activation whatever name they are asked for by.
    listed_twice = other["source"] in ("open_clip", "open_clip_retrieval") and not key.endswith(".openai")
    if listed_twice and architecture and ("quickgelu" in architecture.lower()) != ("quickgelu" in key):
        yield "activation (QuickGELU here or there, not both)"
    sizes = [str(row.get("image_size", "")).removesuffix(".0") for row in (here, there)]
    if all(sizes) and sizes[0] != sizes[1]:
        yield f"evaluation size ({sizes[0]} px here, {sizes[1]} px there)"
    # What shape bias counts are decisions, whose number is itself a result.
    if measured["metric"] != "shape_bias" and not math.isnan(other["n"]) and measured["n"] != other["n"]:
        yield f"number of images ({measured['n']:,} here, {other['n']:,.0f} there)"
    if how["pillow"] and int(how["pillow"].split(".")[0]) >= 13:
        yield "resampling (Pillow 13 filters tall images in another order)"
    if how["precision"] in ("bf16", "auto"):
        yield f"precision ({how['precision']})"
