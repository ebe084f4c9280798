"""From annotated image names to records: the part that all formats with an annotation file share."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlkit.data.records import ImageRef, Problems, Record, Source
from vlkit.data.sources.image_files import ImageLookup, printable_name
from vlkit.data.sources.options import require_split
from vlkit.errors import DataError
from vlkit.escape import one_line


@dataclass
class Annotated:
    """One image as an annotation file names it."""

    name: str  # becomes the key
    captions: list[str] = field(default_factory=list)
    split: str | None = None  # canonical
    label: int | None = None
    files: tuple[str, ...] = ()  # names under which the file may lie; empty: `name`


@dataclass(frozen=True)
class Layout:
    """What a format is called and how its folder should look, printed when nothing can be read."""

    format: str
    tree: str

    def error(self, message: str) -> DataError:
        """`message`, followed by the tree this format expects."""
        return DataError(f"{message}\nExpected for --format {self.format}:\n{self.tree.rstrip()}")


def build_source(
    images: Iterable[Annotated],
    lookup: ImageLookup,
    layout: Layout,
    where: Path,
    problems: Problems,
    split: str | None = None,
    class_names: tuple[str, ...] = (),
) -> Source:
    """Resolve the files of annotated images of one split; what cannot be used is counted in `problems`.

    Args:
        images: in the order the records shall have.
        lookup: finds the image files.
        layout: of the format.
        where: the annotation file, named in messages.
        problems: continued; bad rows may be in it already.
        split: the split the user asked for; None takes all.
        class_names: what the labels point into; with them, captions are not required.

    Raises:
        DataError: unknown split, no image file found at all, or no usable record.
    """
    named = list(images)
    wanted = require_split(split, {image.split for image in named}, where)
    chosen = [image for image in named if wanted is None or image.split == wanted]
    records, num_missing = [], 0
    for image in chosen:
        path = lookup.find(image.files or (image.name,))
        captions = tuple(text for text in (caption.strip() for caption in image.captions) if text)
        if path is None:
            num_missing += 1
            problems.add("image file missing", one_line(image.name))
        elif not captions and image.label is None:
            problems.add("image without caption", one_line(image.name))
        else:
            records.append(Record(printable_name(image.name), ImageRef(path=path), captions, image.label, image.split))
    if not records:
        raise layout.error(_nothing_left(where, len(chosen), num_missing, lookup, problems))
    return Source(tuple(records), layout.format, where.parent, class_names, problems)


def _nothing_left(where: Path, num_chosen: int, num_missing: int, lookup: ImageLookup, problems: Problems) -> str:
    searched = ", ".join(str(folder) for folder in lookup.folders)
    if num_chosen and num_missing == num_chosen:
        return (
            f"None of the {num_chosen} images named in {where} was found (first: "
            f"{problems.examples['image file missing'][0]}). Searched in: {searched}. "
            "Put the images there or name their folder with --images."
        )
    found = "; ".join(problems.lines()) or "it names no images"
    return f"No usable image with a caption in {where}: {found}."


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 file without line ends, byte order mark dropped.

    Raises:
        DataError: unreadable, or not UTF-8.
    """
    return [line.removesuffix("\r") for line in read_text(path).split("\n")]


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, byte order mark dropped, line ends as they are.

    Raises:
        DataError: unreadable, or not UTF-8.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"Cannot read {path}: {error.strerror or error}.") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 text. Save the file as UTF-8.") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        DataError: unreadable or no JSON.
    """
    try:
        return json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no valid JSON ({error}). The file may have been cut: copy it again.") from error


def json_rows(document: Any, name: str, layout: Layout, where: Path) -> list[dict[str, Any]]:
    """The list of objects `document[name]`.

    Raises:
        DataError: it is not there, or something else.
    """
    rows = document.get(name) if isinstance(document, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        have = ", ".join(sorted(document)) if isinstance(document, dict) else f"a {type(document).__name__}"
        raise layout.error(f"{where} has no list of objects '{name}' (it has: {one_line(have, 200)}).")
    return rows
