"""The mini ImageNet-D: several rendered sets as one, each of which changes one thing about the images."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from clip_robustness.core.io import InputError, read_parquet, write_parquet


def combine_variations(indexes: Sequence[Path], variations: Sequence[str], out: Path) -> None:
    """Write the rows of all `indexes`, with the column `variation` that says which each is from, to `out`.

    The column has the name that the adapter of ImageNet-D gives it. Errors: `InputError` for another number of names
    than of indexes, for indexes with different columns, and for an image that stands in two.
    """
    if len(variations) != len(indexes):
        raise InputError(f"{out}: {len(indexes)} indexes and {len(variations)} variations; name each index once")
    tables = [read_parquet(index) for index in indexes]
    for index, table in zip(indexes, tables, strict=True):
        if list(table) != list(tables[0]):
            raise InputError(f"{index}: its columns are not those of {indexes[0]}; render both again")
    columns = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    ids = columns["image_id"]
    if len(set(ids)) < len(ids):
        raise InputError(f"{out}: an image stands in two of the indexes; give each world a name of its own")
    counts = [len(table["image_id"]) for table in tables]
    write_parquet(out, columns | {"variation": np.repeat(np.array(variations, dtype=object), counts)})
