"""Tables of image-text pairs: CSV, TSV, JSON lines, a JSON list of objects, or parquet.

The rows of one image become one record with several captions, in the order in which the images first appear.
"""

import json
import posixpath
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vlkit.data.records import Problems, Source
from vlkit.data.sources.annotated import Annotated, Layout, build_source, read_json, read_lines, read_text
from vlkit.data.sources.columns import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    LABEL_COLUMNS,
    SPLIT_COLUMN,
    URL_COLUMNS,
    column_named,
    find_column,
    label_images,
)
from vlkit.data.sources.delimited import DELIMITERS, read_delimited
from vlkit.data.sources.image_files import ImageLookup, image_folders
from vlkit.data.sources.options import SourceOptions, canonical_split
from vlkit.errors import DataError
from vlkit.escape import one_line

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = ".parquet"
TABLE_SUFFIXES = (*DELIMITERS, *JSON_LINES, PARQUET)

LAYOUT = Layout(
    "table",
    """\
  FILE.csv (comma), FILE.tsv (tab), FILE.jsonl or FILE.parquet; columns: filepath|image|path, caption|title|text,
  optional: class|label, split. Paths are relative to the file, or to --images.
""",
)

Row = tuple[str, dict[str, Any]]  # where it stands, its cells by column


class Columns(NamedTuple):
    """The names under which a table keeps what we read."""

    image: str
    caption: str | None
    label: str | None
    split: str | None


def read_table(path: Path, options: SourceOptions) -> Source:
    """Read a table of image paths, captions and optionally class and split.

    Args:
        path: the table, or a folder that holds exactly one.
        options: `images` (folder the paths are relative to; default the table's own), `split`, and the
            columns of images, captions and classes by name (any case).

    Returns:
        One record an image; the key is the path as written, normalised.
        `problems` counts rows that do not parse, lack an image or a caption, and images that do not exist.

    Raises:
        DataError: unreadable table, missing columns, no such split, or nothing usable.
        ConfigError: a column named in `options` does not exist.
    """
    options.check_used("table", ["images", "split", "image_column", "caption_column", "class_column"])
    path = _only_table(path)
    problems = Problems()
    header, rows = _read_rows(path, problems)
    columns = _choose_columns(header, options, path)
    images, classes = _group(rows, columns, problems)
    class_names = label_images(images, classes)
    lookup = ImageLookup(image_folders(path, (), options.images))
    return build_source(images, lookup, LAYOUT, path, problems, options.split, class_names)


def recognised(columns: Sequence[str]) -> bool:
    """Whether a table with these columns can be read without naming any."""
    described = find_column(columns, CAPTION_COLUMNS + LABEL_COLUMNS)
    return find_column(columns, IMAGE_COLUMNS) is not None and described is not None


def tables_in(folder: Path) -> list[Path]:
    """The table files that lie directly in a folder, without those that describe a tar or folder of their name."""
    tables = [file for file in folder.iterdir() if file.suffix.lower() in TABLE_SUFFIXES and file.name[0] != "."]
    return sorted(file for file in tables if file.suffix.lower() != PARQUET or not describes_another(file))


def describes_another(file: Path) -> bool:
    """Whether a parquet file lists what is in the tar or folder of its name, as img2dataset's do."""
    return file.with_suffix(".tar").exists() or file.with_suffix("").is_dir()


def _only_table(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise DataError(f"{path} does not exist. Name a table (.csv, .tsv, .jsonl) or the folder that holds it.")
    tables = tables_in(path)
    if len(tables) != 1:
        found = ", ".join(file.name for file in tables) or "none"
        raise LAYOUT.error(f"Expected one table in {path}, found: {found}. Name the file itself.")
    return tables[0]


def _read_rows(path: Path, problems: Problems) -> tuple[list[str], Iterator[Row]]:
    suffix = path.suffix.lower()
    if suffix in JSON_LINES:
        return _object_rows(_parse_lines(path, problems), problems)
    if suffix == ".json":
        document = read_json(path)
        if not isinstance(document, list):
            raise LAYOUT.error(f"{path} is no list of objects, but a {type(document).__name__}.")
        return _object_rows(((f"{path.name}[{place}]", row) for place, row in enumerate(document)), problems)
    if suffix in DELIMITERS:
        return read_delimited(read_text(path), DELIMITERS[suffix], path, problems)
    if suffix == PARQUET:
        return _parquet_rows(path)
    raise LAYOUT.error(f"{path} has the suffix '{path.suffix}'; tables end in {', '.join(TABLE_SUFFIXES)} or .json.")


def _parquet_rows(path: Path) -> tuple[list[str], Iterator[Row]]:
    import pyarrow as pa  # arrow only where parquet is read
    import pyarrow.parquet as pq

    try:
        table = pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path} is no readable parquet file ({one_line(str(error), 200)}). Copy it again.") from error
    batches = table.iter_batches(4096)
    rows = (row for batch in batches for row in batch.to_pylist())
    return table.schema_arrow.names, ((f"{path.name}:{number}", row) for number, row in enumerate(rows))


