"""Few-shot linear probes: 1 to 16 images a class, several draws.

FewShotEvaluator(divide(source.records), class_names).run(embedder).metrics["accuracy@1/4_shots"]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from eval.features import IMAGES, EmbeddingSource, parts_of
from eval.labelled import Labelled, Parts, check_parts, draw_shots, embed_labelled, require_classes
from eval.metrics import bootstrap_interval, hit_probability, label_ranks
from eval.probe import fit_probe
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.errors import ConfigError

SHOTS = (1, 2, 4, 8, 16)
SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class FewShotEvaluator(Evaluator):
    """Accuracy of linear probes trained on a few images a class, averaged over draws.

    Attributes:
        parts: shots and their validation images are drawn from `train` and `val` together; `test` tests.
        class_names: (C,).
        shots: images a class.
        seeds: of the draws.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        progress: called with (done, total) over images and fits.
    """

    parts: Parts
    class_names: Sequence[str]
    shots: tuple[int, ...] = SHOTS
    seeds: tuple[int, ...] = SEEDS
    batch_size: int = 64
    workers: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: a part without images, or a label without a name.
            ConfigError: no shots or seeds, or fewer than one shot.
        """
        check_parts(self.parts, len(self.class_names))
        if not self.shots or not self.seeds or min(self.shots) < 1:
            raise ConfigError(f"shots {self.shots}, seeds {self.seeds}: give at least one of each, shots from 1.")

    def run(self, source: EmbeddingSource, pipeline: None = None) -> Evaluation:
        """Embed once, then draw, fit and test for every number of shots and every seed.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator.

        Returns:
            Metrics `accuracy@1/{k}_shots` (mean over draws) and `accuracy@1/{k}_shots/std` (over draws).

        Raises:
            DataError: a class without a training image, or none left to validate on.
            GalleryError: features that are not finite.
        """
        pool = [*self.parts.train, *self.parts.val]
        num_fits = len(self.shots) * len(self.seeds)
        of_pool, of_test, of_fits = parts_of(self.progress, len(pool), len(self.parts.test), num_fits)
        train = embed_labelled(source, pool, self.batch_size, self.workers, of_pool)
        test = embed_labelled(source, self.parts.test, self.batch_size, self.workers, of_test)
        require_classes(train.labels, self.class_names, "training")
        metrics: dict[str, float] = {}
        intervals: dict[str, tuple[float, float]] = {}
        rows = []
        for place, shots in enumerate(self.shots):
            hits = []
            for number, seed in enumerate(self.seeds):
                hits.append(self._hits(train, test, shots, seed))
                if of_fits:
                    of_fits(place * len(self.seeds) + number + 1, num_fits)
            drawn = torch.stack(hits)
            key = f"accuracy@1/{shots}_shots"
            metrics[key] = drawn.mean().item()
            metrics[f"{key}/std"] = drawn.mean(1).std(correction=0).item()
            low, high = bootstrap_interval(drawn.mean(0)).tolist()
            intervals[key] = (low, high)
            rows.append(drawn.mean(0))
        unreadable = train.unreadable + test.unreadable
        return Evaluation(
            metrics=metrics,
            intervals=intervals,
            protocol={
                "images": IMAGES,
                "parts": self.parts.how,
                "shots": list(self.shots),
                "seeds": list(self.seeds),
                "features": "unit norm",
                "classifier": "multinomial logistic regression on the shots, C on min(shots, 4) further images a class",
                "interval": "95%, percentile bootstrap, 1000 resamples of test images, draws averaged",
            },
            counts={
                "images": len(test.records),
                "train_images": len(train.records),
                "classes": len(self.class_names),
                "classes_without_test_images": len(self.class_names) - len(test.labels.unique()),
                "classes_short_of_shots": int((torch.bincount(train.labels) < max(self.shots)).sum()),
                "unreadable_images": len(unreadable),
            },
            per_item=pa.table(
                {
                    "key": [record.key for record in test.records],
                    "class": [self.class_names[label] for label in test.labels.tolist()],
                    **{f"hit@1/{shots}_shots": row.numpy() for shots, row in zip(self.shots, rows, strict=True)},
                }
            ),
            figures={"unreadable_images": unreadable},
        )

    def _hits(self, train: Labelled, test: Labelled, shots: int, seed: int) -> Tensor:
        rows, val_rows = draw_shots(train.labels, shots, seed)
        probe = fit_probe(train.at(rows), train.at(val_rows), self.class_names, refit=False)
        return hit_probability(label_ranks(probe.head.ranking_scores(test.features), test.labels), 1)
