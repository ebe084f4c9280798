"""Zero-shot classification of labelled images: class names through templates, accuracy and its interval.

source = read_source("caltech101")
evaluation = ClassificationEvaluator(source.records, class_names).run(vlkit.load_embedder("run:runs/f8k"))
evaluation.metrics["accuracy@1"]
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from eval.features import IMAGES, ClassifyingSource, EmbeddedRecords, embed_records, parts_of
from eval.metrics import (
    Ranks,
    bootstrap_interval,
    confusion_matrix,
    expected_rank,
    hit_probability,
    label_ranks,
    mean_per_class_recall,
)
from eval.with_addons import addons_record, as_source, passes_for, read_and_fit, score_images
from vlkit.addons.class_weights.templates import DEFAULT_TEMPLATES, load_templates, templates_hash
from vlkit.addons.classifier import ZeroShotClassifier, check_classes, parse_class
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Reference
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record
from vlkit.errors import DataError

# Rows scored together: 1024 x 20,000 classes are 80 MB.
CHUNK = 1024


class Scored(NamedTuple):
    """What the classifier says of every image."""

    ranks: Ranks
    predicted: Tensor  # (N,) int64
    probability: Tensor  # (N,) of the predicted class
    rule: str


class Classes(NamedTuple):
    """The classes as shown, and what the result says of add-ons."""

    names: tuple[str, ...]
    addons: dict[str, object]


class Outcome(NamedTuple):
    """Everything that is counted from."""

    images: EmbeddedRecords
    labels: Tensor  # (N,)
    scored: Scored
    classes: Classes


class ClassifiedExample(NamedTuple):
    """One image with its true and its predicted class."""

    record: Record
    true: str
    predicted: str
    probability: float


@dataclass(frozen=True)
class ClassificationEvaluator(Evaluator):
    """Accuracy@K and mean recall per class of a model, zero-shot.

    Images without a label are left out and counted, unreadable ones too.

    Attributes:
        records: images; `label` points into `class_names`.
        class_names: (C,) as in prompts; `name | synonym` takes the maximum.
        templates: a set's name, a file, one template with `{}`, or a list.
        naming: how the class names came about, for the record.
        ks: the K of accuracy@K; K above C is left out.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap.
        num_examples: images to keep for a report: the most certain right ones and the most certain wrong ones.
        progress: called with (done, total) over prompts and images together.
        distinct: refuse a name that stands for two classes. Where it may, the two tie.
        reference: what add-ons that are not fitted yet may be fitted on.
        passes: image passes to share with other evaluations of the same model.
    """

    records: Sequence[Record]
    class_names: Sequence[str]
    templates: str | Sequence[str] = DEFAULT_TEMPLATES
    naming: str = "as given"
    ks: tuple[int, ...] = (1, 5)
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    num_examples: int = 0
    progress: Progress | None = None
    distinct: bool = True
    reference: Reference | None = None
    passes: Passes | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: no image has a label, or a label is beyond the class names.
            ConfigError: an empty or a repeated class name.
        """
        labelled = [record for record in self.records if record.label is not None]
        if not labelled:
            raise DataError(
                f"None of the {len(self.records)} images has a class; expected a folder for each class, as in "
                "FOLDER/CLASS/image.jpg, a column `class`, or KEY.cls in shards."
            )
        highest = max(labelled, key=lambda record: record.label or 0)
        if (highest.label or 0) >= len(self.class_names):
            raise DataError(
                f"{highest.key} has label {highest.label}, but there are {len(self.class_names)} class names; "
                "expected one for each label."
            )
        parsed = [parse_class(name) for name in self.class_names]
        if self.distinct:
            check_classes(parsed)

    def run(self, source: ClassifyingSource, pipeline: Pipeline = PLAIN) -> Evaluation:
        """Embed the class names, embed the images, count.

        Args:
            source: the model.
            pipeline: add-ons; those that are not fitted yet are fitted on `reference`.

        Returns:
            Metrics `accuracy@K` and `mean_per_class_recall` (over classes that have an image); one row an image
            in `per_item`; figures `confusion_matrix` (C,C), `class_names`, `examples`, `unreadable_images`.

        Raises:
            DataError: no readable image.
            ConfigError: unusable templates.
            GalleryError: features that are not finite.
        """
        labelled = [record for record in self.records if record.label is not None]
        templates = load_templates(self.templates) if isinstance(self.templates, str) else tuple(self.templates)
        measure = self._adapted if pipeline.addons or self.passes is not None else self._plain
        images, labels, scored, classes = measure(source, labelled, templates, pipeline)
        hits = torch.stack([hit_probability(scored.ranks, k) for k in self.ks], dim=1)
        names, num_present = classes.names, len(labels.unique())
        metrics, intervals = _metrics(hits, labels, self.ks, len(names), self.seed)
        return Evaluation(
            metrics=metrics,
            intervals=intervals,
            protocol=self._protocol(templates, scored.rule) | classes.addons,
            counts={
                "images": len(images.records),
                "classes": len(names),
                "classes_without_images": len(names) - num_present,
                "unreadable_images": len(images.unreadable),
                "images_without_labels": len(self.records) - len(labelled),
            },
            per_item=_per_item(images, labels, scored, names),
            figures={
                "confusion_matrix": confusion_matrix(labels, scored.predicted, len(names)),
                "class_names": names,
                "examples": _examples(images.records, labels, scored, names, self.num_examples),
                "unreadable_images": images.unreadable,
            },
        )

    def _plain(
        self, source: ClassifyingSource, records: Sequence[Record], templates: Sequence[str], pipeline: Pipeline
    ) -> Outcome:
        num_prompts = len(templates) * sum(len(parse_class(name).names) for name in self.class_names)
        of_prompts, of_images = parts_of(self.progress, num_prompts, len(records))
        classifier = ZeroShotClassifier.build(
            source, self.class_names, templates, progress=of_prompts, distinct=self.distinct
        )
        images = embed_records(source, records, self.batch_size, self.workers, of_images)
        labels = torch.tensor([record.label for record in images.records])
        return Outcome(images, labels, _score(classifier, images.features, labels), Classes(classifier.class_names, {}))

    def _adapted(
        self, source: ClassifyingSource, records: Sequence[Record], templates: Sequence[str], pipeline: Pipeline
    ) -> Outcome:
        """Through the add-ons: what they need is fitted, and told in the result."""
        model = as_source(source)
        classes = [parse_class(name) for name in self.class_names]
        passes = passes_for(self.passes, pipeline, model, self.batch_size, self.workers)
        read, fitted = read_and_fit(pipeline, "classification", records, passes, self.reference, classes, templates)
        labels = torch.tensor([record.label for record in read.embedded.records])
        scored = score_images(fitted, read.vectors, labels, classes, model, templates, self.progress)
        names = tuple(item.shown for item in classes)
        return Outcome(read.embedded, labels, Scored(*scored), Classes(names, addons_record(fitted)))

    def _protocol(self, templates: Sequence[str], rule: str) -> dict[str, object]:
        return {
            "images": IMAGES,
            "class_names": self.naming,
            "class_names_hash": hashlib.sha256("\n".join(self.class_names).encode()).hexdigest()[:12],
            "templates": self.templates if isinstance(self.templates, str) else f"{len(self.templates)} given",
            "num_templates": len(templates),
            "templates_hash": templates_hash(templates),
            "probability": rule,
            "ties": "within 1e-6 x max(1, |score|); the expectation over their random order",
            "mean_per_class_recall": "over classes that have an image",
            "interval": f"95%, percentile bootstrap, 1000 resamples of images, seed {self.seed}",
        }