def _parse_lines(path: Path, problems: Problems) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            try:
                yield f"{path.name}:{number}", json.loads(line)
            except (ValueError, RecursionError):
                problems.add("line that is no JSON", f"{path.name}:{number}")


def _object_rows(values: Iterator[tuple[str, Any]], problems: Problems) -> tuple[list[str], Iterator[Row]]:
    rows: list[Row] = []
    for where, value in values:
        if isinstance(value, dict):
            rows.append((where, value))
        else:
            problems.add("row that is no object", where)
    header = list(dict.fromkeys(str(name) for _, row in rows[:1000] for name in row))
    return header, iter(rows)


def _choose_columns(header: Sequence[str], options: SourceOptions, path: Path) -> Columns:
    image = column_named(header, options.image_column, IMAGE_COLUMNS, "--image-column", path)
    caption = column_named(header, options.caption_column, CAPTION_COLUMNS, "--caption-column", path)
    label = column_named(header, options.class_column, LABEL_COLUMNS, "--class-column", path)
    if label in (image, caption) and options.class_column is None:
        label = None
    have = f"have: {one_line(', '.join(header), 300) or 'none'}"
    if image is None and find_column(header, URL_COLUMNS):
        url = find_column(header, URL_COLUMNS)
        raise DataError(
            f"{path} holds links, not images ({have}). Download them into shards first: "
            f"vlkit shards build {path} --url-column {url} --out FOLDER."
        )
    if image is None:
        raise DataError(
            f"{path}: no column {' | '.join(IMAGE_COLUMNS)} found, {have}. Name the one with the image paths by "
            "--image-column."
        )
    if caption is None and label is None:
        raise DataError(
            f"{path}: no column {' | '.join(CAPTION_COLUMNS)} found, {have}. Name the one with the captions by "
            "--caption-column, or the one with the classes by --class-column."
        )
    return Columns(image, caption, label, find_column(header, SPLIT_COLUMN))


def _group(rows: Iterator[Row], columns: Columns, problems: Problems) -> tuple[list[Annotated], list[str | None]]:
    """Images in first-seen order with all their captions, and the class each was given, as text."""
    images: dict[str, Annotated] = {}
    classes: dict[str, str | None] = {}
    for where, row in rows:
        cell = row.get(columns.image)
        if not isinstance(cell, str) or not cell.strip():
            problems.add("row without an image path", where)
        elif "://" in cell:
            problems.add("row with a URL where a file is expected (download the images first)", where)
        else:
            name = posixpath.normpath(cell.strip())
            image = images.setdefault(name, Annotated(name, split=_split(row, columns)))
            classes.setdefault(name, _class(row, columns))
            _add_captions(image, row, columns, where, problems)
            if (image.split, classes[name]) != (_split(row, columns), _class(row, columns)):
                problems.add("class or split that differs from the image's first row (ignored)", where)
    return list(images.values()), [classes[name] for name in images]


def _add_captions(image: Annotated, row: dict[str, Any], columns: Columns, where: str, problems: Problems) -> None:
    if columns.caption is None:
        return
    value = row.get(columns.caption)
    captions = [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]
    captions = [text for text in captions if text.strip()]
    if not captions:
        problems.add("row without caption", where)
    image.captions += captions


def _split(row: dict[str, Any], columns: Columns) -> str | None:
    value = row.get(columns.split) if columns.split else None
    return canonical_split(value) if isinstance(value, str) and value.strip() else None


def _class(row: dict[str, Any], columns: Columns) -> str | None:
    value = row.get(columns.label) if columns.label else None
    return None if value is None or not str(value).strip() else str(value).strip()
