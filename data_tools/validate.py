"""The doctor for shards: every tar opens, its index and stats agree with it, every sample decodes and has a caption.

    report = validate_shards("shards/", workers=2)
    report.ok, report.lines()

The tar is walked anew and never through its sidecar, so a wrong sidecar cannot hide anything. Nothing is written.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_tools.build_plan import PLAN
from data_tools.check_samples import check_chunk, parse_object, sample_name, walked
from data_tools.chunks import cut_chunks, map_chunks
from data_tools.sample_facts import hash64
from data_tools.write_shard import stats_path
from vlkit.contracts import Progress
from vlkit.data.records import Problems
from vlkit.data.shard_index import ShardSpec, expand_shards, sidecar_path
from vlkit.data.shard_paths import unfinished_build
from vlkit.data.shard_sidecar import TOKENS, build_table, map_table, summary_of, tar_identity
from vlkit.errors import DataError
from vlkit.escape import one_line

_EXAMPLES = 20


@dataclass(frozen=True)
class ValidationReport:
    """What is wrong with a set of shards.

    `problems` cost samples or mislead a training; `notes` are worth a look. Both by cause, with `shard/key`.
    """

    num_shards: int
    num_samples: int  # usable by the index; the others are in `problems`
    num_captions: int
    num_decoded: int
    problems: Problems = field(default_factory=lambda: Problems(_EXAMPLES))
    notes: Problems = field(default_factory=lambda: Problems(_EXAMPLES))
    # Every tar that opens, with the digest of its index and its samples with problems (row -> cause): for `fix_shards`.
    shards: dict[Path, tuple[str, dict[int, str]]] = field(default_factory=dict, repr=False)

    @property
    def ok(self) -> bool:
        """Whether there is no problem; notes do not count."""
        return self.problems.total == 0

    def lines(self) -> list[str]:
        """The report as text, one line a finding; text out of data is made safe for a terminal."""
        head = (
            f"{self.num_shards} shards, {self.num_samples} samples with {self.num_captions} captions, "
            f"{self.num_decoded} images decoded: {'ok' if self.ok else f'{self.problems.total} problems'}"
        )
        problems = [f"problem: {one_line(line)}" for line in self.problems.lines()]
        return [head, *problems, *(f"note: {one_line(line)}" for line in self.notes.lines())]

    def to_json(self) -> dict[str, Any]:
        """Counts, `ok`, and under `problems` and `notes` a list of {cause, count, examples}."""
        return {
            "ok": self.ok,
            "num_shards": self.num_shards,
            "num_samples": self.num_samples,
            "num_captions": self.num_captions,
            "num_decoded": self.num_decoded,
            "problems": _as_rows(self.problems),
            "notes": _as_rows(self.notes),
        }


class _Shard(NamedTuple):
    path: Path
    num_samples: int
    key_hashes: NDArray[np.uint64]  # (S,)
    digest: str
    num_token_lists: dict[str, NDArray[np.int64]]  # tokenizer id -> (S,) captions that have token ids
    stated_captions: int | None  # by the stats file


def validate_shards(spec: ShardSpec, *, progress: Progress | None = None, workers: int = 0) -> ValidationReport:
    """Check shards from their headers to their pixels.

    Args:
        spec: what `expand_shards` takes.
        progress: called with (samples done, all samples).
        workers: processes that decode; 0 decodes in this one.

    Raises:
        DataError: there are no such shards at all, or a worker died.
    """
    paths = expand_shards(spec)
    problems, notes = Problems(_EXAMPLES), Problems(_EXAMPLES)
    unfinished = unfinished_build(spec)
    if unfinished:
        problems.add("unfinished build", unfinished)
    shards = [shard for shard in (_open(path, problems, notes) for path in paths) if shard is not None]
    _check_repeated(shards, problems)
    chunks = cut_chunks((shard.path, shard.num_samples) for shard in shards)
    num_captions: dict[str, list[NDArray[np.int64]]] = {str(shard.path): [] for shard in shards}
    num_decoded, broken = 0, {str(shard.path): dict[int, str]() for shard in shards}
    for chunk, finding in zip(chunks, map_chunks(check_chunk, chunks, workers, progress), strict=True):
        num_decoded += finding.num_decoded
        num_captions[chunk.tar].append(finding.num_captions)
        broken[chunk.tar].update(finding.broken)
        for cause, where in finding.problems:
            problems.add(cause, where)
    captions = {path: np.concatenate(counts or [np.zeros(0, np.int64)]) for path, counts in num_captions.items()}
    for shard in shards:
        _check_captions(shard, captions[str(shard.path)], problems)
    return ValidationReport(
        num_shards=len(paths),
        num_samples=sum(shard.num_samples for shard in shards),
        num_captions=int(sum(counts.sum() for counts in captions.values())),
        num_decoded=num_decoded,
        problems=problems,
        notes=notes,
        shards={shard.path: (shard.digest, broken[str(shard.path)]) for shard in shards},
    )


def _open(path: Path, problems: Problems, notes: Problems) -> _Shard | None:
    """Walk a tar and compare its sidecar; None when it cannot be opened."""
    try:
        table = build_table(path)
    except DataError as error:
        problems.add("shard that cannot be opened", f"{path.name} ({error})")
        return None
    summary = summary_of(table)
    _merge(summary.problems, path, problems)
    _merge(summary.notes, path, notes)
    token_lists = _check_sidecar(path, table, problems, notes)
    stats = _check_stats(path, table, problems, notes)
    hashes = np.array([hash64(key.as_py()) for key in table.column("key")], np.uint64)
    return _Shard(path, summary.num_samples, hashes, summary.digest, token_lists, stats.get("num_captions"))


def _check_sidecar(path: Path, table: pa.Table, problems: Problems, notes: Problems) -> dict[str, NDArray[np.int64]]:
    """Compare the stored index with the tar as walked; returns how many captions have token ids."""
    sidecar = sidecar_path(path)
    if not sidecar.exists():
        notes.add("shard without index (it is made on first use)", path.name)
        return {}
    try:
        stored = map_table(sidecar)
    except DataError as error:
        problems.add("index that cannot be read", f"{sidecar.name} ({error})")
        return {}
    summary = summary_of(stored)
    if (summary.tar_size, summary.tar_ends) != tar_identity(path):
        problems.add("index that belongs to other contents of the tar", f"{sidecar.name} ({_sizes(path, stored)})")
        return {}
    columns = table.column_names
    if not set(columns) <= set(stored.column_names) or not stored.select(columns).equals(table):
        problems.add("index whose keys or places differ from the tar's", sidecar.name)
        return {}
    return {
        name.removeprefix(TOKENS): pc.list_value_length(stored.column(name)).to_numpy().astype(np.int64)
        for name in stored.column_names
        if name.startswith(TOKENS)
    }


def _check_stats(path: Path, table: pa.Table, problems: Problems, notes: Problems) -> dict[str, Any]:
    """Compare what the build wrote down, all but the checksum, which a worker computes; {} where there is nothing."""
    file = stats_path(path.parent, path.name.removesuffix(".tar"))
    if not file.is_file():
        if (path.parent / PLAN).is_file():
            problems.add("shard without stats file: its build did not finish it", path.name)
        else:
            notes.add("shard without stats file (not built by vlkit)", path.name)
        return {}
    stats = parse_object(file.read_bytes())
    if stats is None:
        problems.add("stats file that cannot be read", file.name)
        return {}
    found = {
        "tar_bytes": summary_of(table).tar_size,
        "num_samples": table.num_rows,
        "image_bytes": int(pc.sum(table.column("image_size")).as_py() or 0),
    }
    for name, value in found.items():
        if stats.get(name) != value:
            problems.add("stats that differ from the tar", f"{file.name}: {name} is {stats.get(name)}, found {value}")
    return stats


def _sizes(path: Path, stored: pa.Table) -> str:
    return f"the index expects {summary_of(stored).tar_size} bytes, the tar has {tar_identity(path)[0]}"


def _check_repeated(shards: list[_Shard], problems: Problems) -> None:
    """Shards that are copies of each other, and keys that occur in several shards."""
    first_with: dict[str, Path] = {}
    distinct = []
    for shard in shards:
        original = first_with.setdefault(shard.digest, shard.path)
        if original is shard.path:
            distinct.append(shard)
        else:
            problems.add("shard with the contents of another", f"{shard.path.name} = {original.name}")
    if not distinct:
        return
    hashes = np.concatenate([shard.key_hashes for shard in distinct])
    values, counts = np.unique(hashes, return_counts=True)
    repeated = set(values[counts > 1].tolist())
    if repeated:
        for shard, row in _rows_with(distinct, repeated):
            problems.add("key that occurs in several shards", sample_name(shard.path, walked(str(shard.path)).key(row)))


def _rows_with(shards: list[_Shard], hashes: set[int]) -> Iterator[tuple[_Shard, int]]:
    wanted = np.array(sorted(hashes), np.uint64)
    for shard in shards:
        for row in np.flatnonzero(np.isin(shard.key_hashes, wanted)).tolist():
            yield shard, row


def _check_captions(shard: _Shard, num_captions: NDArray[np.int64], problems: Problems) -> None:
    """The stats must have counted the captions that are there, and each must have its token ids."""
    counted = int(num_captions.sum())
    if shard.stated_captions not in (None, counted):
        found = f"{shard.path.name}: num_captions is {shard.stated_captions}, found {counted}"
        problems.add("stats that differ from the tar", found)
    for tokenizer, stored in shard.num_token_lists.items():
        for row in np.flatnonzero(stored != num_captions).tolist():
            where = sample_name(shard.path, walked(str(shard.path)).key(row))
            problems.add(f"token ids of {tokenizer} for another number of captions", where)


def _merge(found: Problems, path: Path, into: Problems) -> None:
    """Continue `into` with what was found in one shard, keeping its counts."""
    for cause, count in found.counts.items():
        for key in found.examples[cause]:
            into.add(cause, f"{path.name.removesuffix('.tar')}/{key}")
        into.counts[cause] += count - len(found.examples[cause])


def _as_rows(problems: Problems) -> list[dict[str, Any]]:
    return [
        {"cause": cause, "count": count, "examples": problems.examples[cause]}
        for cause, count in problems.counts.most_common()
    ]
