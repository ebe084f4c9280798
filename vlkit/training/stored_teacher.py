"""A teacher's features that lie in the shards, where `vlkit shards reinforce` has put them, or another tool.

    batch = StoredTeacher(shards, teacher_of(shards))(batch)       # batch.extra["teacher_image"], ["teacher_text"]

A sample holds `teacher_image.npy` (E,) and `teacher_text.npy` (captions, E), floats of any length. `teacher.json`
beside the shards says which teacher that was; shards whose teachers differ are never mixed. Without it (shards of
another tool, or at a URL) the features are taken as they are. With it, `teacher_image.npy` may be (1+views, E): of the
whole image, and of views of it that training shows the student again, see `vlkit/data/replay.py`.
"""

import io
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkit.contracts import ImageTextBatch
from vlkit.data.atomic import atomic_file
from vlkit.data.caption_choice import texts_of_field
from vlkit.data.captions import caption_hash
from vlkit.data.collate import VIEW
from vlkit.data.shard_index import ShardIndex, ShardSet
from vlkit.errors import DataError, GalleryError
from vlkit.features.feature_set import Fingerprint

TEACHER_IMAGE, TEACHER_TEXT = "teacher_image.npy", "teacher_text.npy"
TEACHER_FILE = "teacher.json"

Array = NDArray[np.float32]
_MAGIC = b"\x93NUMPY\x01\x00"


@dataclass(frozen=True)
class TeacherRecord:
    """Which teacher's features shards hold, and of what."""

    fingerprint: Fingerprint
    embed_dim: int
    logit_scale: float
    fields: tuple[str, ...] = ()  # of the .json files, whose texts' features follow those of the captions
    views: int = 0  # of each image, whose features follow that of the whole image
    augment: Mapping[str, Any] | None = None  # [data.augment] by which these were drawn

    def write(self, folder: Path) -> None:
        """Put it beside shards."""
        value = {**asdict(self), "fingerprint": self.fingerprint.to_json()}
        with atomic_file(folder / TEACHER_FILE) as file:
            file.write(json.dumps(value, indent=1).encode())

    @classmethod
    def read(cls, folder: Path) -> "TeacherRecord | None":
        """The record beside the shards of a folder, None where there is none.

        Raises:
            DataError: it is something else.
        """
        path = folder / TEACHER_FILE
        if not path.is_file():
            return None
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            fingerprint = Fingerprint.from_json(value["fingerprint"], path)
            numbers = int(value["embed_dim"]), float(value["logit_scale"])
            return cls(fingerprint, *numbers, tuple(value["fields"]), int(value["views"]), value["augment"])
        except (OSError, ValueError, KeyError, TypeError, GalleryError) as error:
            raise DataError(
                f"{path} is no record of a teacher ({error!r}). Copy it again from where the shards come from, or "
                "delete it to use their features unchecked."
            ) from error

    def differences(self, other: "TeacherRecord") -> list[str]:
        """One line for each thing in which two differ; empty when their features may be mixed."""
        found = self.fingerprint.differences(other.fingerprint)
        names = ("fields", "views", "augment")
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return found + [f"{name}: {mine} here, {theirs} there" for name, mine, theirs in pairs if mine != theirs]

    def identity(self) -> dict[str, Any]:
        """What must be the same for a run to be continued, as JSON types."""
        views = {"views": self.views, "augment": self.augment} if self.views else {}
        return {**self.fingerprint.identity, "fields": list(self.fields), **views}


def teacher_of(shards: ShardSet) -> TeacherRecord | None:
    """The one teacher whose features shards hold; None where nothing says which it was.

    Raises:
        DataError: the shards of two folders hold features of different teachers.
    """
    return teacher_of_folders(list(dict.fromkeys(shard.path.parent for shard in shards.shards)))


def teacher_of_folders(folders: Sequence[Path]) -> TeacherRecord | None:
    """The same of the shards in some folders."""
    first, record = folders[0], TeacherRecord.read(folders[0])
    for folder in folders[1:]:
        other = TeacherRecord.read(folder)
        if (record is None) != (other is None):
            there, lacking = (folder, first) if record is None else (first, folder)
            raise DataError(
                f"The shards in {there} say which teacher their features are of ({TEACHER_FILE}), those in {lacking} "
                "do not. Store the features of both with one teacher: `vlkit shards reinforce`."
            )
        found = record.differences(other) if record is not None and other is not None else []
        if found:
            raise DataError(
                f"The shards in {first} and {folder} hold features of different teachers: {'; '.join(found)}. Use "
                "shards of one teacher; `vlkit shards reinforce` stores its features anew."
            )
    return record


