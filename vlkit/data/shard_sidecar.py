"""The sidecar `NNNNN.index.arrow` beside `NNNNN.tar`: where every sample lies, as memory-mapped Arrow columns.

Columns, one row a sample: `key` (binary), `image_offset`, `image_size` and the same for `caption`, `json`, `cls`
(int64; offset -1 where there is none), `members` (list of suffix, offset, size) and for every tokenizer
`tokens:ID` (a list of token ids for each caption, uint16 where they fit). The schema's metadata holds the tar's
size and a hash of its ends, by which a sidecar that no longer fits is known. Times are left out, so that equal
shards have equal sidecars.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from vlkit.data.atomic import atomic_file
from vlkit.data.records import Problems
from vlkit.data.tar_samples import ROLES, Samples, group_samples
from vlkit.data.tar_walk import walk_tar
from vlkit.errors import DataError

VERSION = 1
TOKENS = "tokens:"
TokenIds = Mapping[str, Sequence[Sequence[Sequence[int]]]]  # tokenizer id -> sample -> caption -> ids

_HEAD, _TAIL = 4 << 10, 32 << 10  # bytes hashed at both ends; the tail reaches over a tar's zero padding
_EXAMPLES = 20


@dataclass(frozen=True)
class IndexSummary:
    """What is known of a shard without looking at its samples."""

    num_samples: int
    digest: str  # hash over keys, places and the tar's ends
    tar_size: int
    tar_ends: str
    problems: Problems
    notes: Problems


def sidecar_path(tar_path: str | Path) -> Path:
    """`00000.tar` -> `00000.index.arrow` in the same folder."""
    path = Path(tar_path)
    return path.with_name(path.name.removesuffix(".tar") + ".index.arrow")


def build_table(tar_path: str | Path, token_ids: TokenIds | None = None) -> pa.Table:
    """Walk a tar and lay its samples out as the sidecar's table.

    Args:
        tar_path: the shard.
        token_ids: per tokenizer id, for every sample in the tar's order, the ids of each of its captions.

    Raises:
        DataError: the tar cannot be read or is compressed; or token ids for another number of samples.
    """
    samples = group_samples(walk_tar(tar_path), Problems(_EXAMPLES), Problems(_EXAMPLES))
    columns: dict[str, pa.Array] = {"key": pa.array(samples.keys, pa.binary())}
    for role in ROLES:
        columns[f"{role}_offset"], columns[f"{role}_size"] = map(pa.array, samples.places[role])
    files = pa.StructArray.from_arrays(
        [pa.array(samples.suffix.astype(np.uint16)), pa.array(samples.offset), pa.array(samples.size)],
        ["suffix", "offset", "size"],
    )
    columns["members"] = pa.ListArray.from_arrays(pa.array(samples.first_file.astype(np.int32)), files)
    for tokenizer_id, ids in sorted((token_ids or {}).items()):
        if len(ids) != len(samples.keys):
            raise DataError(f"{tar_path} has {len(samples.keys)} samples, but got token ids for {len(ids)}.")
        columns[TOKENS + tokenizer_id] = _token_column(ids)
    size, ends = tar_identity(tar_path)
    return pa.table(columns).replace_schema_metadata(_metadata(samples, size, ends))


def write_table(table: pa.Table, path: Path) -> None:
    """Write a sidecar so that it is either whole or not there."""
    with atomic_file(path) as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def map_table(path: Path) -> pa.Table:
    """A sidecar as a memory map: nothing is read until a column is looked at, and all processes share it.

    Raises:
        DataError: it is no sidecar, or of another version.
    """
    try:
        # Threads of Arrow would be started in a process that may be forked later.
        options = pa.ipc.IpcReadOptions(use_threads=False)
        with pa.memory_map(str(path)) as file, pa.ipc.open_file(file, options=options) as reader:
            table = reader.read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{path} is no shard index, or was cut: {error}. Delete it; it is made again.") from error
    if (table.schema.metadata or {}).get(b"vlkit.version") != str(VERSION).encode():
        raise DataError(f"{path} was written by another version of vlkit. Delete it; it is made again.")
    return table


def summary_of(table: pa.Table) -> IndexSummary:
    """The metadata of a sidecar's table."""
    values = json.loads(table.schema.metadata[b"vlkit.index"])
    return IndexSummary(
        values["num_samples"],
        values["digest"],
        values["tar_size"],
        values["tar_ends"],
        _load_problems(values["problems"]),
        _load_problems(values["notes"]),
    )


