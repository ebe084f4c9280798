"""Images of any origin in order, decoded and preprocessed, in chunks: what embedding and evaluation read.

    for rows, images, failures in iterate_images(paths, preprocess, batch_size=64, workers=4):
        ...                                    # images (b, 3, H, W) uint8, rows: their positions in `paths`

An unreadable image does not stop the others; it is reported with its position. Work is spread over threads, not
processes: decoding and resizing release the interpreter lock, so threads scale, start at once and share memory.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vlkit.data.decode import MAX_PIXELS, Exif, decode_image, image_to_tensor
from vlkit.data.records import ImageRef, Record
from vlkit.data.transforms import Preprocess
from vlkit.errors import DataError

ImageLike = Record | str | Path | Image.Image

# Handing one image to a thread costs as much as a tenth of decoding a small one.
_IMAGES_PER_TASK = 8


class ImageChunk(NamedTuple):
    """Up to `batch_size` consecutive items."""

    rows: list[int]  # (b,) positions of the readable ones in `items`
    images: Tensor  # (b,3,size,size) uint8
    failures: list[tuple[int, str]]  # position in `items`, what is wrong


def iterate_images(
    items: Sequence[ImageLike],
    preprocess: Preprocess,
    *,
    batch_size: int,
    workers: int = 0,
    reference: bool = False,
    exif: Exif = "apply",
    max_pixels: int = MAX_PIXELS,
) -> Iterator[ImageChunk]:
    """Decode and preprocess images in order.

    Args:
        items: N records, paths or pillow images.
        preprocess: makes every image a square of its size.
        batch_size: items per chunk, readable or not.
        workers: threads; 0 does the work in the caller's thread. At most two chunks are prepared ahead.
        reference: decode and resize with pillow: to the bit what open_clip computes, several times slower.
        exif: whether images are turned as their EXIF orientation says; open_clip and most peers ignore it.
        max_pixels: images with more pixels count as unreadable.

    Yields:
        One chunk per `batch_size` items; `rows` and `failures` together hold each of its positions once.
    """

    def one(item: ImageLike) -> Tensor | str:
        try:
            pixels = read_image(item, reference=reference, exif=exif, max_pixels=max_pixels)
        except DataError as error:
            return str(error)
        return preprocess.with_pillow(pixels) if reference else preprocess(pixels)

    def some(part: Sequence[ImageLike]) -> list[Tensor | str]:
        return [one(item) for item in part]

    def parts(chunk: Sequence[ImageLike]) -> list[Sequence[ImageLike]]:
        return [chunk[i : i + _IMAGES_PER_TASK] for i in range(0, len(chunk), _IMAGES_PER_TASK)]

    def collect(start: int, futures: list[Future[list[Tensor | str]]]) -> ImageChunk:
        return _chunk(start, [result for future in futures for result in future.result()], preprocess.size)

    starts = range(0, len(items), batch_size)
    if workers < 1:
        for start in starts:
            yield _chunk(start, some(items[start : start + batch_size]), preprocess.size)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="vlkit-images") as pool:
        ahead: deque[tuple[int, list[Future[list[Tensor | str]]]]] = deque()
        try:
            for start in starts:
                ahead.append((start, [pool.submit(some, part) for part in parts(items[start : start + batch_size])]))
                if len(ahead) > 2:
                    yield collect(*ahead.popleft())
            while ahead:
                yield collect(*ahead.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # the caller may stop early


def read_image(
    item: ImageLike, *, reference: bool = False, exif: Exif = "apply", max_pixels: int = MAX_PIXELS
) -> Tensor:
    """One image in full size.

    Args:
        item: a record, a path or a pillow image.
        reference, exif, max_pixels: see `iterate_images`.

    Returns:
        (3, H, W) uint8 RGB.

    Raises:
        DataError: it cannot be read, is no image or is broken.
    """
    if isinstance(item, Image.Image):
        return image_to_tensor(item, where=getattr(item, "filename", "") or "pillow image", exif=exif)
    ref, where = (item.image, item.key) if isinstance(item, Record) else (ImageRef(path=str(item)), str(item))
    return decode_image(ref.read(), where=where, exif=exif, max_pixels=max_pixels, reference=reference)


def _chunk(start: int, results: list[Tensor | str], size: int) -> ImageChunk:
    rows = [start + i for i, result in enumerate(results) if not isinstance(result, str)]
    images = [result for result in results if not isinstance(result, str)]
    failures = [(start + i, result) for i, result in enumerate(results) if isinstance(result, str)]
    stacked = torch.stack(images) if images else torch.empty(0, 3, size, size, dtype=torch.uint8)
    return ImageChunk(rows, stacked, failures)