class StoredTeacher:
    """Adds the stored features to batches.

    Args:
        shards: that hold them.
        record: of `teacher_of`.
        own_scale: put the teacher's logit scale beside its features, where it is known.
    """

    def __init__(self, shards: ShardSet, record: TeacherRecord | None, own_scale: bool = True) -> None:
        self._shards, self._fields = shards, record.fields if record is not None else ()
        self._views = record.views if record is not None else 0
        self._extra: dict[str, Tensor] = {}
        if record is not None and own_scale:
            self._extra["teacher_logit_scale"] = torch.tensor(record.logit_scale)

    def each(self, batches: Iterator[ImageTextBatch]) -> Iterator[ImageTextBatch]:
        """All batches with the features."""
        return map(self, batches)

    def __call__(self, batch: ImageTextBatch) -> ImageTextBatch:
        """The batch with `teacher_image` (B,E), `teacher_text` (R,E), unit norm, and the scale where it is known.

        Broken samples get zeros; they do not count.

        Raises:
            DataError: a sample has none, or of another shape.
        """
        ids, valid = batch.ids.tolist(), batch.valid.tolist()
        # Row 0 is of the whole image, which is also what a run without augmentation shows.
        rows = (batch.extra[VIEW] + 1).tolist() if VIEW in batch.extra else [0] * len(ids)
        numbers = zip(ids, rows, valid, strict=True)
        known = [self._read(number, row) if good else None for number, row, good in numbers]
        images = [None if one is None else one.image for one in known]
        texts: list[Array | None] = []
        for row, hashed in zip(batch.text_to_image.tolist(), batch.caption_hash.tolist(), strict=True):
            taught = known[row]
            texts.append(None if taught is None else taught.text_of(hashed))
        width = _common_width([one for one in known if one is not None])
        found = {"teacher_image": _rows(images, width), "teacher_text": _rows(texts, width)}
        return batch._replace(extra={**batch.extra, **found, **self._extra})

    def _read(self, number: int, view: int) -> "_Taught":
        shard, i = self._shards.locate(number)
        captions = texts_of_sample(shard, i, self._fields)
        texts = _stored(shard, i, TEACHER_TEXT, len(captions))
        hashes = {caption_hash(caption): row for caption, row in zip(captions, texts, strict=True)}
        where = f"{shard.path.name}, sample {shard.key(i)}"
        return _Taught(where, _stored(shard, i, TEACHER_IMAGE, 1 + self._views)[view], hashes)


def texts_of_sample(shard: ShardIndex, i: int, fields: Sequence[str]) -> list[str]:
    """The texts of a sample that have features, in their order: its captions, then those in the fields.

    Raises:
        DataError: its .json cannot be read.
    """
    return [*shard.captions(i), *(text for field in fields for text in texts_of_field(shard, i, field))]


class _Taught(NamedTuple):
    """What a sample stores of the teacher."""

    where: str
    image: Array  # (E,)
    texts: dict[int, Array]  # hash of a caption -> (E,)

    def text_of(self, hashed: int) -> Array:
        if hashed not in self.texts:
            raise DataError(
                f"{self.where}: the caption trained on is none of those that .{TEACHER_TEXT} has the teacher's "
                "features of. Train on these, store the features of more fields (`vlkit shards reinforce --field`), "
                "or name a teacher in loss.distillation."
            )
        return self.texts[hashed]


def _common_width(known: Sequence[_Taught]) -> int:
    """E of all of them; 1 where there is none."""
    width = len(known[0].image) if known else 1
    for one in known:
        other = next((len(row) for row in (one.image, *one.texts.values()) if len(row) != width), width)
        if other != width:
            raise DataError(
                f"{one.where}: the teacher's features are {other} wide, those of {known[0].where} {width}: they are of "
                "two teachers. Store the features of one in all samples (`vlkit shards reinforce`)."
            )
    return width


def _stored(shard: ShardIndex, i: int, suffix: str, rows: int) -> Array:
    data = shard.read_member(i, suffix)
    where = f"{shard.path.name}, sample {shard.key(i)}"
    if data is None:
        raise DataError(
            f"{where}: there is no .{suffix}. loss.distillation without a teacher reads the teacher's features from "
            "the shards; store them in every sample (`vlkit shards reinforce`), or name a teacher."
        )
    try:
        array = np.atleast_2d(parse_npy(data))
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{where}: .{suffix} is no array of numpy ({error}).") from error
    if array.ndim != 2 or len(array) != rows or array.dtype.kind != "f":
        raise DataError(
            f"{where}: .{suffix} holds {array.dtype} of shape {array.shape}; expected {rows} row(s) of floats, "
            f"{'one a caption' if suffix == TEACHER_TEXT else 'one an image, and one for each view'}."
        )
    array = array.astype(np.float32)
    unit: Array = array / np.maximum(np.linalg.norm(array, axis=1, keepdims=True), 1e-12)
    return unit


def parse_npy(data: bytes) -> NDArray[Any]:
    """An array from the bytes of a .npy file; no pickles.

    As `np.load`, which takes ten times as long on arrays this small: nearly all of it for the header, which is the
    same in most samples.

    Raises:
        ValueError, EOFError: it is something else, or cut.
    """
    if not data.startswith(_MAGIC) or len(data) < 10:
        loaded: NDArray[Any] = np.load(io.BytesIO(data), allow_pickle=False)
        return loaded
    end = 10 + struct.unpack("<H", data[8:10])[0]
    shape, by_columns, kind = _header(data[:end])
    if kind.hasobject:
        raise ValueError("it holds Python objects")
    count = int(np.prod(shape))
    return np.frombuffer(data, kind, count, end).reshape(shape, order="F" if by_columns else "C")


@lru_cache(maxsize=64)
def _header(data: bytes) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    file = io.BytesIO(data[8:])
    shape, by_columns, kind = np.lib.format.read_array_header_1_0(file)
    return shape, by_columns, kind


def _rows(rows: list[Array | None], width: int) -> Tensor:
    out = torch.zeros(len(rows), width)
    for number, row in enumerate(rows):
        if row is not None:
            out[number] = torch.from_numpy(row)
    return out
