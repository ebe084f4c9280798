"""Find samples that are there more than once, and keep the best of each.

    report = dedupe_shards("shards/", by=("bytes", "near"), workers=2)
    report.lines();  write_groups(report, "copies.jsonl");  copy_samples(report.shards, report.keep, "clean/")

Every copy was compared with the very sample that is kept for it, so nothing goes out because it resembles something
that resembles something else. Per sample some 120 bytes stay in memory; images are read once, those of possible copies
twice.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from data_tools.chunks import cut_chunks, map_chunks
from data_tools.confirm_pairs import MIN_COSINE, Embed, Shortlist, confirm_pairs
from data_tools.perceptual_hash import RADIUS
from data_tools.same_picture import MIN_CORRELATION
from data_tools.shortlist import shortlist_within
from data_tools.signatures import Signatures, signatures_of_chunk
from vlkit.contracts import Progress
from vlkit.data.atomic import atomic_file
from vlkit.data.shard_index import ShardSet, ShardSpec
from vlkit.errors import ConfigError

# What makes a sample a copy, from the strictest on: the same encoded image, the same decoded pixels, the same picture
# (re-encoded, resized, slightly cropped), the same captions.
KINDS = ("bytes", "pixels", "near", "captions")
DEFAULT_KINDS = ("bytes", "pixels", "near")

_CROWDED = 8  # samples of one hash that are compared with one another rather than with their best
_MAX_ROUNDS = 16


@dataclass(frozen=True)
class DedupeReport:
    """Which samples are copies of which; N samples, numbered as in `shards`."""

    shards: ShardSet
    copy_of: NDArray[np.int64]  # (N,) the sample that is kept for it, -1 for those that are kept
    kind: NDArray[np.int8]  # (N,) position in KINDS, of copies
    similarity: NDArray[np.float32]  # (N,) of a copy to what is kept: correlation or cosine; 1 for bytes and captions
    num_undecodable: int  # compared by bytes and captions only
    num_flat: int  # as good as one colour: these too
    num_compared: int  # pairs looked at twice

    @property
    def keep(self) -> NDArray[np.bool_]:
        """(N,) the samples without copies of others."""
        return self.copy_of < 0

    @cached_property
    def counts(self) -> dict[str, int]:
        """Copies by kind."""
        kinds = self.kind[~self.keep]
        return {name: int((kinds == number).sum()) for number, name in enumerate(KINDS)}

    def similarity_of(self, sample: int) -> float:
        """Of one copy to what is kept, to four digits."""
        return round(float(self.similarity[sample]), 4)

    def groups(self) -> list[tuple[int, NDArray[np.int64]]]:
        """Every kept sample that has copies, with these."""
        copies = np.flatnonzero(~self.keep)
        copies = copies[np.argsort(self.copy_of[copies], kind="stable")]
        kept, starts = np.unique(self.copy_of[copies], return_index=True)
        return list(zip(kept.tolist(), np.split(copies, starts[1:]), strict=True)) if len(copies) else []

    def rows(self) -> list[tuple[str, int]]:
        """The figures as (name, value)."""
        named = {"bytes": "same bytes", "pixels": "same pixels", "near": "near copies", "captions": "same captions"}
        return [
            ("samples", len(self.copy_of)),
            *((named[kind], count) for kind, count in self.counts.items()),
            ("kept", int(self.keep.sum())),
            ("groups", len(self.groups())),
            ("does not decode", self.num_undecodable),
            ("flat, compared by bytes only", self.num_flat),
            ("pairs looked at", self.num_compared),
        ]

    def to_json(self) -> dict[str, Any]:
        """The figures."""
        return {
            "num_samples": len(self.copy_of),
            "num_kept": int(self.keep.sum()),
            "num_groups": len(self.groups()),
            "copies": self.counts,
            "num_undecodable": self.num_undecodable,
            "num_flat": self.num_flat,
            "num_compared": self.num_compared,
        }


def dedupe_shards(
    spec: ShardSpec,
    *,
    by: Sequence[str] = DEFAULT_KINDS,
    radius: int = RADIUS,
    min_correlation: float = MIN_CORRELATION,
    min_cosine: float = MIN_COSINE,
    embed: Embed | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> DedupeReport:
    """Compare all samples with all.

    Args:
        spec: what `expand_shards` takes.
        by: of KINDS, what counts as a copy.
        radius: bits in which the perceptual hashes of copies may differ, see `perceptual_hash`.
        min_correlation: of near copies, see `same_picture`.
        min_cosine: of their embeddings; counts instead where `embed` is given.
        embed: images to unit vectors, to confirm near copies.
        workers: processes beside this one.
        progress: called with (samples read, all samples).

    Raises:
        ConfigError: an unknown kind, or a threshold out of range.
        DataError: no shards, or a worker died.
    """
    check_thresholds(radius, min_correlation, min_cosine)
    unknown = set(by) - set(KINDS)
    if unknown or not by:
        raise ConfigError(f"by = {', '.join(by)}: expected some of {', '.join(KINDS)}.")
    shards = ShardSet.open(spec)
    chunks = cut_chunks((shard.path, shard.num_samples) for shard in shards.shards)
    signatures = Signatures.join(list(map_chunks(signatures_of_chunk, chunks, workers, progress)))
    search = _Search(shards, signatures, min_correlation, min_cosine, embed, max(workers, 1))
    if "bytes" in by:
        search.mark_equal(signatures.bytes_hash, KINDS.index("bytes"))
    if "near" in by or "pixels" in by:
        search.mark_near(radius, near="near" in by, pixels="pixels" in by)
    if "captions" in by:
        search.mark_equal(signatures.caption_sets(), KINDS.index("captions"))
    undecodable = signatures.pixels == 0
    return DedupeReport(
        shards,
        search.resolved(),
        search.kind,
        search.similarity,
        num_undecodable=int(undecodable.sum()),
        num_flat=int((~signatures.shown & ~undecodable).sum()),
        num_compared=search.num_compared,
    )


def check_thresholds(radius: int, min_correlation: float, min_cosine: float) -> None:
    """Raise ConfigError where a threshold is out of range."""
    if not 0 <= radius <= 20:
        raise ConfigError(f"radius = {radius}: expected 0 to 20 bits; different images are some 30 apart.")
    for name, value in (("min_correlation", min_correlation), ("min_cosine", min_cosine)):
        if not 0 < value <= 1:
            raise ConfigError(f"{name} = {value:g}: expected more than 0, at most 1.")


class _Search:
    """The samples marked as copies so far."""

    def __init__(
        self,
        shards: ShardSet,
        signatures: Signatures,
        min_correlation: float,
        min_cosine: float,
        embed: Embed | None,
        workers: int,
    ):
        self.signatures = signatures
        self._shards, self._embed, self._workers = shards, embed, workers
        self._min_correlation, self._min_cosine = min_correlation, min_cosine
        number = len(signatures)
        # More pixels first: a copy was made from the larger one. Of equal ones the first stays.
        self._rank = np.empty(number, np.int64)
        self._rank[np.lexsort((np.arange(number), -signatures.pixels))] = np.arange(number)
        self.copy_of = np.full(number, -1, np.int64)
        self.kind = np.zeros(number, np.int8)
        self.similarity = np.ones(number, np.float32)
        self.num_compared = 0

    def mark_equal(self, hashes: NDArray[np.uint64], kind: int) -> None:
        """Of kept samples with equal hash, 0 apart, all but the best are copies of it."""
        for best, others in self._equal(hashes, self.copy_of < 0):
            self.copy_of[others], self.kind[others] = best, kind

    def mark_near(self, radius: int, near: bool, pixels: bool) -> None:
        """Of kept samples that show the same picture, all but the best are copies of it."""
        shown = self.signatures.shown
        # First those that share a hash with many, each against the best of them: not all against all.
        led: set[int] = set()
        for _ in range(_MAX_ROUNDS):
            groups = self._equal(self.signatures.hashes[:, 0], shown & (self.copy_of < 0), led)
            crowded = [(best, others) for best, others in groups if len(others) >= _CROWDED]
            if not crowded:
                break
            led.update(best for best, _ in crowded)
            first = np.concatenate([others for _, others in crowded])
            second = np.concatenate([np.full(len(others), best) for best, others in crowded])
            self._mark(Shortlist(first, second, np.zeros(len(first), np.int64)), near, pixels)
        pairs = shortlist_within(self.signatures.hashes, shown & (self.copy_of < 0), radius, self._workers)
        self._mark(pairs, near, pixels)

    def resolved(self) -> NDArray[np.int64]:
        """`copy_of` with every copy of a copy led to the sample that is kept; kind and similarity follow."""
        todo = np.flatnonzero(self.copy_of >= 0)
        while len(todo):
            between = self.copy_of[todo]
            chained = self.copy_of[between] >= 0
            todo, between = todo[chained], between[chained]
            self.kind[todo] = np.maximum(self.kind[todo], self.kind[between])
            self.similarity[todo] = np.minimum(self.similarity[todo], self.similarity[between])
            self.copy_of[todo] = self.copy_of[between]
        return self.copy_of

    def _equal(
        self, hashes: NDArray[np.uint64], among: NDArray[np.bool_], passed_over: set[int] | None = None
    ) -> list[tuple[int, NDArray[np.int64]]]:
        """The best and the others of every group of equal hashes; those in `passed_over` do not lead again."""
        rows = np.flatnonzero(among & (hashes != 0))
        if passed_over:
            rows = rows[~np.isin(rows, np.fromiter(passed_over, np.int64))]
        rows = rows[np.lexsort((self._rank[rows], hashes[rows]))]
        starts = np.flatnonzero(hashes[rows][1:] != hashes[rows][:-1]) + 1
        return [(int(part[0]), part[1:]) for part in np.split(rows, starts) if len(part) > 1]

    def _mark(self, pairs: Shortlist, near: bool, pixels: bool) -> None:
        found = confirm_pairs(
            pairs,
            self._image,
            self._image,
            min_correlation=self._min_correlation,
            min_cosine=self._min_cosine,
            embed=self._embed,
            workers=self._workers,
        )
        self.num_compared += len(pairs.first)
        good = (found.same if near else np.zeros_like(found.same)) | (found.same_pixels if pixels else False)
        first, second = pairs.first[good], pairs.second[good]
        swapped = self._rank[first] < self._rank[second]
        better, worse = np.where(swapped, first, second), np.where(swapped, second, first)
        equal, similarity = found.same_pixels[good], found.similarity[good]
        # From the best on: what is kept takes all its copies, and what is a copy already takes none.
        for pair in np.lexsort((self._rank[worse], self._rank[better])):
            if self.copy_of[better[pair]] < 0 and self.copy_of[worse[pair]] < 0:
                self.copy_of[worse[pair]] = better[pair]
                self.kind[worse[pair]] = KINDS.index("pixels" if equal[pair] and pixels else "near")
                self.similarity[worse[pair]] = similarity[pair]

    def _image(self, sample: int) -> Any:
        shard, row = self._shards.locate(sample)
        return shard.image(row)


def write_groups(report: DedupeReport, path: str | Path) -> None:
    """Write all groups: one JSON line a group, or one parquet row a sample where the name ends in `.parquet`.

    Raises:
        ConfigError: the name ends in neither.
        OSError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in {".jsonl", ".parquet"}:
        raise ConfigError(f"{path.name}: groups are written as .jsonl or .parquet.")
    path.parent.mkdir(parents=True, exist_ok=True)
    key = report.shards.key
    with atomic_file(path) as file:
        if path.suffix == ".parquet":
            pq.write_table(_as_table(report), file)
            return
        for kept, copies in report.groups():
            about = [
                {
                    "key": key(row),
                    "kind": KINDS[report.kind[row]],
                    "similarity": report.similarity_of(row),
                }
                for row in copies.tolist()
            ]
            file.write(json.dumps({"kept": key(kept), "copies": about}).encode() + b"\n")


def _as_table(report: DedupeReport) -> pa.Table:
    copies = np.flatnonzero(~report.keep)
    return pa.table(
        {
            "key": pa.array([report.shards.key(row) for row in copies.tolist()], pa.string()),
            "copy_of": pa.array([report.shards.key(row) for row in report.copy_of[copies].tolist()], pa.string()),
            "kind": pa.array([KINDS[kind] for kind in report.kind[copies]], pa.string()),
            "similarity": pa.array(report.similarity[copies], pa.float32()),
        }
    )
