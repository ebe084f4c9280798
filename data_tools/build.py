"""Build webdataset shards from any source.

    vlkit shards build $VLKIT_DATA/flickr8k --split train --max-side 96 --out shards/f8k_train

A shard holds the next `samples_per_shard` records and is written by one process; records that cannot be used leave
their number free, so that a sample's key never depends on other records. Killed at any time and started again,
the build continues, and ends with the same bytes as one that was never interrupted, with any number of workers
(and the same versions of libraries).
"""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.build_plan import finished_stats, hold_folder, settle_plan, source_fingerprint
from data_tools.write_shard import ShardOptions, ShardPart, Tokenize, write_error, write_shard
from vlkit.contracts import Progress
from vlkit.data.atomic import atomic_file
from vlkit.data.records import Problems, Source
from vlkit.engine import map_parts
from vlkit.errors import ConfigError, DataError

FAILURES = "failures.jsonl"
CLASS_NAMES = "classnames.txt"


@dataclass(frozen=True)
class BuildReport:
    """What a build wrote. Sizes in bytes."""

    out: Path
    num_shards: int
    num_shards_kept: int  # finished by an earlier start
    num_records: int
    num_samples: int
    num_captions: int
    num_labelled: int
    num_reencoded: int
    image_bytes: int
    tar_bytes: int
    failures: Problems  # records left out, by cause; all of them are in failures.jsonl


def build_shards(
    source: Source,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    max_side: int | None = None,
    quality: int = 90,
    tokenizers: Mapping[str, Tokenize] | None = None,
    shuffle: bool = False,
    seed: int = 0,
    workers: int = 1,
    progress: Progress | None = None,
) -> BuildReport:
    """Write a source as tar shards with indexes, or continue such a build.

    Args:
        source: the records; those without a caption get the name of their class as one.
        out: folder for `00000.tar`, `00000.index.arrow`, `00000.stats.json`, ..., `build.json`, `failures.jsonl`.
        samples_per_shard: records per tar.
        max_side: pixels; larger images are turned upright, resized and encoded anew as JPEG. None keeps all bytes.
        quality: of that JPEG, 1-100.
        tokenizers: tokenizer id -> function from texts to token ids, stored in the index.
        shuffle: permute the records over all shards, by `seed`; else the source's order.
        seed: of the permutation.
        workers: processes. With several, a script needs the guard `if __name__ == "__main__":`.
        progress: called with records done and in all.

    Raises:
        ConfigError: an option out of range.
        DataError: no record, another build in the folder, no space left, or not one usable record.
        VlkitError: a worker process died.
    """
    _check_options(samples_per_shard, max_side, quality)
    if not source.records:
        raise DataError(f"The source {source.root} has no records, so there is nothing to build.")
    options = ShardOptions(max_side, quality, tokenizers or {}, source.class_names)
    plan = _plan(source, options, samples_per_shard, seed if shuffle else None)
    with hold_folder(out):
        try:
            settle_plan(out, plan)
            _write_class_names(source.class_names, out)
            parts = _cut(source, out, options, samples_per_shard, seed if shuffle else None)
            stats, kept = _write_parts(parts, out, workers, len(source), progress)
            _write_failures(stats, out)
        except OSError as error:
            raise write_error(error, out) from error
    report = _report(out, stats, kept)
    if report.num_samples == 0:
        raise DataError(f"None of the {len(source)} records could be used: {'; '.join(report.failures.lines())}.")
    return report


def _check_options(samples_per_shard: int, max_side: int | None, quality: int) -> None:
    for name, value, low, high in (
        ("samples_per_shard", samples_per_shard, 1, 1_000_000),
        ("max_side", 1 if max_side is None else max_side, 1, 65_500),  # JPEG's own limit
        ("quality", quality, 1, 100),
    ):
        if not low <= value <= high:
            raise ConfigError(f"{name} = {value}: expected {low} to {high}.")


def _plan(source: Source, options: ShardOptions, samples_per_shard: int, seed: int | None) -> dict[str, Any]:
    return {
        "num_shards": -(-len(source) // samples_per_shard),
        "num_records": len(source),
        "source": source_fingerprint(source),
        "source_format": source.format,
        "samples_per_shard": samples_per_shard,
        "max_side": options.max_side,
        "quality": None if options.max_side is None else options.quality,
        "tokenizers": sorted(options.tokenizers),
        "shuffle_seed": seed,
    }


def _cut(source: Source, out: Path, options: ShardOptions, samples_per_shard: int, seed: int | None) -> list[ShardPart]:
    """The parts in order. Names have a fixed width, and a sample's key is its shard's name and its row there."""
    order = np.arange(len(source))
    if seed is not None:
        order = np.random.Generator(np.random.Philox(seed)).permutation(len(source))
    starts = range(0, len(source), samples_per_shard)
    width, digits = max(5, len(str(len(starts) - 1))), max(4, len(str(samples_per_shard - 1)))
    return [
        ShardPart(
            f"{number:0{width}d}",
            digits,
            [source.records[row] for row in order[start : start + samples_per_shard]],
            out,
            options,
        )
        for number, start in enumerate(starts)
    ]


def _write_parts(
    parts: list[ShardPart], out: Path, workers: int, total: int, progress: Progress | None
) -> tuple[list[dict[str, Any]], int]:
    """Stats of all parts in order, and how many were there already."""
    stats = {part.name: found for part in parts if (found := finished_stats(out, part.name))}
    kept = len(stats)
    todo = [part for part in parts if part.name not in stats]
    done = sum(len(part.records) for part in parts if part.name in stats)
    if progress:
        progress(done, total)
    for position, written in map_parts(write_shard, todo, workers):
        stats[todo[position].name] = written
        done += written["num_records"]
        if progress:
            progress(done, total)
    return [stats[part.name] for part in parts], kept


def _write_failures(stats: list[dict[str, Any]], out: Path) -> None:
    with atomic_file(out / FAILURES) as file:
        for shard in stats:
            for failure in shard["failures"]:
                file.write(json.dumps({"shard": shard["shard"], **failure}).encode() + b"\n")


def _write_class_names(class_names: tuple[str, ...], out: Path) -> None:
    if class_names:
        with atomic_file(out / CLASS_NAMES) as file:
            file.write("".join(f"{' '.join(name.split())}\n" for name in class_names).encode("utf-8", "replace"))


def _report(out: Path, stats: list[dict[str, Any]], kept: int) -> BuildReport:
    sums: Counter[str] = Counter()
    failures = Problems()
    for shard in stats:
        sums.update({name: value for name, value in shard.items() if isinstance(value, int)})
        for failure in shard["failures"]:
            failures.add(failure["cause"], failure["key"])
    names = ("num_records", "num_samples", "num_captions", "num_labelled", "num_reencoded", "image_bytes", "tar_bytes")
    return BuildReport(out, len(stats), kept, **{name: sums[name] for name in names}, failures=failures)
