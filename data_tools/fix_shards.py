"""A clean copy of shards: what the doctor found broken is left out, and listed.

report = validate_shards("shards/")
fixed = fix_shards(report, Path("clean/"))       # clean/left_out.jsonl names what is missing in clean/*.tar
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_tools.check_samples import sample_name, walked
from data_tools.copy_samples import Chosen, CopyReport, copy_chosen
from data_tools.sample_facts import hash64
from data_tools.validate import ValidationReport
from vlkit.contracts import Progress
from vlkit.data.atomic import atomic_file
from vlkit.data.records import Problems
from vlkit.data.shard_columns import Columns
from vlkit.data.tar_samples import group_samples
from vlkit.data.tar_walk import walk_tar

LEFT_OUT = "left_out.jsonl"

_ALL = 1 << 62  # examples of a cause


@dataclass(frozen=True)
class FixReport:
    """The clean copy, and what is not in it."""

    copied: CopyReport
    left_out: Problems  # by cause; all of them are in left_out.jsonl


def fix_shards(
    report: ValidationReport,
    out: Path,
    *,
    samples_per_shard: int = 1000,
    workers: int = 1,
    progress: Progress | None = None,
) -> FixReport:
    """Copy the samples without problems.

    Args:
        report: of `validate_shards`, just made.
        out, samples_per_shard, workers, progress: see `copy_samples`.

    Raises:
        ConfigError: samples_per_shard out of range, or `out` holds the shards themselves.
        DataError: not one whole sample, or another build in the folder, or no space left.
    """
    chosen: list[Chosen] = []
    lines: list[dict[str, str]] = []
    digests: set[str] = set()
    for path, (digest, broken) in report.shards.items():
        columns, number = walked(str(path)), len(walked(str(path)).numbers["image_offset"])
        lines += [{"shard": path.name, "key": key, "cause": cause} for cause, key in _unusable(path)]
        if digest in digests:
            lines.append({"shard": path.name, "key": "", "cause": "shard with the contents of another"})
            continue
        digests.add(digest)
        causes = {**dict.fromkeys(_without_text(columns), "no caption and no label"), **broken}
        lines += [
            {"shard": path.name, "key": sample_name(path, columns.key(row)), "cause": causes[row]}
            for row in sorted(causes)
        ]
        rows = np.setdiff1d(np.arange(number), np.fromiter(causes, np.int64, len(causes)))
        hashes = [hash64(columns.key(row)) for row in rows.tolist()]
        chosen.append(Chosen(path, digest, rows, np.array(hashes, np.uint64)))
    copied = copy_chosen(chosen, out, samples_per_shard=samples_per_shard, workers=workers, progress=progress)
    with atomic_file(out / LEFT_OUT) as file:
        for line in lines:
            file.write(json.dumps(line).encode() + b"\n")
    left_out = Problems()
    for line in lines:
        left_out.add(line["cause"], line["key"] or line["shard"])
    return FixReport(copied, left_out)


def _unusable(path: Path) -> Iterator[tuple[str, str]]:
    """Cause and key of everything the index leaves out."""
    problems = group_samples(walk_tar(path), Problems(_ALL), Problems(1)).problems
    for cause, keys in problems.examples.items():
        if not cause.endswith("(kept)"):  # in the index, and judged here
            yield from ((cause, f"{path.name.removesuffix('.tar')}/{key}") for key in keys)


def _without_text(columns: Columns) -> list[int]:
    missing: NDArray[np.bool_] = np.logical_and.reduce(
        [columns.numbers[f"{role}_offset"] < 0 for role in ("caption", "json", "cls")]
    )
    found: list[int] = np.flatnonzero(missing).tolist()
    return found
