"""One shard, from records to a tar, its index, a table of its rows and the stats file that marks it as finished.

The bytes depend on the records and the options alone: no times, owners or machine in them.
"""

import errno
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.writer import TarWriter

from data_tools.encode_image import StoredImage, store_image
from vlkit.data.atomic import atomic_file
from vlkit.data.decode import BrokenImageError
from vlkit.data.records import Record
from vlkit.data.shard_paths import stats_path as stats_path
from vlkit.data.shard_sidecar import build_table, sidecar_path, write_table
from vlkit.errors import DataError

# Texts -> token ids, as a list of lists or a padded tensor (R,T) whose trailing zeros are padding.
Tokenize = Callable[[list[str]], Any]

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class ShardOptions:
    """What decides the contents of a shard besides its records."""

    max_side: int | None
    quality: int
    tokenizers: Mapping[str, Tokenize]
    class_names: tuple[str, ...]


class Missing(NamedTuple):
    """A row whose image was lost before it came here."""

    key: str
    cause: str  # one of a few, so that causes can be counted
    message: str
    captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class ShardPart:
    """One unit of work."""

    name: str  # "00000"
    key_digits: int  # of a sample's number within the shard
    records: Sequence[Record | Missing]
    folder: Path
    options: ShardOptions
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # more about each row, for the table
    columns_in_json: tuple[str, ...] = ()  # of these, what each sample carries as well
    failures_listed: int | None = None  # of each cause in the stats: dead links may be millions; None lists all


class Sample(NamedTuple):
    """A sample ready to be written."""

    image: StoredImage
    captions: list[str]
    record: Record
    sha256: str  # of the image as it came


def write_shard(part: ShardPart) -> dict[str, Any]:
    """Write `NAME.tar`, `NAME.index.arrow`, `NAME.parquet` and last `NAME.stats.json`, each whole or not at all.

    Returns:
        The stats: counts, bytes, hashes, and every record left out with its cause.

    Raises:
        DataError: no space left, or the folder cannot be written to.
    """
    tar_path = part.folder / f"{part.name}.tar"
    try:
        stats, captions, rows = _write_tar(part, tar_path)
        tokens = {name: _token_ids(tokenize, captions) for name, tokenize in part.options.tokenizers.items()}
        table = build_table(tar_path, tokens)
        assert table.num_rows == stats["num_samples"], (tar_path, table.num_rows, stats["num_samples"])
        write_table(table, sidecar_path(tar_path))
        stats["index_sha256"] = hashlib.sha256(sidecar_path(tar_path).read_bytes()).hexdigest()
        _write_rows(rows, part)
        with atomic_file(stats_path(part.folder, part.name)) as file:
            file.write(json.dumps(stats, indent=1).encode())
    except OSError as error:
        raise write_error(error, part.folder) from error
    return stats


def rows_path(folder: Path, name: str) -> Path:
    """The table of all rows of shard `name`, those left out and why included."""
    return folder / f"{name}.parquet"


# Names and order as in img2dataset's tables, as far as both have them.
_ROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # in the tar
        ("source_key", pa.string()),
        ("caption", pa.string()),  # all of them, one a line
        ("status", pa.string()),  # success or failed
        ("error", pa.string()),  # the cause, one of a few
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("sha256", pa.string()),  # of the image as it came
        ("label", pa.int32()),
        ("split", pa.string()),
    ]
)


def _write_rows(rows: list[dict[str, Any]], part: ShardPart) -> None:
    table = pa.Table.from_pylist(rows, _ROW_SCHEMA)
    for name, values in part.columns.items():
        table = table.append_column(name, pa.array(values))
    with atomic_file(rows_path(part.folder, part.name)) as file:
        pq.write_table(table, file, compression="zstd")


def _write_tar(part: ShardPart, tar_path: Path) -> tuple[dict[str, Any], list[list[str]], list[dict[str, Any]]]:
    """Stats, the captions of each sample written, and what the table says of each row."""
    failures: list[dict[str, Any]] = []
    rows: list[dict[str, Any]] = []
    captions: list[list[str]] = []
    counts = dict.fromkeys(("num_captions", "num_labelled", "num_reencoded", "image_bytes"), 0)
    with atomic_file(tar_path) as file:
        hashing = _HashingFile(file)
        with TarWriter(hashing, user="", group="", mode=0o644, encoder=False, mtime=0) as writer:
            for row, record in enumerate(part.records):
                key = f"{part.name}{row:0{part.key_digits}d}"
                rows.append(_row_of(key, record))
                try:
                    sample = _prepare(record, part.options)
                except _LeftOutError as reason:
                    failures.append({"key": record.key, "row": row, "cause": reason.cause, "message": str(reason)})
                    rows[-1] |= {"status": "failed", "error": reason.cause, "error_message": str(reason)}
                    continue
                rows[-1] |= _row_of_sample(sample)
                more = {name: part.columns[name][row] for name in part.columns_in_json}
                writer.write({"__key__": key, **_members(sample, part.options.class_names, more)})
                captions.append(sample.captions)
                counts["num_captions"] += len(sample.captions)
                counts["num_labelled"] += sample.record.label is not None
                counts["num_reencoded"] += sample.image.reencoded
                counts["image_bytes"] += len(sample.image.data)
    stats = {
        "shard": part.name,
        "num_records": len(part.records),
        "num_samples": len(captions),
        **counts,
        "tar_bytes": hashing.size,
        "tar_sha256": hashing.sha256.hexdigest(),
        "causes": dict(Counter(failure["cause"] for failure in failures).most_common()),
        "failures": _first_of_each_cause(failures, part.failures_listed),
    }
    return stats, captions, rows


