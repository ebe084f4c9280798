"""Copy chosen samples of shards into new shards: every file of a sample byte by byte, in the old order.

    copy_samples(shards, keep, Path("clean/"), workers=2)

The new shards have indexes (with the token ids of the old ones), stats and a plan, as those of `vlkit shards build`
have; an interrupted copy is continued by the same call, and the bytes do not depend on the number of workers.
A key that occurs in several of the old shards gets the shard's name in front: `00003_000017`.
"""

import hashlib
import io
import json
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.build_plan import finished_stats, hold_folder, settle_plan
from data_tools.check_samples import read_texts
from data_tools.sample_facts import hash64
from data_tools.write_shard import stats_path, write_error
from vlkit.contracts import Progress
from vlkit.data.atomic import atomic_file
from vlkit.data.shard_columns import Columns, fitting_table
from vlkit.data.shard_index import ShardIndex, ShardSet, sidecar_path
from vlkit.data.shard_sidecar import TokenIds, build_table, summary_of, write_table
from vlkit.engine import map_parts
from vlkit.errors import ConfigError, DataError

# Files beside shards that speak of all of them.
BESIDE = ("classnames.txt", "zeroshot_classification_templates.txt", "dataset_type.txt")
_COUNTS = ("num_samples", "num_captions", "num_labelled", "num_reencoded", "image_bytes")


@dataclass(frozen=True)
class CopyReport:
    """What a copy wrote. Sizes in bytes."""

    out: Path
    num_shards: int
    num_shards_kept: int  # finished by an earlier start
    num_samples: int
    num_renamed: int
    tar_bytes: int


class Chosen(NamedTuple):
    """The samples of one shard to copy."""

    tar: Path
    digest: str  # of its index, so that the rows are those that were chosen
    rows: NDArray[np.int64]  # ascending
    key_hashes: NDArray[np.uint64]  # (rows,)


# Columns of an old shard and a row there -> suffix and content of further files of that sample.
More = Callable[[Columns, int], Mapping[str, bytes]]


class _Run(NamedTuple):
    """Samples of one old shard that go into one new one."""

    tar: str
    digest: str
    rows: NDArray[np.int64]
    renamed: NDArray[np.bool_]


class _Part(NamedTuple):
    """One new shard."""

    name: str
    runs: list[_Run]
    folder: Path


def copy_samples(
    shards: ShardSet,
    keep: NDArray[np.bool_],
    out: Path,
    *,
    samples_per_shard: int = 1000,
    workers: int = 1,
    progress: Progress | None = None,
) -> CopyReport:
    """Copy the samples with `keep` (N,) into shards in the folder `out`, or continue that; see `copy_chosen`."""
    assert len(keep) == shards.num_samples
    chosen = []
    for shard, start, stop in zip(shards.shards, shards.offsets[:-1], shards.offsets[1:], strict=True):
        rows = np.flatnonzero(keep[start:stop])
        chosen.append(Chosen(shard.path, shard.digest, rows, key_hashes(shard)[rows]))
    return copy_chosen(chosen, out, samples_per_shard=samples_per_shard, workers=workers, progress=progress)


def copy_chosen(
    chosen: Sequence[Chosen],
    out: Path,
    *,
    samples_per_shard: int = 1000,
    workers: int = 1,
    progress: Progress | None = None,
) -> CopyReport:
    """Copy samples into new shards.

    Args:
        chosen: shard by shard, in the order of the copy.
        out: a new folder, or one in which the same copy was begun.
        samples_per_shard: samples per new tar.
        workers: processes.
        progress: called with (samples written, all samples).

    Raises:
        ConfigError: samples_per_shard out of range, or `out` holds the shards themselves.
        DataError: nothing to copy, another build in the folder, a shard that changed, features of two teachers, or no
            space left.
    """
    if not 1 <= samples_per_shard <= 1_000_000:
        raise ConfigError(f"samples_per_shard = {samples_per_shard}: expected 1 to 1000000.")
    total = sum(len(part.rows) for part in chosen)
    if total == 0:
        raise DataError(f"No sample is left to copy to {out}: all were left out.")
    if any(part.tar.parent.resolve() == out.resolve() for part in chosen):
        raise ConfigError(f"{out} holds the shards to copy from. Name another folder as --out.")
    parts = _cut(chosen, out, samples_per_shard)
    with hold_folder(out):
        try:
            settle_plan(out, _plan(chosen, samples_per_shard, total, len(parts)))
            for name in BESIDE:
                if (chosen[0].tar.parent / name).is_file():
                    shutil.copyfile(chosen[0].tar.parent / name, out / name)
            _copy_teacher(chosen, out)
            stats, kept = _write_parts(parts, total, workers, progress)
        except OSError as error:
            raise write_error(error, out) from error
    renamed = sum(int(run.renamed.sum()) for part in parts for run in part.runs)
    return CopyReport(out, len(parts), kept, total, renamed, sum(shard["tar_bytes"] for shard in stats))


