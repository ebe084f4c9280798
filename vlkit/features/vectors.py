"""Vectors on disk under 16-byte keys: the one kind of file the cache is made of.

A folder of segments, each a .npy file with rows (key, vector), written whole under a name of its own and never
changed. So any number of processes, also on several machines, may read and write at once without locks, and a kill
loses at most the rows since the last flush. When there are many segments they are merged into one.
"""

import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from secrets import token_hex
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlkit.data.atomic import atomic_file
from vlkit.errors import DataError
from vlkit.features.cache_folder import cannot_write

MAX_SEGMENTS = 48
MAX_PENDING = 4096  # rows
MAX_WAIT = 5.0  # seconds of work that a kill may lose

_log = logging.getLogger(__name__)


class VectorStore:
    """Rows of `width` floats by key, a hash of 16 bytes. Open it, find, add, flush; `with` flushes at the end."""

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder
        self.kind = np.dtype([("key", "V16"), ("vector", "<f4", (width,))])
        self._segments: list[NDArray[Any]] = []
        self._index: _Index | None = None
        self._keys: list[bytes] = []
        self._vectors: list[NDArray[np.float32]] = []
        self._last_flush = time.monotonic()
        self._open()

    def __len__(self) -> int:
        """Rows on disk."""
        return sum(map(len, self._segments))

    def __enter__(self) -> "VectorStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def find(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """Where the row of each key lies, for `rows`; -1 where there is none. What is added later moves no row."""
        if self._index is None:
            self._index = _Index.of(self._segments)
        return self._index.find(np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2))

    def rows(self, places: NDArray[np.int64]) -> NDArray[np.float32]:
        """(len(places), width) of places that `find` gave."""
        out = np.empty((len(places), self.kind["vector"].shape[0]), np.float32)
        ends = np.cumsum([len(segment) for segment in self._segments])
        owner = np.searchsorted(ends, places, side="right")
        for number in np.unique(owner):
            segment, mine = self._segments[number], owner == number
            out[mine] = segment["vector"][places[mine] - (ends[number] - len(segment))]
        return out

    def add(self, keys: Sequence[bytes], vectors: NDArray[np.float32]) -> None:
        """Remember rows; they reach the disk at the next flush, which comes by itself after seconds of work.

        Raises:
            DataError: the disk is full or read-only.
        """
        assert len(keys) == len(vectors), (len(keys), len(vectors))
        self._keys += keys
        self._vectors.append(vectors.copy())  # the caller may write into its array
        if len(self._keys) >= MAX_PENDING or time.monotonic() - self._last_flush > MAX_WAIT:
            self.flush()

    def flush(self) -> None:
        """Write what is pending as one segment.

        Raises:
            DataError: the disk is full or read-only.
        """
        if self._keys:
            rows = np.empty(len(self._keys), self.kind)
            rows["key"] = np.frombuffer(b"".join(self._keys), "V16")
            rows["vector"] = np.concatenate(self._vectors)
            self._keys, self._vectors = [], []
            self._take_in(self._write(rows))
        self._last_flush = time.monotonic()

    def _write(self, rows: NDArray[Any]) -> Path:
        path = self.folder / f"{time.time_ns():020d}-{token_hex(4)}.npy"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as file:
                np.save(file, rows)
        except OSError as error:
            raise DataError(cannot_write(self.folder, error)) from error
        return path

    def _open(self) -> None:
        paths = sorted(self.folder.glob("*.npy"))
        for path in paths:
            self._take_in(path)
        if len(paths) > MAX_SEGMENTS:
            self._merge(paths)

    def _take_in(self, path: Path) -> None:
        try:
            segment: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except FileNotFoundError:  # merged by another process since it was listed: at worst computed again
            return
        except (OSError, ValueError, EOFError) as error:
            _log.warning("Left out a broken file of the cache: %s (%s).", path, error)
            return
        if segment.dtype != self.kind:
            _log.warning("Left out a file of the cache that holds something else: %s.", path)
            return
        self._segments.append(segment)
        self._index = None

    def _merge(self, paths: list[Path]) -> None:
        rows = np.concatenate(self._segments)
        rows = rows[np.unique(rows["key"].copy().view("<u8").reshape(-1, 2), axis=0, return_index=True)[1]]
        try:
            merged = self._write(rows)
        except DataError:  # reading goes on as it was; whoever has something to write will hear of it
            return
        self._segments = []
        self._take_in(merged)
        for path in paths:
            try:
                os.unlink(path)
            except OSError:  # gone already, or open elsewhere on Windows: then it goes next time
                continue


class _Index(NamedTuple):
    """Keys of all rows in the order of their first halves, which no two keys share: they are hashes."""

    first: NDArray[np.uint64]  # (rows,) rising
    second: NDArray[np.uint64]
    place: NDArray[np.int64]

    @classmethod
    def of(cls, segments: Sequence[NDArray[Any]]) -> "_Index":
        halves = np.frombuffer(b"".join(segment["key"].tobytes() for segment in segments), "<u8").reshape(-1, 2)
        order = np.argsort(halves[:, 0], kind="stable")
        return cls(halves[order, 0], halves[order, 1], order)

    def find(self, halves: NDArray[np.uint64]) -> NDArray[np.int64]:
        if not len(self.place):
            return np.full(len(halves), -1)
        at = np.minimum(np.searchsorted(self.first, halves[:, 0]), len(self.place) - 1)
        same = (self.first[at] == halves[:, 0]) & (self.second[at] == halves[:, 1])
        return np.where(same, self.place[at], -1)
