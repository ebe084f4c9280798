"""Where features come from: a model with its cache, or a set that was embedded before.

    source = open_source("run:runs/demo", cache=FeatureCache.default())
    source.embed_images(paths)    # encodes what the cache does not have
    source = StoredSource(open_features("features/flickr8k"), source)

All of them answer like an `Embedder`, so that whatever takes one takes the others.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache as memoized
from functools import cached_property, partial
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkit.contracts import Progress, continued
from vlkit.data.images import ImageLike
from vlkit.features.cache import FeatureCache, text_key
from vlkit.features.model_card import ModelCard, card_of, remembered_card
from vlkit.features.stamps import Stamper
from vlkit.features.vectors import VectorStore
from vlkit.models.embedder import (
    Decode,
    EmbeddedChunk,
    Embedder,
    ReadableImages,
    all_of,
    check_texts,
    readable_of,
)

if TYPE_CHECKING:
    from vlkit.models.load import Precision

# Images that are handed on at once when all of them are in the cache.
_CACHED_AT_ONCE = 1024
# From so many images on bf16 saves more than the second look costs.
_WORTH_BF16 = 32
# Texts between two writes to the cache: seconds of work.
_TEXTS_AT_ONCE = 4096


class FeatureSource(ABC):
    """Features of images and texts by one model. Unit norm, float32, on the CPU, in the order asked for."""

    @property
    @abstractmethod
    def card(self) -> ModelCard:
        """The model's identity and its way from scores to probabilities."""

    @property
    @abstractmethod
    def embedder(self) -> Embedder:
        """The model itself, loaded when first asked for."""

    @abstractmethod
    def iterate_embeddings(
        self,
        images: Sequence[ImageLike],
        batch_size: int = 64,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> Iterator[EmbeddedChunk]:
        """As `Embedder.iterate_embeddings`."""

    @abstractmethod
    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """As `Embedder.embed_texts`."""

    def embed_images(
        self,
        images: Sequence[ImageLike],
        batch_size: int = 64,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> Tensor:
        """As `Embedder.embed_images`: (N,D).

        Raises:
            DataError: an image cannot be read; the message names it.
        """
        return all_of(self.iterate_embeddings(images, batch_size, progress, workers), len(images), self.card.embed_dim)

    def embed_images_where_readable(
        self,
        images: Sequence[ImageLike],
        batch_size: int = 64,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> ReadableImages:
        """As `Embedder.embed_images_where_readable`."""
        chunks = self.iterate_embeddings(images, batch_size, progress, workers)
        return readable_of(chunks, len(images), self.card.embed_dim)

    @property
    def name(self) -> str:
        """As the user gave it."""
        return self.card.name

    @property
    def identity(self) -> str:
        """Hash of weights, preprocessing and tokenizer."""
        return self.card.identity

    @property
    def embed_dim(self) -> int:
        """D."""
        return self.card.embed_dim

    @property
    def logit_scale(self) -> float:
        """Multiplier of the cosine."""
        return self.card.logit_scale

    @property
    def logit_bias(self) -> float | None:
        """Added after scaling; None for softmax-trained models."""
        return self.card.logit_bias

    @property
    def family(self) -> Literal["softmax", "sigmoid"]:
        """Which probabilities the scores stand for."""
        return self.card.family


@dataclass(frozen=True)
class CachedEmbedder(FeatureSource):
    """A model that encodes what it has not encoded before. `open_source(name)` makes one.

    Attributes:
        load: gives the model; called when something has to be encoded, or when `known` is None.
        cache: None encodes everything each time.
        known: the card where it is known without the model.
    """

    load: Callable[[], Embedder]
    cache: FeatureCache | None
    known: ModelCard | None = None

    @cached_property
    def card(self) -> ModelCard:
        """Of the model; loads it if nothing is known."""
        return self.known or card_of(self.embedder)

    @cached_property
    def embedder(self) -> Embedder:
        """The model."""
        return self.load()

    def num_missing(self, images: Sequence[ImageLike]) -> int:
        """How many of the images would have to be read and encoded."""
        if self.cache is None:
            return len(images)
        stamper = Stamper()
        keys = [stamper.key(image) or bytes(16) for image in images]
        with self.cache.images(self.card) as store:
            return int((store.find(keys) < 0).sum())

    def iterate_embeddings(
        self,
        images: Sequence[ImageLike],
        batch_size: int = 64,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> Iterator[EmbeddedChunk]:
        """As `Embedder.iterate_embeddings`; what the cache has is not read from its files."""
        if self.cache is None or isinstance(images, str | os.PathLike):
            yield from self.embedder.iterate_embeddings(images, batch_size, progress, workers)
            return
        stamper = Stamper()
        keys = [stamper.key(image) for image in images]
        with self.cache.images(self.card) as store:
            places = store.find([key or bytes(16) for key in keys])
            missing = np.flatnonzero(places < 0).tolist()
            begin = 0
            for chunk in self._encode(images, missing, batch_size, workers):
                new = [row for row in chunk.rows if keys[row] is not None]
                vectors = torch.cat([chunk.embeddings, chunk.norms[:, None]], dim=1).numpy()
                store.add(
                    [k for row in new if (k := keys[row])], vectors[[keys[row] is not None for row in chunk.rows]]
                )
                end = 1 + max([*chunk.rows, *(row for row, _ in chunk.failures)])
                yield _with_cached(chunk, begin, end, places, store)
                begin = end
                if progress:
                    progress(begin, len(images))
            nothing = EmbeddedChunk([], torch.empty(0, self.embed_dim), [], torch.empty(0))
            for start in range(begin, len(images), _CACHED_AT_ONCE):
                end = min(start + _CACHED_AT_ONCE, len(images))
                yield _with_cached(nothing, start, end, places, store)
                if progress:
                    progress(end, len(images))

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """As `Embedder.embed_texts`; only texts the cache does not have are encoded."""
        check_texts(texts)
        if self.cache is None:
            return self.embedder.embed_texts(texts, batch_size, progress)
        distinct = list(dict.fromkeys(texts))
        keys = [text_key(text) for text in distinct]
        out = np.empty((len(distinct), self.embed_dim), np.float32)
        with self.cache.texts(self.card) as store:
            places = store.find(keys)
            out[places >= 0] = store.rows(places[places >= 0])
            missing = np.flatnonzero(places < 0)
            done = len(distinct) - len(missing)
            if progress:
                progress(done, len(distinct))
            for start in range(0, len(missing), _TEXTS_AT_ONCE):
                chosen = missing[start : start + _TEXTS_AT_ONCE]
                report = continued(progress, done + start, len(distinct))
                out[chosen] = self.embedder.embed_texts([distinct[row] for row in chosen], batch_size, report).numpy()
                store.add([keys[row] for row in chosen], out[chosen])
        row_of = {text: row for row, text in enumerate(distinct)}
        return torch.from_numpy(out)[[row_of[text] for text in texts]]

    def _encode(
        self, images: Sequence[ImageLike], missing: list[int], batch_size: int, workers: int | None
    ) -> Iterator[EmbeddedChunk]:
        """Chunks of the missing images, their rows counted over all images."""
        if not missing:  # the model need not even be loaded
            return
        chosen = [images[row] for row in missing]
        for chunk in self.embedder.iterate_embeddings(chosen, batch_size, workers=workers):
            rows = [missing[row] for row in chunk.rows]
            failures = [(missing[row], reason) for row, reason in chunk.failures]
            yield EmbeddedChunk(rows, chunk.embeddings, failures, chunk.norms)


def open_source(
    name: str,
    device: str = "auto",
    cache: FeatureCache | None = None,
    *,
    precision: "Precision" = "fp32",
    decode: Decode = "fast",
) -> CachedEmbedder:
    """A named model with a cache.

    Args:
        name: as for `vlkit.models.load.load_encoder`.
        device: "auto" (cuda, mps, cpu), or a torch device.
        cache: None encodes everything each time.
        precision: of the weights, see `load_embedder`.
        decode: how images are read, see `load_embedder`.

    Raises:
        ModelError: an unknown name, or a device this machine lacks.
        CheckpointError: weights that are missing or damaged.
    """
    from vlkit.models.load import load_embedder, pick_device, pick_precision

    # At once, although the model may not be needed.
    chosen = pick_precision(precision, pick_device(device))
    variant = f"{precision} {chosen} {decode}"
    load = partial(load_embedder, name, device, precision=precision, decode=decode)
    return _named_source(name, load, cache, variant)


class Sources(NamedTuple):
    """One model in the precision that images go through first, and in fp32; one and the same where one is enough."""

    first: CachedEmbedder
    exact: CachedEmbedder


def open_sources(
    name: str,
    images: Sequence[ImageLike],
    device: str = "auto",
    cache: FeatureCache | None = None,
    *,
    precision: "Precision" = "auto",
) -> Sources:
    """A named model for images whose decisions are to be fp32's, in little more than bf16's time.

    Args:
        name, device, cache: as for `open_source`.
        images: that will be embedded.
        precision: "fp32" or "bf16" for both; "auto" is bf16 first where that saves time: on a processor that has it,
            for transformers, for more than a few images, most of which the cache does not have in fp32 already.

    Raises:
        ModelError, CheckpointError: as `open_source`.
    """
    from vlkit.models.load import in_auto_precision, pick_device, pick_precision

    if precision != "auto":
        only = open_source(name, device, cache, precision=precision)
        return Sources(only, only)
    exact = open_source(name, device, cache)
    chosen = pick_precision(precision, pick_device(device))
    if chosen == "fp32" or len(images) < _WORTH_BF16:
        return Sources(exact, exact)
    first = _named_source(name, lambda: in_auto_precision(exact.embedder), cache, f"auto {chosen} fast")
    if first.card.precision == "fp32" or exact.num_missing(images) <= first.num_missing(images) / 2:
        return Sources(exact, exact)
    return Sources(first, exact)


def _named_source(name: str, load: Callable[[], Embedder], cache: FeatureCache | None, variant: str) -> CachedEmbedder:
    once = memoized(load)  # one model, whoever asks first: the card, or the first thing to encode
    return CachedEmbedder(once, cache, None if cache is None else remembered_card(name, cache.cards, once, variant))


def _with_cached(
    chunk: EmbeddedChunk, begin: int, end: int, places: NDArray[np.int64], store: VectorStore
) -> EmbeddedChunk:
    """The chunk together with the cached images among `begin` to `end`, in order."""
    cached = begin + np.flatnonzero(places[begin:end] >= 0)
    rows = np.concatenate([np.array(chunk.rows, np.int64), cached])
    order = np.argsort(rows, kind="stable")
    found = torch.from_numpy(store.rows(places[cached]))
    features = torch.cat([chunk.embeddings, found[:, :-1]])[order]
    return EmbeddedChunk(rows[order].tolist(), features, chunk.failures, torch.cat([chunk.norms, found[:, -1]])[order])
