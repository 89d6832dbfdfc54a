"""The published study: numbers that others measured, from config/published/*.csv to tidy tables.

    import_published(Path("config/published"), Path("results/published/tables"), study="published")

`sources.csv` and `models.csv` describe; every other .csv in the folder holds measurements, one a row:
model, dataset, metric, slice, value, n, convention, source. Nothing is believed: whatever is wrong is
collected and raised as one `InputError`, a line each, before any table is written.
"""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clip_robustness.core import io
from clip_robustness.core.io import InputError
from clip_robustness.core.registry import NAME, nearest
from clip_robustness.core.statistics import clopper_pearson
from clip_robustness.core.tables import KEY, MEASUREMENT

Row = dict[str, Any]
Place = tuple[Path, int]

PUBLISHED = ("model", "dataset", "metric", "slice", "value", "n", "convention", "source")  # a file's columns
MODEL = (
    "model", "title", "library", "group", "family", "source", "train_images", "finetuning", "loss",
    "params_m", "parent", "image_size",
)  # fmt: skip
SOURCE = ("source", "repository", "path", "commit", "licence", "what")
TABLE = (*MEASUREMENT, "repository", "commit", "licence")

GROUPS = (
    "clip_zero_shot", "clip_finetuned", "standard", "more_data", "self_supervised", "robust", "vlm", "human",
)  # fmt: skip
COUNTS = ("n_shape", "n_texture", "n_conflict")
METRICS = {
    "accuracy": "accuracy",
    "reference_accuracy": "accuracy",
    "factor_accuracy": "factors",
    **{f"{which}_recall@{k}": "retrieval" for which in ("image", "text") for k in (1, 5, 10)},
    **dict.fromkeys(COUNTS, "shape_bias"),
}
TABLES = ("accuracy", "shape_bias", "factors", "retrieval")
FACTOR_DATASET = "imagenet_x"
INTEGERS = ("n", "train_images", "image_size")
NUMBERS = ("value", "low", "high", "params_m")
SHOWN_PROBLEMS = 30
LARGEST = 2**53


def import_published(folder: Path, out: Path, study: str) -> None:
    """Validate the CSV files of `folder`; write models, accuracy, shape_bias, factors and retrieval to `out`.

    Each table is written as .parquet and .csv, sorted, byte for byte reproducible. Measurements get the 95 %
    interval of Clopper and Pearson and the repository, commit and licence of their source. Where n is not
    known, n, low and high are empty (null); a value never is. Counts of cue-conflict decisions become
    `shape_bias` (n = decisions for either cue) and `cue_accuracy` (n = conflicts), after Geirhos et al. 2019.

    Errors: `InputError` naming file, row, field, what was expected and the nearest valid name.
    """
    folder, out = Path(folder), Path(out)
    problems: list[str] = []
    sources = _read_sources(folder / "sources.csv", problems)
    models = _read_models(folder / "models.csv", problems)
    files = sorted(path for path in folder.glob("*.csv") if path.name not in ("sources.csv", "models.csv"))
    if not files:
        problems.append(f"{folder}: no measurements; expected .csv files beside models.csv and sources.csv")
    rows = _read_measurements(files, models, sources, problems)
    counted = _shape_bias_rows([entry for entry in rows if entry[1]["metric"] in COUNTS], problems)
    _stop(problems)

    tables: dict[str, list[Row]] = {name: [] for name in TABLES}
    tables["shape_bias"] = counted
    for _, row in rows:
        if row["metric"] not in COUNTS:
            name = "factors" if row["dataset"] == FACTOR_DATASET else METRICS[row["metric"]]
            tables[name].append(row)
    for name, table in tables.items():
        _add_intervals(table)
        for row in table:
            source = sources[row["source"]]
            row.update(study=study, **{field: source[field] for field in ("repository", "commit", "licence")})
        _write(out / name, TABLE, sorted(table, key=_key))
    _write(out / "models", MODEL, [models[name] for name in sorted(models)])


