"""The encoder that is being trained as a source of features: images decoded once a run, work shared by processes.

The main process evaluates. Where it needs features, or something for each photograph, it asks the others, who wait in
`serve` until it calls `dismiss`; each does its share and all parts come back in order.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.features import SharingSource
from vlkit.contracts import Progress
from vlkit.data.images import ImageChunk, ImageLike, iterate_images
from vlkit.data.transforms import Preprocess
from vlkit.distributed import from_main, gather_objects, rank, world_size
from vlkit.features.model_card import ModelCard
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.embedder import EmbeddedChunk, Embedder

# Decoded validation images of one evaluation are kept up to this size: 3,500 images of 224 pixels.
MAX_CACHED_BYTES = 512 * 2**20
BATCH_SIZE = 64
_WORKERS = 2  # threads that decode; the loader of the training has its own

Item = TypeVar("Item")
Found = TypeVar("Found")


class PixelCache:
    """Preprocessed images of this process's share of one evaluation, decoded once where they are few enough."""

    def __init__(self) -> None:
        self._chunks: dict[int, list[ImageChunk]] = {}  # by the images: an evaluation may have several sets of them
        self._free = MAX_CACHED_BYTES

    def iterate(self, images: Sequence[ImageLike], preprocess: Preprocess, workers: int) -> Iterator[ImageChunk]:
        """As `iterate_images`."""
        which = hash((preprocess, tuple(images)))
        if which in self._chunks:
            yield from self._chunks[which]
            return
        size = len(images) * 3 * preprocess.size**2
        small = size <= self._free
        seen = []
        for chunk in iterate_images(images, preprocess, batch_size=BATCH_SIZE, workers=workers):
            if small:
                seen.append(chunk)
            yield chunk
        if small:
            self._chunks[which] = seen
            self._free -= size


@dataclass(frozen=True)
class InTrainingSource(SharingSource):
    """The encoder of this moment.

    Attributes:
        encoder: whole, in eval mode.
        cache: of the evaluation, kept from one moment to the next.
    """

    encoder: DualEncoder
    cache: PixelCache

    @cached_property
    def embedder(self) -> Embedder:
        """The encoder with its tokenizer."""
        return Embedder(self.encoder, "in training")

    @cached_property
    def card(self) -> ModelCard:
        """Not hashed: it lives for one evaluation, and nothing is stored under it."""
        one = self.embedder
        unknown = "in training"
        return ModelCard(
            one.name, unknown, unknown, unknown, unknown, unknown, one.embed_dim, one.logit_scale, one.logit_bias,
            one.family, one.decode, "fp32",
        )  # fmt: skip

    def serve(self) -> None:
        """Do this process's share of whatever the main one asks for."""
        while (job := from_main(None)) is not None:
            what, *given = job
            shares: dict[str, Callable[..., Any]] = {
                "images": self._images, "texts": self._texts, "items": self._items
            }  # fmt: skip
            gather_objects(shares[what](*given))

    def dismiss(self) -> None:
        """Let the others go on."""
        from_main(None)

    def iterate_embeddings(
        self,
        images: Sequence[ImageLike],
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> Iterator[EmbeddedChunk]:
        """As `Embedder`, in one chunk; images come in the cache's batches, whatever `batch_size`."""
        from_main(("images", images, workers))
        parts = gather_objects(self._images(images, workers))
        rows = [row for part in parts for row in part.rows]
        order = torch.tensor(rows, dtype=torch.int64).argsort()
        failures = sorted(failure for part in parts for failure in part.failures)
        if progress:
            progress(len(images), len(images))
        whole, norms = (torch.cat([getattr(part, name) for part in parts]) for name in ("embeddings", "norms"))
        yield EmbeddedChunk(sorted(rows), whole[order], failures, norms[order])

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """As `Embedder`."""
        if world_size() == 1:
            return self.embedder.embed_texts(texts, batch_size, progress)
        distinct = list(dict.fromkeys(texts))
        from_main(("texts", distinct, batch_size))
        parts = gather_objects(self._texts(distinct, batch_size))
        place = {text: row for row, text in enumerate(distinct)}
        if progress:
            progress(len(distinct), len(distinct))
        return torch.stack(_in_turn(parts))[[place[text] for text in texts]] if texts else parts[0]

    def share(self, work: Callable[[Embedder, Item], Found], items: Sequence[Item]) -> list[Found]:
        """As `SharingSource`."""
        from_main(("items", work, items))
        return _in_turn(gather_objects(self._items(work, items)))

    def _images(self, images: Sequence[ImageLike], workers: int | None) -> EmbeddedChunk:
        """This process's share; positions are those among all images.

        Process r has every W-th batch, so that each batch is one that a single process would embed.
        """
        mine = [row for row in range(len(images)) if row // BATCH_SIZE % world_size() == rank()]
        rows: list[int] = []
        failures: list[tuple[int, str]] = []
        raw = [torch.empty(0, self.encoder.embed_dim)]
        chosen = [images[row] for row in mine]
        for chunk in self.cache.iterate(chosen, self.encoder.preprocess, _WORKERS if workers is None else workers):
            if chunk.rows:
                with torch.no_grad():
                    pixels = chunk.images.to(self.encoder.device)
                    raw.append(self.encoder.encode_image(pixels, normalize=False).float().cpu())
            rows += [mine[row] for row in chunk.rows]
            failures += [(mine[row], reason) for row, reason in chunk.failures]
        features = torch.cat(raw)
        return EmbeddedChunk(rows, F.normalize(features, dim=-1), failures, features.norm(dim=-1))

    def _texts(self, texts: Sequence[str], batch_size: int) -> Tensor:
        return self.embedder.embed_texts(texts[rank() :: world_size()], batch_size)

    def _items(self, work: Callable[[Embedder, Item], Found], items: Sequence[Item]) -> list[Found]:
        return [work(self.embedder, item) for item in items[rank() :: world_size()]]


def _in_turn(parts: Sequence[Any]) -> list[Any]:
    """Process r did every W-th, from its own number on."""
    return [parts[place % len(parts)][place // len(parts)] for place in range(sum(len(part) for part in parts))]
