"""Results as lines of JSON: one evaluation of one model on one data set, appended atomically.

    line = result_line(evaluation, task="retrieval", model=..., identity=..., data=..., run=run_facts(started))
    append_result("results.jsonl", line)

Two runs of the same evaluation give equal lines in every field but `run`, which holds what belongs to the
occasion: when, how long, where, with which versions.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from vlkit import __version__
from vlkit.contracts import Evaluation
from vlkit.data.atomic import atomic_file
from vlkit.errors import DataError

# What can change a number.
PACKAGES = ("torch", "torchvision", "open_clip_torch", "transformers", "pillow", "simplejpeg", "numpy")
DIGITS = 8


class Results(NamedTuple):
    """The lines of a results file, and how many of its lines are no JSON (torn by a crash)."""

    lines: tuple[dict[str, Any], ...]
    num_broken: int


def result_line(
    evaluation: Evaluation,
    *,
    task: str,
    model: str,
    identity: str,
    data: str,
    format: str,  # noqa: A002  (the key in the line and the option's name)
    split: str | None,
    left_out: Mapping[str, Any],
    run: Mapping[str, Any],
) -> dict[str, Any]:
    """The line of one evaluation, keys in reading order.

    Args:
        evaluation: what an evaluator returned.
        task: "retrieval", "classification", ...
        model: the model's name as the user gave it.
        identity: hash of its weights, preprocessing and tokenizer.
        data: the data's path as the user gave it.
        format: how the data was read.
        split: which part of it, None for all.
        left_out: what of the data did not enter, and why.
        run: `run_facts(...)`.
    """
    return {
        "task": task,
        "model": model,
        "model_identity": identity,
        "data": data,
        "format": format,
        "split": split,
        "templates_hash": evaluation.protocol.get("templates_hash"),
        "protocol": dict(evaluation.protocol),
        "counts": dict(evaluation.counts),
        "left_out": dict(left_out),
        "metrics": {key: round(value, DIGITS) for key, value in evaluation.metrics.items()},
        "intervals": {key: [round(bound, DIGITS) for bound in pair] for key, pair in evaluation.intervals.items()},
        "run": dict(run),
    }


def run_facts(started: float, device: str) -> dict[str, Any]:
    """What belongs to this occasion only.

    Args:
        started: `time.time()` at the beginning.
        device: where the model ran.
    """
    versions = {"vlkit": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    return {
        "seconds": round(time.time() - started, 2),
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": sys.platform,
        "device": device,
        "versions": versions,
    }


def append_result(path: str | Path, line: Mapping[str, Any]) -> None:
    """Append one line: whole or not at all, also with several processes writing to one file.

    A last line that a crash left without its end gets one first, so that it spoils nothing but itself.

    Args:
        path: the results file; it and its folder are made.
        line: what JSON can hold; NaN is refused.

    Raises:
        DataError: the file cannot be written.
        ValueError: a number is not finite.
    """
    content = json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"
    file = _open(Path(path))
    try:
        # O_APPEND: the kernel puts one write at the end as a whole, whoever else appends.
        content = content if _ends_whole(file) else b"\n" + content
        written = os.write(file, content)
        os.fsync(file)
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror or error}. Free space and run again.") from error
    finally:
        os.close(file)
    if written < len(content):
        raise DataError(f"Only {written} of {len(content)} bytes fitted into {path}. Free space and run again.")


def write_per_item(path: str | Path, evaluation: Evaluation) -> None:
    """Write the evaluation's table of items as Parquet, whole or not at all.

    Raises:
        DataError: it cannot be written.
    """
    import pyarrow.parquet as pq  # half a second that reading and appending lines need not pay

    assert evaluation.per_item is not None
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(target) as file:
            pq.write_table(evaluation.per_item, file)
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror or error}.") from error


def check_writable(path: str | Path) -> None:
    """Find out before an hour of work, not after, that results cannot be appended to `path`; nothing is made.

    Raises:
        DataError: the file, or the folder it would go to, cannot be written.
    """
    path = Path(path)
    if path.exists():
        os.close(_open(path))
        return
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        reason = "is no folder" if not above.is_dir() else "is not writable"
        raise DataError(f"Cannot write results to {path}: {above} {reason}. Name another file.")


def read_results(path: str | Path) -> Results:
    """All lines of a results file; a torn one is counted, not fatal.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DataError(f"Cannot read results {path}: {error.strerror or error}.") from error
    lines, num_broken = [], 0
    for row in text.split("\n"):
        try:
            line = json.loads(row) if row.strip() else None
        except ValueError:
            line = row
        if isinstance(line, dict):
            lines.append(line)
        elif line is not None:
            num_broken += 1
    return Results(tuple(lines), num_broken)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise DataError(f"Cannot write results to {path}: {error.strerror or error}. Name another file.") from error


def _ends_whole(file: int) -> bool:
    size = os.lseek(file, 0, os.SEEK_END)
    if size == 0:
        return True
    os.lseek(file, size - 1, os.SEEK_SET)
    return os.read(file, 1) == b"\n"