def suffixes_of(table: pa.Table) -> list[str]:
    """Member suffixes that the `members` column counts through."""
    suffixes: list[str] = json.loads(table.schema.metadata[b"vlkit.suffixes"])
    return suffixes


def tar_identity(path: str | Path) -> tuple[int, str]:
    """Size in bytes and a hash of the first and last bytes of a tar: cheap, and tells a rebuilt one.

    Raises:
        DataError: the tar cannot be read.
    """
    try:
        with open(path, "rb", buffering=0) as file:
            return file_identity(file)
    except OSError as error:
        raise DataError(f"Cannot read shard {path}: {error.strerror or error}.") from error


def file_identity(file: io.FileIO) -> tuple[int, str]:
    """`tar_identity` of a file just opened."""
    size = os.fstat(file.fileno()).st_size
    ends = b""
    for start, end in ends_of_length(size):
        file.seek(start)
        ends += file.read(end - start)
    return size, ends_hash(ends)


def ends_of_length(size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """From where to where the first and the last bytes of a tar of `size` bytes lie that are hashed."""
    return (0, min(_HEAD, size)), (max(size - _TAIL, 0), size)


def ends_hash(ends: bytes) -> str:
    """The hash of both ends, one after the other."""
    return hashlib.sha256(ends).hexdigest()[:32]


def _metadata(samples: Samples, size: int, ends: str) -> dict[str, str]:
    hashed = hashlib.sha256(f"{VERSION} {size} {ends}\n".encode())
    hashed.update(b"\n".join(samples.keys) + b"\n\n" + b"\n".join(samples.suffixes))
    for column in (samples.first_file, samples.suffix, samples.offset, samples.size):
        hashed.update(np.ascontiguousarray(column, "<i8").tobytes())
    values = {
        "num_samples": len(samples.keys),
        "digest": hashed.hexdigest()[:32],
        "tar_size": size,
        "tar_ends": ends,
        "problems": _dump_problems(samples.problems),
        "notes": _dump_problems(samples.notes),
    }
    suffixes = [suffix.decode("utf-8", "backslashreplace") for suffix in samples.suffixes]
    return {
        "vlkit.version": str(VERSION),
        "vlkit.index": json.dumps(values),
        "vlkit.suffixes": json.dumps(suffixes),
    }


def _token_column(samples: Sequence[Sequence[Sequence[int]]]) -> pa.Array:
    captions = [caption for sample in samples for caption in sample]
    flat = np.fromiter((token for caption in captions for token in caption), np.int64)
    narrow = flat.size == 0 or (flat.min() >= 0 and flat.max() < 1 << 16)
    inner = pa.ListArray.from_arrays(_ends(captions), pa.array(flat.astype(np.uint16 if narrow else np.int32)))
    return pa.ListArray.from_arrays(_ends(samples), inner)


def _ends(lists: Sequence[Sequence[object]]) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum([len(part) for part in lists])]).astype(np.int32))


def _dump_problems(problems: Problems) -> dict[str, tuple[int, list[str]]]:
    return {cause: (count, problems.examples[cause]) for cause, count in problems.counts.items()}


def _load_problems(values: dict[str, tuple[int, list[str]]]) -> Problems:
    problems = Problems(_EXAMPLES)
    for cause, (count, examples) in values.items():
        problems.counts[cause] = count
        problems.examples[cause] = examples
    return problems
