"""What an evaluator asks of a model, and the check of what it gets."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

from torch import Tensor

from vlkit.contracts import Progress
from vlkit.data.records import Record
from vlkit.errors import DataError, GalleryError
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
    unreadable = tuple((records[position].key, reason) for position, reason in read.failures)
    if not read.kept:
        first = f" First: {unreadable[0][0]}: {unreadable[0][1]}" if unreadable else ""
        raise DataError(f"None of the {len(records)} images could be read.{first}")
    kept = tuple(records[position] for position in read.kept)
    check_finite(read.embeddings, [record.key for record in kept], "images")
    return EmbeddedRecords(kept, read.embeddings, unreadable)


def check_finite(features: Tensor, names: Sequence[str], what: str) -> None:
    """Refuse features from which no ranking follows.

    Args:
        features: (n,D).
        names: (n,) shown for the first broken row.
        what: "images" or "texts".

    Raises:
        GalleryError: a feature is NaN or infinite.
    """
    broken = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if broken:
        raise GalleryError(
            f"The model gives features that are not finite for {len(broken)} of {len(features)} {what} "
            f"(first: {names[broken[0]]!r}). Its weights are damaged or its training diverged; use another checkpoint."
        )


def parts_of(progress: Progress | None, *sizes: int) -> list[Progress | None]:
    """One callback for each of several jobs that together fill one bar of sum(sizes)."""
    if progress is None:
        return [None] * len(sizes)
    report, total = progress, sum(sizes)

    def part(before: int, size: int) -> Progress:
        return lambda done, of: report(before + round(size * done / max(of, 1)), total)

    return [part(sum(sizes[:place]), size) for place, size in enumerate(sizes)]
