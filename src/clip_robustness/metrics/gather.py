"""Metric files into one tidy table, and the table of models: small, sorted, byte-identical."""

import csv
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clip_robustness.core import io
from clip_robustness.core.tables import KEY, MEASUREMENT


def gather(study: str, metrics: Sequence[Path], out: Path) -> None:
    """Collect metric files (…/{model}/{dataset}.json) into `out`, a parquet file with a .csv beside it.

    Errors: `InputError` for a file that is no metric file, and for the same row twice.
    """
    rows = []
    for path in metrics:
        content = io.read_json(path)
        if "rows" not in content:
            raise io.InputError(f"{path}: no rows in it, so it is not a metric file; delete it and run again")
        where = {"study": study, "model": path.parent.name, "dataset": path.stem, "source": "measured"}
        rows += [{**where, **row} for row in content["rows"]]
    rows.sort(key=lambda row: [row[name] for name in KEY])
    for one, two in itertools.pairwise(rows):
        if all(one[name] == two[name] for name in KEY):
            raise io.InputError(f"two rows for {[one[name] for name in KEY]}; each may stand in one metric file only")
    write_table(out, {name: [row[name] for row in rows] for name in MEASUREMENT})


def gather_models(models: Mapping[str, Any], out: Path) -> None:
    """Write the table of models: `models` is {"columns": [...], "rows": [[...], ...]}."""
    write_table(
        out,
        {name: list(column) for name, column in zip(models["columns"], zip(*models["rows"], strict=True), strict=True)},
    )


def write_table(out: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write `out` (.parquet) and the same as .csv, floats in the shortest form that reads back equal."""
    io.write_parquet(out, columns)
    with (
        io.atomic(out.with_suffix(".csv")) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
