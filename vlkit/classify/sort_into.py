"""Sort classified images into one folder a class, by copying or linking; nothing is moved or overwritten."""

import filecmp
import os
import shutil
from pathlib import Path

from vlkit.classify.run import Classified
from vlkit.data.records import Record
from vlkit.errors import ConfigError, DataError
from vlkit.escape import file_stem

UNSURE = "unsure"


class Sorter:
    """Puts each image into `folder/<class>/`, or `folder/unsure/` below the probability threshold.

    A file that is already there is left alone: the same content is not stored twice, another file of the
    same name gets a number behind its own.
    """

    def __init__(self, folder: str | Path, class_names: tuple[str, ...], *, link: bool = False) -> None:
        self.folder = Path(folder)
        self.link = link
        self.placed = 0
        self.already_there = 0
        self._folders = _distinct_folders((*class_names, UNSURE))

    def place(self, result: Classified) -> Path:
        """Copy or link one image; returns where it lies now.

        Raises:
            ConfigError: linking was asked for, but the image lies inside a shard.
            DataError: the file cannot be written (no space, no permission).
        """
        name = UNSURE if result.unsure else result.classes[0][0]
        target_folder = self.folder / self._folders[name]
        try:
            target_folder.mkdir(parents=True, exist_ok=True)
            return self._put(result.record, target_folder)
        except OSError as error:
            raise DataError(
                f"Cannot put {result.record.key} into {target_folder}: {error.strerror or error}. "
                "Free space or choose another folder, then run again; what is sorted already stays."
            ) from error

    def _put(self, record: Record, folder: Path) -> Path:
        from_shard = record.image.path is None or record.image.offset is not None
        if from_shard and self.link:
            raise ConfigError(f"{record.key} lies inside a shard and cannot be linked to; use --copy.")
        content = record.image.read() if from_shard else None
        original = None if from_shard else Path(str(record.image.path)).resolve()
        name = file_stem(record.key.rsplit("/", 1)[-1].rsplit("::", 1)[-1]) if original is None else original.name
        for number in range(1, 1_000_000):
            target = folder / (name if number == 1 else f"{Path(name).stem} ({number}){Path(name).suffix}")
            if not os.path.lexists(target):
                self._write(target, original, content)
                self.placed += 1
                return target
            if _same(target, original, content):
                self.already_there += 1
                return target
        raise AssertionError(f"a million files named {name} in {folder}")

    def _write(self, target: Path, original: Path | None, content: bytes | None) -> None:
        if original is None:
            assert content is not None
            partial = target.with_name(target.name + ".partial")
            partial.write_bytes(content)
            os.replace(partial, target)
        elif self.link:
            target.symlink_to(original)
        else:
            partial = target.with_name(target.name + ".partial")
            shutil.copy2(original, partial)
            os.replace(partial, target)


def _same(target: Path, original: Path | None, content: bytes | None) -> bool:
    if not target.is_file():
        return False
    if original is None:
        return target.read_bytes() == content
    return target.resolve() == original or filecmp.cmp(target, original, shallow=False)


def _distinct_folders(names: tuple[str, ...]) -> dict[str, str]:
    """A folder name for each class; classes that differ only in forbidden characters or case get a number."""
    folders: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        stem, number = file_stem(name), 2
        folder = stem
        while folder.lower() in taken:
            folder = f"{stem} ({number})"
            number += 1
        taken.add(folder.lower())
        folders.setdefault(name, folder)
    return folders
