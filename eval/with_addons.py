"""What evaluators share when a pipeline of add-ons stands between features and scores."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from eval.features import EmbeddedRecords, EmbeddingSource, readable
from eval.metrics import Ranks, RetrievalRanks, label_ranks
from eval.metrics.ranking import tie_bounds
from vlkit.addons.adapted import AdaptedRetrieval, Direction
from vlkit.addons.base import InputEdit, Task, TowerEdit
from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import Vectors
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Reference, Stream
from vlkit.contracts import Progress
from vlkit.data.records import Record
from vlkit.errors import ConfigError
from vlkit.features.feature_set import check_finite
from vlkit.features.model_card import card_of
from vlkit.features.source import CachedEmbedder, FeatureSource
from vlkit.models.embedder import Embedder

# What a reference without any data still gives.
_FREE = frozenset(
    {
        "class_names",
        "patches",
        "patch_tokens",
        "views",
        "pixels",
        "grad_text",
        "grad_image",
        "test_stream",
        "extra_model",
    }
)
CHUNK = 1024


class ReadImages(NamedTuple):
    """Test images with everything a pipeline wants of them."""

    embedded: EmbeddedRecords
    vectors: Vectors


class ScoredImages(NamedTuple):
    """What a pipeline says of every image."""

    ranks: Ranks
    predicted: Tensor  # (N,) int64
    probability: Tensor  # (N,) of the predicted class
    rule: str


def as_source(source: EmbeddingSource) -> FeatureSource:
    """The source as add-ons take it: a loaded model becomes one without a cache.

    Raises:
        ConfigError: it is neither a model nor a source of features.
    """
    if isinstance(source, FeatureSource):
        return source
    if isinstance(source, Embedder):
        return CachedEmbedder(lambda: source, None, card_of(source))
    raise ConfigError(f"Add-ons need a model or a FeatureSource; got {type(source).__name__}.")


def passes_for(
    passes: Passes | None, pipeline: Pipeline, source: FeatureSource, batch_size: int, workers: int | None
) -> Passes:
    """Those that were given, or new ones."""
    return passes or Passes(source, local=pipeline.local, batch_size=batch_size, workers=workers)


def read_images(passes: Passes, records: Sequence[Record], pipeline: Pipeline) -> ReadImages:
    """One pass over the images under the pipeline's edits, with its views.

    Raises:
        DataError: no image could be read.
        GalleryError: features that are not finite.
    """
    read = passes.read(records, pipeline.edits, pipeline.views)
    kept, unreadable = readable(records, read.kept, read.failures)
    check_finite(read.vectors.pooled, [record.key for record in kept], "images")
    return ReadImages(EmbeddedRecords(kept, read.vectors.pooled, unreadable), read.vectors)


def read_and_fit(
    pipeline: Pipeline,
    task: Task,
    records: Sequence[Record],
    passes: Passes,
    reference: Reference | None,
    class_names: Sequence[ClassName],
    templates: str | Sequence[str],
) -> tuple[ReadImages, Pipeline]:
    """The test images as the pipeline wants them, and the pipeline fitted.

    Edits are fitted first, for the images are read under them; the rest may want to see those images.

    Raises:
        ConfigError: see `prepared`.
        DataError, GalleryError: see `read_images`.
    """
    edits = Pipeline(pipeline.edits)
    if not edits.fitted:
        done = prepared(edits, task, None, passes, reference, class_names, templates)
        others = [addon for addon in pipeline.addons if not isinstance(addon, InputEdit | TowerEdit)]
        pipeline = Pipeline([*done.addons, *others])
    read = read_images(passes, records, pipeline)
    return read, prepared(pipeline, task, read, passes, reference, class_names, templates)


def prepared(
    pipeline: Pipeline,
    task: Task,
    images: ReadImages | None,
    passes: Passes,
    reference: Reference | None,
    class_names: Sequence[ClassName],
    templates: str | Sequence[str],
) -> Pipeline:
    """The pipeline, fitted: as it is, on a reference, or, where it needs no data, on the class names alone.

    Transductive add-ons get the test images, without labels; nobody else does.

    Raises:
        ConfigError: data it needs were not given.
    """
    if pipeline.fitted:
        return pipeline
    given = reference or Reference(task=task)
    missing = sorted(pipeline.needs - _FREE - set(given.gives()))
    if missing:
        names = ", ".join(addon.name for addon in pipeline.addons)
        raise ConfigError(
            f"{names} must be fitted first: it needs {', '.join(missing)}. "
            "Give a reference (--reference), or fit and save it with `vlkit adapt`."
        )
    stream = None
    if pipeline.transductive:
        assert images is not None
        plain = passes.read(images.embedded.records)
        stream = Stream(plain.vectors, images.embedded.records)
    complete = replace(given, task=task, class_names=tuple(class_names), stream=stream, passes=passes)
    return pipeline.fit(complete, passes.source, templates)


def score_images(
    pipeline: Pipeline,
    images: Vectors,
    labels: Tensor,
    class_names: Sequence[ClassName],
    source: FeatureSource,
    templates: str | Sequence[str],
    progress: Progress | None = None,
) -> ScoredImages:
    """Ranks, predictions and probabilities of labelled images."""
    classifier = pipeline.classifier(class_names, source, templates, progress)
    # A streaming add-on remembers, so it takes all images in one go.
    size = len(images) if pipeline.streaming else CHUNK
    parts = []
    for start in range(0, len(images), max(size, 1)):
        logits = classifier.logits(images.rows(slice(start, start + size)))
        shifted = logits + classifier.logit_bias
        chances = shifted.sigmoid() if classifier.family == "sigmoid" else shifted.softmax(-1)
        best = chances.max(dim=-1)
        # Ranked on the scale of the cosine, which is what the tolerance of ties is meant for.
        ranks = label_ranks(logits / classifier.logit_scale, labels[start : start + size])
        parts.append((ranks, best.indices, best.values))
    ranks = Ranks(*(torch.cat(column) for column in zip(*(part[0] for part in parts), strict=True)))
    return ScoredImages(ranks, torch.cat([p[1] for p in parts]), torch.cat([p[2] for p in parts]), classifier.rule)


def ranks_of(scored: AdaptedRetrieval, owners: Tensor) -> RetrievalRanks:
    """Ranks of the right answers in both directions; a bias of one gallery does not touch the other direction.

    Args:
        scored: images and texts.
        owners: (M,) the image row each text belongs to.
    """
    return RetrievalRanks(
        image_to_text=directed_ranks(scored, owners, "image_to_text"),
        text_to_image=directed_ranks(scored, owners, "text_to_image"),
    )


def directed_ranks(scored: AdaptedRetrieval, owners: Tensor, direction: Direction) -> Ranks:
    """Ranks of the right answers in one direction: all that a bias with the queries of one kind can give."""
    parts, start = [], 0
    for scores in scored.scores(direction):
        rows = torch.arange(start, start + len(scores))
        if direction == "image_to_text":
            own = owners[None, :] == rows[:, None]
        else:
            own = torch.arange(scores.shape[1])[None, :] == owners[rows][:, None]
        best = scores.masked_fill(~own, -torch.inf).amax(1)
        best[best.isneginf()] = 0.0  # no right answer: any finite number, for such a query is a miss anyway
        low, high = tie_bounds(best)
        better = ((scores > high[:, None]) & ~own).sum(1)
        tied = ((scores >= low[:, None]) & ~own).sum(1) - better
        parts.append(Ranks(better, tied, ((scores >= low[:, None]) & own).sum(1)))
        start += len(scores)
    return Ranks(*(torch.cat(column) for column in zip(*parts, strict=True)))


def addons_record(pipeline: Pipeline) -> dict[str, object]:
    """What a result says of the add-ons: nothing for none."""
    if not pipeline.addons:
        return {}
    record: dict[str, object] = {"addons": pipeline.describe(), "transductive": pipeline.transductive}
    if pipeline.streaming:
        record["stream"] = "images in the order of the data"
    return record
