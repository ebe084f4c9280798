"""Where each file of a tar lies, read from the headers alone.

Walking a memory map touches 512 bytes a file and never the contents, so a shard is indexed some twenty times
faster than `tarfile` or webdataset read it. Understands ustar, pax (`x`, `g`) and GNU (`L`, `K`, base-256 sizes)
headers. Nothing after damage is trusted: the walk stops there and says where.
"""

import mmap
import os
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlkit.errors import DataError

BLOCK = 512
NO_CONTENT = -1  # size of a member whose bytes do not lie in the tar as they are: a link or a sparse file

_ZEROS = bytes(BLOCK)
_BAD_SUM = "damaged header (its sum is wrong)"
_REGULAR = frozenset(b"\x0007")
_LINKS = frozenset(b"12")
_SKIPPED = frozenset(b"3456")  # devices, directories, pipes: a header and no content
_PAX_LOCAL = frozenset(b"xX")
_PAX_GLOBAL, _GNU_NAME, _GNU_SPARSE = b"gLS"
_MAX_RECORD = 1 << 20  # bytes of a pax or GNU record; a longer one is damage, not a name
_CHUNK = 4096  # headers gathered at a time: 2 MiB
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstandard",
    b"\x04\x22\x4d\x18": "lz4",
    b"PK\x03\x04": "zip",
}


class Damage(NamedTuple):
    """Where a walk had to stop, and what it struck."""

    cause: str
    offset: int  # first byte of the tar that is not accounted for
    name: bytes | None = None  # the file it struck, when its header was still readable


@dataclass(frozen=True)
class TarMembers:
    """The files of a tar, in its order. Directories and devices are left out."""

    names: list[bytes]
    offsets: NDArray[np.int64]  # (M,) first byte of the content
    sizes: NDArray[np.int64]  # (M,) bytes, or NO_CONTENT
    length: int  # bytes of the whole tar
    damage: Damage | None


def walk_tar(path: str | Path) -> TarMembers:
    """List the files of a tar from its headers.

    Raises:
        DataError: the file cannot be read, or is compressed.
    """
    try:
        with open_tar(path) as file:
            length = os.fstat(file.fileno()).st_size
            if length == 0:
                nothing = np.zeros(0, np.int64)
                return TarMembers([], nothing, nothing, 0, Damage("empty file", 0))
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"Cannot read shard {path}: {error.strerror or error}.") from error
    _refuse_compressed(path, content[:8])
    return _Walk(content).run()


def open_tar(path: str | Path) -> BufferedReader:
    """A shard as a file; one of a URL is downloaded if need be.

    Raises:
        OSError: it cannot be opened.
        RemoteError: it could not be downloaded.
    """
    from vlkit.data.remote import bring  # which builds on this module

    while True:
        try:
            return open(path, "rb")
        except FileNotFoundError:
            if not bring(Path(path)):
                raise


def _refuse_compressed(path: str | Path, opening: bytes) -> None:
    for magic, kind in _COMPRESSED.items():
        if opening.startswith(magic):
            raise DataError(
                f"{path} is compressed ({kind}): its samples cannot be reached one by one. Unpack it to a plain .tar "
                "(images hardly compress anyway), or build it again with `vlkit shards build`."
            )


