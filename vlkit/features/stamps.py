"""What tells whether an image is the same as before without reading it: where it lies, its size and its time."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vlkit.data.images import ImageLike
from vlkit.data.records import ImageRef, Record


class Stamp(NamedTuple):
    """One image on disk: its file, its place in it, and the state of the file. Equal stamps, equal image."""

    path: str  # absolute; empty for bytes in memory
    offset: int | None
    size: int | None  # of the member of a tar
    column: str | None
    file_size: int  # -1 where there is no file
    changed: int  # nanoseconds; of bytes in memory, their hash

    @property
    def content(self) -> tuple[object, ...]:
        """All but the path: stays the same when the folder is moved."""
        return self[1:]

    @property
    def key(self) -> bytes:
        """16 bytes, equal for equal stamps."""
        return digest(*self)


@dataclass
class Stamper:
    """Stamps of images; a file that holds many of them is looked at once."""

    def __post_init__(self) -> None:
        self._last: tuple[str, str, int, int] | None = None

    def stamp(self, ref: ImageRef) -> Stamp:
        """The stamp of one image; a missing file has size -1."""
        if ref.data is not None:
            return Stamp("", None, None, None, len(ref.data), int.from_bytes(digest(ref.data)[:8], "big") >> 1)
        assert ref.path is not None
        if self._last is None or self._last[0] != ref.path:
            self._last = (ref.path, os.path.abspath(ref.path), *_state(ref.path))
        return Stamp(self._last[1], ref.offset, ref.size, ref.column, self._last[2], self._last[3])

    def key(self, image: ImageLike) -> bytes | None:
        """16 bytes for an image of any origin; None where nothing but its pixels could tell it."""
        if isinstance(image, Image.Image):
            return None
        ref = image.image if isinstance(image, Record) else ImageRef(path=str(image))
        stamp = self.stamp(ref)
        return None if stamp.file_size < 0 else stamp.key


def digest(*parts: object) -> bytes:
    """16 bytes over values: bytes and strings as they are, others as text."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        content = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogatepass")
        found.update(len(content).to_bytes(8, "big") + content)
    return found.digest()


def folder_stamp(*places: Path) -> bytes:
    """16 bytes over names, sizes and times of files, and of all files below folders."""
    files = sorted(file for place in places for file in (place.rglob("*") if place.is_dir() else [place]))
    return digest(*(part for file in files if file.is_file() for part in (file.absolute(), *_state(str(file)))))


def _state(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:
        return -1, 0
    return found.st_size, found.st_mtime_ns