def _read_measurements(
    files: Iterable[Path], models: Mapping[str, Row], sources: Mapping[str, Row], problems: list[str]
) -> list[tuple[Place, Row]]:
    rows: list[tuple[Place, Row]] = []
    seen: dict[tuple[str, ...], Place] = {}
    for path in files:
        for line, row in _read(path, PUBLISHED, problems):
            where = f"{path}, row {line}"
            found = []
            for field, known, place in (
                ("model", models, "models.csv"),
                ("source", sources, "sources.csv"),
                ("metric", METRICS, f"the metrics: {', '.join(METRICS)}"),
            ):
                if row[field] not in known:
                    expected = f"expected a name in {place}{nearest(row[field], known)}"
                    found.append(f"{where}, field '{field}': '{row[field]}' is unknown; {expected}")
            if not NAME.fullmatch(row["dataset"]):
                found.append(f"{where}, field 'dataset': {row['dataset']!r}; expected letters, digits, '_', '-', '.'")
            count = row["metric"] in COUNTS
            value = _number(row["value"], int if count else float)
            if value is None or value < 0 or (not count and value > 1):
                expected = "a whole number of 0 or more" if count else "a fraction in 0..1 (not per cent)"
                found.append(f"{where}, field 'value': {row['value']!r}; expected {expected}")
            n = _number(row["n"], int)
            if row["n"] and (n is None or n < 1):
                found.append(f"{where}, field 'n': {row['n']!r}; expected a whole number of 1 or more, or nothing")
            key = _key(row)
            if key in seen:
                first, first_line = seen[key]
                found.append(f"{where}: repeats {first.name}, row {first_line}; expected one row for {', '.join(KEY)}")
            problems += found
            if not found:
                seen[key] = (path, line)
                rows.append(((path, line), {**row, "value": value, "n": n}))
    return rows


def _shape_bias_rows(counts: Sequence[tuple[Place, Row]], problems: list[str]) -> list[Row]:
    """shape / (shape + texture) and (shape + texture) / conflicts; a ratio over nothing has no row."""
    cells: dict[tuple[str, ...], dict[str, int]] = {}
    first: dict[tuple[str, ...], tuple[Place, Row]] = {}
    for place, row in counts:
        key = tuple(row[field] for field in KEY if field != "metric")
        cells.setdefault(key, {})[row["metric"]] = row["value"]
        first.setdefault(key, (place, row))
    rows = []
    for key, cell in cells.items():
        (path, line), row = first[key]
        missing = [name for name in COUNTS if name not in cell]
        if missing:
            problems.append(f"{path}, row {line}, field 'metric': expected also {', '.join(missing)} for this row")
            continue
        decided = cell["n_shape"] + cell["n_texture"]
        if decided > cell["n_conflict"]:
            expected = f"n_shape + n_texture at most n_conflict, {cell['n_conflict']}"
            problems.append(f"{path}, row {line}, field 'value': {decided} decisions; expected {expected}")
            continue
        ratios = (("shape_bias", cell["n_shape"], decided), ("cue_accuracy", decided, cell["n_conflict"]))
        rows += [{**row, "metric": metric, "value": k / n, "n": n} for metric, k, n in ratios if n]
    return rows


def _read_models(path: Path, problems: list[str]) -> dict[str, Row]:
    models: dict[str, Row] = {}
    lines: dict[str, int] = {}
    for line, row in _read(path, MODEL, problems):
        where, name = f"{path}, row {line}", row["model"]
        if not NAME.fullmatch(name):
            problems.append(f"{where}, field 'model': {name!r}; expected lower-case letters, digits, '_', '-', '.'")
        if name in models:
            problems.append(f"{where}, field 'model': '{name}' is taken by row {lines[name]}; expected a new name")
            continue
        if row["group"] not in GROUPS:
            expected = f"expected one of {', '.join(GROUPS)}{nearest(row['group'], GROUPS)}"
            problems.append(f"{where}, field 'group': '{row['group']}' is unknown; {expected}")
        if not row["title"]:
            problems.append(f"{where}, field 'title': '' given; expected a name to print")
        numbers: Row = {}
        for field, kind in (("train_images", int), ("params_m", float), ("image_size", int)):
            numbers[field] = _number(row[field], kind)
            if row[field] and (numbers[field] is None or numbers[field] <= 0):
                problems.append(f"{where}, field '{field}': {row[field]!r}; expected a positive number, or nothing")
        models[name], lines[name] = {**row, **numbers}, line
    for name, row in models.items():
        if row["parent"] and row["parent"] not in models:
            expected = f"expected a model of this file, or nothing{nearest(row['parent'], models)}"
            problems.append(f"{path}, row {lines[name]}, field 'parent': '{row['parent']}' is unknown; {expected}")
    return models