def _copy_teacher(chosen: Sequence[Chosen], out: Path) -> None:
    """The record of the one teacher whose features the samples bring along, where there is one."""
    from vlkit.training.stored_teacher import TEACHER_FILE, teacher_of_folders

    folders = list(dict.fromkeys(part.tar.parent for part in chosen if len(part.rows)))
    if any((folder / TEACHER_FILE).is_file() for folder in folders):
        record = teacher_of_folders(folders)
        assert record is not None
        record.write(out)


def key_hashes(shard: ShardIndex) -> NDArray[np.uint64]:
    """(S,) 64-bit hashes of the keys of a shard."""
    return np.array([hash64(shard.key(row).encode("utf-8", "replace")) for row in range(len(shard))], np.uint64)


def copy_shard(shard: ShardIndex, folder: Path, more: More) -> dict[str, Any]:
    """Copy all samples of one shard into a shard of the same name, with further files; those of a name are replaced.

    Returns:
        The stats, which are written last.

    Raises:
        DataError: the shard changed, or no space left.
    """
    rows = np.arange(len(shard))
    return _write_part(_Part(shard.name, [_Run(str(shard.path), shard.digest, rows, rows < 0)], folder), more)


def source_hash(chosen: Sequence[Chosen]) -> str:
    """Changes when other samples, or shards with other contents, are chosen."""
    hashed = hashlib.sha256()
    for part in chosen:
        hashed.update(f"{part.tar.name}\0{part.digest}\n".encode("utf-8", "backslashreplace"))
        hashed.update(np.ascontiguousarray(part.rows, "<i8").tobytes())
    return hashed.hexdigest()[:32]


def _nothing_more(columns: Columns, row: int) -> Mapping[str, bytes]:
    return {}


def _plan(chosen: Sequence[Chosen], samples_per_shard: int, total: int, num_shards: int) -> dict[str, Any]:
    return {
        "format": "vlkit shards 1",
        "num_shards": num_shards,
        "num_records": total,
        "source": source_hash(chosen),
        "source_format": "copy",
        "samples_per_shard": samples_per_shard,
    }


def _cut(chosen: Sequence[Chosen], out: Path, samples_per_shard: int) -> list[_Part]:
    hashes = np.concatenate([part.key_hashes for part in chosen])
    values, counts = np.unique(hashes, return_counts=True)
    recurring = np.isin(hashes, values[counts > 1])
    ends = np.cumsum([len(part.rows) for part in chosen])
    starts = range(0, len(hashes), samples_per_shard)
    width = max(5, len(str(len(starts) - 1)))
    parts = []
    for number, start in enumerate(starts):
        stop, runs = min(start + samples_per_shard, len(hashes)), []
        for part, end in zip(chosen, ends.tolist(), strict=True):
            begin = end - len(part.rows)
            low, high = max(start, begin), min(stop, end)
            if low < high:
                rows = part.rows[low - begin : high - begin]
                runs.append(_Run(str(part.tar), part.digest, rows, recurring[low:high]))
        parts.append(_Part(f"{number:0{width}d}", runs, out))
    return parts


def _write_parts(
    parts: list[_Part], total: int, workers: int, progress: Progress | None
) -> tuple[list[dict[str, Any]], int]:
    stats = {part.name: found for part in parts if (found := finished_stats(part.folder, part.name))}
    kept, todo = len(stats), [part for part in parts if part.name not in stats]
    done = sum(found["num_samples"] for found in stats.values())
    for position, written in map_parts(_write_part, todo, workers):
        stats[todo[position].name] = written
        done += written["num_samples"]
        if progress:
            progress(done, total)
    return [stats[part.name] for part in parts], kept


