"""Parts of images as images: cut, and embedded a few at a time.

features = embed_crops(source, [Crop(record, Box(20, 30, 80, 60)), Crop(record)], batch_size=64)
"""

import io
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from eval.coco_instances import Box
from eval.features import EmbeddingSource
from vlkit.contracts import Progress
from vlkit.data.images import read_image
from vlkit.data.records import ImageRef, Record
from vlkit.errors import DataError
from vlkit.features.feature_set import check_finite

# Crops held as pixels at once.
_AT_ONCE = 256
# GeneCIS's; context is added on the left and above only.
GENECIS_DILATION = 0.7

Cutter = Callable[[Image.Image, Box], Image.Image]


class Crop(NamedTuple):
    """A part of an image, or all of it."""

    image: Record
    box: Box | None = None

    @property
    def key(self) -> str:
        """Names it."""
        if self.box is None:
            return self.image.key
        return f"{self.image.key}@" + ",".join(f"{side:g}" for side in self.box)


class EmbeddedCrops(NamedTuple):
    """Features of the crops that could be made."""

    rows: dict[str, int]  # a crop's key to its row
    features: Tensor  # (n,D) unit norm
    unreadable: tuple[tuple[str, str], ...]  # an image's key and the reason


def embed_crops(
    source: EmbeddingSource,
    crops: Sequence[Crop],
    batch_size: int,
    workers: int | None,
    progress: Progress | None,
    cutter: Cutter,
) -> EmbeddedCrops:
    """Features of crops, each once.

    Args:
        source: the model.
        crops: in any order; those of one image are best together.
        batch_size, workers, progress: as for any embedding.
        cutter: makes an image of an image and a box.

    Raises:
        DataError: none could be read.
        GalleryError: features that are not finite.
    """
    distinct = list({crop.key: crop for crop in crops}.values())
    rows: dict[str, int] = {}
    parts: list[Tensor] = []
    unreadable: dict[str, str] = {}
    for start in range(0, len(distinct), _AT_ONCE):
        chunk = distinct[start : start + _AT_ONCE]
        records = [record for record in (_cut(crop, cutter, unreadable) for crop in chunk) if record is not None]
        read = source.embed_images_where_readable(records, batch_size=batch_size, workers=workers)
        unreadable |= {records[position].key: reason for position, reason in read.failures}
        for position in read.kept:
            rows[records[position].key] = len(rows)
        parts.append(read.embeddings)
        if progress:
            progress(start + len(chunk), len(distinct))
    if not rows:
        raise DataError(f"None of the {len(distinct)} images and parts of images could be read.")
    features = torch.cat(parts)
    check_finite(features, list(rows), "images")
    return EmbeddedCrops(rows, features, tuple(unreadable.items()))


def plain_cut(image: Image.Image, box: Box) -> Image.Image:
    """The pixels of a box, at least one of them."""
    left, top = min(int(box.left), image.width - 1), min(int(box.top), image.height - 1)
    right, bottom = round(box.left + box.width), round(box.top + box.height)
    return image.crop((max(left, 0), max(top, 0), max(right, left + 1), max(bottom, top + 1)))


def genecis_cut(image: Image.Image, box: Box) -> Image.Image:
    """GeneCIS's crop: the box with 0.7 of its size on the left and above, on a black square.

    Source: Vaze et al. 2023, arXiv:2306.07969; released code genecis, datasets/vaw_dataset.py, as it is.
    """
    cut = image.crop(genecis_corners(box, image.width, image.height))
    side = max(cut.size)
    square = Image.new("RGB", (side, side))
    square.paste(cut, ((side - cut.width) // 2, (side - cut.height) // 2))
    return square


def genecis_corners(box: Box, width: int, height: int) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of GeneCIS's crop."""
    left, top = max(0.0, box.left - GENECIS_DILATION * box.width), max(0.0, box.top - GENECIS_DILATION * box.height)
    right = min(float(width), left + (1 + GENECIS_DILATION) * box.width)
    return left, top, right, min(float(height), top + (1 + GENECIS_DILATION) * box.height)


def _cut(crop: Crop, cutter: Cutter, unreadable: dict[str, str]) -> Record | None:
    if crop.box is None:
        return crop.image
    try:
        # Boxes are given on the file's own pixels, without its EXIF rotation.
        pixels = read_image(crop.image, exif="ignore")
    except DataError as error:
        unreadable[crop.image.key] = str(error)
        return None
    stored = io.BytesIO()
    cutter(Image.fromarray(pixels.permute(1, 2, 0).numpy()), crop.box).save(stored, "PNG", compress_level=0)
    return Record(crop.key, ImageRef(data=stored.getvalue()))
