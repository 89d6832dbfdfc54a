"""Tables as data frames, and data frames as tables."""

from pathlib import Path

import pandas as pd

from clip_robustness.core import io
from clip_robustness.core.io import InputError


def read_table(path: Path) -> pd.DataFrame:
    """A table of a study (.parquet). Errors: `InputError` when it is missing or not whole."""
    try:
        return pd.read_parquet(path)
    except FileNotFoundError:
        raise InputError(f"{path}: no such table; make it first") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole parquet file ({error}); delete it and run again") from None


def write_table(table: pd.DataFrame, out: Path) -> None:
    """Write `out` (.parquet) and the same as .csv beside it."""
    with io.atomic(out) as temporary:
        table.to_parquet(temporary, index=False)
    with io.atomic(out.with_suffix(".csv")) as temporary:
        table.to_csv(temporary, index=False, lineterminator="\n")
