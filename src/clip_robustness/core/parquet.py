"""Decoding a parquet file that nobody vouches for, without more memory than it may take."""

from collections.abc import Sequence
from typing import Any

MOST_AT_ONCE = 1 << 16  # rows


def decode(file: Any, columns: Sequence[str], groups: Sequence[int], limit: int) -> Any:
    """Columns, or leaves of columns, of row groups of a `pyarrow.parquet.ParquetFile`; None beyond `limit` bytes.

    A few rows at a time, so many that one value of the chunk's size in each of them would still be within the limit:
    a page of some bytes may stand for one image a billion times.
    Errors: pyarrow's own, for a damaged file.
    """
    import pyarrow

    rows = sum(file.metadata.row_group(group).num_rows for group in groups)
    if not rows:
        return file.read_row_groups(list(groups), columns=list(columns), use_threads=False)
    chunks = [file.metadata.row_group(group).column(i) for group in groups for i in range(len(file.schema))]
    wanted = [c for c in chunks if c.path_in_schema in columns or c.path_in_schema.partition(".")[0] in columns]
    largest = max([1, *(chunk.total_uncompressed_size for chunk in wanted)])
    size, batches = sum(max(chunk.total_uncompressed_size, 0) for chunk in wanted), []
    if size <= limit:
        size, at_once = 0, max(1, min(MOST_AT_ONCE, limit // largest))
        for batch in file.iter_batches(at_once, row_groups=list(groups), columns=list(columns), use_threads=False):
            batches.append(batch)
            size += batch.nbytes
            if size > limit:
                break
    if size > limit:
        return None
    if not batches:
        raise pyarrow.ArrowInvalid(f"{rows} rows announced, none found")
    table = pyarrow.Table.from_batches(batches)
    table.validate(full=True)  # texts are UTF-8
    return table
