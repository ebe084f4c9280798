"""Comma- and tab-separated text: quoting, rows that do not fit the header, a header with the wrong separator."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlkit.data.records import Problems
from vlkit.data.sources.annotated import read_text
from vlkit.errors import DataError, did_you_mean
from vlkit.escape import one_line

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_NAMES = {",": "comma", "\t": "tab", ";": "semicolon", "|": "pipe"}


def read_delimited(
    text: str, delimiter: str, path: Path, problems: Problems
) -> tuple[list[str], Iterator[tuple[str, dict[str, Any]]]]:
    """The header, and the rows as (where, cells by column).

    Rows with more or fewer cells than the header, and rows with broken quotes, are counted in `problems`.

    Args:
        text: of the whole file.
        delimiter: between cells.
        path: named in messages.
        problems: continued while the rows are drawn.

    Raises:
        DataError: empty, repeated column, wrong separator, or (while drawing) a quote that is never closed.
    """
    # strict: otherwise an unclosed quote swallows the rest of the file into one caption without a word.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader)
    except StopIteration:
        raise DataError(f"{path} is empty. The first line names the columns.") from None
    except csv.Error as error:
        raise DataError(f"{path}, line 1: {error}. The first line names the columns.") from error
    _check_header(header, delimiter, path)
    return header, _rows(reader, header, path, problems)


def read_table(file: str | Path, *columns: str) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a .csv or .tsv as (where, cells by column); rows that do not fit the header are left out.

    Args:
        file: its ending says what separates cells.
        columns: those it must have.

    Raises:
        DataError: unreadable, another kind of file, or no such column.
    """
    path = Path(file)
    delimiter = DELIMITERS.get(path.suffix.lower())
    if delimiter is None:
        raise DataError(f"{path}: expected a table .csv or .tsv with a header.")
    header, rows = read_delimited(read_text(path), delimiter, path, Problems())
    for column in columns:
        if column not in header:
            raise DataError(f"{path} has no column {column!r}. {did_you_mean(column, header)}")
    return list(rows)


def _check_header(header: list[str], delimiter: str, path: Path) -> None:
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise DataError(f"{path}: the column name '{one_line(repeated[0], 80)}' stands twice in the first line.")
    if len(header) == 1:
        others = [other for other in _NAMES if other != delimiter and other in header[0]]
        if others:
            expected, found = _NAMES[delimiter], " or ".join(_NAMES[other] for other in others)
            raise DataError(
                f"{path}: the first line '{one_line(header[0], 80)}' holds no {expected}, but a {found}. "
                f"A {path.suffix} file is separated by {expected}s; convert it, or rename it "
                "(.csv for commas, .tsv for tabs)."
            )


def _rows(reader: Any, header: list[str], path: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    while True:
        first_line = reader.line_num + 1
        where = f"{path.name}:{first_line}"
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error) or "field larger" in str(error):
                raise DataError(
                    f"{path}: a quote opened in the row that starts in line {first_line} is never closed. "
                    'Close it, or double it ("") where it belongs to the text.'
                ) from error
            problems.add("row with a broken quote", where)
            continue
        if not cells:
            continue  # blank line
        if len(cells) != len(header):
            problems.add(f"row that has not the {len(header)} cells of the header", where)
            continue
        yield where, dict(zip(header, cells, strict=True))
