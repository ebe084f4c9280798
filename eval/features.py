"""What an evaluator asks of a model, and how it asks: images that may be broken, texts, both at once."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor

from vlkit.contracts import Progress
from vlkit.data.records import Record
from vlkit.errors import DataError
from vlkit.features.feature_set import check_finite
from vlkit.features.source import FeatureSource
from vlkit.models.embedder import Embedder

Item = TypeVar("Item")
Found = TypeVar("Found")

# How the embedder reads images, for the record: it decides comparability (open_clip ignores EXIF).
IMAGES = "decoded with EXIF rotation applied, then the model's own preprocessing"


class ReadImages(Protocol):
    """Features of the images that could be read; `vlkit.models.embedder.ReadableImages` is one."""

    @property
    def embeddings(self) -> Tensor:
        """(n,D) float32 unit norm."""

    @property
    def kept(self) -> list[int]:
        """(n,) position of each row among the records."""

    @property
    def failures(self) -> list[tuple[int, str]]:
        """Position and reason of each record that could not be read."""


class EmbeddingSource(Protocol):
    """Turns records and texts into unit vectors; `Embedder` does."""

    def embed_images_where_readable(
        self,
        images: Sequence[Record],
        batch_size: int = 64,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> ReadImages:
        """Features of every readable image, and what is wrong with the others."""

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """(M,D) features, one row a text."""


class ClassifyingSource(EmbeddingSource, Protocol):
    """One that also says how its scores become probabilities; `Embedder` does."""

    @property
    def logit_scale(self) -> float:
        """Multiplier of the cosine."""

    @property
    def logit_bias(self) -> float | None:
        """Added after scaling; None for softmax-trained models."""

    @property
    def family(self) -> Literal["softmax", "sigmoid"]:
        """Over the classes, or each class on its own."""


class SharingSource(FeatureSource):
    """One behind which several processes hold the same model."""

    @abstractmethod
    def share(self, work: Callable[[Embedder, Item], Found], items: Sequence[Item]) -> list[Found]:
        """`work(model, item)` for each item, each done by one of the processes; in the order of `items`.

        Args:
            work: picklable; it asks nothing of the source.
            items: picklable.
        """


def over_items(
    source: FeatureSource,
    work: Callable[[Embedder, Item], Found],
    items: Sequence[Item],
    progress: Progress | None = None,
) -> list[Found]:
    """`work(model, item)` for each item, shared over processes where the source can: for what is no feature.

    Args:
        source: the model.
        work: picklable; it asks nothing of the source.
        items: photographs, for instance.
        progress: called with (done, total) items.
    """
    if isinstance(source, SharingSource):
        return source.share(work, items)
    found = []
    for number, item in enumerate(items, start=1):
        found.append(work(source.embedder, item))
        if progress:
            progress(number, len(items))
    return found


class Unreadable(NamedTuple):
    """A photograph that could not be read."""

    key: str
    reason: str


def over_photographs(
    source: FeatureSource,
    work: Callable[[Embedder, tuple[int, Item]], Found | Unreadable],
    photographs: Sequence[Item],
    progress: Progress | None = None,
) -> tuple[list[Found], tuple[Unreadable, ...]]:
    """`work(model, (number, photograph))` for each, see `over_items`: what came of them, and what could not be read."""
    found = over_items(source, work, list(enumerate(photographs)), progress)
    unreadable = tuple(one for one in found if isinstance(one, Unreadable))
    return [one for one in found if not isinstance(one, Unreadable)], unreadable


class EmbeddedRecords(NamedTuple):
    """Records with their features, and those left out."""

    records: tuple[Record, ...]  # (N,) the readable ones, in their order
    features: Tensor  # (N,D)
    unreadable: tuple[tuple[str, str], ...]  # key and reason


def embed_records(
    source: EmbeddingSource, records: Sequence[Record], batch_size: int, workers: int | None, progress: Progress | None
) -> EmbeddedRecords:
    """Features of the images of `records`; unreadable ones are set apart by name.

    Raises:
        DataError: no image could be read.
        GalleryError: features that are not finite.
    """
    read = source.embed_images_where_readable(records, batch_size=batch_size, workers=workers, progress=progress)
    kept, unreadable = readable(records, read.kept, read.failures)
    check_finite(read.embeddings, [record.key for record in kept], "images")
    return EmbeddedRecords(kept, read.embeddings, unreadable)


def embed_texts(
    source: EmbeddingSource, texts: Sequence[str], progress: Progress | None = None, prefix: str = ""
) -> Tensor:
    """(M,D) features of texts, each behind the prefix.

    Raises:
        GalleryError: features that are not finite.
    """
    features = source.embed_texts([prefix + text for text in texts] if prefix else texts, progress=progress)
    check_finite(features, texts, "texts")
    return features


class EmbeddedPairs(NamedTuple):
    """Images and texts, each embedded once however often it occurs, and which row of the features it has."""

    images: EmbeddedRecords
    texts: Tensor  # (M,D)
    image_row: dict[str, int]  # by key; only those that could be read
    text_row: dict[str, int]


def embed_pairs(
    source: EmbeddingSource,
    records: Iterable[Record],
    texts: Iterable[str],
    batch_size: int,
    workers: int | None,
    progress: Progress | None,
    prefix: str = "",
) -> EmbeddedPairs:
    """Features of images and of texts behind the prefix.

    Raises:
        DataError: no image could be read.
        GalleryError: features that are not finite.
    """
    distinct = list({record.key: record for record in records}.values())
    texts = list(dict.fromkeys(texts))
    of_images, of_texts = parts_of(progress, len(distinct), len(texts))
    images = embed_records(source, distinct, batch_size, workers, of_images)
    return EmbeddedPairs(
        images,
        embed_texts(source, texts, of_texts, prefix),
        {record.key: row for row, record in enumerate(images.records)},
        {text: row for row, text in enumerate(texts)},
    )


def readable(
    records: Sequence[Record], kept: Sequence[int], failures: Sequence[tuple[int, str]]
) -> tuple[tuple[Record, ...], tuple[tuple[str, str], ...]]:
    """The records that could be read, by their positions, and key and reason of the others.

    Raises:
        DataError: no image could be read.
    """
    unreadable = tuple((records[position].key, reason) for position, reason in failures)
    if not kept:
        first = f" First: {unreadable[0][0]}: {unreadable[0][1]}" if unreadable else ""
        raise DataError(f"None of the {len(records)} images could be read.{first}")
    return tuple(records[position] for position in kept), unreadable


def parts_of(progress: Progress | None, *sizes: int) -> list[Progress | None]:
    """One callback for each of several jobs that together fill one bar of sum(sizes)."""
    if progress is None:
        return [None] * len(sizes)
    report, total = progress, sum(sizes)

    def part(before: int, size: int) -> Progress:
        return lambda done, of: report(before + round(size * done / max(of, 1)), total)

    return [part(sum(sizes[:place]), size) for place, size in enumerate(sizes)]
