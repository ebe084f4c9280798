"""Tables of links and captions: CC3M, CC12M, RedCaps, LAION, DataComp, or one's own.

| file                  | read as                                                                          |
|-----------------------|----------------------------------------------------------------------------------|
| .parquet              | columns by name (LAION: URL, TEXT; DataComp: uid, url, text)                     |
| .tsv                  | no quotes; without a header where its first line holds a link: `caption<TAB>url` |
|                       | (CC3M) or `url<TAB>caption` (CC12M)                                              |
| .csv                  | comma, quotes; with or without header                                            |
| .jsonl                | an object a line                                                                 |
| .json                 | a list of objects, or such a list under `annotations` (RedCaps)                  |

A folder of files of one kind is read in the order of their names; text files may be gzipped (`.gz`). Text is copied
into one parquet file first, so that each part of the work can read its own rows.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_tools.url_text import TEXT_SUFFIXES, UrlRow, choose_columns, text_of, text_rows
from vlkit.data.atomic import atomic_file
from vlkit.data.sources.columns import column_named
from vlkit.data.sources.table import describes_another
from vlkit.errors import DataError
from vlkit.escape import one_line

COPY = ".urls.parquet"

_ROW_GROUP = 10_000
_SUFFIXES = (".parquet", *TEXT_SUFFIXES)
_SCHEMA = pa.schema([("url", pa.string()), ("caption", pa.string()), ("uid", pa.string())])


class Segment(NamedTuple):
    """Rows `start` to `stop` (exclusive) of one parquet file."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True)
class UrlTable:
    """An opened table: parquet files, and under which names they keep what we read."""

    files: tuple[Path, ...]
    sizes: tuple[int, ...]  # rows of each file
    columns: tuple[str, str, str | None]  # url, caption, uid
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """Rows of all files."""
        return sum(self.sizes)

    def cut(self, rows_per_part: int) -> list[list[Segment]]:
        """The rows in their order, in parts of `rows_per_part` (the last may be smaller)."""
        parts: list[list[Segment]] = []
        room = 0
        for file, size in zip(self.files, self.sizes, strict=True):
            start = 0
            while start < size:
                if room == 0:
                    parts.append([])
                    room = rows_per_part
                stop = min(size, start + room)
                parts[-1].append(Segment(str(file), start, stop))
                room -= stop - start
                start = stop
        return parts


def open_url_table(path: Path, folder: Path, url_column: str | None, caption_column: str | None) -> UrlTable:
    """Open a table of links.

    Args:
        path: a file, or a folder of files of one kind.
        folder: where text is copied to, as `.urls.parquet`; an earlier copy of the same text is used again.
        url_column: its name, in any case; None looks for `url`, `image_url`, `link`.
        caption_column: its name; None looks for `caption`, `title`, `text`, ... A text file of two columns without
            header has the columns `url` and `caption`.

    Raises:
        DataError: nothing there, not readable, no column of links or captions, or no row.
        ConfigError: a named column does not exist.
    """
    files = _table_files(path)
    fingerprint = _fingerprint(files)
    if _suffix(files[0]) == ".parquet":
        table = _open_parquet(files, url_column, caption_column, fingerprint)
    else:
        asked = json.dumps([fingerprint, url_column, caption_column])
        copy = folder / COPY
        if not copy.is_file() or (pq.read_schema(copy).metadata or {}).get(b"vlkit") != asked.encode():
            _copy_text(files, copy, url_column, caption_column, asked)
        table = _open_parquet([copy], "url", "caption", fingerprint)
    if table.num_rows == 0:
        raise DataError(f"{path} has no rows.")
    return table


def read_rows(segments: Iterable[Segment], columns: tuple[str, str, str | None]) -> list[UrlRow]:
    """The rows of some segments, in order.

    Raises:
        DataError: a file cannot be read any more.
    """
    rows: list[UrlRow] = []
    for segment in segments:
        try:
            rows += _read_segment(segment, columns)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"Cannot read {segment.file}: {one_line(str(error), 200)}.") from error
    return rows


