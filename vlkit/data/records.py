"""One record of a source: where its image lies, its captions, its label.

Every reader in `vlkit/data/sources/` yields these and nothing else, so whatever reads a source
(shard building, embedding, classification, evaluation) knows one type.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vlkit.errors import DataError


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Bytes of one encoded image: a file, a range of a tar, a cell of a parquet file, or bytes in memory.

    Exactly one of `path` and `data` is set; `offset` and `size` (bytes) narrow `path` to a member of a tar. With
    `column`, `path` is a parquet file and `offset` the row in it; `image.bytes` is a field of a struct.
    """

    path: str | None = None
    offset: int | None = None
    size: int | None = None
    data: bytes | None = None
    column: str | None = None

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            DataError: the file is missing, unreadable or shorter than it should be.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        if self.column is not None:
            from vlkit.data.parquet_cells import read_cell  # arrow only where parquet is read

            assert self.offset is not None
            return read_cell(self.path, self.offset, self.column)
        from vlkit.data.tar_walk import open_tar  # numpy only where images are read

        try:
            with open_tar(self.path) as file:
                if self.offset is None:
                    return file.read()
                assert self.size is not None
                file.seek(self.offset)
                content = file.read(self.size)
                end = file.seek(0, os.SEEK_END)
        except OSError as error:
            raise DataError(f"Cannot read image {self.path}: {error.strerror or error}.") from error
        if len(content) < self.size:
            raise DataError(
                f"{self.path} ends at byte {end}, but an image should reach byte "
                f"{self.offset + self.size}: the file was cut. Copy or build it again."
            )
        return content


@dataclass(frozen=True, slots=True)
class Record:
    """One image with what is known of it."""

    key: str  # unique in its source, e.g. the path relative to its folder
    image: ImageRef
    captions: tuple[str, ...] = ()
    label: int | None = None  # position in the source's class_names
    split: str | None = None
    labels: tuple[int, ...] | None = None  # all classes that apply, in multi-label data


@dataclass
class Problems:
    """Rows a source left out, counted by cause, the first few of each cause named."""

    examples_per_cause: int = 5
    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, cause: str, where: str) -> None:
        """Count one row left out; `where` names it (file and line, or key)."""
        self.counts[cause] += 1
        named = self.examples.setdefault(cause, [])
        if len(named) < self.examples_per_cause:
            named.append(where)

    def lines(self) -> list[str]:
        """One line a cause: how often, and which rows first."""
        return [
            f"{count} x {cause}: {', '.join(self.examples[cause])}"
            + (", ..." if count > len(self.examples[cause]) else "")
            for cause, count in self.counts.most_common()
        ]

    @property
    def total(self) -> int:
        """How many rows were left out."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Source:
    """All records of one source on disk, and what was left out while reading it."""

    records: tuple[Record, ...]
    format: str  # a name of vlkit.data.sources.FORMATS
    root: Path
    class_names: tuple[str, ...] = ()  # raw folder or class names; Record.label points into it
    problems: Problems = field(default_factory=Problems)
    templates: tuple[str, ...] = ()  # prompts with `{}` for the class name, where the data come with their own

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)


def text_to_image(records: Iterable[Record]) -> list[int]:
    """The image row of every caption when all captions of `records` are laid in one list."""
    return [row for row, record in enumerate(records) for _ in record.captions]
