"""What a build is to do, written down before it begins, so that a later start continues it or is refused."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlkit.data.atomic import TEMPORARY, atomic_file
from vlkit.data.records import ImageRef, Source
from vlkit.data.shard_paths import BUILD_FORMAT, BUILD_PLAN, read_build_plan, stats_path
from vlkit.data.shard_sidecar import sidecar_path
from vlkit.errors import DataError

PLAN = BUILD_PLAN

# Files of ours that a killed build was writing.
_NAMES = (
    r"\d+\.(tar|index\.arrow|parquet|images|stats\.json)|\.urls\.parquet|build\.json|failures\.jsonl|classnames\.txt"
)
_LEFT_OVER = re.compile(rf"({_NAMES})\.\d+{re.escape(TEMPORARY)}")


def source_fingerprint(source: Source) -> str:
    """A hash of the records in their order; image files below the source's root count by relative path."""
    hashed = hashlib.sha256(json.dumps(source.class_names).encode())
    for record in source.records:
        image = _image_identity(record.image, source.root)
        more = [] if record.labels is None else [record.labels]
        line = json.dumps([record.key, image, record.captions, record.label, record.split, *more])
        hashed.update(line.encode() + b"\n")
    return hashed.hexdigest()[:32]


def _image_identity(image: ImageRef, root: Path) -> list[Any]:
    if image.data is not None:
        return [hashlib.sha256(image.data).hexdigest()]
    assert image.path is not None
    path = image.path
    if path.startswith(f"{root}{os.sep}"):
        path = path[len(f"{root}{os.sep}") :]
    return [path, image.offset, image.size, *([] if image.column is None else [image.column])]


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make the folder and keep other builds out of it while the block runs; a killed build lets go of it.

    Raises:
        DataError: it cannot be made, or another build is at work in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"Cannot make the folder {folder}: {error.strerror or error}.") from error
    try:
        import fcntl
    except ImportError:  # Windows has no locks on folders
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise DataError(f"Another build is writing to {folder}. Wait for it, or name another --out.") from error
    try:
        yield
    finally:
        os.close(descriptor)


def settle_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan into a fresh folder, or check that it is the one begun there, and clear what a kill left.

    Raises:
        DataError: the folder belongs to another build, or holds shards of unknown origin.
    """
    begun = read_build_plan(folder)
    if begun is not None:
        _compare(begun, plan, folder)
    elif any(folder.glob("*.tar")):
        raise DataError(f"{folder} holds tars that no `vlkit shards build` made. Name an empty or new folder as --out.")
    else:
        with atomic_file(folder / PLAN) as file:
            file.write(json.dumps({"format": BUILD_FORMAT, **plan}, indent=1).encode())
    for entry in list(folder.iterdir()):
        if _LEFT_OVER.fullmatch(entry.name):
            entry.unlink(missing_ok=True)


def finished_stats(folder: Path, name: str, *beside: Path) -> dict[str, Any] | None:
    """The stats of a shard if it is finished and its tar, its index and the files `beside` it are there as written."""
    tar = folder / f"{name}.tar"
    try:
        stats: dict[str, Any] = json.loads(stats_path(folder, name).read_text())
        there = all(file.is_file() for file in (sidecar_path(tar), *beside))
        whole = there and tar.stat().st_size == stats["tar_bytes"]
    except (OSError, ValueError, KeyError):
        return None
    return stats if whole else None


def _compare(begun: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    names = sorted({*begun, *wanted})
    changed = [
        f"{name} was {json.dumps(begun.get(name))}, now {json.dumps(wanted.get(name))}"
        for name in names
        if name != "format" and begun.get(name) != wanted.get(name)
    ]
    if changed:
        raise DataError(
            f"{folder} holds a build with other input or options: {'; '.join(changed)}. To continue it, run it as it "
            "was begun; to build anew, name another --out or delete the folder."
        )
