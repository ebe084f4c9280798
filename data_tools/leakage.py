"""Which training samples are copies of evaluation images, or carry their captions.

    report = find_leakage("shards/", {"coco": read_source("coco", split="val")}, workers=2)
    report.rows();  write_leaks(report, "leaks.jsonl");  copy_samples(report.shards, report.keep, "clean/")

The evaluation sets are held in memory as hashes, the training samples pass by in chunks: memory does not grow with the
training set but by 20 bytes a sample.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.chunks import Chunk, cut_chunks, map_chunks
from data_tools.confirm_pairs import MIN_COSINE, Confirmed, Embed, Shortlist, confirm_pairs
from data_tools.dedupe import check_thresholds
from data_tools.perceptual_hash import RADIUS
from data_tools.same_picture import MIN_CORRELATION
from data_tools.shortlist import Shortlister
from data_tools.signatures import Signatures, signatures_of_chunk, signatures_of_records
from vlkit.contracts import Progress
from vlkit.data.atomic import atomic_file
from vlkit.data.records import ImageRef, Record, Source
from vlkit.data.shard_index import ShardSet, ShardSpec
from vlkit.engine import map_parts
from vlkit.errors import ConfigError

KINDS = ("bytes", "pixels", "near", "captions")
_RECORDS_IN_A_PART = 256


class Leak(NamedTuple):
    """A training sample and what of an evaluation set it repeats."""

    sample: int  # number in the shards
    record: int  # number in the evaluation set
    kind: str  # of KINDS; "captions": they share a caption, case and punctuation aside
    similarity: float  # correlation or cosine of the images; 1 for bytes and captions


@dataclass(frozen=True)
class LeakageReport:
    """What of the evaluation sets is in the training shards, by the name of the set."""

    shards: ShardSet
    sources: Mapping[str, Source]
    leaks: Mapping[str, tuple[Leak, ...]]  # one for each pair of sample and record and, apart from it, for its captions
    num_undecodable: int  # training samples

    @property
    def keep(self) -> NDArray[np.bool_]:
        """(N,) the training samples whose image is no copy of an evaluation image."""
        return self.without(("bytes", "pixels", "near"))

    def without(self, kinds: Sequence[str]) -> NDArray[np.bool_]:
        """(N,) the training samples without leaks of these kinds."""
        keep = np.ones(self.shards.num_samples, bool)
        keep[[leak.sample for leaks in self.leaks.values() for leak in leaks if leak.kind in kinds]] = False
        return keep

    def counts(self, name: str) -> dict[str, int]:
        """Of one set: images, training samples that repeat one by kind, and how many of the images are repeated."""
        leaks = self.leaks[name]
        images = [leak for leak in leaks if leak.kind != "captions"]
        return {
            "images": len(self.sources[name]),
            **{kind: len({leak.sample for leak in leaks if leak.kind == kind}) for kind in KINDS},
            "images_in_training": len({leak.record for leak in images}),
        }

    def rows(self) -> list[tuple[object, ...]]:
        """One row a set, as under COLUMNS."""
        return [(name, *self.counts(name).values()) for name in self.sources]

    def to_json(self) -> dict[str, Any]:
        """The figures, by set."""
        return {
            "num_samples": self.shards.num_samples,
            "num_undecodable": self.num_undecodable,
            "num_leaking": int((~self.keep).sum()),
            "sets": {name: self.counts(name) for name in self.sources},
        }


COLUMNS = ("evaluation set", "images", "same bytes", "same pixels", "near copies", "same caption", "found in training")


def find_leakage(
    spec: ShardSpec,
    sources: Mapping[str, Source],
    *,
    radius: int = RADIUS,
    min_correlation: float = MIN_CORRELATION,
    min_cosine: float = MIN_COSINE,
    embed: Embed | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> LeakageReport:
    """Compare every training sample with every record of the evaluation sets.

    Args:
        spec: the training shards, as `expand_shards` takes them.
        sources: name -> evaluation set, of any format.
        radius, min_correlation, min_cosine, embed: see `dedupe_shards`.
        workers: processes beside this one.
        progress: called with (training samples read, all).

    Raises:
        ConfigError: no evaluation set, or a threshold out of range.
        DataError: no shards, or a worker died.
    """
    check_thresholds(radius, min_correlation, min_cosine)
    if not sources:
        raise ConfigError("No evaluation set to compare with; expected at least one.")
    shards = ShardSet.open(spec)
    records = [record for source in sources.values() for record in source.records]
    sets = np.repeat(np.arange(len(sources)), [len(source) for source in sources.values()])
    gallery = _Gallery(_signatures(records, workers), sets, radius, max(workers, 1))
    chunks = cut_chunks((shard.path, shard.num_samples) for shard in shards.shards)
    undecodable, start = 0, 0
    for chunk, found in zip(chunks, map_chunks(signatures_of_chunk, chunks, workers, progress), strict=True):
        gallery.compare(found, start)
        undecodable += int((found.pixels == 0).sum())
        start += _length(chunk)
    leaks = gallery.leaks(shards, records, min_correlation, min_cosine, embed, max(workers, 1))
    return LeakageReport(shards, sources, _by_set(leaks, sources), undecodable)


def _length(chunk: Chunk) -> int:
    return chunk.stop - chunk.start


def _signatures(records: list[Record], workers: int) -> Signatures:
    parts = [records[start : start + _RECORDS_IN_A_PART] for start in range(0, len(records), _RECORDS_IN_A_PART)]
    found = dict(map_parts(signatures_of_records, parts, workers))
    return Signatures.join([found[position] for position in range(len(parts))])


class _Gallery:
    """All evaluation records, and what of them the training samples repeat."""

    def __init__(self, signatures: Signatures, sets: NDArray[np.int64], radius: int, threads: int):
        self._threads = threads
        self._shortlister = Shortlister(signatures.hashes, signatures.shown, radius)
        self._bytes = _Equal(signatures.bytes_hash, np.arange(len(signatures)))
        owners = np.repeat(np.arange(len(signatures)), signatures.num_captions)
        # A caption that many records of a set share counts for the first: "a dog" must not make a million pairs.
        _, first = np.unique(
            np.stack([signatures.caption_hash, sets[owners].astype(np.uint64)]), axis=1, return_index=True
        )
        self._captions = _Equal(signatures.caption_hash[first], owners[first])
        self._same_bytes: list[tuple[int, int]] = []
        self._same_captions: set[tuple[int, int]] = set()
        # Pairs to look at, first the sample, then the record, and the other way round: whose window it is.
        self._by_sample: list[Shortlist] = []
        self._by_record: list[Shortlist] = []

    def compare(self, samples: Signatures, start: int) -> None:
        """Take the samples from number `start` on."""
        self._same_bytes += [(start + row, record) for row, record in self._bytes.pairs(samples.bytes_hash)]
        owners = np.repeat(np.arange(len(samples)), samples.num_captions)
        pairs = self._captions.pairs(samples.caption_hash)
        self._same_captions |= {(start + int(owners[caption]), record) for caption, record in pairs}
        found = self._shortlister.against(samples.hashes, samples.shown, self._threads)
        self._by_sample.append(found._replace(first=found.first + start))
        found = self._shortlister.windows_against(samples.hashes, samples.shown, self._threads)
        self._by_record.append(found._replace(second=found.second + start))

    def leaks(
        self,
        shards: ShardSet,
        records: list[Record],
        min_correlation: float,
        min_cosine: float,
        embed: Embed | None,
        workers: int,
    ) -> list[Leak]:
        """Look at the pairs again; each pair of sample and record comes out once for its image."""

        def sample_image(sample: int) -> ImageRef:
            shard, row = shards.locate(sample)
            return shard.image(row)

        def record_image(record: int) -> ImageRef:
            return records[record].image

        best = {pair: Leak(*pair, "bytes", 1.0) for pair in self._same_bytes}
        for parts, first, second, swapped in (
            (self._by_sample, sample_image, record_image, False),
            (self._by_record, record_image, sample_image, True),
        ):
            pairs = _joined(parts)
            todo = [pair not in best for pair in zip(*_sides(pairs, swapped), strict=True)]
            pairs = Shortlist(*(column[np.array(todo, bool)] for column in pairs))
            found = confirm_pairs(
                pairs,
                first,
                second,
                min_correlation=min_correlation,
                min_cosine=min_cosine,
                embed=embed,
                workers=workers,
            )
            for leak in _leaks_of(pairs, found, swapped):
                best[leak.sample, leak.record] = leak
        captions = [Leak(*pair, "captions", 1.0) for pair in self._same_captions]
        return sorted([*best.values(), *captions])


def _sides(pairs: Shortlist, swapped: bool) -> tuple[list[int], list[int]]:
    """Samples and records of the pairs."""
    sides = pairs.first.tolist(), pairs.second.tolist()
    return (sides[1], sides[0]) if swapped else sides


def _leaks_of(pairs: Shortlist, found: Confirmed, swapped: bool) -> list[Leak]:
    samples, records = _sides(pairs, swapped)
    return [
        Leak(samples[pair], records[pair], kind, float(found.similarity[pair]))
        for pair in np.flatnonzero(found.same)
        for kind in ["pixels" if found.same_pixels[pair] else "near"]
    ]


class _Equal:
    """Hashes with their owners, to be asked for those equal to others; 0 equals nothing."""

    def __init__(self, hashes: NDArray[np.uint64], owners: NDArray[np.int64]):
        order = np.argsort(hashes, kind="stable")
        order = order[hashes[order] != 0]
        self._hashes, self._owners = hashes[order], owners[order]

    def pairs(self, hashes: NDArray[np.uint64]) -> list[tuple[int, int]]:
        """(position in `hashes`, owner) of all equal ones."""
        low = np.searchsorted(self._hashes, hashes, "left")
        high = np.searchsorted(self._hashes, hashes, "right")
        return [
            (int(position), int(owner))
            for position in np.flatnonzero(high > low)
            for owner in self._owners[low[position] : high[position]]
        ]


def _joined(parts: list[Shortlist]) -> Shortlist:
    return Shortlist(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _by_set(leaks: list[Leak], sources: Mapping[str, Source]) -> dict[str, tuple[Leak, ...]]:
    """Leaks with records numbered within their set."""
    ends = np.cumsum([len(source) for source in sources.values()])
    found: dict[str, list[Leak]] = {name: [] for name in sources}
    names = list(sources)
    for leak in leaks:
        place = int(np.searchsorted(ends, leak.record, "right"))
        begin = int(ends[place]) - len(sources[names[place]])
        found[names[place]].append(leak._replace(record=leak.record - begin))
    return {name: tuple(part) for name, part in found.items()}


def write_leaks(report: LeakageReport, path: str | Path) -> None:
    """Write one JSON line a leak.

    Raises:
        OSError: the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        for name, leaks in report.leaks.items():
            records = report.sources[name].records
            for leak in leaks:
                line = {
                    "key": report.shards.key(leak.sample),
                    "set": name,
                    "evaluation_key": records[leak.record].key,
                    "kind": leak.kind,
                    "similarity": round(leak.similarity, 4),
                }
                file.write(json.dumps(line).encode() + b"\n")
