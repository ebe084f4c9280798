"""What an earlier set of features offers to the one that replaces it: everything that has not changed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlkit.features.stamps import Stamp
from vlkit.features.store import is_whole, part_file, read_about


class Changes(NamedTuple):
    """How a source differs from what was embedded."""

    num_new: int
    num_changed: int
    num_removed: int

    def __str__(self) -> str:
        """For a message."""
        counts = f"{self.num_new} images are new, {self.num_changed} changed, {self.num_removed} gone"
        return counts + (" (captions, labels or the order differ)" if not any(self) else "")


class Row(NamedTuple):
    """Where the features of one image lie."""

    part: int
    row: int
    norm: float
    content: tuple[object, ...]  # of its stamp


@dataclass(frozen=True)
class OldParts:
    """The finished parts of a folder; the rest of it may be missing."""

    folder: Path
    num_parts: int
    parts: tuple[int, ...]
    rows: dict[str, Row]

    def unchanged(self, key: str, stamp: Stamp) -> Row | None:
        """The row of an image that is still the same."""
        row = self.rows.get(key)
        return row if row is not None and row.content == stamp.content and stamp.file_size >= 0 else None

    def changes(self, keys: Sequence[str], stamps: Sequence[Stamp]) -> Changes:
        """What is new, changed and gone."""
        same = sum(self.unchanged(key, stamp) is not None for key, stamp in zip(keys, stamps, strict=True))
        known = sum(key in self.rows for key in keys)
        return Changes(len(keys) - known, known - same, len(self.rows) - known)

    def matrix(self, name: str, part: int) -> NDArray[Any]:
        """One file of a part, memory-mapped."""
        file = part_file(self.folder, name, part, self.num_parts)
        return np.load(file, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]

    @cached_property
    def texts(self) -> dict[str, tuple[int, int, int]]:
        """Caption -> part, 0 for the first of an image or 1 for another, row."""
        found: dict[str, tuple[int, int, int]] = {}
        for part in self.parts:
            if not part_file(self.folder, "text_emb", part, self.num_parts).is_file():
                continue
            others = 0
            for row, captions in enumerate(self._column(part, "captions")):
                for place, caption in enumerate(captions or ()):
                    found.setdefault(caption, (part, 1, others) if place else (part, 0, row))
                    others += place > 0
        return found

    def text(self, caption: str) -> NDArray[Any]:
        """(D,) of a caption in `texts`."""
        part, other, row = self.texts[caption]
        return self.matrix("more_text_emb" if other else "text_emb", part)[row]  # type: ignore[no-any-return]

    def _column(self, part: int, name: str) -> list[Any]:
        return _column(part_file(self.folder, "metadata", part, self.num_parts), name)


def open_old_parts(folder: Path) -> OldParts:
    """Read the metadata of all finished parts of a folder of features."""
    num_parts = read_about(folder).num_parts
    parts = tuple(part for part in range(num_parts) if is_whole(folder, part, num_parts))
    rows: dict[str, Row] = {}
    for part in parts:
        names = ("key", "norm", "offset", "size", "column", "file_size", "changed")
        file = part_file(folder, "metadata", part, num_parts)
        columns = [_column(file, name) for name in names]
        for row, (key, norm, *content) in enumerate(zip(*columns, strict=True)):
            rows[key] = Row(part, row, norm, tuple(content))
    return OldParts(folder, num_parts, parts, rows)


def _column(file: Path, name: str) -> list[Any]:
    return pq.read_table(file, columns=[name]).column(0).to_pylist()  # type: ignore[no-any-return]