class _Walk:
    """One walk over one tar; lists grow by one entry a file."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content = content
        self.length = len(content)
        self.headers: list[int] = []  # offset of the header of each file
        self.starts: list[int] = []
        self.sizes: list[int] = []
        self.long_names: dict[int, bytes] = {}  # file number -> name from a pax or GNU record
        self.records: list[int] = []  # offsets of pax and GNU headers
        self.everywhere: dict[bytes, bytes] = {}  # pax values for all files to come
        self.pending: dict[bytes, bytes] = {}  # pax and GNU values for the next file

    def run(self) -> TarMembers:
        damages = [self._follow()]
        names, bad_header = self._check_headers()
        damages += [bad_header, self._check_records()]
        damage = min((found for found in damages if found), key=lambda found: found.offset, default=None)
        kept = len(names) if damage is None else int(np.searchsorted(self.headers, damage.offset))
        for number, name in self.long_names.items():
            if number < kept:
                names[number] = name
        if kept and self.starts[kept - 1] + self.sizes[kept - 1] > self.length:
            kept -= 1
            damage = Damage("cut inside a file", self.headers[kept], names[kept])
        offsets, sizes = np.array(self.starts[:kept], np.int64), np.array(self.sizes[:kept], np.int64)
        return TarMembers(names[:kept], offsets, sizes, self.length, damage)

    def _follow(self) -> Damage | None:
        """Go from header to header, trusting each; sums are checked afterwards, all at once."""
        content, length, position = self.content, self.length, 0
        while position + BLOCK <= length:
            size = _number(content[position + 124 : position + 136])
            if size is None:
                return Damage("damaged header", position)
            kind = content[position + 156]
            if kind == 0 and content[position] == 0 and content[position : position + BLOCK] == _ZEROS:
                return self._after_end(position)
            if kind in _REGULAR and not self.pending and not self.everywhere:
                self._add(position, position + BLOCK, size)
                position += BLOCK + (size + BLOCK - 1) // BLOCK * BLOCK
                continue
            end = self._unusual(position, kind, size)
            if end is None:
                return Damage("damaged pax or GNU header", position)
            position = end
        return Damage("cut short (the end mark of a tar is missing)", min(position, length))

    def _add(self, header: int, start: int, size: int, name: bytes | None = None) -> None:
        if name is not None:
            self.long_names[len(self.headers)] = name
        self.headers.append(header)
        self.starts.append(start)
        self.sizes.append(size)

    def _unusual(self, position: int, kind: int, size: int) -> int | None:
        """Take a header that is no plain file, or has pax values waiting; returns where the next one is."""
        start = position + BLOCK
        if kind in _PAX_LOCAL or kind == _PAX_GLOBAL or kind in b"LK":
            return self._record(position, kind, size)
        values, self.pending = {**self.everywhere, **self.pending}, {}
        name = values.get(b"path")
        if kind in _LINKS:
            self._add(position, start, NO_CONTENT, name)
        if kind in _LINKS or kind in _SKIPPED:
            return start
        size = _decimal(values[b"size"]) if b"size" in values else size
        if size < 0:
            return None
        if kind == _GNU_SPARSE:
            start = self._after_sparse_map(start)
        if kind in _REGULAR or kind == _GNU_SPARSE:
            whole = kind in _REGULAR and not any(key.startswith(b"GNU.sparse.") for key in values)
            self._add(position, start, size if whole else NO_CONTENT, name)
        return start + (size + BLOCK - 1) // BLOCK * BLOCK

    def _record(self, position: int, kind: int, size: int) -> int | None:
        """Take a pax or GNU record, which speaks of the next file."""
        start = position + BLOCK
        data = self.content[start : start + min(size, _MAX_RECORD)]
        if len(data) < size:
            return start + size if start + size > self.length else None
        self.records.append(position)
        if kind == _GNU_NAME:
            self.pending[b"path"] = data.partition(b"\0")[0]
        elif kind in _PAX_LOCAL or kind == _PAX_GLOBAL:
            values = _pax_values(data)
            if values is None:
                return None
            (self.everywhere if kind == _PAX_GLOBAL else self.pending).update(values)
        return start + (size + BLOCK - 1) // BLOCK * BLOCK

    def _after_sparse_map(self, start: int) -> int:
        flag = start - BLOCK + 482
        while start <= self.length - BLOCK and self.content[flag]:
            flag, start = start + 504, start + BLOCK
        return start

    def _after_end(self, position: int) -> Damage | None:
        """Anything but zeros after the end mark was appended or left over, and no reader sees it."""
        for start in range(position, self.length, 1 << 20):
            chunk = self.content[start : start + (1 << 20)]
            if chunk.count(0) != len(chunk):
                first = start + len(chunk) - len(chunk.lstrip(b"\0"))
                return Damage("more data after the end mark of the tar (two tars in one file?)", first)
        return None

    def _blocks(self, positions: list[int]) -> NDArray[np.uint8]:
        whole = self.length // BLOCK
        content = np.frombuffer(self.content, np.uint8, whole * BLOCK).reshape(whole, BLOCK)
        return content[np.array(positions, np.int64) // BLOCK]

    def _check_headers(self) -> tuple[list[bytes], Damage | None]:
        """Names of the files up to the first header whose sum is wrong, and that header."""
        names: list[bytes] = []
        for first in range(0, len(self.headers), _CHUNK):
            positions = self.headers[first : first + _CHUNK]
            blocks = self._blocks(positions)
            names += _header_names(blocks)
            bad = _first_bad(blocks)
            if bad is not None:
                return names[: first + bad], Damage(_BAD_SUM, positions[bad])
        return names, None

    def _check_records(self) -> Damage | None:
        bad = _first_bad(self._blocks(self.records)) if self.records else None
        return None if bad is None else Damage(_BAD_SUM, self.records[bad])


def _first_bad(blocks: NDArray[np.uint8]) -> int | None:
    bad = (int(row) for row in np.flatnonzero(_wrong_sums(blocks)) if not _right_signed_sum(blocks[row]))
    return next(bad, None)


def _header_names(blocks: NDArray[np.uint8]) -> list[bytes]:
    """Names (n) out of header blocks (n, 512): the name field, after the prefix field in POSIX headers."""
    names: list[bytes] = np.ascontiguousarray(blocks[:, :100]).view("S100").ravel().tolist()
    posix = (blocks[:, 257:263] == np.frombuffer(b"ustar\0", np.uint8)).all(axis=1)
    for row in np.flatnonzero(posix & (blocks[:, 345] != 0)):
        names[row] = blocks[row, 345:500].tobytes().partition(b"\0")[0] + b"/" + names[row]
    # numpy strips NULs at the end only; what follows an inner one is left over from another name
    return [name.partition(b"\0")[0] if b"\0" in name else name for name in names]


def _wrong_sums(blocks: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which header blocks (n, 512) do not add up; a sum counts its own eight bytes as spaces."""
    digits = blocks[:, 148:154].astype(np.int64) - ord("0")
    stated = digits @ (8 ** np.arange(5, -1, -1, dtype=np.int64))
    for row in np.flatnonzero(((digits < 0) | (digits > 7)).any(axis=1)):  # fewer digits, or none at all
        number = _number(blocks[row, 148:156].tobytes())
        stated[row] = -1 if number is None else number
    own = blocks[:, 148:156].sum(axis=1, dtype=np.int64)
    wrong: NDArray[np.bool_] = _row_sums(blocks) - own + 8 * 32 != stated
    return wrong


