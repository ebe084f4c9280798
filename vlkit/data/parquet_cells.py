"""One cell of a parquet file, for images that are stored in a table.

A row group is the least that parquet can read; the groups read last are kept, so that going through a file in its
order reads each group once.
"""

import os
import threading
from bisect import bisect_right
from functools import lru_cache
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vlkit.errors import DataError

# Held while a group is read: a ParquetFile is no object for several threads.
_reading = threading.Lock()


def read_cell(path: str, row: int, column: str) -> bytes:
    """The bytes in one cell.

    Args:
        path: of the parquet file.
        row: counted from 0 over the whole file.
        column: its name; `image.bytes` is the field `bytes` of the struct `image`.

    Raises:
        DataError: the file cannot be read, has no such row or column, or the cell is empty.
    """
    where = f"{path}, row {row}, column {column}"
    try:
        with _reading:
            value = _cell(path, os.stat(path).st_mtime_ns, row, column)
    except (OSError, KeyError, IndexError, pa.ArrowException) as error:
        raise DataError(f"Cannot read {where}: {error}. The file may have been cut: copy it again.") from error
    if not isinstance(value, bytes):
        found = "nothing" if value is None else f"a {type(value).__name__}"
        raise DataError(f"{where} holds {found} where the bytes of an image are expected.")
    return value


def _cell(path: str, changed: int, row: int, column: str) -> Any:
    _, starts = _open(path, changed)
    group = bisect_right(starts, row) - 1
    if not 0 <= group < len(starts) - 1:
        raise IndexError(f"the file has {starts[-1]} rows")
    return _row_group(path, changed, group, column)[row - starts[group]].as_py()


@lru_cache(maxsize=8)
def _open(path: str, changed: int) -> tuple[pq.ParquetFile, list[int]]:
    """The file, and the first row of each group with the number of all rows at the end."""
    file = pq.ParquetFile(path, memory_map=True)
    sizes = (file.metadata.row_group(group).num_rows for group in range(file.num_row_groups))
    return file, list(accumulate(sizes, initial=0))


@lru_cache(maxsize=2)
def _row_group(path: str, changed: int, group: int, column: str) -> pa.ChunkedArray:
    file, _ = _open(path, changed)
    name, *fields = column.split(".") if column not in file.schema_arrow.names else [column]
    cells = file.read_row_group(group, columns=[column]).column(name)
    for field in fields:
        cells = pa.chunked_array([chunk.field(field) for chunk in cells.chunks])
    return cells
