"""Linear probe: logistic regression on frozen image features, its strength chosen on validation data.

parts = divide(read_source("caltech101").records)
LinearProbeEvaluator(parts, class_names).run(embedder).metrics["accuracy@1"]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from eval.features import IMAGES, EmbeddingSource, parts_of
from eval.labelled import Labelled, Parts, check_labels, embed_labelled, require_classes
from eval.logistic import ChosenStrength, LinearHead, choose_strength, fit_logistic
from eval.metrics import (
    bootstrap_interval,
    confusion_matrix,
    expected_rank,
    hit_probability,
    label_ranks,
    macro_f1,
    mean_per_class_recall,
)
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.errors import DataError


class Probe(NamedTuple):
    """A fitted probe and how its strength was found."""

    head: LinearHead
    chosen: ChosenStrength


@dataclass(frozen=True)
class LinearProbeEvaluator(Evaluator):
    """Accuracy of a linear classifier trained on frozen features; works with image-only models too.

    Attributes:
        parts: train, validation and test images; `label` points into `class_names`.
        class_names: (C,).
        ks: the K of accuracy@K; K above C is left out.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap.
        progress: called with (done, total) images.
    """

    parts: Parts
    class_names: Sequence[str]
    ks: tuple[int, ...] = (1, 5)
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: a part without images, or a label without a name.
        """
        for name in ("train", "val", "test"):
            records = getattr(self.parts, name)
            if not records:
                raise DataError(f"There is no {name} image; a probe needs all of train, val and test.")
            check_labels(records, len(self.class_names))

    def run(self, source: EmbeddingSource, pipeline: None = None) -> Evaluation:
        """Embed, choose C on validation, fit on train and validation, test.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator.

        Returns:
            Metrics `accuracy@K`, `mean_per_class_recall`, `macro_f1`; `per_item` one row a test image.

        Raises:
            DataError: no readable image in a part, or a class without a training image.
            GalleryError: features that are not finite.
        """
        sizes = [len(self.parts.train), len(self.parts.val), len(self.parts.test)]
        reports = parts_of(self.progress, *sizes)
        train, val, test = (
            embed_labelled(source, records, self.batch_size, self.workers, report)
            for records, report in zip(self.parts[:3], reports, strict=True)
        )
        probe = fit_probe(train, val, self.class_names)
        scores = probe.head.ranking_scores(test.features)
        metrics, intervals, hits = score_heads(scores, test.labels, self.ks, self.seed)
        predicted = scores.argmax(1)
        confusion = confusion_matrix(test.labels, predicted, len(self.class_names))
        unreadable = train.unreadable + val.unreadable + test.unreadable
        return Evaluation(
            metrics=metrics | {"macro_f1": macro_f1(confusion)},
            intervals=intervals,
            protocol={
                "images": IMAGES,
                "parts": self.parts.how,
                "features": "unit norm",
                "classifier": "multinomial logistic regression, L-BFGS, bias not regularised",
                "c": probe.chosen.c,
                "c_chosen_on": "validation: grid of 7 from 1e-6 to 1e6, then 8 halvings; refitted on train and val",
                "validation_accuracy": round(probe.chosen.accuracy, 6),
                "interval": f"95%, percentile bootstrap, 1000 resamples of test images, seed {self.seed}",
            },
            counts={
                "train_images": len(train.records),
                "val_images": len(val.records),
                "images": len(test.records),
                "classes": len(self.class_names),
                "classes_without_test_images": len(self.class_names) - len(test.labels.unique()),
                "unreadable_images": len(unreadable),
            },
            per_item=items_table(test, predicted, scores, hits[:, 0], self.class_names),
            figures={
                "confusion_matrix": confusion,
                "class_names": tuple(self.class_names),
                "unreadable_images": unreadable,
                "tried": probe.chosen.tried,
            },
        )


def fit_probe(train: Labelled, val: Labelled, class_names: Sequence[str], refit: bool = True) -> Probe:
    """Choose C on `val`, then fit on `train` and, where `refit`, on `val` as well.

    Args:
        train: to fit on.
        val: to choose C on.
        class_names: (C,).
        refit: as Radford et al. do; few-shot protocols keep to the shots.

    Raises:
        DataError: a class without a training image, or no validation image.

    Differs: features are unit norm, so values of C are not those of raw features.
    """
    require_classes(train.labels, class_names, "training")
    if not len(val.records):
        raise DataError("There is no validation image to choose the regularisation on.")
    size = len(class_names)
    last: list[LinearHead] = []

    def accuracy(c: float) -> float:
        # From the last optimum it is a short way to the next; the result does not depend on it.
        head = fit_logistic(train.features, train.labels, size, c, last[-1] if last else None)
        last.append(head)
        return hit_probability(label_ranks(head.ranking_scores(val.features), val.labels), 1).mean().item()

    chosen = choose_strength(accuracy)
    features, labels = train.features, train.labels
    if refit:
        features, labels = torch.cat([features, val.features]), torch.cat([labels, val.labels])
    return Probe(fit_logistic(features, labels, size, chosen.c), chosen)


def score_heads(
    scores: Tensor, labels: Tensor, ks: Sequence[int], seed: int
) -> tuple[dict[str, float], dict[str, tuple[float, float]], Tensor]:
    """`accuracy@K` and `mean_per_class_recall` with intervals, and hits (N,1+) whose first column is K = 1."""
    ranks = label_ranks(scores, labels)
    wanted = [1, *(k for k in ks if 1 < k <= scores.shape[1])]
    hits = torch.stack([hit_probability(ranks, k) for k in wanted], dim=1)
    low, high = bootstrap_interval(hits, seed=seed)
    metrics = {f"accuracy@{k}": hits[:, place].mean().item() for place, k in enumerate(wanted)}
    intervals = {f"accuracy@{k}": (low[place].item(), high[place].item()) for place, k in enumerate(wanted)}
    metrics["mean_per_class_recall"] = mean_per_class_recall(hits[:, 0], labels)
    return metrics, intervals, hits


def items_table(test: Labelled, predicted: Tensor, scores: Tensor, hit: Tensor, class_names: Sequence[str]) -> pa.Table:
    """One row a test image."""
    return pa.table(
        {
            "key": [record.key for record in test.records],
            "class": [class_names[label] for label in test.labels.tolist()],
            "predicted": [class_names[label] for label in predicted.tolist()],
            "rank": expected_rank(label_ranks(scores, test.labels)).numpy(),
            "hit@1": hit.numpy(),
        }
    )
