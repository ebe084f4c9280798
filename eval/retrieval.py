"""Image-text retrieval in both directions, all captions used.

source = read_source("flickr8k", split="test")
evaluation = RetrievalEvaluator(source.records).run(vlkit.load_embedder("run:runs/f8k"))
evaluation.metrics["text_to_image/recall@1"], evaluation.intervals["text_to_image/recall@1"]
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from eval.examples import RetrievalExample, choose_examples
from eval.features import IMAGES, EmbeddedRecords, EmbeddingSource, embed_records, embed_texts, parts_of
from eval.metrics import (
    RetrievalRanks,
    SameLabel,
    bootstrap_interval,
    expected_rank,
    hit_probability,
    positive_positions,
    retrieval_ranks,
)
from eval.with_addons import addons_record, as_source, passes_for, ranks_of, read_and_fit
from vlkit.addons.class_weights.templates import templates_hash
from vlkit.addons.exchange import Vectors
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Reference
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record, text_to_image
from vlkit.errors import ConfigError, DataError

CAPTION_TEMPLATES = ("{}",)  # captions are embedded as they are


class Measured(NamedTuple):
    """Numbers of one retrieval."""

    ranks: RetrievalRanks
    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]


class Outcome(NamedTuple):
    """Everything that is counted from."""

    images: EmbeddedRecords
    captions: list[str]  # (M,)
    text: Tensor  # (M,D)
    owners: Tensor  # (M,)
    ranks: RetrievalRanks
    addons: dict[str, object]  # what the result says of add-ons


@dataclass(frozen=True)
class RetrievalEvaluator(Evaluator):
    """Recall@K, median rank and their intervals of a model on images with captions.

    Images without captions are left out, and so are unreadable images with their captions; both are counted.

    Attributes:
        records: images with any number of captions each.
        ks: the K of recall@K.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap.
        num_examples: queries of each direction to keep for a report, half of them answered right.
        progress: called with (done, total) over images and texts together.
        reference: what add-ons that are not fitted yet may be fitted on.
        passes: image passes to share with other evaluations of the same model.
        text_prefix: words put before every caption, as `A photo depicts ` in CLIPScore and DN.
        true_recall: also measure how many of an image's captions are found, beside whether any is: a second, slower
            pass over all scores.
    """

    records: Sequence[Record]
    ks: tuple[int, ...] = (1, 5, 10)
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    num_examples: int = 0
    progress: Progress | None = None
    reference: Reference | None = None
    passes: Passes | None = None
    text_prefix: str = ""
    true_recall: bool = False

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: no image has a caption.
        """
        if not any(record.captions for record in self.records):
            raise DataError(f"None of the {len(self.records)} images has a caption; retrieval needs captions.")

    def run(self, source: EmbeddingSource, pipeline: Pipeline = PLAIN) -> Evaluation:
        """Embed, rank, count.

        Args:
            source: the model.
            pipeline: add-ons; those that are not fitted yet are fitted on `reference`.

        Returns:
            Metrics `image_to_text/recall@K`, `text_to_image/recall@K`, `mean_recall@K` (mean of the two) and
            `.../median_rank`; with `true_recall` also `image_to_text/true_recall@K`, `.../mean_average_precision` and
            `.../r_precision`; one row a query in `per_item`; figures `examples` and `unreadable_images`.

        Raises:
            DataError: no readable image.
            GalleryError: features that are not finite.
            ConfigError: `true_recall` with add-ons, which are ranked another way.
        """
        if self.true_recall and pipeline.addons:
            raise ConfigError("True recall is measured without add-ons; leave one of the two out.")
        captioned = [record for record in self.records if record.captions]
        num_captions = sum(len(record.captions) for record in captioned)
        look_up = self._adapted if pipeline.addons or self.passes is not None else self._plain
        images, captions, text, owners, ranks, addons = look_up(source, captioned, num_captions, pipeline)
        metrics, intervals = metrics_of(ranks, owners, self.ks, self.seed)
        if self.true_recall:
            values = caption_recall(images.features, text, owners, self.ks)
            low, high = bootstrap_interval(torch.stack(list(values.values()), dim=1), seed=self.seed)
            for place, (key, column) in enumerate(values.items()):
                metrics[key], intervals[key] = column.mean().item(), (low[place].item(), high[place].item())
        examples: Sequence[RetrievalExample] = ()
        # Examples show what plain features find; with add-ons they would show something else than what was measured.
        if self.num_examples and not pipeline.addons:
            examples = choose_examples(images.records, images.features, text, owners, ranks, self.num_examples)
        return Evaluation(
            metrics=metrics,
            intervals=intervals,
            protocol={**self._protocol(), **addons},
            counts={
                "images": len(images.records),
                "texts": len(captions),
                "unreadable_images": len(images.unreadable),
                "texts_of_unreadable_images": num_captions - len(captions),
                "images_without_captions": len(self.records) - len(captioned),
                "texts_that_several_images_share": _num_shared(captions, owners.tolist()),
            },
            per_item=_per_item(images.records, captions, ranks, self.ks),
            figures={"examples": tuple(examples), "unreadable_images": images.unreadable},
        )

    def _plain(
        self, source: EmbeddingSource, records: Sequence[Record], num_captions: int, pipeline: Pipeline
    ) -> Outcome:
        of_images, of_texts = parts_of(self.progress, len(records), num_captions)
        images = embed_records(source, records, self.batch_size, self.workers, of_images)
        captions, text, owners = _texts(source, images.records, self.text_prefix, of_texts)
        return Outcome(images, captions, text, owners, retrieval_ranks(images.features, text, owners), {})

    def _adapted(
        self, source: EmbeddingSource, records: Sequence[Record], num_captions: int, pipeline: Pipeline
    ) -> Outcome:
        """Through the add-ons: what they need is fitted, and told in the result."""
        model = as_source(source)
        passes = passes_for(self.passes, pipeline, model, self.batch_size, self.workers)
        read, fitted = read_and_fit(pipeline, "retrieval", records, passes, self.reference, (), CAPTION_TEMPLATES)
        captions, text, owners = _texts(fitted.source(model), read.embedded.records, self.text_prefix, self.progress)
        ranks = ranks_of(fitted.retrieval(read.vectors, Vectors("text", text), model), owners)
        return Outcome(read.embedded, captions, text, owners, ranks, addons_record(fitted))

    def _protocol(self) -> Mapping[str, object]:
        return {
            "images": IMAGES,
            "captions": "all of each image",
            "image_to_text": "an image is a hit when any of its captions is among the first K",
            "text_to_image": "a caption is a hit when its image is among the first K",
            "similarity": "cosine",
            "ties": "within 1e-6 x max(1, |score|); the expectation over their random order",
            "ks": list(self.ks),
            "templates": f"{self.text_prefix}{{}}" if self.text_prefix else "caption as it is",
            "templates_hash": templates_hash([self.text_prefix + template for template in CAPTION_TEMPLATES]),
            "interval": f"95%, percentile bootstrap, 1000 resamples of images, seed {self.seed}",
        }


