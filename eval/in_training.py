"""Evaluations during training: from the run file's [[eval]] sections to entries of `fit`'s `every`.

run = load_run("run.toml")
pretrain(run, every=make_every(run))
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from eval.class_names import name_classes
from eval.classification import ClassificationEvaluator
from eval.retrieval import RetrievalEvaluator
from vlkit.config import EvalSettings, RunConfig
from vlkit.contracts import Progress
from vlkit.data.images import ImageChunk, iterate_images
from vlkit.data.records import Record
from vlkit.data.sources import read_source
from vlkit.data.transforms import Preprocess
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
    count = Counter(section.name for section in run.eval)
    return [
        Every(section.every, _Evaluation(section, prefix=f"{_stem(section)}/" if count[section.name] > 1 else ""))
        for section in run.eval
    ]


class _Evaluation:
    """One [[eval]] section: reads its data at once, its images at the first call."""

    def __init__(self, section: EvalSettings, prefix: str) -> None:
        self.prefix = prefix
        source = read_source(_place(section), format=section.format, images=section.images, split=section.split)
        self.evaluator: RetrievalEvaluator | ClassificationEvaluator
        if section.name == "retrieval":
            self.evaluator = RetrievalEvaluator(source.records)
        else:
            classes = name_classes(source.class_names, source.records)
            self.evaluator = ClassificationEvaluator(classes.records, classes.names)
        self.cache = _PixelCache()

    def __call__(self, moment: Moment) -> Mapping[str, float]:
        """Evaluate the encoder as it is now."""
        evaluation = self.evaluator.run(_InTraining(moment.encoder, self.cache))
        unreadable = evaluation.figures["unreadable_images"]
        if unreadable and not self.cache.reported:
            _log.warning("%d evaluation images cannot be read (first: %s: %s).", len(unreadable), *unreadable[0])
            self.cache.reported = True
        # Ranks are no fractions; they would press the curves of a plot flat.
        fractions = {key: value for key, value in evaluation.metrics.items() if not key.endswith("rank")}
        return {self.prefix + key: value for key, value in fractions.items()}


class _PixelCache:
    """Preprocessed images of one evaluation, decoded once where they are few enough."""

    def __init__(self) -> None:
        self.chunks: list[ImageChunk] | None = None
        self.reported = False

    def iterate(self, records: Sequence[Record], preprocess: Preprocess, workers: int) -> Iterator[ImageChunk]:
        if self.chunks is not None:
            yield from self.chunks
            return
        small = len(records) * 3 * preprocess.size**2 <= MAX_CACHED_BYTES
        seen = []
        for chunk in iterate_images(records, preprocess, batch_size=BATCH_SIZE, workers=workers):
            if small:
                seen.append(chunk)
            yield chunk
        self.chunks = seen if small else None


@dataclass(frozen=True)
class _InTraining:
    """The encoder of this moment as a source of features: an `Embedder` whose images are decoded once a run."""

    encoder: DualEncoder
    cache: _PixelCache

    @property
    def _embedder(self) -> Embedder:
        return Embedder(encoder=self.encoder, name="in training")

    def embed_images_where_readable(
        self,
        images: Sequence[Record],
        batch_size: int = BATCH_SIZE,
        progress: Progress | None = None,
        workers: int | None = None,
    ) -> ReadableImages:
        """As `Embedder`; the chunks are those of the cache."""
        kept: list[int] = []
        failures: list[tuple[int, str]] = []
        features = [torch.empty(0, self.encoder.embed_dim)]
        for chunk in self.cache.iterate(images, self.encoder.preprocess, workers or 2):
            if chunk.rows:
                with torch.no_grad():
                    pixels = chunk.images.to(self.encoder.device)
                    features.append(self.encoder.encode_image(pixels).float().cpu())
            kept += chunk.rows
            failures += chunk.failures
            if progress:
                progress(len(kept) + len(failures), len(images))
        return ReadableImages(torch.cat(features), kept, failures)

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """As `Embedder`."""
        return self._embedder.embed_texts(texts, batch_size, progress)

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


def _stem(section: EvalSettings) -> str:
    return Path(_place(section)).stem + (f"_{section.split}" if section.split else "")
