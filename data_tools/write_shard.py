"""One shard, from records to a tar, its index and the stats file that marks it as finished.

The bytes depend on the records and the options alone: no times, owners or machine in them.
"""

import errno
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from webdataset.writer import TarWriter

from data_tools.encode_image import StoredImage, store_image
from vlkit.data.atomic import atomic_file
from vlkit.data.decode import BrokenImageError
from vlkit.data.records import Record
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


class ShardPart(NamedTuple):
    """One unit of work."""

    name: str  # "00000"
    key_digits: int  # of a sample's number within the shard
    records: Sequence[Record]
    folder: Path
    options: ShardOptions


class Sample(NamedTuple):
    """A sample ready to be written."""

    image: StoredImage
    captions: list[str]
    record: Record


def write_shard(part: ShardPart) -> dict[str, Any]:
    """Write `NAME.tar`, `NAME.index.arrow` and last `NAME.stats.json`, each whole or not at all.

    Returns:
        The stats: counts, bytes, hashes, and every record left out with its cause.

    Raises:
        DataError: no space left, or the folder cannot be written to.
    """
    tar_path = part.folder / f"{part.name}.tar"
    try:
        stats, captions = _write_tar(part, tar_path)
        tokens = {name: _token_ids(tokenize, captions) for name, tokenize in part.options.tokenizers.items()}
        table = build_table(tar_path, tokens)
        assert table.num_rows == stats["num_samples"], (tar_path, table.num_rows, stats["num_samples"])
        write_table(table, sidecar_path(tar_path))
        stats["index_sha256"] = hashlib.sha256(sidecar_path(tar_path).read_bytes()).hexdigest()
        with atomic_file(stats_path(part.folder, part.name)) as file:
            file.write(json.dumps(stats, indent=1).encode())
    except OSError as error:
        raise write_error(error, part.folder) from error
    return stats


def stats_path(folder: Path, name: str) -> Path:
    """Where the stats of a shard lie."""
    return folder / f"{name}.stats.json"


def _write_tar(part: ShardPart, tar_path: Path) -> tuple[dict[str, Any], list[list[str]]]:
    failures: list[dict[str, Any]] = []
    captions: list[list[str]] = []
    counts = dict.fromkeys(("num_captions", "num_labelled", "num_reencoded", "image_bytes"), 0)
    with atomic_file(tar_path) as file:
        hashing = _HashingFile(file)
        with TarWriter(hashing, user="", group="", mode=0o644, encoder=False, mtime=0) as writer:
            for row, record in enumerate(part.records):
                key = f"{part.name}{row:0{part.key_digits}d}"
                try:
                    sample = _prepare(record, part.options)
                except _LeftOutError as reason:
                    failures.append({"key": record.key, "row": row, "cause": reason.cause, "message": str(reason)})
                    continue
                writer.write({"__key__": key, **_members(sample, part.options.class_names)})
                captions.append(sample.captions)
                counts["num_captions"] += len(sample.captions)
                counts["num_labelled"] += record.label is not None
                counts["num_reencoded"] += sample.image.reencoded
                counts["image_bytes"] += len(sample.image.data)
    stats = {
        "shard": part.name,
        "num_records": len(part.records),
        "num_samples": len(captions),
        **counts,
        "tar_bytes": hashing.size,
        "tar_sha256": hashing.sha256.hexdigest(),
        "failures": failures,
    }
    return stats, captions


class _LeftOutError(Exception):
    """A record that does not get into the shard."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def _prepare(record: Record, options: ShardOptions) -> Sample:
    captions = fold_captions(record.captions)
    if not captions and record.label is not None and record.label < len(options.class_names):
        captions = fold_captions([options.class_names[record.label].replace("_", " ")])
    if not captions:
        raise _LeftOutError("no caption", f"{record.key} has no caption, and no class whose name could stand for one.")
    try:
        image = store_image(record.image.read(), record.key, options.max_side, options.quality)
    except BrokenImageError as error:
        raise _LeftOutError(error.cause, str(error)) from error
    except DataError as error:
        raise _LeftOutError("unreadable file", str(error)) from error
    return Sample(image, captions, record)


def fold_captions(captions: Sequence[str]) -> list[str]:
    """Each caption on one line, as valid Unicode, without the empty ones."""
    folded = (" ".join(caption.encode("utf-8", "replace").decode().split()) for caption in captions)
    return [caption for caption in folded if caption]


def _members(sample: Sample, class_names: Sequence[str]) -> dict[str, bytes]:
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