def _read_sources(path: Path, problems: list[str]) -> dict[str, Row]:
    sources: dict[str, Row] = {}
    for line, row in _read(path, SOURCE, problems):
        for field in [field for field in SOURCE if not row[field]]:
            problems.append(f"{path}, row {line}, field '{field}': '' given; expected every field of a source")
        if row["source"] in sources:
            problems.append(f"{path}, row {line}, field 'source': '{row['source']}' stands twice; expected one row")
        sources[row["source"]] = row
    return sources


def _read(path: Path, columns: Sequence[str], problems: list[str]) -> list[tuple[int, Row]]:
    """Rows as (line of the file, values by column); a file with other columns is reported and has no rows."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            header = next(reader, [])
            rows = [(reader.line_num, row) for row in reader if row]
    except OSError as error:
        problems.append(f"{path}: cannot read it ({error.strerror}); expected the columns {', '.join(columns)}")
        return []
    except (UnicodeDecodeError, csv.Error) as error:
        problems.append(f"{path}: not a CSV file in UTF-8 ({error})")
        return []
    if header != list(columns):
        for name in [name for name in header if name not in columns]:
            problems.append(f"{path}, row 1: unknown column '{name}'{nearest(name, columns)}")
        problems.append(f"{path}, row 1: expected exactly the columns {','.join(columns)}")
        return []
    for line, row in rows:
        if len(row) != len(columns):
            problems.append(f"{path}, row {line}: {len(row)} fields; expected {len(columns)}")
    return [(line, dict(zip(columns, row, strict=True))) for line, row in rows if len(row) == len(columns)]


def _number(text: str, kind: type) -> Any:
    """`text` as a finite number of `kind`, of a size that a float tells from the next, else None."""
    if "_" in text or text != text.strip():
        return None  # Python would take both, other readers of the file would not
    try:
        number = kind(text)
        return number if math.isfinite(number) and abs(number) <= LARGEST else None
    except (ValueError, OverflowError):
        return None


def _key(row: Row) -> tuple[str, ...]:
    return tuple(row[field] for field in KEY)


def _add_intervals(rows: Sequence[Row]) -> None:
    """Add `low` and `high`, rounded: special functions of two machines may differ in the last bits."""
    known = [row for row in rows if row["n"] is not None]
    n = np.array([row["n"] for row in known])
    low, high = clopper_pearson(np.rint(np.array([row["value"] for row in known]) * n), n)
    for row in rows:
        row["low"] = row["high"] = None
    for row, a, b in zip(known, low.tolist(), high.tolist(), strict=True):
        # A published rate is rounded: near 0 and 1 it may lie just outside the interval of its whole count.
        row["low"], row["high"] = min(round(a, 6), row["value"]), max(round(b, 6), row["value"])


def _write(path: Path, columns: Sequence[str], rows: Sequence[Row]) -> None:
    import pyarrow

    kinds = {
        **dict.fromkeys(columns, pyarrow.string()),
        **dict.fromkeys(INTEGERS, pyarrow.int64()),
        **dict.fromkeys(NUMBERS, pyarrow.float64()),
    }
    schema = pyarrow.schema([(column, kinds[column]) for column in columns])
    table = pyarrow.table({c: [row[c] for row in rows] for c in columns}, schema=schema)
    io.write_parquet(path.with_name(f"{path.name}.parquet"), table)
    with (
        io.atomic(path.with_name(f"{path.name}.csv")) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([row[c] for c in columns] for row in rows)


def _stop(problems: Sequence[str]) -> None:
    if problems:
        more = len(problems) - SHOWN_PROBLEMS
        raise InputError("\n".join(problems[:SHOWN_PROBLEMS]) + (f"\n... and {more} more" if more > 0 else ""))
