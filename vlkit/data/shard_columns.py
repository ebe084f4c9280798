"""The columns of an opened shard, as numpy views of the memory-mapped sidecar, and the tar's file descriptor.

Both are held for the shards used last and let go again: a set may have more shards than a process may open files.
"""

import io
import mmap
import os
import stat
import weakref
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from numpy.typing import NDArray

from vlkit.data.remote import read_at, read_marker
from vlkit.data.shard_sidecar import (
    TOKENS,
    build_table,
    file_identity,
    map_table,
    sidecar_path,
    suffixes_of,
    summary_of,
    tar_identity,
    write_table,
)
from vlkit.errors import DataError


class RawSample(NamedTuple):
    """A sample as it stands in the tar."""

    key: str
    image: memoryview  # encoded; of the mapped file, which is read when it is looked at
    caption: bytes | None  # the caption file, None where there is none


class Columns:
    """Columns of one shard, and its tar; rows are samples."""

    def __init__(self, table: pa.Table, tar_path: str) -> None:
        self._summary = summary_of(table)
        self._tar_path = tar_path
        self._remote = read_marker(Path(tar_path)) is not None
        self._tar: io.FileIO | None = None
        self._map: memoryview | None = None
        self.numbers: dict[str, NDArray[Any]] = {
            name: _only_chunk(table, name).to_numpy(zero_copy_only=True)
            for name in table.column_names
            if name.endswith(("_offset", "_size"))
        }
        self._keys = _only_chunk(table, "key")
        self._suffixes = suffixes_of(table)
        members = _only_chunk(table, "members")
        self._first_member = members.offsets.to_numpy()
        self._members = [members.values.field(name).to_numpy() for name in ("suffix", "offset", "size")]
        self.tokens: dict[str, tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = {
            name[len(TOKENS) :]: _ragged(_only_chunk(table, name))
            for name in table.column_names
            if name.startswith(TOKENS)
        }

    def key(self, i: int) -> bytes:
        """Key of row `i`."""
        key: bytes = self._keys[i].as_py()
        return key

    def place(self, role: str, i: int) -> tuple[int, int]:
        """Offset and size of a role's file; (-1, 0) where row `i` has none."""
        return int(self.numbers[f"{role}_offset"][i]), int(self.numbers[f"{role}_size"][i])

    def members(self, i: int) -> dict[str, tuple[int, int]]:
        """Suffix -> (offset, size) of every file of row `i`."""
        rows = range(self._first_member[i], self._first_member[i + 1])
        suffix, offset, size = self._members
        return {self._suffixes[suffix[row]]: (int(offset[row]), int(size[row])) for row in rows}

    def tokens_of(self, tokenizer_id: str, i: int) -> list[NDArray[Any]] | None:
        """Token ids of every caption of row `i`; None when this tokenizer's are not stored."""
        if tokenizer_id not in self.tokens:
            return None
        first_caption, first_token, ids = self.tokens[tokenizer_id]
        captions = range(first_caption[i], first_caption[i + 1])
        return [ids[first_token[caption] : first_token[caption + 1]] for caption in captions]

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes of the tar. Moves no file pointer, so forked workers share the descriptor safely.

        Raises:
            DataError: the tar cannot be read, is another one than was indexed, or ends before.
        """
        try:
            content = (
                read_at(Path(self._tar_path), size, offset) if self._remote else _read_at(self._file(), size, offset)
            )
        except OSError as error:
            raise DataError(f"Cannot read shard {self._tar_path}: {error.strerror or error}.") from error
        if len(content) < size:
            raise DataError(
                f"{self._tar_path} is shorter than when it was indexed: it was cut. Copy or build it again."
            )
        return content

    def raw_samples(self) -> Iterator[RawSample]:
        """All rows in the tar's order.

        Raises:
            DataError: the tar cannot be read, or is another one than was indexed.
        """
        names = ("image_offset", "image_size", "caption_offset", "caption_size")
        places = [self.numbers[name].tolist() for name in names]  # once: numpy's single numbers are slow
        tar = None if self._remote else self._mapped()
        for key, image, size, caption, caption_size in zip(self._keys.to_pylist(), *places, strict=True):
            content = memoryview(self.read(image, size)) if tar is None else tar[image : image + size]
            if caption < 0:
                text = None
            else:
                text = self.read(caption, caption_size) if tar is None else bytes(tar[caption : caption + caption_size])
            yield RawSample(key.decode("utf-8", "backslashreplace"), content, text)

    def _mapped(self) -> memoryview:
        # Kept: a new map would fault on every page again, which takes as long as copying the images.
        if self._map is None:
            self._map = memoryview(mmap.mmap(self._file().fileno(), 0, access=mmap.ACCESS_READ))
        return self._map

    def _file(self) -> io.FileIO:
        if self._tar is None:
            tar = io.FileIO(self._tar_path)
            weakref.finalize(self, tar.close)  # closes when the shard is let go, however that happens
            if file_identity(tar) != (self._summary.tar_size, self._summary.tar_ends):
                raise _changed(self._tar_path)
            self._tar = tar
        return self._tar


def fitting_table(tar_path: Path) -> tuple[pa.Table | None, str | None]:
    """The sidecar of a tar if it is there and belongs to it.

    Returns:
        The table, or None; and why a sidecar that is there cannot be used.
    """
    path = sidecar_path(tar_path)
    if not path.exists():
        return None, None
    try:
        table = map_table(path)
    except DataError:
        return None, "was broken or of another version of vlkit"
    if read_marker(tar_path) is not None:  # compared when it was downloaded; the body need not be here
        return table, None
    summary = summary_of(table)
    if (summary.tar_size, summary.tar_ends) != tar_identity(tar_path):
        return None, "belonged to other contents of the tar"
    return table, None


def store_table(table: pa.Table, tar_path: Path) -> bool:
    """Write the sidecar if its folder may be written to.

    A folder without any write permission counts as read-only for root too.
    """
    path = sidecar_path(tar_path)
    if not stat.S_IMODE(path.parent.stat().st_mode) & 0o222:
        return False
    try:
        write_table(table, path)
    except OSError:  # another owner's folder, a read-only or a full disk
        return False
    return True


@lru_cache(maxsize=128)
def open_columns(tar_path: str, digest: str) -> Columns:
    """Columns of a shard, from its sidecar or else from a walk over the tar.

    Raises:
        DataError: the tar or its sidecar is not the one that had this digest.
    """
    table, _ = fitting_table(Path(tar_path))
    table = build_table(tar_path) if table is None else table
    if summary_of(table).digest != digest:
        raise _changed(tar_path)
    return Columns(table, tar_path)


def _read_at(file: io.FileIO, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)  # Windows, where workers are spawned and share no files
    return file.read(size)


def _changed(tar_path: str) -> DataError:
    return DataError(f"{tar_path} or its index changed while it was in use. Start again.")


def _only_chunk(table: pa.Table, name: str) -> Any:
    column = table.column(name)
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def _ragged(column: Any) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """A list of lists as its two offset columns and the flat values."""
    inner = column.values
    return column.offsets.to_numpy(), inner.offsets.to_numpy(), inner.values.to_numpy()
