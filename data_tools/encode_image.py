"""One image on its way into a shard: its own bytes if they will do, else a smaller JPEG.

Every image is decoded once, so that what goes into a shard is known to be readable.
"""

from typing import NamedTuple

import numpy as np
import simplejpeg

from vlkit.data.decode import open_image
from vlkit.data.transforms import resize

# How files of a format open (bytes, position), and what their members are called.
_MAGIC = (
    (b"\xff\xd8", 0, "jpg"),
    (b"\x89PNG", 0, "png"),
    (b"WEBP", 8, "webp"),
    (b"GIF8", 0, "gif"),
    (b"BM", 0, "bmp"),
    (b"II*\0", 0, "tif"),
    (b"MM\0*", 0, "tif"),
    (b"P3", 0, "ppm"),
    (b"P5", 0, "pgm"),
    (b"P6", 0, "ppm"),
    (b"ftypavi", 4, "avif"),
    (b"ftyp", 4, "heic"),
)

_CHECKED_SIDE = 32  # pixels to which a kept JPEG is decoded: reads all of its data in half the time


class StoredImage(NamedTuple):
    """An image as it goes into a shard; sizes are those it shows, after EXIF rotation."""

    data: bytes
    extension: str
    width: int
    height: int
    original_width: int
    original_height: int
    reencoded: bool


def store_image(data: bytes, where: str, max_side: int | None, quality: int) -> StoredImage:
    """Check an encoded image and make it smaller where it is larger than needed.

    Args:
        data: the encoded image.
        where: names it in messages.
        max_side: pixels; an image with a longer side is turned upright, resized to it (bicubic, antialiased) and
            encoded as JPEG. None keeps all bytes as they are.
        quality: of that JPEG.

    Raises:
        BrokenImageError: it cannot be decoded, or has too many pixels.
    """
    image = open_image(data, where=where)
    size = (image.width, image.height)
    if max_side is None or max(size) <= max_side:
        image.decode(image.shrink_for(*size, _CHECKED_SIDE))
        return StoredImage(data, _extension(data), *size, *size, False)
    width, height = (max(round(side * max_side / max(size)), 1) for side in size)
    # A JPEG is decoded at a fraction while that leaves twice the size wanted: off by 3 grey levels at most.
    decoded = image.decode(image.shrink_for(image.height, image.width, min(width, height)))
    small = resize(decoded, height, width, "bicubic").permute(1, 2, 0).numpy()
    encoded = simplejpeg.encode_jpeg(np.ascontiguousarray(small), quality, "RGB", "420", fastdct=False)
    return StoredImage(encoded, "jpg", width, height, *size, True)


def _extension(data: bytes) -> str:
    return next((name for magic, at, name in _MAGIC if data[at : at + len(magic)] == magic), "img")
