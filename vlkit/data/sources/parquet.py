"""Parquet files that hold the images themselves: img2dataset's output and the Hub's data sets.

img2dataset writes a binary column named after the encoding, empty where the download failed; the Hub writes a struct
of `bytes` and `path`, and the class names into the schema. Only captions, labels and keys are read here; an image is
read when it is asked for. Parquet tables with paths of image files are of format `table`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vlkit.data.records import ImageRef, Problems, Record, Source
from vlkit.data.sources.annotated import Annotated, Layout
from vlkit.data.sources.columns import CAPTION_COLUMNS, LABEL_COLUMNS, SPLIT_COLUMN, column_named, label_images
from vlkit.data.sources.image_files import ImageLookup, image_folders, printable_name
from vlkit.data.sources.options import STANDARD_SPLITS, SourceOptions, canonical_split, require_split
from vlkit.data.sources.table import describes_another
from vlkit.errors import DataError
from vlkit.escape import one_line

# Binary columns as img2dataset names them; the Hub's structs and plain binary columns go by the second list.
_ENCODINGS = ("jpg", "jpeg", "png", "webp")
_IMAGES = ("image", "img", "image_bytes", "picture", "photo", "bytes", *_ENCODINGS)
_KEYS = ("key", "__key__", "uid")

LAYOUT = Layout(
    "parquet",
    """\
  FILE.parquet, or a folder of them (also in data/ or in train/, val/, test/), with a column of encoded images:
  jpg|png|webp: binary with caption (img2dataset), or image: struct<bytes, path> with caption or label (the Hub)
