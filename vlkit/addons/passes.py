"""Passes of the image tower: an image is encoded once for each distinct combination of edits and views.

passes = Passes(source, local=True)
passes.read(records)                                   # plain; through the source's cache
passes.read(records, recipe=TEN_CROPS)                 # the same images and their views
passes.read(records, edits=(pixel_prompt, last_block))
passes.num_passes                                      # 3, however often each was asked for
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import InputEdit, TowerEdit, Vectors
from vlkit.addons.views import ViewRecipe
from vlkit.contracts import Progress
from vlkit.data.images import iterate_images, read_image
from vlkit.data.records import ImageRef, Record
from vlkit.errors import DataError
from vlkit.features.model_card import ModelCard
from vlkit.features.source import FeatureSource
from vlkit.features.stamps import digest
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.embedder import EmbeddedChunk, Embedder

Edit = InputEdit | TowerEdit
# Views that go through the tower together: what 256 leave in a layer is so large that the C library asks the system for
# it anew each time, a quarter of the time on a CPU.
_VIEWS_AT_ONCE = 64


class ReadVectors(NamedTuple):
    """Vectors of the images that could be read."""

    vectors: Vectors
    kept: list[int]  # (n,) position of each row among the records
    failures: list[tuple[int, str]]


class _Kind(NamedTuple):
    """What tells one kind of pass from another."""

    edits: tuple[str, ...]
    recipe: ViewRecipe | None


@dataclass
class _Made:
    """What passes of one kind have made so far."""

    vectors: Vectors | None
    place: dict[tuple[str, ImageRef], int]  # row in `vectors`
    failures: dict[tuple[str, ImageRef], str]


class Passes:
    """Image features of one model by kind of pass; each image is encoded once in each kind.

    Args:
        source: the model, with its cache or a stored set; plain passes go through it.
        local: whether passes keep patches and patch tokens too; then nothing comes from the cache.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        progress: called with (done, total) of each pass.

    Attributes:
        num_passes: passes made so far.
        num_images: images that went through them, views not counted.
        seconds: of the clock that they took.
    """

    def __init__(
        self,
        source: FeatureSource,
        *,
        local: bool = False,
        batch_size: int = 64,
        workers: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.source, self.local = source, local
        self._batch_size, self._workers, self._progress = batch_size, workers, progress
        self._made: dict[_Kind, _Made] = {}
        self.num_passes = self.num_images = 0
        self.seconds = 0.0

    def read(
        self, records: Sequence[Record], edits: Sequence[Edit] = (), recipe: ViewRecipe | None = None
    ) -> ReadVectors:
        """Vectors of records, unreadable ones named.

        Args:
            records: images.
            edits: of pixels and towers, in order.
            recipe: of the views wanted besides.

        Raises:
            ModelError: `local` and a tower without patches.
        """
        kind = _Kind(tuple(edit.key for edit in edits), recipe)
        made = self._made.setdefault(kind, _Made(None, {}, {}))
        keys = [(record.key, record.image) for record in records]
        known = made.place.keys() | made.failures.keys()
        missing = {key: record for key, record in zip(keys, records, strict=True) if key not in known}
        if missing:
            self.num_passes += 1
            self.num_images += len(missing)
            began = time.perf_counter()
            _add(made, list(missing), self._run(list(missing.values()), edits, recipe))
            self.seconds += time.perf_counter() - began
        kept = [row for row, key in enumerate(keys) if key in made.place]
        failures = [(row, made.failures[key]) for row, key in enumerate(keys) if key not in made.place]
        if made.vectors is None:
            made.vectors = Vectors("image", torch.empty(0, self.source.embed_dim), norm=torch.empty(0))
        return ReadVectors(made.vectors.rows([made.place[keys[row]] for row in kept]), kept, failures)

    def _run(self, records: Sequence[Record], edits: Sequence[Edit], recipe: ViewRecipe | None) -> ReadVectors:
        if not edits and recipe is None and not self.local:
            chunks = self.source.iterate_embeddings(records, self._batch_size, self._progress, self._workers)
            return _joined([_plain(chunk) for chunk in chunks], self.source.embed_dim)
        model = self.source.embedder
        with editing(model.encoder, edits):
            made = [
                _encoded(model, batch, edits, self.local)
                for batch in _batches(model, records, recipe, self._batch_size, self._workers, self._progress)
            ]
        return _joined(made, self.source.embed_dim)


def _add(made: _Made, keys: Sequence[tuple[str, ImageRef]], read: ReadVectors) -> None:
    """Keep what a pass has made."""
    start = 0 if made.vectors is None else len(made.vectors)
    made.place.update({keys[row]: start + place for place, row in enumerate(read.kept)})
    made.failures.update({keys[row]: reason for row, reason in read.failures})
    if read.kept:
        made.vectors = read.vectors if made.vectors is None else stacked([made.vectors, read.vectors])


@contextmanager
def editing(encoder: DualEncoder, edits: Sequence[Edit]) -> Iterator[None]:
    """All tower edits at once, the first outermost."""
    with ExitStack() as stack:
        for edit in edits:
            if isinstance(edit, TowerEdit):
                stack.enter_context(edit.edit(encoder))
        yield


@dataclass(frozen=True)
class EditedSource(FeatureSource):
    """A model under edits, as a source of features. Texts come from the cache unless the text tower is edited.

    Attributes:
        plain: the model without them.
        edits: in order.
    """

    plain: FeatureSource
    edits: tuple[Edit, ...]

    @property
    def card(self) -> ModelCard:
        """Of the model without edits: what an add-on is fitted for."""
        return self.plain.card

    @property
    def embedder(self) -> Embedder:
        """The model without edits; `editing` applies them."""
        return self.plain.embedder

    def iterate_embeddings(
        self,
        images: Sequence[object],
        batch_size: int = 64,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> Iterator[EmbeddedChunk]:
        """As `Embedder.iterate_embeddings`, under the edits."""
        if not self.edits:
            yield from self.plain.iterate_embeddings(images, batch_size, progress, workers)  # type: ignore[arg-type]
            return
        model = self.embedder
        for batch in _batches(model, images, None, batch_size, workers, progress):  # type: ignore[arg-type]
            with editing(model.encoder, self.edits):  # not while the caller holds a chunk
                done = _encoded(model, batch, self.edits, local=False)
            assert done.vectors.norm is not None
            yield EmbeddedChunk(done.kept, done.vectors.pooled, done.failures, done.vectors.norm)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """As `Embedder.embed_texts`, under the edits of the text tower."""
        if not any(isinstance(edit, TowerEdit) and "text" in edit.towers for edit in self.edits):
            return self.plain.embed_texts(texts, batch_size, progress)
        with editing(self.embedder.encoder, self.edits):
            return self.embedder.embed_texts(texts, batch_size, progress)


class _Batch(NamedTuple):
    rows: list[int]
    images: Tensor  # (b,3,S,S) uint8
    views: Tensor | None  # (b,V,3,S,S) uint8
    failures: list[tuple[int, str]]


def _batches(
    model: Embedder,
    records: Sequence[Record],
    recipe: ViewRecipe | None,
    batch_size: int,
    workers: int | None,
    progress: Progress | None,
) -> Iterator[_Batch]:
    """Images as the model sees them, with their views."""
    preprocess = model.encoder.preprocess
    exif = "apply" if model.decode == "fast" else "ignore"
    done = 0
    for chunk in iterate_images(
        records,
        preprocess,
        batch_size=batch_size,
        workers=2 if workers is None else workers,
        reference=model.decode == "reference",
        exif=exif,  # type: ignore[arg-type]
    ):
        views = None
        if recipe is not None and chunk.rows:
            # Views are cut out of the whole image, so it is decoded a second time: cheap beside V forward passes.
            views = torch.stack(
                [
                    recipe.of(read_image(records[row], exif=exif), preprocess, _number(records[row]))  # type: ignore[arg-type]
                    for row in chunk.rows
                ]
            )
        yield _Batch(chunk.rows, chunk.images, views, chunk.failures)
        done += len(chunk.rows) + len(chunk.failures)
        if progress:
            progress(done, len(records))


def _plain(chunk: EmbeddedChunk) -> ReadVectors:
    return ReadVectors(Vectors("image", chunk.embeddings, norm=chunk.norms), chunk.rows, chunk.failures)


def _encoded(model: Embedder, batch: _Batch, edits: Sequence[Edit], local: bool) -> ReadVectors:
    """One batch through the towers as they are now."""
    if not batch.rows:
        nothing = Vectors("image", torch.empty(0, model.embed_dim), norm=torch.empty(0))
        return ReadVectors(nothing, [], batch.failures)
    encoder = model.encoder
    with torch.inference_mode():
        vectors = _vectors(encoder, _edited(batch.images, edits).to(model.device), local)
        if batch.views is not None:
            flat = _edited(batch.views.flatten(0, 1), edits).to(model.device)
            encoded = torch.cat([encoder.encode_image(part) for part in flat.split(_VIEWS_AT_ONCE)]).float().cpu()
            vectors = replace(vectors, views=encoded.unflatten(0, batch.views.shape[:2]))
    return ReadVectors(vectors, batch.rows, batch.failures)


def _vectors(encoder: DualEncoder, images: Tensor, local: bool) -> Vectors:
    if not local:
        raw = encoder.encode_image(images, normalize=False).float().cpu()
        return Vectors("image", F.normalize(raw, dim=-1), norm=raw.norm(dim=-1))
    tower = encoder.vision_tower
    x = tower.through_blocks(images)
    raw, tokens = tower.finish(x).float().cpu(), tower.patches(x)
    patches = None if tower.project is None else F.normalize(tower.project(tokens), dim=-1).float().cpu()
    return Vectors(
        "image",
        F.normalize(raw, dim=-1),
        norm=raw.norm(dim=-1),
        patches=patches,
        patch_tokens=tokens.float().cpu(),
        grid=tower.grid,
    )


def _edited(images: Tensor, edits: Sequence[Edit]) -> Tensor:
    """Pixels after the input edits: float32 in [0,1] where there are any, else as they are."""
    chosen = [edit for edit in edits if isinstance(edit, InputEdit)]
    if not chosen:
        return images
    pixels = images.float() / 255
    for edit in chosen:
        pixels = edit.edit_image(pixels)
    if pixels.shape[-3:] != images.shape[-3:]:
        raise DataError(f"{chosen[-1].name} made images of shape {tuple(pixels.shape)} out of {tuple(images.shape)}.")
    return pixels


def _joined(parts: Sequence[ReadVectors], dim: int) -> ReadVectors:
    """Chunks as one, in order."""
    if not parts:
        return ReadVectors(Vectors("image", torch.empty(0, dim), norm=torch.empty(0)), [], [])
    full = [part for part in parts if part.kept] or list(parts[:1])
    vectors = stacked([part.vectors for part in full])
    kept = [row for part in parts for row in part.kept]
    return ReadVectors(vectors, kept, [failure for part in parts for failure in part.failures])


def stacked(parts: Sequence[Vectors]) -> Vectors:
    """The rows of several, one after the other."""
    return replace(
        parts[0],
        pooled=torch.cat([one.pooled for one in parts]),
        norm=_cat([one.norm for one in parts]),
        patches=_cat([one.patches for one in parts]),
        patch_tokens=_cat([one.patch_tokens for one in parts]),
        views=_cat([one.views for one in parts]),
    )


def _number(record: Record) -> int:
    """Of a record, so that its views do not depend on where it stands in a list."""
    return int.from_bytes(digest(record.key)[:6], "big")


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    """All of them, or None where there are none."""
    there = [part for part in parts if part is not None]
    return torch.cat(there) if there else None
