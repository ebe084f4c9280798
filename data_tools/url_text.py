"""Rows of links and captions out of text: tab- or comma-separated, JSON lines, JSON; see `url_table.py`."""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from vlkit.data.sources.columns import CAPTION_COLUMNS, URL_COLUMNS, column_named
from vlkit.errors import DataError
from vlkit.escape import one_line

TEXT_SUFFIXES = (".tsv", ".csv", ".jsonl", ".ndjson", ".json")

_CAPTIONS = (*CAPTION_COLUMNS, "raw_caption", "alt_text", "alt")


class UrlRow(NamedTuple):
    """One row; `url` is None where the row cannot be read, `caption` then holds what stands there."""

    url: str | None
    caption: str | None
    uid: str | None


def choose_columns(
    header: list[str], url_column: str | None, caption_column: str | None, file: Path
) -> tuple[str, str]:
    """The columns of links and captions: the named ones, else the first of the usual names.

    Raises:
        DataError: there is none of them.
        ConfigError: a named one does not exist.
    """
    url = column_named(header, url_column, URL_COLUMNS, "--url-column", file)
    caption = column_named(header, caption_column, _CAPTIONS, "--caption-column", file)
    for found, what, option in ((url, "links", "--url-column"), (caption, "captions", "--caption-column")):
        if found is None:
            have = one_line(", ".join(header), 300) or "none"
            raise DataError(f"{file}: no column of {what} found, have: {have}. Name it by {option}.")
    assert url is not None and caption is not None
    return url, caption


def text_rows(file: Path, url_column: str | None, caption_column: str | None) -> Iterator[UrlRow]:
    """The rows of a text file, gzipped or not.

    Raises:
        DataError: not readable, or no column of links or captions.
        ConfigError: a named column does not exist.
    """
    suffix = Path(file.name.lower().removesuffix(".gz")).suffix
    zipped = file.name.lower().endswith(".gz")
    opened = cast(IO[bytes], gzip.open(file) if zipped else open(file, "rb"))  # noqa: SIM115
    try:
        # What is no UTF-8 becomes a sign for that: one bad caption in millions must not stop the work.
        newline = "" if suffix == ".csv" else "\n"  # a lone carriage return may stand in a caption
        with opened, io.TextIOWrapper(opened, "utf-8-sig", errors="replace", newline=newline) as text:
            if suffix in (".tsv", ".csv"):
                yield from _delimited_rows(text, suffix, file, url_column, caption_column)
            else:
                yield from _object_rows(_objects(text, suffix, file), file, url_column, caption_column)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"Cannot read {file}: {error}.") from error


def _delimited_rows(
    text: Iterable[str], suffix: str, file: Path, url_column: str | None, caption_column: str | None
) -> Iterator[UrlRow]:
    quoted = suffix == ".csv"
    reader = _cells(text, quoted, file)
    first = next(reader, [])
    header = first
    if any(_is_link(cell) for cell in first):
        header = ["url" if _is_link(cell) else "caption" if len(first) == 2 else f"{n}" for n, cell in enumerate(first)]
    url, caption = (header.index(name) for name in choose_columns(header, url_column, caption_column, file))
    uid = header.index("uid") if "uid" in header else None
    rows: Iterable[list[str]] = reader if header is first else _with_first(first, reader)
    for cells in rows:
        if len(cells) == len(header):
            yield UrlRow(cells[url], cells[caption], None if uid is None else cells[uid])
        elif cells:
            yield UrlRow(None, " ".join(cells), None)


def _cells(text: Iterable[str], quoted: bool, file: Path) -> Iterator[list[str]]:
    if not quoted:
        # Captions in .tsv files hold single quotation marks: nothing in them is quoted.
        yield from (line.rstrip("\r\n").split("\t") for line in text if line.strip())
        return
    reader = csv.reader(text, strict=True)  # strict: else an unclosed quote swallows the rest without a word
    try:
        yield from reader
    except csv.Error as error:
        raise DataError(
            f"{file}, at line {reader.line_num}: {error}. A quote may be open: close or double it."
        ) from error


def _with_first(first: list[str], rest: Iterator[list[str]]) -> Iterator[list[str]]:
    yield first
    yield from rest


def _is_link(cell: str) -> bool:
    return cell.strip().lower().startswith(("http://", "https://"))


def _objects(text: IO[str], suffix: str, file: Path) -> Iterator[Any]:
    if suffix == ".json":
        try:
            document = json.load(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file} is no valid JSON ({error}).") from error
        rows = document.get("annotations") if isinstance(document, dict) else document
        if not isinstance(rows, list):
            raise DataError(f"{file} holds neither a list of objects nor one under 'annotations'.")
        yield from rows
        return
    for line in text:
        try:
            yield json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            yield line.strip()


def _object_rows(
    objects: Iterator[Any], file: Path, url_column: str | None, caption_column: str | None
) -> Iterator[UrlRow]:
    names: tuple[str, str] | None = None
    for value in objects:
        if isinstance(value, dict):
            names = names or choose_columns(list(value), url_column, caption_column, file)
            yield UrlRow(text_of(value.get(names[0])), text_of(value.get(names[1])), text_of(value.get("uid")))
        elif value is not None:
            yield UrlRow(None, one_line(str(value), 200), None)


def text_of(value: Any) -> str | None:
    """A cell as text; several captions become several lines."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, list):
        return "\n".join(text for text in value if isinstance(text, str))
    return None if value is None else str(value)
