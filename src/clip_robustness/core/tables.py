"""The tidy table that wings hand on: one row a measurement, the same columns wherever it was measured."""

from pathlib import Path
from typing import Any

from clip_robustness.core.io import InputError, damage

# Column -> what it says. The documentation shows it.
MEANING = {
    "study": "the study that the row belongs to",
    "model": "the model's name in the table of models",
    "dataset": "the data set's name, or of an average `natural_average`",
    "metric": "what was measured",
    "slice": "of which part: a class, a factor, a corruption, a score; empty for the whole",
    "value": "the number: a fraction unless the metric says otherwise, never per cent",
    "low": "lower end of its 95 % interval",
    "high": "upper end of its 95 % interval",
    "n": "images (or decisions, sets, pairs) behind it",
    "convention": "by which rule, where several are in use",
    "source": "whose measurement: `measured` here, or who published it",
}
MEASUREMENT = tuple(MEANING)
# What makes a row one of its kind within a study.
KEY = ("model", "dataset", "metric", "slice", "convention", "source")


def read_frame(path: Path) -> Any:
    """A table (.parquet) as a data frame. Errors: `InputError` when it is missing or damaged."""
    import pandas

    try:
        return pandas.read_parquet(path, page_checksum_verification=True)
    except FileNotFoundError:
        raise InputError(f"{path}: no such table; make it first") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a whole parquet file ({damage(path, error)}); delete it and run again") from None