def _table_files(path: Path) -> list[Path]:
    if path.is_file():
        if _suffix(path) not in _SUFFIXES:
            raise DataError(f"{path}: a table of links ends in {', '.join(_SUFFIXES)} (text also with .gz).")
        return [path]
    if not path.is_dir():
        raise DataError(f"{path} does not exist. Name a table of links, or a folder of them.")
    files = sorted(file for file in path.iterdir() if _suffix(file) in _SUFFIXES and file.name[0] != ".")
    files = [file for file in files if not file.name.endswith("_stats.json") and not describes_another(file)]
    kinds = sorted({_suffix(file) for file in files})
    if len(kinds) != 1:
        found = ", ".join(kinds) or "none"
        raise DataError(f"Expected tables of one kind ({', '.join(_SUFFIXES)}) in {path}, found: {found}.")
    return files


def _suffix(file: Path) -> str:
    name = file.name.lower().removesuffix(".gz")
    return next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")


def _fingerprint(files: list[Path]) -> str:
    """Changes with the content; of parquet the end is enough, as it holds the places of all columns."""
    hashed = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        hashed.update(f"{file.name} {size}\n".encode("utf-8", "surrogateescape"))
        with open(file, "rb") as data:
            if _suffix(file) == ".parquet":
                data.seek(max(0, size - (1 << 20)))
            while piece := data.read(1 << 20):
                hashed.update(piece)
    return hashed.hexdigest()[:32]


def _open_parquet(files: list[Path], url_column: str | None, caption_column: str | None, fingerprint: str) -> UrlTable:
    found: set[tuple[str, str, str | None]] = set()
    sizes = []
    for file in files:
        try:
            metadata, names = pq.read_metadata(file), pq.read_schema(file).names
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{file} is no readable parquet file ({one_line(str(error), 200)}).") from error
        url, caption = choose_columns(names, url_column, caption_column, file)
        found.add((url, caption, column_named(names, None, ("uid",), "", file)))
        sizes.append(metadata.num_rows)
    if len(found) > 1:
        raise DataError(f"The files in {files[0].parent} have different columns. Build from each by itself.")
    return UrlTable(tuple(files), tuple(sizes), found.pop(), fingerprint)


def _read_segment(segment: Segment, columns: tuple[str, str, str | None]) -> Iterator[UrlRow]:
    table = pq.ParquetFile(segment.file)
    first = 0
    for group in range(table.num_row_groups):
        stop = first + table.metadata.row_group(group).num_rows
        if first < segment.stop and segment.start < stop:
            cells = table.read_row_group(group, columns=[name for name in columns if name])
            cells = cells.slice(max(segment.start - first, 0), segment.stop - max(segment.start, first))
            lists = [cells.column(name).to_pylist() if name else [None] * cells.num_rows for name in columns]
            for url, caption, uid in zip(*lists, strict=True):
                yield UrlRow(text_of(url), text_of(caption), text_of(uid))
        first = stop


def _copy_text(files: list[Path], copy: Path, url_column: str | None, caption_column: str | None, asked: str) -> None:
    schema = _SCHEMA.with_metadata({"vlkit": asked})
    with atomic_file(copy) as out, pq.ParquetWriter(out, schema, compression="zstd") as writer:
        rows: list[UrlRow] = []
        for file in files:
            for row in text_rows(file, url_column, caption_column):
                rows.append(row)
                if len(rows) == _ROW_GROUP:
                    writer.write_table(_arrow(rows, schema))
                    rows.clear()
        writer.write_table(_arrow(rows, schema))


def _arrow(rows: list[UrlRow], schema: pa.Schema) -> pa.Table:
    columns = [[row[place] for row in rows] for place in range(3)]
    return pa.table([pa.array(column, pa.string()) for column in columns], schema=schema)
