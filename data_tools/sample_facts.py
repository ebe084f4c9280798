"""What a summary wants to know of each sample: bytes, hashes, size, format, captions, label."""

import base64
import hashlib
import io
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from data_tools.chunks import Chunk
from vlkit.data.shard_index import ShardIndex
from vlkit.errors import DataError

_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Facts:
    """Facts of n samples with c captions in all."""

    image_bytes: NDArray[np.int64]  # (n,)
    image_hashes: NDArray[np.uint64]  # (n,) of the encoded bytes
    widths: NDArray[np.int64]  # (n,) pixels as shown, after EXIF; 0 where the header cannot be parsed
    heights: NDArray[np.int64]  # (n,)
    num_captions: NDArray[np.int64]  # (n,)
    caption_hashes: NDArray[np.uint64]  # (c,)
    words: NDArray[np.int64]  # (c,) separated by white space
    formats: Counter[str]  # "JPEG RGB"
    labels: Counter[int]
    problems: tuple[tuple[str, str], ...]  # cause, shard/key

    @staticmethod
    def join(parts: Sequence["Facts"]) -> "Facts":
        """The facts of several runs of samples as one, in their order."""
        formats, labels = Counter[str](), Counter[int]()
        for part in parts:
            formats.update(part.formats)
            labels.update(part.labels)
        return Facts(
            image_bytes=np.concatenate([part.image_bytes for part in parts]),
            image_hashes=np.concatenate([part.image_hashes for part in parts]),
            widths=np.concatenate([part.widths for part in parts]),
            heights=np.concatenate([part.heights for part in parts]),
            num_captions=np.concatenate([part.num_captions for part in parts]),
            caption_hashes=np.concatenate([part.caption_hashes for part in parts]),
            words=np.concatenate([part.words for part in parts]),
            formats=formats,
            labels=labels,
            problems=tuple(problem for part in parts for problem in part.problems),
        )


def facts_of(chunk: Chunk) -> Facts:
    """Read the samples of a chunk; image headers are parsed, pixels are not decoded."""
    shard = ShardIndex.open(chunk.tar)
    num_samples = chunk.stop - chunk.start
    sizes, shapes = np.zeros(num_samples, np.int64), np.zeros((num_samples, 2), np.int64)
    image_hashes: list[int] = []
    texts: list[str] = []
    num_captions: list[int] = []
    formats, labels = Counter[str](), Counter[int]()
    problems: list[tuple[str, str]] = []
    for position, row in enumerate(range(chunk.start, chunk.stop)):
        where = f"{shard.name}/{shard.key(row)}"
        data = shard.image_bytes(row)
        sizes[position] = len(data)
        image_hashes.append(hash64(data))
        kind, width, height = _header(data)
        formats[kind] += 1
        shapes[position] = width, height
        captions, label = _texts(shard, row, where, problems)
        texts += captions
        num_captions.append(len(captions))
        labels.update([] if label is None else [label])
    return Facts(
        image_bytes=sizes,
        image_hashes=np.array(image_hashes, np.uint64),
        widths=shapes[:, 0],
        heights=shapes[:, 1],
        num_captions=np.array(num_captions, np.int64),
        caption_hashes=np.array([hash64(text.encode("utf-8", "replace")) for text in texts], np.uint64),
        words=np.array([len(text.split()) for text in texts], np.int64),
        formats=formats,
        labels=labels,
        problems=tuple(problems),
    )


def hash64(data: bytes) -> int:
    """64 bits of BLAKE2b: among 10 million different values two agree with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def _texts(
    shard: ShardIndex, row: int, where: str, problems: list[tuple[str, str]]
) -> tuple[tuple[str, ...], int | None]:
    try:
        return shard.captions(row), shard.label(row)
    except DataError:
        problems.append(("caption or label that cannot be read", where))
        return (), None


def _header(data: bytes) -> tuple[str, int, int]:
    """Format with mode, width and height by the header alone; an oversized image has a size too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the size, which is what we ask for, and of odd metadata
            image = Image.open(io.BytesIO(data))
            turned = b"Exif\0\0" in data and image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    except Image.DecompressionBombError:
        return "too many pixels", 0, 0
    except UnidentifiedImageError:
        return "not an image", 0, 0
    except Exception:  # a broken header: pillow raises a dozen types (struct.error, SyntaxError, OSError, ...)
        return "broken header", 0, 0
    width, height = image.size
    return f"{image.format} {image.mode}", *((height, width) if turned else (width, height))


def thumbnail_of(data: bytes, where: str, side: int) -> str | None:
    """A JPEG data URL of an image, at most `side` pixels a side; None for an image that does not decode."""
    from vlkit.data.decode import decode_image  # imports torch, which the workers that only read headers need not

    try:
        pixels = decode_image(data, where=where, min_size=side)
    except DataError:
        return None
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=70)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
