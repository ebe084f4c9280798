"""A stored set of features as a source of features: what was embedded is looked up, the rest is the model's."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from vlkit.contracts import Progress
from vlkit.data.images import ImageLike
from vlkit.data.records import Record
from vlkit.errors import GalleryError
from vlkit.features.model_card import ModelCard
from vlkit.features.source import FeatureSource
from vlkit.features.stamps import Stamper
from vlkit.features.store import StoredFeatures
from vlkit.models.embedder import EmbeddedChunk, Embedder, check_texts

_AT_ONCE = 1024


@dataclass(frozen=True)
class StoredSource(FeatureSource):
    """Features of `vlkit embed` for the records of the same source, by their keys.

    Attributes:
        stored: the features.
        model: that made them; encodes texts that are no caption of the set, such as prompts.
    """

    stored: StoredFeatures
    model: FeatureSource

    def __post_init__(self) -> None:
        """Check.

        Raises:
            GalleryError: the features are another model's; the message says what differs.
        """
        self.stored.fingerprint.require_same(
            self.model.card.fingerprint, f"Features in {self.stored.folder}", "this model"
        )

    @property
    def card(self) -> ModelCard:
        """The model's."""
        return self.model.card

    @property
    def embedder(self) -> Embedder:
        """The model."""
        return self.model.embedder

    def iterate_embeddings(
        self,
        images: Sequence[ImageLike],
        batch_size: int = 64,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> Iterator[EmbeddedChunk]:
        """Features of records that were embedded; those that could not be read then are failures now.

        Raises:
            GalleryError: a record was not embedded, or its file has another size than it had.
        """
        places = self._places(images)
        norms = self.stored.metadata.column("norm").to_numpy()
        for start in range(0, len(images), _AT_ONCE):
            rows = list(range(start, min(start + _AT_ONCE, len(images))))
            kept = [row for row in rows if places[row] >= 0]
            failures = [(row, self.stored.failures[_key(images[row])]) for row in rows if places[row] < 0]
            chosen = places[kept]
            yield EmbeddedChunk(kept, self._features[chosen], failures, torch.from_numpy(norms[chosen].copy()))
            if progress:
                progress(rows[-1] + 1, len(images))

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """Captions of the set as they are stored, other texts from the model."""
        check_texts(texts)
        others = list(dict.fromkeys(text for text in texts if text not in self._captions))
        found = self.model.embed_texts(others, batch_size, progress) if others else torch.empty(0, self.embed_dim)
        row_of = {text: row + len(self._texts) for row, text in enumerate(others)} | self._captions
        if progress and not others:
            progress(len(texts), len(texts))
        return torch.cat([self._texts, found])[[row_of[text] for text in texts]]

    def _places(self, images: Sequence[ImageLike]) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        row_of = {key: row for row, key in enumerate(self.stored.ids)}
        sizes = self.stored.metadata.column("file_size").to_pylist()
        places = np.array([row_of.get(_key(image), -1) for image in images], np.int64)
        keys = [_key(image) for image in images]
        absent = [key for key, place in zip(keys, places, strict=True) if place < 0 and key not in self.stored.failures]
        if absent:
            raise GalleryError(
                f"{self.stored.folder} has no features of {len(absent)} of {len(images)} images (first: {absent[0]}). "
                "Name the source it was made from, or bring it up to date with `vlkit embed --update`."
            )
        stamper = Stamper()
        for image, place in zip(images, places, strict=True):
            assert isinstance(image, Record)
            size = stamper.stamp(image.image).file_size
            if place >= 0 and size not in (-1, sizes[place]):
                raise GalleryError(
                    f"{image.key} has {size} bytes, and had {sizes[place]} when {self.stored.folder} was made. "
                    "Bring it up to date with `vlkit embed --update`."
                )
        return places

    @cached_property
    def _features(self) -> Tensor:
        return self.stored.images().pooled

    @cached_property
    def _texts(self) -> Tensor:
        has_texts = "text" in self.stored.stored.kinds
        return self.stored.texts().pooled if has_texts else torch.empty(0, self.embed_dim)

    @cached_property
    def _captions(self) -> dict[str, int]:
        captions = (caption for captions in self.stored.captions for caption in captions)
        return {caption: row for row, caption in enumerate(captions)}


def _key(image: ImageLike) -> str:
    if not isinstance(image, Record):
        raise GalleryError("Stored features are found by the keys of records; got an image without one.")
    return image.key