def _write_part(part: _Part, more: More = _nothing_more) -> dict[str, Any]:
    """Write one new shard, its index and last its stats; runs in a worker."""
    tar_path = part.folder / f"{part.name}.tar"
    try:
        with atomic_file(tar_path) as file:
            counts, tokens = _copy_runs(part.runs, file, more)
        table = build_table(tar_path, tokens)
        if table.num_rows != counts["num_samples"]:
            problems = "; ".join(summary_of(table).problems.lines())
            raise DataError(f"{tar_path}: {counts['num_samples']} samples written, {table.num_rows} found: {problems}.")
        write_table(table, sidecar_path(tar_path))
        stats = {
            "shard": part.name,
            "num_records": counts["num_samples"],
            **counts,
            "tar_bytes": tar_path.stat().st_size,
            "tar_sha256": _sha256(tar_path),
            "failures": [],
            "index_sha256": _sha256(sidecar_path(tar_path)),
        }
        with atomic_file(stats_path(part.folder, part.name)) as file:
            file.write(json.dumps(stats, indent=1).encode())
    except OSError as error:
        raise write_error(error, part.folder) from error
    return stats


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _copy_runs(runs: list[_Run], into: IO[bytes], more: More) -> tuple[dict[str, int], TokenIds]:
    """Write the samples of all runs; returns counts, and the token ids of the tokenizers that all samples have."""
    counts = Counter[str]()
    tokens: list[dict[str, list[list[int]]]] = []
    taken = Counter[str]()
    # Not webdataset's writer: it drops files whose suffix opens with an underscore, and stops at an empty one.
    with tarfile.open(fileobj=into, mode="w|", format=tarfile.PAX_FORMAT) as tar:
        for run in runs:
            columns, stored = _columns(run.tar, run.digest)
            for row, renamed in zip(run.rows.tolist(), run.renamed.tolist(), strict=True):
                key = _new_key(Path(run.tar), columns.key(row), renamed, taken)
                added = more(columns, row)
                for suffix, place in columns.members(row).items():
                    if suffix not in added:
                        _add(tar, f"{key}.{suffix}", columns.read(*place))
                for suffix, content in added.items():
                    _add(tar, f"{key}.{suffix}", content)
                number, _ = read_texts(columns, row)
                counts["num_samples"] += 1
                counts["num_captions"] += number
                counts["num_labelled"] += columns.place("cls", row)[0] >= 0
                counts["image_bytes"] += columns.place("image", row)[1]
                tokens.append({} if stored is None else _tokens(stored, row, number))
    names = set.intersection(*(set(sample) for sample in tokens))
    return {name: counts[name] for name in _COUNTS}, {name: [sample[name] for sample in tokens] for name in names}


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), 0o644
    tar.addfile(member, io.BytesIO(content))


def _new_key(tar: Path, key: bytes, renamed: bool, taken: Counter[str]) -> str:
    name = key.decode("utf-8", "backslashreplace")
    if renamed:
        folder, slash, base = name.rpartition("/")
        name = f"{folder}{slash}{tar.name.removesuffix('.tar').replace('.', '_')}_{base}"
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}_{taken[name]}"  # shards of one name in two folders


@lru_cache(maxsize=8)
def _columns(tar: str, digest: str) -> tuple[Columns, Columns | None]:
    """A tar as walked now, whatever its sidecar says, and the sidecar if it says the same."""
    table = build_table(tar)
    if summary_of(table).digest != digest:
        raise DataError(f"{tar} changed while samples were chosen from it. Start again.")
    stored, _ = fitting_table(Path(tar))
    names = table.column_names
    fits = stored is not None and set(names) <= set(stored.column_names) and stored.select(names).equals(table)
    return Columns(table, tar), Columns(stored, tar) if fits else None


def _tokens(stored: Columns, row: int, num_captions: int) -> dict[str, list[list[int]]]:
    """Stored token ids, of the tokenizers that have some for every caption of the sample."""
    found = {name: stored.tokens_of(name, row) or [] for name in stored.tokens}
    return {name: [caption.tolist() for caption in ids] for name, ids in found.items() if len(ids) == num_captions}
