"""Where image files lie: recursive scans, look-up of names in folders, folders found by convention.

Folders are listed once and names looked up in the listing: a stat per file costs seconds per 100,000 files on
a local disk and minutes on a network one.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from vlkit.data.records import Problems
from vlkit.errors import DataError

_JPEG = (".jpg", ".jpeg", ".jpe", ".jfif")
_OTHER = (".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif", ".heic", ".heif")
_NETPBM = (".ppm", ".pgm", ".pbm", ".pnm")
IMAGE_SUFFIXES = frozenset((*_JPEG, *_OTHER, *_NETPBM))

# One found image: the parts of its path below the scanned root, and the path to open.
FoundImage = tuple[tuple[str, ...], str]


def is_image_name(name: str) -> bool:
    """Whether a file name has the suffix of an image format."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def printable_name(name: str) -> str:
    """The name as valid Unicode: bytes of a file name that are no UTF-8 become `\\xe9`.

    Keys go into JSON, tars and Arrow tables, which refuse the lone surrogates Python stands in for such bytes.
    """
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def scan_images(root: Path, problems: Problems) -> list[FoundImage]:
    """All image files below `root`, ordered by the parts of their path; links are followed.

    What is skipped (hidden entries, other files, broken links, links that lead back up) is counted in `problems`.

    Raises:
        DataError: `root` itself cannot be listed.
    """
    found: list[FoundImage] = []
    # Folder, its parts, its real path and those of the folders above it.
    pending: list[tuple[str, tuple[str, ...], tuple[str, ...]]] = [(os.fspath(root), (), (os.path.realpath(root),))]
    while pending:
        folder, parts, above = pending.pop()
        for entry in _entries(folder, parts, problems):
            below = (*parts, entry.name)
            cause = _skip_cause(entry)
            if cause:
                problems.add(cause, _key(below))
            elif not entry.is_dir():
                found.append((below, entry.path))
            else:
                real = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(above[-1], entry.name)
                if real in above:
                    problems.add("link that leads back to a folder above it", _key(below))
                else:
                    pending.append((entry.path, below, (*above, real)))
    return sorted(found)


def _entries(folder: str, parts: tuple[str, ...], problems: Problems) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            yield from sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        if not parts:
            raise DataError(f"Cannot list folder {folder}: {error.strerror or error}.") from error
        problems.add("folder that cannot be listed", _key(parts))


def _skip_cause(entry: os.DirEntry[str]) -> str | None:
    if entry.name.startswith("."):
        return "hidden file or folder"
    if entry.is_dir():
        return None
    if not is_image_name(entry.name):
        return "not an image by its suffix"
    if entry.is_symlink() and not entry.is_file():
        return "broken link"
    return None


def _key(parts: Iterable[str]) -> str:
    return printable_name("/".join(parts))


class ImageLookup:
    """Finds the file of an image name in a few folders, listing each folder at most once."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = tuple(folders)
        self._listings: dict[str, frozenset[str]] = {}

    def find(self, names: Iterable[str]) -> str | None:
        """The first existing file among `names` (relative to the folders, or absolute), None when there is none."""
        for name in names:
            for folder in self.folders:
                path = os.path.normpath(os.path.join(folder, name))
                parent, base = os.path.split(path)
                if base in self._listing(parent):
                    return path
        return None

    def _listing(self, folder: str) -> frozenset[str]:
        known = self._listings.get(folder)
        if known is None:
            try:
                with os.scandir(folder or ".") as entries:
                    # A directory is no image, and a link is one only if it leads to a file; is_file stats links alone.
                    known = frozenset(entry.name for entry in entries if entry.is_file())
            except OSError:
                known = frozenset()  # no such folder: none of its files exist
            self._listings[folder] = known
        return known


def image_folders(annotation: Path, names: Sequence[str], images: Path | None, also_above: bool = False) -> list[Path]:
    """The folders in which the images of an annotation file may lie, most specific first.

    Args:
        annotation: the annotation file.
        names: folder names that are customary for the format.
        images: the folder the user named; then only it and the customary folders below it count.
        also_above: the annotation's parent is a folder for annotations only, so look beside it as well.

    Raises:
        DataError: `images` is no folder.
    """
    if images is not None and not images.is_dir():
        raise DataError(f"The folder of images {images} does not exist. Name the folder that holds the image files.")
    bases = [images] if images is not None else [annotation.parent]
    if images is None and also_above:
        bases.append(annotation.parent.parent)
    folders = [base / name for base in bases for name in names if (base / name).is_dir()]
    return [*folders, *bases]
