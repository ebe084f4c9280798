"""Evaluations during training: from the run file's [[eval]] sections to entries of `fit`'s `every`.

run = load_run("run.toml")
pretrain(run, every=make_every(run))

With several processes all make these entries: each embeds its share of the images and texts, the main one scores,
and all get its numbers.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from eval.class_names import name_classes
from eval.classification import ClassificationEvaluator
from eval.protocol_data import Prepared, prepare
from eval.protocols import find_protocol
from eval.retrieval import RetrievalEvaluator
from vlkit.config import EvalSettings, RunConfig
from vlkit.contracts import Progress
from vlkit.data.images import ImageChunk, iterate_images
from vlkit.data.records import Record
from vlkit.data.sources import read_source
from vlkit.data.transforms import Preprocess
from vlkit.distributed import from_main, gather_objects, is_main, rank, world_size
from vlkit.models.dual_encoder import DualEncoder
from vlkit.models.embedder import Embedder, ReadableImages
from vlkit.training.loop import Every, Moment

_log = logging.getLogger(__name__)

# Decoded validation images are kept between evaluations up to this size: 3,500 images of 224 pixels.
MAX_CACHED_BYTES = 512 * 2**20
BATCH_SIZE = 64


def make_every(run: RunConfig) -> list[Every]:
    """One entry for each [[eval]] of a run, in their order.

    Each returns the evaluator's fractions to the loop, under the evaluator's own keys; where two sections run the
    same evaluation, behind the name of their data: `val/text_to_image/recall@1`.

    Raises:
        DataError: data that is missing or cannot be evaluated: before training starts.
    """
    count = Counter(_kind(section) for section in run.eval)
    return [
        Every(section.every, _Evaluation(section, prefix=f"{_stem(section)}/" if count[_kind(section)] > 1 else ""))
        for section in run.eval
    ]


class _Evaluation:
    """One [[eval]] section: reads its data at once, its images at the first call."""

    def __init__(self, section: EvalSettings, prefix: str) -> None:
        self.prefix = prefix
        self.evaluator = _evaluator(section)
        self.cache = _PixelCache()

    def __call__(self, moment: Moment) -> Mapping[str, float]:
        """Evaluate the encoder as it is now. All processes call this; the metrics are the same in all."""
        source = _InTraining(moment.encoder, self.cache)
        if not is_main():
            source.serve()
            metrics: Mapping[str, float] = from_main(None)
            return metrics
        try:
            metrics = self._score(source)
        finally:  # also on an error: the others must not wait for more
            source.dismiss()
        return dict(from_main(metrics))

    def _score(self, source: "_InTraining") -> Mapping[str, float]:
        evaluation = self.evaluator.run(source)
        unreadable = evaluation.figures["unreadable_images"]
        if unreadable and not self.cache.reported:
            _log.warning("%d evaluation images cannot be read (first: %s: %s).", len(unreadable), *unreadable[0])
            self.cache.reported = True
        # Ranks are no fractions; they would press the curves of a plot flat.
        fractions = {key: value for key, value in evaluation.metrics.items() if not key.endswith("rank")}
        return {self.prefix + key: value for key, value in fractions.items()}


def _evaluator(section: EvalSettings) -> RetrievalEvaluator | ClassificationEvaluator | Prepared:
    if section.protocol is not None:
        return prepare(find_protocol(section.protocol), _place(section), images=section.images)
    source = read_source(_place(section), format=section.format, images=section.images, split=section.split)
    if section.name == "retrieval":
        return RetrievalEvaluator(source.records)
    classes = name_classes(source.class_names, source.records)
    return ClassificationEvaluator(classes.records, classes.names)


class _PixelCache:
    """Preprocessed images of this process's share of one evaluation, decoded once where they are few enough."""

    def __init__(self) -> None:
        self.chunks: dict[int, list[ImageChunk]] = {}  # by the images: a protocol may have several folds
        self.reported = False

    def iterate(self, records: Sequence[Record], preprocess: Preprocess, workers: int) -> Iterator[ImageChunk]:
        which = hash(tuple(record.key for record in records))
        if which in self.chunks:
            yield from self.chunks[which]
            return
        small = len(records) * 3 * preprocess.size**2 <= MAX_CACHED_BYTES
        seen = []
        for chunk in iterate_images(records, preprocess, batch_size=BATCH_SIZE, workers=workers):
            if small:
                seen.append(chunk)
            yield chunk
        if small:
            self.chunks[which] = seen


