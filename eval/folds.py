"""Retrieval within parts of equal size, metrics averaged: COCO's "1k" is the mean over five folds of 1,000 images.

FoldedRetrieval(RetrievalEvaluator(records), folds=5).run(source).metrics["text_to_image/recall@1"]
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc
import torch

from eval.features import EmbeddingSource
from eval.metrics import bootstrap_interval
from eval.retrieval import RetrievalEvaluator
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record
from vlkit.errors import ConfigError, DataError


@dataclass(frozen=True)
class FoldedRetrieval(Evaluator):
    """Metrics are means over the folds; intervals are over all queries together.

    Attributes:
        evaluator: with all records; those that have captions are cut in their order.
        folds: how many parts; 1 is the evaluator itself.
        progress: called with (done, total) over images and texts of all folds.
    """

    evaluator: RetrievalEvaluator
    folds: int = 1
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: folds below 1.
            DataError: images with captions that cannot be cut into equal parts.
        """
        if self.folds < 1:
            raise ConfigError(f"{self.folds} folds; expected 1 or more.")
        count = sum(bool(record.captions) for record in self.evaluator.records)
        if count % self.folds:
            raise DataError(
                f"{count} images with captions cannot be cut into {self.folds} equal folds; expected a divisor of "
                f"{count}, as 5 is of COCO's 5,000. Choose --folds so, or leave it out for all images at once."
            )

    @property
    def records(self) -> Sequence[Record]:
        """Of all folds."""
        return self.evaluator.records

    def run(self, source: EmbeddingSource, pipeline: Pipeline = PLAIN) -> Evaluation:
        """Evaluate each fold by itself; an add-on that takes test images sees those of the fold.

        Returns:
            As `RetrievalEvaluator.run`; figure `examples` is of the first fold.

        Raises:
            DataError, GalleryError: as `RetrievalEvaluator.run`.
        """
        if self.folds == 1:
            return replace(self.evaluator, progress=self.progress or self.evaluator.progress).run(source, pipeline)
        captioned = [record for record in self.records if record.captions]
        size = len(captioned) // self.folds
        parts = []
        for fold in range(self.folds):
            own = captioned[fold * size : (fold + 1) * size]
            report = _shifted(self.progress, fold, self.folds)
            parts.append(replace(self.evaluator, records=own, progress=report).run(source, pipeline))
        return _joined(parts, self.evaluator.seed)


def _joined(parts: Sequence[Evaluation], seed: int) -> Evaluation:
    keys = list(parts[0].metrics)
    table = pa.concat_tables([part.per_item for part in parts if part.per_item is not None])
    intervals: dict[str, tuple[float, float]] = {}
    # Of the metrics that `per_item` holds; the others are left without one.
    for direction in ("image_to_text", "text_to_image"):
        rows = table.filter(pc.equal(table["direction"], direction))
        units = torch.from_numpy(pc.dictionary_encode(rows["key"]).combine_chunks().indices.to_numpy().copy())
        for column in (name for name in rows.column_names if name.startswith("hit@")):
            low, high = bootstrap_interval(torch.from_numpy(rows[column].to_numpy().copy()), units=units, seed=seed)
            intervals[f"{direction}/recall@{column[4:]}"] = (low.item(), high.item())
    figures = {
        "examples": parts[0].figures["examples"],
        "unreadable_images": tuple(one for part in parts for one in part.figures["unreadable_images"]),
    }
    return Evaluation(
        metrics={key: sum(part.metrics[key] for part in parts) / len(parts) for key in keys},
        intervals=intervals,
        protocol={**parts[0].protocol, "folds": f"mean over {len(parts)}; intervals over all their queries"},
        counts={key: sum(part.counts[key] for part in parts) for key in parts[0].counts},
        per_item=table,
        figures=figures,
    )


def _shifted(progress: Progress | None, part: int, parts: int) -> Progress | None:
    if progress is None:
        return None
    report = progress
    return lambda done, total: report(part * total + done, parts * total)