def _first_of_each_cause(failures: list[dict[str, Any]], limit: int | None) -> list[dict[str, Any]]:
    seen: Counter[str] = Counter()
    listed = []
    for failure in failures:
        seen[failure["cause"]] += 1
        if limit is None or seen[failure["cause"]] <= limit:
            listed.append(failure)
    return listed


def _row_of(key: str, record: Record | Missing) -> dict[str, Any]:
    row = {"key": key, "source_key": record.key, "caption": "\n".join(fold_captions(record.captions)) or None}
    return row if isinstance(record, Missing) else {**row, "label": record.label, "split": record.split}


def _row_of_sample(sample: Sample) -> dict[str, Any]:
    image = sample.image
    return {
        "caption": "\n".join(sample.captions),
        "status": "success",
        "width": image.width,
        "height": image.height,
        "original_width": image.original_width,
        "original_height": image.original_height,
        "sha256": sample.sha256,
    }


class _LeftOutError(Exception):
    """A record that does not get into the shard."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def _prepare(record: Record | Missing, options: ShardOptions) -> Sample:
    if isinstance(record, Missing):
        raise _LeftOutError(record.cause, record.message)
    captions = fold_captions(record.captions)
    if not captions:
        labels = record.labels or (() if record.label is None else (record.label,))
        names = [options.class_names[label] for label in labels if label < len(options.class_names)]
        captions = fold_captions([name.replace("_", " ") for name in names])
    if not captions:
        raise _LeftOutError("no caption", f"{record.key} has no caption, and no class whose name could stand for one.")
    try:
        data = record.image.read()
        image = store_image(data, record.key, options.max_side, options.quality)
    except BrokenImageError as error:
        raise _LeftOutError(error.cause, str(error)) from error
    except DataError as error:
        raise _LeftOutError("unreadable file", str(error)) from error
    return Sample(image, captions, record, hashlib.sha256(data).hexdigest())


def fold_captions(captions: Sequence[str]) -> list[str]:
    """Each caption on one line, as valid Unicode, without the empty ones."""
    folded = (" ".join(caption.encode("utf-8", "replace").decode().split()) for caption in captions)
    return [caption for caption in folded if caption]


def _members(sample: Sample, class_names: Sequence[str], more: Mapping[str, Any]) -> dict[str, bytes]:
    record, image = sample.record, sample.image
    about = {
        "key": record.key,
        "split": record.split,
        "label": record.label,
        "class_name": None if record.label is None or record.label >= len(class_names) else class_names[record.label],
        "captions": sample.captions,
        "width": image.width,
        "height": image.height,
        "original_width": image.original_width,
        "original_height": image.original_height,
        **({} if record.labels is None else {"labels": list(record.labels)}),
        **more,
    }
    members = {
        image.extension: image.data,
        "txt": "\n".join(sample.captions).encode(),
        "json": json.dumps(about, ensure_ascii=False).encode("utf-8", "replace"),
    }
    if record.label is not None:
        members["cls"] = str(record.label).encode()
    return members


class _HashingFile:
    """What a tar is streamed into; knows the hash and length of all that went through."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.size += len(data)
        return self._file.write(data)


def _token_ids(tokenize: Tokenize, samples: list[list[str]]) -> list[list[list[int]]]:
    flat = [caption for captions in samples for caption in captions]
    rows = iter(_rows(tokenize(flat)) if flat else [])
    return [[next(rows) for _ in captions] for captions in samples]


def _rows(ids: Any) -> list[list[int]]:
    if isinstance(ids, list):
        return ids
    rows: list[list[int]] = ids.tolist()
    for row in rows:
        while row and row[-1] == 0:
            row.pop()
    return rows


def write_error(error: OSError, folder: Path) -> DataError:
    """What to tell the user when a file of a build cannot be written."""
    if error.errno in _NO_SPACE:
        return DataError(
            f"No space left in {folder} ({error.strerror}). What was half written is gone, finished shards are kept. "
            "Free space there and run the same command again: it continues. Or name another --out; --max-side makes "
            "shards smaller."
        )
    return DataError(f"Cannot write shards to {folder}: {error.strerror or error}.")
