"""The class of every sample, for batches that hold all classes alike.

    classes = find_classes(shards, "cls")          # or a field of the samples' .json, e.g. "category"
    classes.names, classes.of_sample               # ("0", "1", ...), (N,) positions in names

Every label is read once, before training; the file with the outcome is kept in the cache folder under the data's
fingerprint, so that a run which starts again, and the other ranks, need not read them.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlkit.contracts import Progress
from vlkit.data.atomic import atomic_file
from vlkit.data.cache_folder import cache_folder
from vlkit.data.shard_index import ShardIndex, ShardSet
from vlkit.errors import DataError
from vlkit.escape import one_line

# Fewer samples are read in no time, and leave no file behind.
_WORTH_KEEPING = 100_000
_EXAMPLES = 3


@dataclass(frozen=True)
class Classes:
    """The classes of a set of samples."""

    names: tuple[str, ...]  # sorted; numbers by value
    of_sample: NDArray[np.int32]  # (N,) position in `names`


def find_classes(shards: ShardSet, label: str, progress: Progress | None = None) -> Classes:
    """Read the label of every sample.

    Args:
        shards: the samples.
        label: "cls" for the number in the `.cls` file, else a field of the `.json` file that holds a text or a number.
        progress: called with (shards read, shards).

    Raises:
        DataError: samples without such a label; the first are named.
    """
    kept = _kept(shards, label)
    if kept is not None and kept.is_file():
        with np.load(kept) as arrays:
            return Classes(tuple(json.loads(str(arrays["names"]))), arrays["of_sample"])
    numbers: dict[str, int] = {}
    found = np.empty(shards.num_samples, np.int32)
    missing: list[str] = []
    place = num_missing = 0
    for done, shard in enumerate(shards.shards, start=1):
        for row in range(shard.num_samples):
            name = _label(shard, row, label)
            if name is None:
                num_missing += 1
                if len(missing) < _EXAMPLES:
                    missing.append(f"{shard.name}/{shard.key(row)}")
            else:
                found[place] = numbers.setdefault(name, len(numbers))
            place += 1
        if progress:
            progress(done, len(shards.shards))
    if num_missing:
        raise _without_labels(label, num_missing, shards.num_samples, missing)
    names = sorted(numbers, key=lambda name: (not name.isdecimal(), int(name) if name.isdecimal() else 0, name))
    position = np.empty(len(names), np.int32)
    position[[numbers[name] for name in names]] = np.arange(len(names))
    classes = Classes(tuple(names), position[found])
    if kept is not None:
        _keep(classes, kept)
    return classes


def _label(shard: ShardIndex, row: int, label: str) -> str | None:
    try:
        value: object = shard.label(row) if label == "cls" else (shard.json(row) or {}).get(label)
    except DataError:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return str(value).strip() or None


def _without_labels(label: str, count: int, total: int, examples: list[str]) -> DataError:
    what = ".cls file with a class number" if label == "cls" else f"text or number under {label!r} in its .json file"
    named = ", ".join(one_line(key, 80) for key in examples) + (", ..." if count > len(examples) else "")
    return DataError(
        f"data.balance = {label!r}: {count:,} of {total:,} samples have no {what} ({named}). Balanced batches need a "
        'label for every sample: name another field, build the shards with labels ("cls"), or leave data.balance out.'
    )


def _kept(shards: ShardSet, label: str) -> Path | None:
    if shards.num_samples < _WORTH_KEEPING:
        return None
    name = hashlib.sha256(f"{shards.fingerprint}\0{label}".encode()).hexdigest()[:32]
    return cache_folder() / "labels" / f"{name}.npz"


def _keep(classes: Classes, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            np.savez(file, of_sample=classes.of_sample, names=np.array(json.dumps(classes.names)))
    except OSError:  # a cache that cannot be written is read anew next time
        return
