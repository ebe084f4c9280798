"""What of each sample is compared to find copies: hashes of its bytes, of what it shows, and of its captions."""

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.chunks import Chunk
from data_tools.perceptual_hash import THUMBNAIL, WINDOWS, is_flat, perceptual_hashes, thumbnail
from data_tools.sample_facts import hash64
from vlkit.data.decode import open_image
from vlkit.data.records import Record
from vlkit.data.shard_index import ShardIndex
from vlkit.errors import DataError


@dataclass(frozen=True)
class Signatures:
    """Signatures of n samples with c captions in all."""

    bytes_hash: NDArray[np.uint64]  # (n,) of the encoded image; 0 where it cannot be read
    hashes: NDArray[np.uint64]  # (n, len(WINDOWS)) perceptual
    shown: NDArray[np.bool_]  # (n,) whether the perceptual hashes mean something: the image decodes and is not flat
    pixels: NDArray[np.int64]  # (n,) height x width; 0 where it does not decode
    num_captions: NDArray[np.int64]  # (n,)
    caption_hash: NDArray[np.uint64]  # (c,) of the normal forms; 0 for a caption of which nothing is left
    failures: tuple[str, ...]  # one message for each image that does not decode

    @staticmethod
    def join(parts: Sequence["Signatures"]) -> "Signatures":
        """The signatures of several runs of samples as one, in their order."""
        return Signatures(
            bytes_hash=np.concatenate([part.bytes_hash for part in parts]),
            hashes=np.concatenate([part.hashes for part in parts]),
            shown=np.concatenate([part.shown for part in parts]),
            pixels=np.concatenate([part.pixels for part in parts]),
            num_captions=np.concatenate([part.num_captions for part in parts]),
            caption_hash=np.concatenate([part.caption_hash for part in parts]),
            failures=tuple(failure for part in parts for failure in part.failures),
        )

    def __len__(self) -> int:
        return len(self.bytes_hash)

    def caption_sets(self) -> NDArray[np.uint64]:
        """(n,) equal for samples with the same captions, in any order; 0 for samples without any."""
        sets = np.zeros(len(self), np.uint64)
        for row, part in enumerate(np.split(self.caption_hash, np.cumsum(self.num_captions)[:-1])):
            distinct = np.unique(part[part != 0])
            sets[row] = hash64(distinct.tobytes()) if len(distinct) else 0
        return sets


class _Item(NamedTuple):
    where: str
    read: Callable[[], bytes]
    captions: tuple[str, ...]


def signatures_of_chunk(chunk: Chunk) -> Signatures:
    """Signatures of a run of samples of a shard; runs in a worker."""
    shard = ShardIndex.open(chunk.tar)

    def item(row: int) -> _Item:
        try:
            captions = shard.captions(row)
        except DataError:
            captions = ()
        return _Item(f"{shard.name}/{shard.key(row)}", lambda: shard.image_bytes(row), captions)

    return _signatures(map(item, range(chunk.start, chunk.stop)))


def signatures_of_records(records: Sequence[Record]) -> Signatures:
    """Signatures of records of any source; runs in a worker."""
    return _signatures(_Item(record.key, record.image.read, record.captions) for record in records)


def normal_caption(text: str) -> str:
    """A caption without case, punctuation, compatibility forms (NFKC) and extra spaces."""
    kept = (
        char if unicodedata.category(char)[0] in "LNM" else " "
        for char in unicodedata.normalize("NFKC", text.casefold())
    )
    return " ".join("".join(kept).split())


def _signatures(items: Iterable[_Item]) -> Signatures:
    bytes_hash: list[int] = []
    pixels: list[int] = []
    num_captions: list[int] = []
    caption_hash: list[int] = []
    failures: list[str] = []
    thumbnails = []
    for item in items:
        data, small, size = b"", None, 0
        try:
            data = item.read()
            small, size = thumbnail_of_bytes(data, item.where)
        except DataError as error:
            failures.append(str(error))
        bytes_hash.append(hash64(data) if data else 0)
        thumbnails.append(np.zeros((THUMBNAIL, THUMBNAIL, 3), np.uint8) if small is None else small)
        pixels.append(size)
        num_captions.append(len(item.captions))
        normal = [normal_caption(text).encode("utf-8", "replace") for text in item.captions]
        caption_hash += [hash64(text) if text else 0 for text in normal]
    stacked = np.stack(thumbnails) if thumbnails else np.zeros((0, THUMBNAIL, THUMBNAIL, 3), np.uint8)
    found = np.array(pixels, np.int64)
    return Signatures(
        bytes_hash=np.array(bytes_hash, np.uint64),
        hashes=perceptual_hashes(stacked) if thumbnails else np.zeros((0, len(WINDOWS)), np.uint64),
        shown=(found > 0) & ~is_flat(stacked),
        pixels=found,
        num_captions=np.array(num_captions, np.int64),
        caption_hash=np.array(caption_hash, np.uint64),
        failures=tuple(failures),
    )


def thumbnail_of_bytes(data: bytes, where: str) -> tuple[NDArray[np.uint8], int]:
    """The thumbnail (64, 64, 3) of an encoded image, and the number of its pixels.

    Raises:
        DataError: it does not decode.
    """
    image = open_image(data, where=where)
    return thumbnail(image.decode(image.shrink_for(image.height, image.width, THUMBNAIL))), image.height * image.width