def _score(classifier: ZeroShotClassifier, features: Tensor, labels: Tensor) -> Scored:
    ranks, predicted, probability, rule = [], [], [], ""
    for rows, truth in zip(torch.split(features, CHUNK), torch.split(labels, CHUNK), strict=True):
        # Ranked by score: probabilities of many classes are all below the tie tolerance.
        ranks.append(label_ranks(classifier.weights.scores(rows), truth))
        best = classifier.predict(rows, 1)
        predicted.append(best.indices[:, 0])
        probability.append(best.probabilities[:, 0])
        rule = best.rule
    joined = Ranks(*(torch.cat(parts) for parts in zip(*ranks, strict=True)))
    return Scored(joined, torch.cat(predicted), torch.cat(probability), rule)


def _metrics(
    hits: Tensor, labels: Tensor, ks: Sequence[int], num_classes: int, seed: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    low, high = bootstrap_interval(hits, seed=seed)
    metrics, intervals = {}, {}
    for place, k in enumerate(ks):
        if k <= num_classes:
            metrics[f"accuracy@{k}"] = hits[:, place].mean().item()
            intervals[f"accuracy@{k}"] = (low[place].item(), high[place].item())
    metrics["mean_per_class_recall"] = mean_per_class_recall(hits[:, list(ks).index(1)], labels)
    per_class = bootstrap_interval(hits[:, list(ks).index(1)], groups=labels, seed=seed)
    intervals["mean_per_class_recall"] = (per_class[0].item(), per_class[1].item())
    return metrics, intervals


def _per_item(images: EmbeddedRecords, labels: Tensor, scored: Scored, names: Sequence[str]) -> pa.Table:
    return pa.table(
        {
            "key": [record.key for record in images.records],
            "class": [names[label] for label in labels.tolist()],
            "predicted": [names[label] for label in scored.predicted.tolist()],
            "probability": scored.probability.numpy(),
            "rank": expected_rank(scored.ranks).numpy(),
            "hit@1": hit_probability(scored.ranks, 1).numpy(),
        }
    )


def _examples(
    records: Sequence[Record], labels: Tensor, scored: Scored, names: Sequence[str], count: int
) -> tuple[ClassifiedExample, ...]:
    order = scored.probability.argsort(descending=True, stable=True).tolist()
    right = [row for row in order if scored.predicted[row] == labels[row]][: count - count // 2]
    wrong = [row for row in order if scored.predicted[row] != labels[row]][: count // 2]
    return tuple(
        ClassifiedExample(
            records[row], names[int(labels[row])], names[int(scored.predicted[row])], scored.probability[row].item()
        )
        for row in right + wrong
    )
