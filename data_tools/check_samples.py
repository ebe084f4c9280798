"""The checks of single samples: images decode, captions, JSON and labels can be read. Runs in workers."""

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.chunks import Chunk
from data_tools.write_shard import stats_path
from vlkit.data.decode import BrokenImageError, decode_image
from vlkit.data.shard_columns import Columns
from vlkit.data.shard_index import MAX_CLASSES
from vlkit.data.shard_sidecar import build_table
from vlkit.data.tar_walk import open_tar
from vlkit.errors import DataError

_DECODE_SIDE = 32  # JPEGs may be decoded this much smaller: all their data are still read, in half the time


class Finding(NamedTuple):
    """What one chunk of samples came to."""

    num_decoded: int
    num_captions: NDArray[np.int64]  # (samples of the chunk,)
    problems: list[tuple[str, str]]  # cause, shard/key
    broken: dict[int, str]  # row of a sample with a problem -> its first cause


def check_chunk(chunk: Chunk) -> Finding:
    """Decode the images of a chunk and read its captions; runs in a worker."""
    columns, path = walked(chunk.tar), Path(chunk.tar)
    # With the first chunk of a shard, so that the sums are computed in the workers too.
    problems = _check_sum(path) if chunk.start == 0 else []
    num_decoded, num_captions = 0, np.zeros(chunk.stop - chunk.start, np.int64)
    broken: dict[int, str] = {}
    for position, row in enumerate(range(chunk.start, chunk.stop)):
        where, before = sample_name(path, columns.key(row)), len(problems)
        try:
            decode_image(columns.read(*columns.place("image", row)), where=where, min_size=_DECODE_SIDE)
            num_decoded += 1
        except BrokenImageError as error:
            problems.append((f"image that does not decode: {error.cause}", where))
        except DataError as error:
            problems.append(("sample that cannot be read", f"{where} ({error})"))
        num_captions[position], found = read_texts(columns, row)
        problems += [(cause, where) for cause in found]
        if len(problems) > before:
            broken[row] = problems[before][0]
    return Finding(num_decoded, num_captions, problems, broken)


def read_texts(columns: Columns, row: int) -> tuple[int, list[str]]:
    """The number of captions of a sample, and what is wrong with its caption, JSON and label."""
    text, data, label = (_content(columns, role, row) for role in ("caption", "json", "cls"))
    causes = []
    values = parse_object(data) if data is not None else {}
    if values is None:
        causes.append("JSON that is no object")
    if label is not None and not _is_whole_number(label):
        causes.append("label that is no whole number")
    captions = _captions_in(values or {})
    if text is not None:
        captions = text.decode("utf-8-sig", "replace").split("\n")
        if "\ufffd" in "".join(captions) and not _is_utf8(text):
            causes.append("caption that is not UTF-8")
    num_captions = sum(bool(caption.strip()) for caption in captions)
    # Without any of the three files the index has reported it already.
    if num_captions == 0 and label is None and (text is not None or data is not None):
        causes.append("no caption")
    return num_captions, causes


def _content(columns: Columns, role: str, row: int) -> bytes | None:
    offset, size = columns.place(role, row)
    return None if offset < 0 else columns.read(offset, size)


def parse_object(data: bytes) -> dict[str, Any] | None:
    """A JSON object, None if it is none."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _captions_in(values: dict[str, Any]) -> list[str]:
    found: Any = next((values[name] for name in ("captions", "caption", "text") if values.get(name)), [])
    return [text for text in (found if isinstance(found, list) else [found]) if isinstance(text, str)]


def _is_whole_number(data: bytes) -> bool:
    try:
        return 0 <= int(data) < MAX_CLASSES
    except ValueError:
        return False


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _check_sum(path: Path) -> list[tuple[str, str]]:
    file = stats_path(path.parent, path.name.removesuffix(".tar"))
    stated = (parse_object(file.read_bytes()) or {}).get("tar_sha256") if file.is_file() else None
    if stated is None:
        return []
    with open_tar(path) as tar:
        found = hashlib.file_digest(tar, "sha256").hexdigest()
    return [] if found == stated else [("tar whose checksum differs from its stats", path.name)]


def walked(tar: str) -> Columns:
    """The columns of a tar as walked now, whatever its sidecar says."""
    state = Path(tar).stat()
    return _walked(tar, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=8)
def _walked(tar: str, _size: int, _modified: int) -> Columns:
    return Columns(build_table(tar), tar)


def sample_name(path: Path, key: bytes) -> str:
    """`shard/key`, which names a sample in messages."""
    return f"{path.name.removesuffix('.tar')}/{key.decode('utf-8', 'backslashreplace')}"
