"""Lists of sample uids as DataComp has them: a sorted `.npy` of 128-bit numbers, each as two `u8`.

A uid is the 32 hexadecimal digits in the field `uid` of a sample's `.json`. Samples without one get the BLAKE2b hash of
`SHARD/KEY`, which holds as long as shards and keys keep their names.

Source: DataComp (github.com/mlfoundations/datacomp), baselines/utils.py and resharder.py.
"""

import hashlib
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vlkit.data.atomic import atomic_file
from vlkit.data.shard_index import ShardIndex
from vlkit.errors import DataError

UID = np.dtype("u8,u8")

_HEX = re.compile(r"[0-9a-fA-F]{32}")


def uid_of(shard: ShardIndex, row: int) -> str:
    """The uid of a sample, as 32 hexadecimal digits."""
    try:
        stated = (shard.json(row) or {}).get("uid")
    except DataError:
        stated = None
    if isinstance(stated, str) and _HEX.fullmatch(stated):
        return stated.lower()
    name = f"{shard.name}/{shard.key(row)}".encode("utf-8", "backslashreplace")
    return hashlib.blake2b(name, digest_size=16).hexdigest()


def as_numbers(uids: list[str]) -> NDArray[np.void]:
    """Hexadecimal uids as an array (n,) of UID."""
    return np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], UID)


def as_text(uids: NDArray[np.void]) -> list[str]:
    """The reverse of `as_numbers`."""
    return [f"{high:016x}{low:016x}" for high, low in uids.tolist()]


def read_uids(path: str | Path) -> NDArray[np.void]:
    """A sorted list, memory-mapped.

    Raises:
        DataError: it cannot be read, or is no such list.
    """
    try:
        found: NDArray[np.void] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"Cannot read the uid list {path}: {error}. Expected a .npy of dtype u8,u8.") from error
    if found.ndim != 1 or found.dtype != UID:
        raise DataError(f"{path} holds {found.dtype} of shape {found.shape}; expected a list of dtype u8,u8.")
    high, low = found["f0"], found["f1"]
    if not ((high[1:] > high[:-1]) | ((high[1:] == high[:-1]) & (low[1:] >= low[:-1]))).all():
        return np.sort(found)
    return found


def write_uids(uids: NDArray[np.void], path: str | Path) -> None:
    """Write a list (n,), sorted and each uid once.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        np.save(file, np.unique(uids))


def is_in(uids: NDArray[np.void], sorted_list: NDArray[np.void]) -> NDArray[np.bool_]:
    """(n,) which of `uids` (n,) are in a sorted list."""
    if len(sorted_list) == 0:
        return np.zeros(len(uids), bool)
    place = np.minimum(np.searchsorted(sorted_list, uids), len(sorted_list) - 1)
    found = sorted_list[place]
    same: NDArray[np.bool_] = (found["f0"] == uids["f0"]) & (found["f1"] == uids["f1"])
    return same
