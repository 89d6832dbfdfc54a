"""Data frames as tables, and as rows."""

from pathlib import Path
from typing import Any

import pandas as pd

from clip_robustness.core import io


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Write `out` (.parquet) and the same as .csv beside it."""
    with io.atomic(out) as temporary:
        table.to_parquet(temporary, index=False, write_page_checksum=True)
    with io.atomic(out.with_suffix(".csv")) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")


def records(table: pd.DataFrame) -> list[Any]:
    """Rows as dicts."""
    return table.to_dict("records")
