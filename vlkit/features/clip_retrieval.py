"""Reads folders of embeddings as clip-retrieval writes them, memory-mapped.

img_emb/img_emb_000.npy        (rows, D) float16 or float32, one row an image
text_emb/text_emb_000.npy      (rows, D) one row a caption; row i belongs to image i
metadata/metadata_000.parquet  row i: image_path, caption, ...

stored = read_clip_retrieval("embeddings")
stored.rows("image", 0, 1000)    # (1000, D) float32
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vlkit.errors import DataError

Kind = Literal["image", "text"]

_FOLDERS: dict[Kind, str] = {"image": "img_emb", "text": "text_emb"}
_METADATA = "metadata"

_EXPECTED = "img_emb/img_emb_0.npy and/or text_emb/text_emb_0.npy, metadata/metadata_0.parquet, parts numbered from 0"


@dataclass(frozen=True)
class StoredEmbeddings:
    """An opened folder. Row i of each kind, and of the metadata, is about the same sample."""

    folder: Path
    parts: dict[Kind, tuple[NDArray[Any], ...]]  # memory-mapped (rows, D), as stored
    metadata_files: tuple[Path, ...]  # one a part; empty where there are none
    sizes: tuple[int, ...]  # rows of each part

    def __len__(self) -> int:
        return self.starts[-1]

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """First row of each part, and the number of all rows."""
        return tuple(accumulate(self.sizes, initial=0))

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Which of image and text are there."""
        return tuple(self.parts)

    @property
    def dim(self) -> int:
        """Columns of the embeddings, the same for image and text."""
        return int(next(iter(self.parts.values()))[0].shape[1])

    def rows(self, kind: Kind, start: int, stop: int) -> NDArray[np.float32]:
        """Embeddings `start` to `stop` (exclusive) across parts.

        Returns:
            (stop - start, D) float32, in memory; normalised only if clip-retrieval was told to.

        Raises:
            DataError: the folder has no such kind.
        """
        if kind not in self.parts:
            raise DataError(f"{self.folder} has no {kind} embeddings (no {_FOLDERS[kind]}/), only {self.kinds[0]}.")
        pieces = [
            np.asarray(self.parts[kind][part][first:last], np.float32) for part, first, last in self._spans(start, stop)
        ]
        return np.concatenate([np.empty((0, self.dim), np.float32), *pieces])

    def metadata(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The metadata of all rows; every column that all parts have, or the named ones.

        Raises:
            DataError: there is none, or it lacks a column.
        """
        if not self.metadata_files:
            raise DataError(f"{self.folder} has no {_METADATA}/*.parquet. Expected: {_EXPECTED}.")
        schemas = [pq.read_schema(file) for file in self.metadata_files]
        common = [name for name in schemas[0].names if all(name in schema.names for schema in schemas)]
        missing = sorted(set(columns or ()) - set(common))
        if missing:
            raise DataError(
                f"{self.folder}: the metadata have no column '{missing[0]}' (in all parts). "
                f"They have: {', '.join(common)}."
            )
        names = common if columns is None else list(columns)
        tables = [pq.read_table(file, columns=names).replace_schema_metadata() for file in self.metadata_files]
        return pa.concat_tables(tables, promote_options="permissive")

    def _spans(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(part, first row in it, row after the last) that make up a range."""
        assert 0 <= start <= stop <= len(self), (start, stop, len(self))
        first = max(bisect_right(self.starts, start) - 1, 0)
        return [
            (part, max(start - begin, 0), min(stop, begin + size) - begin)
            for part, (begin, size) in enumerate(zip(self.starts, self.sizes, strict=False))
            if part >= first and begin < stop
        ]


def is_clip_retrieval(folder: str | Path) -> bool:
    """Whether a folder has the sub-folders of this layout."""
    return any((Path(folder) / name).is_dir() for name in _FOLDERS.values())


def read_clip_retrieval(folder: str | Path) -> StoredEmbeddings:
    """Open a folder of embeddings. Only headers are read.

    Args:
        folder: that holds `img_emb`, `text_emb` or both, and `metadata`.

    Raises:
        DataError: none of these there, a part missing or cut, or parts that differ in rows or width.
    """
    folder = Path(folder)
    files = {kind: _numbered(folder / name, ".npy") for kind, name in _FOLDERS.items()}
    parts = {kind: tuple(_open_part(file) for file in found) for kind, found in files.items() if found}
    if not parts:
        raise DataError(f"{folder} holds no embeddings in clip-retrieval's layout. Expected: {_EXPECTED}.")
    metadata = tuple(_numbered(folder / _METADATA, ".parquet"))
    sizes = tuple(len(part) for part in next(iter(parts.values())))
    rows = {_FOLDERS[kind]: [len(part) for part in opened] for kind, opened in parts.items()}
    if metadata:
        rows[_METADATA] = [_num_rows(file) for file in metadata]
    for name, found in rows.items():
        if found != list(sizes):
            raise DataError(
                f"{folder}: {name} has parts of {found[:5]} rows, {next(iter(rows))} of {list(sizes[:5])}; row i of "
                "each must be about the same sample. A part is missing or was cut: embed again, or remove what is over."
            )
    widths = {part.shape[1] for opened in parts.values() for part in opened}
    if len(widths) > 1:
        raise DataError(f"{folder} mixes embeddings of {sorted(widths)} columns: they come from different models.")
    return StoredEmbeddings(folder, parts, metadata, sizes)


def _numbered(folder: Path, suffix: str) -> list[Path]:
    """`NAME_0`, `NAME_1`, ... in order of their numbers, whatever their zeros."""
    numbers: dict[int, Path] = {}
    for file in sorted(folder.glob(f"*{suffix}")) if folder.is_dir() else ():
        match = re.fullmatch(rf"{re.escape(folder.name)}_(\d+)", file.stem)
        if match and numbers.setdefault(int(match[1]), file) is not file:
            raise DataError(f"{folder} has part {int(match[1])} twice: {numbers[int(match[1])].name}, {file.name}.")
    missing = sorted(set(range(max(numbers, default=-1) + 1)) - set(numbers))
    if missing:
        raise DataError(f"{folder}: part {missing[0]} is missing of {max(numbers) + 1}. Was the job interrupted?")
    return [numbers[number] for number in sorted(numbers)]


def _open_part(file: Path) -> NDArray[Any]:
    try:
        # Without pickles: a matrix of numbers needs none, and they run code.
        part: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file} is no readable .npy file ({error}). It may have been cut: copy it again.") from error
    if part.ndim != 2 or part.dtype.kind != "f":
        raise DataError(f"{file} holds {part.dtype} {part.shape}, expected a matrix (rows, D) of floats.")
    return part


def _num_rows(file: Path) -> int:
    try:
        return int(pq.read_metadata(file).num_rows)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file} is no readable parquet file ({error}). Copy it again.") from error