def _texts(
    source: EmbeddingSource, records: Sequence[Record], prefix: str, progress: Progress | None
) -> tuple[list[str], Tensor, Tensor]:
    """All captions, their features (M,D), and the image row of each (M,)."""
    captions = [caption for record in records for caption in record.captions]
    text = embed_texts(source, captions, progress, prefix)
    return captions, text, torch.tensor(text_to_image(records))


def caption_recall(image: Tensor, text: Tensor, owners: Tensor, ks: Sequence[int]) -> dict[str, Tensor]:
    """Of every image (N,) how its captions rank among all: true recall@K, average precision and R-precision.

    Args:
        image: (N,D) unit norm.
        text: (M,D) unit norm.
        owners: (M,) the image row each text belongs to.
        ks: the K of recall@K.

    Source: CLIP_benchmark 1.6.1, metrics/zeroshot_retrieval.py, `recall_at_k` before it is made a hit rate.
    """
    found = positive_positions(image, text, SameLabel(torch.arange(len(image)), owners))
    values = {f"image_to_text/true_recall@{k}": found.recall(k) for k in ks}
    own = {"mean_average_precision": found.average_precision(), "r_precision": found.r_precision()}
    return values | {f"image_to_text/{name}": column for name, column in own.items()}


def measure_retrieval(image: Tensor, text: Tensor, owners: Tensor, ks: Sequence[int], seed: int = 0) -> Measured:
    """Metrics and 95% intervals from features.

    Args:
        image: (N,D) unit norm.
        text: (M,D) unit norm.
        owners: (M,) the image row each text belongs to.
        ks: the K of recall@K.
        seed: of the bootstrap. What is resampled is images with all their captions.
    """
    ranks = retrieval_ranks(image, text, owners)
    return Measured(ranks, *metrics_of(ranks, owners, ks, seed))


def metrics_of(
    ranks: RetrievalRanks, owners: Tensor, ks: Sequence[int], seed: int = 0
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Metrics and their 95% intervals out of the ranks of both directions."""
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    num_images = len(ranks.image_to_text.better)
    for direction, units in (("image_to_text", torch.arange(num_images)), ("text_to_image", owners)):
        of_queries = getattr(ranks, direction)
        hits = torch.stack([hit_probability(of_queries, k) for k in ks], dim=1)
        low, high = bootstrap_interval(hits, units=units, seed=seed)
        for place, k in enumerate(ks):
            metrics[f"{direction}/recall@{k}"] = hits[:, place].mean().item()
            intervals[f"{direction}/recall@{k}"] = (low[place].item(), high[place].item())
    for direction in ("image_to_text", "text_to_image"):
        metrics[f"{direction}/median_rank"] = float(np.median(expected_rank(getattr(ranks, direction)).numpy()))
    for k in ks:
        metrics[f"mean_recall@{k}"] = (metrics[f"image_to_text/recall@{k}"] + metrics[f"text_to_image/recall@{k}"]) / 2
    return metrics, intervals


def _num_shared(captions: Sequence[str], owners: Sequence[int]) -> int:
    """Captions whose very words also describe another image: they cannot be told apart."""
    num_images = Counter(caption for caption, _ in set(zip(captions, owners, strict=True)))
    return sum(num_images[caption] > 1 for caption in captions)


def _per_item(records: Sequence[Record], captions: Sequence[str], ranks: RetrievalRanks, ks: Sequence[int]) -> pa.Table:
    """One row a query: images first, then captions."""
    keys = [record.key for record in records]
    columns = {
        "direction": ["image_to_text"] * len(keys) + ["text_to_image"] * len(captions),
        "key": keys + [record.key for record in records for _ in record.captions],
        "caption": [None] * len(keys) + list(captions),
        "rank": torch.cat([expected_rank(one) for one in ranks]).numpy(),
    }
    hits = {f"hit@{k}": torch.cat([hit_probability(one, k) for one in ranks]).numpy() for k in ks}
    return pa.table(columns | hits)
