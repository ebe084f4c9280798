"""Build webdataset shards from any source.

    vlkit shards build $VLKIT_DATA/flickr8k --split train --max-side 96 --out shards/f8k_train

A shard holds the next `samples_per_shard` records and is written by one process; records that cannot be used leave
their number free, so that a sample's key never depends on other records. Killed at any time and started again,
the build continues, and ends with the same bytes as one that was never interrupted, with any number of workers
(and the same versions of libraries).
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from data_tools.build_plan import finished_stats, hold_folder, settle_plan, source_fingerprint
from data_tools.write_shard import ShardOptions, ShardPart, Tokenize, rows_path, write_error, write_shard
from vlkit.contracts import Progress
from vlkit.data.atomic import atomic_file
from vlkit.data.records import Problems, Source
from vlkit.engine import map_parts
from vlkit.errors import ConfigError, DataError

FAILURES = "failures.jsonl"
CLASS_NAMES = "classnames.txt"


class NamedPart(Protocol):
    """What is written by one process: it bears the name of its shard."""

    @property
    def name(self) -> str:
        """`00000`, ..."""
        ...


Part = TypeVar("Part", bound=NamedPart)


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
    failures: Problems  # records left out, by cause; NNNNN.parquet names each


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
    engine: str = "local",
    progress: Progress | None = None,
) -> BuildReport:
    """Write a source as tar shards with indexes, or continue such a build.

    Args:
        source: the records; those without a caption get the name of their class as one.
        out: folder for `00000.tar`, `00000.index.arrow`, `00000.parquet`, `00000.stats.json`, ..., `build.json`,
            `failures.jsonl`. On Ray every machine must see it, and the images, under the same path.
        samples_per_shard: records per tar.
        max_side: pixels; larger images are turned upright, resized and encoded anew as JPEG. None keeps all bytes.
        quality: of that JPEG, 1-100.
        tokenizers: tokenizer id -> function from texts to token ids, stored in the index.
        shuffle: permute the records over all shards, by `seed`; else the source's order.
        seed: of the permutation.
        workers: processes. With several, a script needs the guard `if __name__ == "__main__":`.
        engine: "local" or "ray"; see `map_parts`.
        progress: called with records done and in all.

    Raises:
        ConfigError: an option out of range.
        DataError: no record, another build in the folder, no space left, or not one usable record.
        VlkitError: a worker process died.
    """
    check_options(samples_per_shard, max_side, quality)
    if not source.records:
        raise DataError(f"The source {source.root} has no records, so there is nothing to build.")
    options = ShardOptions(max_side, quality, tokenizers or {}, source.class_names)
    plan = _plan(source, options, samples_per_shard, seed if shuffle else None)
    with hold_folder(out):
        try:
            settle_plan(out, plan)
            _write_class_names(source.class_names, out)
            parts = _cut(source, out, options, samples_per_shard, seed if shuffle else None)
            sizes = {part.name: len(part.records) for part in parts}
            report = run_parts(write_shard, parts, sizes, out, workers, engine, progress)
        except OSError as error:
            raise write_error(error, out) from error
    if report.num_samples == 0:
        raise DataError(f"None of the {len(source)} records could be used: {'; '.join(report.failures.lines())}.")
    return report


def key_widths(num_shards: int, samples_per_shard: int) -> tuple[int, int]:
    """Digits of a shard's name and of a sample's number in it, img2dataset's where these suffice."""
    return max(5, len(str(num_shards - 1))), max(4, len(str(samples_per_shard - 1)))


def run_parts(
    write: Callable[[Part], dict[str, Any]],
    parts: Sequence[Part],
    sizes: Mapping[str, int],
    out: Path,
    workers: int,
    engine: str,
    progress: Progress | None,
) -> BuildReport:
    """Write the parts that are not finished yet, and sum up all of them.

    Args:
        write: of a part, returns its stats.
        parts: in order.
        sizes: records of each part by its name.
        out: the folder of the build, which is held.
        workers: processes.
        engine: "local" or "ray".
        progress: called with records done and in all.
    """
    begun = ((part.name, finished_stats(out, part.name, rows_path(out, part.name))) for part in parts)
    stats = {name: found for name, found in begun if found}
    kept = len(stats)
    todo = [part for part in parts if part.name not in stats]
    done, total = sum(sizes[name] for name in stats), sum(sizes.values())
    if progress:
        progress(done, total)
    for position, written in map_parts(write, todo, workers, engine):
        stats[todo[position].name] = written
        done += written["num_records"]
        if progress:
            progress(done, total)
    in_order = [stats[part.name] for part in parts]
    _write_failures(in_order, out)
    return _report(out, in_order, kept)


def check_options(samples_per_shard: int, max_side: int | None, quality: int) -> None:
    """Refuse what no shard can be built with.

    Raises:
        ConfigError: an option out of range.
    """
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
    width, digits = key_widths(len(starts), samples_per_shard)
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


def _write_failures(stats: list[dict[str, Any]], out: Path) -> None:
    """All failures in one file, where the shards list theirs in full."""
    if any(sum(shard["causes"].values()) > len(shard["failures"]) for shard in stats):
        (out / FAILURES).unlink(missing_ok=True)
        return
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
            shard["causes"][failure["cause"]] -= 1
        failures.counts.update(shard["causes"])  # of those that the table alone lists
    names = ("num_records", "num_samples", "num_captions", "num_labelled", "num_reencoded", "image_bytes", "tar_bytes")
    return BuildReport(out, len(stats), kept, **{name: sums[name] for name in names}, failures=failures)
