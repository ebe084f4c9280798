"""Are shortlisted pairs of images really copies? Looked at again, as pixels or as embeddings."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_tools.perceptual_hash import THUMBNAIL
from data_tools.same_picture import compare
from data_tools.signatures import thumbnail_of_bytes
from vlkit.contracts import Progress
from vlkit.data.decode import decode_image
from vlkit.data.records import ImageRef, Record
from vlkit.engine import map_parts
from vlkit.errors import DataError

MIN_COSINE = 0.95

Embed = Callable[[Sequence[Record]], Tensor]  # N records -> (N,D) unit norm

_PAIRS_IN_A_PART = 1024
_SAME_PIXELS = 0.999  # correlation from which on pixels are compared one by one


class Shortlist(NamedTuple):
    """P pairs of images whose hashes are close."""

    first: NDArray[np.int64]  # (P,)
    second: NDArray[np.int64]  # (P,)
    window: NDArray[np.int64]  # (P,) window of `first` that looks like the whole of `second`


class Confirmed(NamedTuple):
    """What a second look at P pairs showed."""

    similarity: NDArray[np.float32]  # (P,) correlation, or cosine of embeddings; -1 where an image cannot be read
    same: NDArray[np.bool_]  # (P,) copies
    same_pixels: NDArray[np.bool_]  # (P,) copies that decode to equal pixels


class _Part(NamedTuple):
    images: list[ImageRef]
    first: NDArray[np.int64]  # positions in `images`
    second: NDArray[np.int64]
    window: NDArray[np.int64]
    min_correlation: float


def confirm_pairs(
    shortlist: Shortlist,
    first_image: Callable[[int], ImageRef],
    second_image: Callable[[int], ImageRef],
    *,
    min_correlation: float,
    min_cosine: float = MIN_COSINE,
    embed: Embed | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> Confirmed:
    """Look at pairs again.

    Args:
        shortlist: the pairs; in the order of `first`, images are read once for several pairs.
        first_image, second_image: from the shortlist's numbers to images.
        min_correlation: of the fitted thumbnails of copies, see `same_picture`.
        min_cosine: of the embeddings of copies; counts instead where `embed` is given.
        embed: images to unit vectors.
        workers: processes that compare pixels.
        progress: called with (pairs done, all pairs).
    """
    total = len(shortlist.first)
    found = Confirmed(np.full(total, -1, np.float32), np.zeros(total, bool), np.zeros(total, bool))
    starts = range(0, total, _PAIRS_IN_A_PART)
    parts = [_part(shortlist, start, first_image, second_image, min_correlation) for start in starts]
    done = 0
    for position, looked in map_parts(_look, parts, workers):
        rows = slice(starts[position], starts[position] + _PAIRS_IN_A_PART)
        if embed is not None:
            cosine = _cosines(parts[position], embed)
            looked = Confirmed(cosine, cosine >= min_cosine, looked.same_pixels)
        for column, values in zip(found, looked, strict=True):
            column[rows] = values
        done += len(parts[position].first)
        if progress:
            progress(done, total)
    return found


def _part(
    shortlist: Shortlist,
    start: int,
    first_image: Callable[[int], ImageRef],
    second_image: Callable[[int], ImageRef],
    min_correlation: float,
) -> _Part:
    """A run of pairs with the images it needs, each once."""
    rows = slice(start, start + _PAIRS_IN_A_PART)
    sides: list[NDArray[np.int64]] = []
    images: list[ImageRef] = []
    for numbers, image in ((shortlist.first[rows], first_image), (shortlist.second[rows], second_image)):
        distinct, place = np.unique(numbers, return_inverse=True)
        sides.append(place + len(images))
        images += [image(number) for number in distinct.tolist()]
    return _Part(images, sides[0], sides[1], shortlist.window[rows], min_correlation)


def _look(part: _Part) -> Confirmed:
    """Compare the thumbnails of the pairs, and the pixels of those that look the same; runs in a worker."""
    thumbnails, readable = np.zeros((len(part.images), THUMBNAIL, THUMBNAIL, 3), np.uint8), []
    for position, image in enumerate(part.images):
        try:
            thumbnails[position], _ = thumbnail_of_bytes(image.read(), "image")
            readable.append(True)
        except DataError:
            readable.append(False)
    match = compare(thumbnails[part.first], thumbnails[part.second], part.window, part.min_correlation)
    can = np.array(readable)[part.first] & np.array(readable)[part.second]
    same = match.same & can
    equal = same & (match.correlation >= _SAME_PIXELS)
    for pair in np.flatnonzero(equal):
        equal[pair] = _equal_pixels(part.images[part.first[pair]], part.images[part.second[pair]])
    return Confirmed(np.where(can, match.correlation, -1).astype(np.float32), same, equal)


def _equal_pixels(first: ImageRef, second: ImageRef) -> bool:
    try:
        pixels = [decode_image(image.read(), where="image") for image in (first, second)]
    except DataError:
        return False
    return pixels[0].shape == pixels[1].shape and torch.equal(*pixels)


def _cosines(part: _Part, embed: Embed) -> NDArray[np.float32]:
    records = [Record(str(position), image) for position, image in enumerate(part.images)]
    features = embed(records)
    return (features[part.first] * features[part.second]).sum(1).numpy().astype(np.float32)