""",
)


class _Columns(NamedTuple):
    """Where a file keeps what we read; `image` leads to the bytes, `path` to the name beside them."""

    image: str
    path: str | None
    caption: str | None
    label: str | None
    split: str | None
    key: str | None


def read_parquet(path: Path, options: SourceOptions) -> Source:
    """Read parquet files with encoded images in them.

    Args:
        path: a file, or a folder of files.
        options: `split` (from a column `split`, the file's name `train-00000-of-00002.parquet`, or its folder),
            `image_column`, `caption_column`; `images` for rows that name a file and hold no bytes.

    Returns:
        One record a row, in the order of files and rows; the key is the column `key` where there is one, else
        `FILE/ROW`. Class names come from the schema, where it has them.

    Raises:
        DataError: unreadable file, no column of images, neither captions nor labels, or no usable row.
    """
    options.check_used("parquet", ["images", "split", "image_column", "caption_column"])
    files = parquet_files(path)
    if not files:
        raise LAYOUT.error(f"No .parquet files in {path}.")
    problems = Problems()
    found = [pair for file in files for pair in _rows(file, files, options, problems)]
    wanted = require_split(options.split, {image.split for image, _ in found}, path)
    chosen = [(image, ref) for image, ref in found if wanted is None or image.split == wanted]
    class_names = _class_names(files[0]) or _name_labels([image for image, _ in found])
    records = tuple(record for image, ref in chosen if (record := _record(image, ref, problems)))
    if not records:
        raise LAYOUT.error(f"No usable row in {path}: {'; '.join(problems.lines()) or 'it has none'}.")
    root = path if path.is_dir() else path.parent
    return Source(records, "parquet", root, class_names, problems)


def parquet_files(path: Path) -> list[Path]:
    """The parquet files of a data set: the file, or those in a folder, its `data` folder or its split folders.

    Files beside a tar or a folder of the same name are left out: they describe what is in there.
    """
    if path.is_file():
        return [path]
    splits = sorted(entry for entry in path.iterdir() if entry.is_dir() and _split_name(entry.name))
    for folders in ([path], [path / "data"], splits):
        files = [file for folder in folders for file in sorted(folder.glob("*.parquet")) if file.name[0] != "."]
        files = [file for file in files if not describes_another(file)]
        if files:
            return files
    return []


def holds_images(file: Path) -> bool:
    """Whether a parquet file has a column of encoded images."""
    return _image_column(_schema(file), None) is not None


def column_names(file: Path) -> list[str]:
    """The columns of a parquet file."""
    names: list[str] = _schema(file).names
    return names


def _schema(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} is no readable parquet file ({one_line(str(error), 200)}). Copy it again.") from error


def _image_column(schema: pa.Schema, wanted: str | None) -> str | None:
    """The column of encoded images, as `read_cell` takes it; None if there is none."""
    names = [wanted] if wanted is not None else sorted(schema.names, key=_usual_name)
    for name in names:
        kind = schema.field(name).type
        if pa.types.is_struct(kind) and {"bytes"} <= {field.name for field in kind}:
            return f"{name}.bytes"
        if (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)) and (wanted or name.lower() in _IMAGES):
            return name
    return None


def _usual_name(name: str) -> int:
    return _IMAGES.index(name.lower()) if name.lower() in _IMAGES else len(_IMAGES)


def _find_columns(file: Path, options: SourceOptions) -> _Columns:
    schema = _schema(file)
    names = schema.names
    named = column_named(names, options.image_column, (), "--image-column", file)
    image = _image_column(schema, named)
    have = f"have: {one_line(', '.join(names), 300)}"
    if image is None:
        raise LAYOUT.error(f"{file}: no column of encoded images, {have}. Name the column by --image-column.")
    caption = column_named(names, options.caption_column, CAPTION_COLUMNS, "--caption-column", file)
    label = column_named(names, None, LABEL_COLUMNS, "", file)
    if caption is None and label is None:
        raise LAYOUT.error(f"{file}: neither captions nor labels, {have}. Name the captions by --caption-column.")
    base = image.removesuffix(".bytes")
    path = f"{base}.path" if base != image and "path" in {field.name for field in schema.field(base).type} else None
    split, key = (column_named(names, None, known, "", file) for known in (SPLIT_COLUMN, _KEYS))
    return _Columns(image, path, caption, label, split, key)


def _rows(
    file: Path, files: list[Path], options: SourceOptions, problems: Problems
) -> Iterator[tuple[Annotated, ImageRef]]:
    """Every row that has an image, with where its bytes lie."""
    columns = _find_columns(file, options)
    stem = file.stem if len({other.parent for other in files}) == 1 else f"{file.parent.name}/{file.stem}"
    file_split = _split_name(file.name.split("-")[0].split(".")[0]) or _split_name(file.parent.name)
    lookup = ImageLookup(image_folders(file, (), options.images))
    for row, cells, has_bytes in _cells(file, columns):
        where = f"{stem}/{row:06d}"
        key = cells.get(columns.key or "")
        split = cells.get(columns.split or "") or file_split
        image = Annotated(
            printable_name(key) if isinstance(key, str) and key else where,
            _texts(cells.get(columns.caption or "")),
            canonical_split(split) if isinstance(split, str) else None,
            files=(cells["__path__"],) if cells.get("__path__") else (),
        )
        image.label = cells.get(columns.label or "")
        beside = None if has_bytes or not image.files else lookup.find(image.files)
        if has_bytes:
            yield image, ImageRef(path=str(file), offset=row, column=columns.image)
        elif beside is not None:
            yield image, ImageRef(path=beside)
        else:
            problems.add("row without image (its download failed)", where)


def _cells(file: Path, columns: _Columns) -> Iterator[tuple[int, dict[str, Any], bool]]:
    """Row number, the small cells by column, and whether there are bytes; images are read only to see gaps."""
    table = pq.ParquetFile(file, memory_map=True)
    names = [name for name in (columns.caption, columns.label, columns.split, columns.key, columns.path) if name]
    leaves = [table.metadata.schema.column(i).path for i in range(table.metadata.num_columns)]
    first = 0
    for group in range(table.num_row_groups):
        rows = table.read_row_group(group, columns=names)
        present = _present(table, group, columns.image, leaves)
        paths = rows.column(columns.path.split(".")[0]).to_pylist() if columns.path else []
        plain = rows.drop_columns([columns.path.split(".")[0]]) if columns.path else rows
        for place, cells in enumerate(plain.to_pylist() or [{} for _ in range(len(paths))]):
            if columns.path:
                cells["__path__"] = (paths[place] or {}).get("path")
            yield first + place, cells, present[place]
        first += rows.num_rows


def _present(table: pq.ParquetFile, group: int, column: str, leaves: list[str]) -> list[bool]:
    """Which rows of a group have bytes; from the statistics where these say that all have."""
    about = table.metadata.row_group(group)
    statistics = about.column(leaves.index(column)).statistics
    if statistics is not None and statistics.has_null_count and statistics.null_count == 0:
        return [True] * about.num_rows
    cells = table.read_row_group(group, columns=[column]).flatten()
    return [bool(valid) for valid in cells.column(0).is_valid().to_pylist()]


def _texts(value: Any) -> list[str]:
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str) and text.strip()]


def _split_name(name: str) -> str | None:
    return canonical_split(name) if canonical_split(name) in STANDARD_SPLITS else None


def _class_names(file: Path) -> tuple[str, ...]:
    """The names in the schema's metadata under `huggingface`; none where there are none."""
    schema = _schema(file)
    label = column_named(schema.names, None, LABEL_COLUMNS, "", file)
    try:
        document = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        names = document["info"]["features"][label]["names"]
    except (ValueError, KeyError, TypeError):
        return ()
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _name_labels(images: list[Annotated]) -> tuple[str, ...]:
    """Labels without names in the schema: text, or plain numbers."""
    given = [None if image.label is None or image.label == -1 else str(image.label).strip() for image in images]
    return label_images(images, [name or None for name in given])


def _record(image: Annotated, ref: ImageRef, problems: Problems) -> Record | None:
    label = image.label if isinstance(image.label, int) and image.label >= 0 else None  # the Hub's -1: not given
    captions = tuple(text.strip() for text in image.captions)
    if not captions and label is None:
        problems.add("row without caption", image.name)
        return None
    return Record(image.name, ref, captions, label, image.split)
