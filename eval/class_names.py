"""From folder names to the class names that go into prompts."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vlkit.data.records import Record
from vlkit.data.sources.annotated import read_json, read_lines
from vlkit.errors import DataError, did_you_mean

SHOWN = 5


class NamedClasses(NamedTuple):
    """Classes of a data set with the names they go by in prompts."""

    names: tuple[str, ...]  # (C,)
    records: tuple[Record, ...]  # `label` points into `names`; images of excluded classes are gone
    how: str  # how the names came about, for the record
    num_excluded: int  # images of excluded classes
    unused: tuple[str, ...]  # entries of the file for folders that are not there


def name_classes(
    folders: Sequence[str],
    records: Sequence[Record],
    file: Path | None = None,
    exclude: Collection[str] = (),
) -> NamedClasses:
    """Give every class folder its name.

    Args:
        folders: the source's class names, which `label` of the records points into.
        records: the source's records.
        file: `folder<TAB>name` or `folder => name` a line, a JSON object {folder: name}, or only names (a line
            each, or a JSON list) in the sorted order of the folders that are not excluded. A name may be
            `name | synonym`. None: the folder's name with `_` as space.
        exclude: folders to leave out with their images.

    Raises:
        DataError: a folder without a name, a number of names that does not fit, an unknown folder in `exclude`.
    """
    for folder in exclude:
        if folder not in folders:
            raise DataError(f"There is no class folder {folder!r} to exclude. {did_you_mean(folder, folders)}")
    kept = [folder for folder in folders if folder not in exclude]
    how = "folder name, _ as space"
    unused: tuple[str, ...] = ()
    if file is None:
        names = tuple(folder.replace("_", " ") for folder in kept)
    else:
        given = _read(file)
        names = _by_folder(given, kept, file) if isinstance(given, Mapping) else _in_order(given, kept, file)
        how = f"given by {file.name}"
        if isinstance(given, Mapping):
            unused = tuple(sorted(folder for folder in given if folder not in folders))
    if exclude:
        how += f"; without {', '.join(sorted(exclude))}"
    position = {folders.index(folder): place for place, folder in enumerate(kept)}
    relabelled = tuple(_relabelled(record, position) for record in records if _is_kept(record, position))
    return NamedClasses(names, relabelled, how, len(records) - len(relabelled), unused)


def _is_kept(record: Record, position: Mapping[int, int]) -> bool:
    return record.label is None or record.label in position


def _relabelled(record: Record, position: Mapping[int, int]) -> Record:
    """Labels of excluded classes go; an image with several classes stays, even without any of them."""
    labels = None
    if record.labels is not None:
        labels = tuple(position[label] for label in record.labels if label in position)
    return replace(record, label=None if record.label is None else position[record.label], labels=labels)


def _read(file: Path) -> Mapping[str, str] | Sequence[str]:
    if file.suffix.lower() == ".json":
        content = read_json(file)
        values = list(content.values()) if isinstance(content, dict) else content
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise DataError(f"{file} holds {json.dumps(content)[:80]}; expected an object of folder: name, or a list.")
        return dict(content) if isinstance(content, dict) else values
    lines = [(number, line) for number, line in enumerate(read_lines(file), start=1) if line.strip()]
    if not lines:
        raise DataError(f"{file} is empty; expected lines `folder<TAB>name`, `folder => name` or names alone.")
    mark = next((mark for mark in ("\t", "=>") if any(mark in line for _, line in lines)), None)
    if mark is None:
        return [line.strip() for _, line in lines]
    pairs: dict[str, str] = {}
    for number, line in lines:
        folder, _, name = (part.strip() for part in line.partition(mark))
        if not folder or not name:
            raise DataError(f"{file}, line {number}: {line.strip()!r} is not `folder{mark}name` as other lines are.")
        if pairs.setdefault(folder, name) != name:
            raise DataError(f"{file}, line {number}: folder {folder!r} has a second name {name!r}.")
    return pairs


def _by_folder(given: Mapping[str, str], folders: Sequence[str], file: Path) -> tuple[str, ...]:
    missing = [folder for folder in folders if folder not in given]
    if missing:
        listed = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise DataError(
            f"{file} names no class for {len(missing)} of {len(folders)} folders: {listed}. "
            "Add them, or leave a folder out with --exclude."
        )
    return tuple(given[folder] for folder in folders)


def _in_order(given: Sequence[str], folders: Sequence[str], file: Path) -> tuple[str, ...]:
    if len(given) != len(folders):
        raise DataError(
            f"{file} lists {len(given)} names, but there are {len(folders)} class folders (first {folders[0]!r}, last "
            f"{folders[-1]!r}). List one name for each folder in sorted order, or write `folder<TAB>name`."
        )
    return tuple(given)