def _row_sums(blocks: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Byte sums (n,) of blocks (n, 512), four bytes at once in 16-bit lanes, which 64 words cannot overflow."""
    words = blocks.view(np.uint64)
    lanes = np.uint64(0x00FF00FF00FF00FF)
    totals = ((words & lanes) + ((words >> np.uint64(8)) & lanes)).sum(axis=1)
    sums: NDArray[np.int64] = totals.view(np.uint16).reshape(-1, 4).sum(axis=1, dtype=np.int64)
    return sums


def _right_signed_sum(block: NDArray[np.uint8]) -> bool:
    """Old tars of some systems added signed bytes."""
    total = int(block.view(np.int8).sum(dtype=np.int64)) - int(block[148:156].view(np.int8).sum(dtype=np.int64))
    return total + 8 * 32 == _number(block[148:156].tobytes())


def _number(text: bytes) -> int | None:
    """A header number: octal digits, or base 256 when the first bit is set. None when it is neither."""
    try:
        number = int(text.rstrip(b" \0") or b"0", 8)
    except ValueError:
        if text[0] == 0x80:
            return int.from_bytes(text[1:], "big")
        try:
            number = int(text.partition(b"\0")[0].strip() or b"0", 8)
        except ValueError:
            return None
    return number if number >= 0 else None


def _decimal(text: bytes) -> int:
    return int(text) if text.isdigit() else -1


def _pax_values(data: bytes) -> dict[bytes, bytes] | None:
    """The `length key=value` lines of a pax record; None when the lengths do not add up."""
    values: dict[bytes, bytes] = {}
    position = 0
    while position < len(data) and data[position] != 0:
        digits = data[position : position + 20].partition(b" ")[0]
        line = data[position : position + max(_decimal(digits), 0)]
        keyword, equals, value = line[len(digits) + 1 :].partition(b"=")
        if _decimal(digits) != len(line) or not equals or not line.endswith(b"\n"):
            return None
        values[keyword] = value[:-1]
        position += len(line)
    return values