@dataclass(frozen=True)
class _InTraining:
    """The encoder of this moment as a source of features: an `Embedder` whose images are decoded once a run.

    The main process asks the others for their shares; they wait in `serve` until it calls `dismiss`.
    """

    encoder: DualEncoder
    cache: _PixelCache
    _embedder: Embedder = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_embedder", Embedder(encoder=self.encoder, name="in training"))

    def serve(self) -> None:
        """Embed this process's share of whatever the main one asks for."""
        while (job := from_main(None)) is not None:
            what, items, size, workers = job
            gather_objects(self._images(items, workers) if what == "images" else self._texts(items, size))

    def dismiss(self) -> None:
        """Let the others go on."""
        from_main(None)

    def embed_images_where_readable(
        self,
        images: Sequence[Record],
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> ReadableImages:
        """As `Embedder`; the chunks are those of the cache."""
        from_main(("images", images, batch_size, workers))
        parts = gather_objects(self._images(images, workers))
        # Process r has every W-th chunk of images, so that each chunk is the one that a single process would embed.
        kept = [row for part in parts for row in part.kept]
        features = torch.cat([part.embeddings for part in parts])[torch.tensor(kept, dtype=torch.int64).argsort()]
        failures = sorted(failure for part in parts for failure in part.failures)
        if progress:
            progress(len(images), len(images))
        return ReadableImages(features, sorted(kept), failures)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """As `Embedder`."""
        if world_size() == 1:
            return self._embedder.embed_texts(texts, batch_size, progress)
        distinct = list(dict.fromkeys(texts))
        from_main(("texts", distinct, batch_size, None))
        parts = gather_objects(self._texts(distinct, batch_size))
        whole = torch.empty(len(distinct), self.encoder.embed_dim)
        for number, part in enumerate(parts):
            whole[number :: len(parts)] = part
        place = {text: row for row, text in enumerate(distinct)}
        if progress:
            progress(len(distinct), len(distinct))
        return whole[[place[text] for text in texts]]

    def _texts(self, texts: Sequence[str], batch_size: int) -> Tensor:
        return self._embedder.embed_texts(texts[rank() :: world_size()], batch_size)

    def _images(self, images: Sequence[Record], workers: int | None) -> ReadableImages:
        """This process's share; positions are those among all images."""
        mine = [row for row in range(len(images)) if row // BATCH_SIZE % world_size() == rank()]
        kept: list[int] = []
        failures: list[tuple[int, str]] = []
        features = [torch.empty(0, self.encoder.embed_dim)]
        for chunk in self.cache.iterate([images[row] for row in mine], self.encoder.preprocess, workers or 2):
            if chunk.rows:
                with torch.no_grad():
                    pixels = chunk.images.to(self.encoder.device)
                    features.append(self.encoder.encode_image(pixels).float().cpu())
            kept += [mine[row] for row in chunk.rows]
            failures += [(mine[row], reason) for row, reason in chunk.failures]
        return ReadableImages(torch.cat(features), kept, failures)

    @property
    def logit_scale(self) -> float:
        """Of this moment."""
        return self._embedder.logit_scale

    @property
    def logit_bias(self) -> float | None:
        """Of this moment."""
        return self._embedder.logit_bias

    @property
    def family(self) -> Literal["softmax", "sigmoid"]:
        """As `Embedder`."""
        return self._embedder.family


def _place(section: EvalSettings) -> str:
    return section.data if isinstance(section.data, str) else "::".join(section.data)


def _kind(section: EvalSettings) -> str:
    """What decides a section's keys: two of a kind are told apart by their data."""
    return section.name or (find_protocol(section.protocol).task if section.protocol else "")


def _stem(section: EvalSettings) -> str:
    if section.protocol is not None:
        return section.protocol
    return Path(_place(section)).stem + (f"_{section.split}" if section.split else "")
