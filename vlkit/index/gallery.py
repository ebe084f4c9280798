"""A folder of features and the index in it: building, adding, and asking.

build_index("features/flickr8k")
gallery = open_gallery("features/flickr8k")
found = gallery.find(source, text="a dog in the snow", k=10)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import torch.nn.functional as F
from torch import Tensor

from vlkit.data.records import ImageRef
from vlkit.errors import ConfigError, GalleryError
from vlkit.features.source import FeatureSource
from vlkit.features.store import ABOUT, StoredFeatures, open_features, read_about
from vlkit.index.faiss_index import EmbeddingIndex, read_index_about

INDEX = "index"
_COLUMNS = ("image_path", "offset", "size", "column", "caption")


class Found(NamedTuple):
    """One result."""

    rank: int  # from 1
    id: str
    score: float  # cosine
    image: ImageRef
    caption: str | None


@dataclass(frozen=True)
class Query:
    """What is looked for: words, an image, or both."""

    text: str | None = None
    image: Path | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: neither.
        """
        if self.text is None and self.image is None:
            raise ConfigError("Say what to look for: --text WORDS, --image FILE, or both.")
        if self.text is not None and not self.text.strip():
            raise ConfigError("--text is empty; give some words.")

    @property
    def rule(self) -> str:
        """How the query became a vector, for the record."""
        if self.text is not None and self.image is not None:
            return "mean of the unit vectors of text and image, brought to unit norm"
        return "text" if self.image is None else "image"

    def vector(self, source: FeatureSource) -> Tensor:
        """(1,D) unit norm.

        Raises:
            DataError: the image cannot be read.
        """
        parts = []
        if self.text is not None:
            parts.append(source.embed_texts([self.text]))
        if self.image is not None:
            parts.append(source.embed_images([self.image], workers=0))
        # Vectors that point against each other have no mean; F.normalize leaves zero, which the index refuses.
        return F.normalize(sum(parts[1:], parts[0]), dim=-1)


def build_index(folder: str | Path, kind: str = "auto") -> EmbeddingIndex:
    """Index the images of a folder of features, and save the index in it.

    Raises:
        GalleryError: no features there, none readable, or an unknown kind.
    """
    index = _index(open_features(folder), kind)
    index.save(Path(folder) / INDEX)
    return index


def add_features(folder: str | Path, more: str | Path) -> int:
    """Add the images of another folder of features to the index of one; returns how many.

    Raises:
        GalleryError: features of another model, or an image that is there already.
    """
    index = _load(Path(folder))
    stored = open_features(more)
    features = stored.images()
    index.add(features.pooled, features.ids, fingerprint=features.fingerprint, items=_known(stored))
    index.save(Path(folder) / INDEX)
    return len(features)


def remove_items(folder: str | Path, ids: Sequence[str]) -> int:
    """Remove images from the index by id; their features stay in the folder.

    Raises:
        GalleryError: an id that is not there.
    """
    index = _load(Path(folder))
    count = index.remove(ids)
    index.save(Path(folder) / INDEX)
    return count


@dataclass(frozen=True)
class Gallery:
    """What can be searched.

    Attributes:
        index: the vectors.
        saved: whether it was built before; else it was made from the features just now.
    """

    index: EmbeddingIndex
    saved: bool

    @property
    def model(self) -> str:
        """Name of the model the features are from."""
        assert self.index.fingerprint is not None
        return self.index.fingerprint.model

    def find(self, source: FeatureSource, query: Query, k: int = 10) -> list[Found]:
        """The k images nearest to a query, fewer where there are fewer.

        Raises:
            GalleryError: `source` is another model, or k below 1.
        """
        assert self.index.fingerprint is not None
        self.index.fingerprint.require_same(source.card.fingerprint, "The gallery", "this model")
        scores, (ids,) = self.index.search(query.vector(source), k)
        place = {name: row for row, name in enumerate(self.index.ids)}
        rows = self.index.items.take([place[name] for name in ids]).to_pylist()
        return [
            Found(rank, row["id"], score, _reference(row), row.get("caption"))
            for rank, (row, score) in enumerate(zip(rows, scores[0].tolist(), strict=True), start=1)
        ]


def open_gallery(folder: str | Path) -> Gallery:
    """The index of a folder of features; one that has none is searched all the same, from its features.

    Raises:
        GalleryError: neither there, or the features changed after the index was built.
    """
    folder = Path(folder)
    if (folder / INDEX).is_dir():
        return Gallery(_load(folder), saved=True)
    return Gallery(_index(open_features(folder), "auto"), saved=False)


def _index(stored: StoredFeatures, kind: str) -> EmbeddingIndex:
    features = stored.images()
    return EmbeddingIndex.build(
        features.pooled,
        features.ids,
        kind,
        fingerprint=features.fingerprint,
        items=_known(stored),
        about={"plan": stored.about.plan},
    )


def _load(folder: Path) -> EmbeddingIndex:
    about = read_index_about(folder / INDEX)
    if (folder / ABOUT).is_file() and read_about(folder).plan != about.get("plan"):
        raise GalleryError(f"The features in {folder} changed since they were indexed. Run `vlkit index build` again.")
    index = EmbeddingIndex.load(folder / INDEX)
    if index.fingerprint is None:
        raise GalleryError(f"The index in {folder} does not say which model it is from. Run `vlkit index build` again.")
    return index


def _known(stored: StoredFeatures) -> pa.Table:
    return stored.metadata.select(_COLUMNS)


def _reference(row: dict[str, object]) -> ImageRef:
    return ImageRef(path=row["image_path"], offset=row["offset"], size=row["size"], column=row["column"])  # type: ignore[arg-type]
