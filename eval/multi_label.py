"""Zero-shot classification of images with several classes: mean average precision over classes.

MultiLabelEvaluator(source.records, source.class_names, templates=source.templates).run(embedder)
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from eval.features import IMAGES, ClassifyingSource, embed_records, parts_of
from eval.metrics import label_average_precision
from vlkit.addons.class_weights.templates import DEFAULT_TEMPLATES, load_templates, templates_hash
from vlkit.addons.classifier import ZeroShotClassifier, check_classes, parse_class
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record
from vlkit.errors import DataError

_ROWS = 4096
_RESAMPLES = 200


@dataclass(frozen=True)
class MultiLabelEvaluator(Evaluator):
    """Mean average precision of a model on images with any number of classes each, zero-shot.

    Attributes:
        records: images; `labels` points into `class_names`, `label` alone counts as one class.
        class_names: (C,) as in prompts; `name | synonym` takes the maximum.
        templates: a set's name, a file, one template with `{}`, or a list.
        naming: how the class names came about, for the record.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap.
        progress: called with (done, total) over prompts and images together.
    """

    records: Sequence[Record]
    class_names: Sequence[str]
    templates: str | Sequence[str] = DEFAULT_TEMPLATES
    naming: str = "as given"
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: no image has a class, or a class number is beyond the class names.
            ConfigError: an empty or a repeated class name.
        """
        if not any(_labels(record) for record in self.records):
            raise DataError(f"None of the {len(self.records)} images has a class; expected KEY.npy or `labels`.")
        for record in self.records:
            if any(label >= len(self.class_names) for label in _labels(record) or ()):
                raise DataError(
                    f"{record.key} has classes {_labels(record)}, but there are {len(self.class_names)} class names."
                )
        check_classes([parse_class(name) for name in self.class_names])

    def run(self, source: ClassifyingSource, pipeline: None = None) -> Evaluation:
        """Embed the class names, embed the images, rank the images of every class.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator yet.

        Returns:
            Metrics `mean_average_precision` (over classes that an image has) and `mean_average_precision/all_classes`
            (the others count 0, as CLIP_benchmark does); figure `average_precision`; `per_item` one row a class.

        Raises:
            DataError: no readable image.
            ConfigError: unusable templates.
            GalleryError: features that are not finite.
        """
        known = [record for record in self.records if _labels(record) is not None]
        templates = load_templates(self.templates) if isinstance(self.templates, str) else tuple(self.templates)
        num_prompts = len(templates) * sum(len(parse_class(name).names) for name in self.class_names)
        of_prompts, of_images = parts_of(self.progress, num_prompts, len(known))
        classifier = ZeroShotClassifier.build(source, self.class_names, templates, progress=of_prompts)
        images = embed_records(source, known, self.batch_size, self.workers, of_images)
        truth = torch.zeros(len(images.records), len(self.class_names), dtype=torch.bool)
        for row, record in enumerate(images.records):
            truth[row, list(_labels(record) or ())] = True
        scores = torch.cat([classifier.weights.scores(rows) for rows in torch.split(images.features, _ROWS)])
        found = label_average_precision(scores, truth)
        absent = int((found.support == 0).sum())
        return Evaluation(
            metrics={
                "mean_average_precision": found.mean(),
                "mean_average_precision/all_classes": found.average_precision.nan_to_num(0.0).mean().item(),
            },
            intervals={"mean_average_precision": _interval(scores, truth, self.seed)},
            protocol={
                "images": IMAGES,
                "class_names": self.naming,
                "class_names_hash": hashlib.sha256("\n".join(self.class_names).encode()).hexdigest()[:12],
                "templates": self.templates if isinstance(self.templates, str) else f"{len(templates)} given",
                "num_templates": len(templates),
                "templates_hash": templates_hash(templates),
                "average_precision": "non-interpolated; classes without an image left out",
                "interval": f"95%, percentile bootstrap, {_RESAMPLES} resamples of images, seed {self.seed}",
            },
            counts={
                "images": len(images.records),
                "classes": len(self.class_names),
                "classes_without_images": absent,
                "unreadable_images": len(images.unreadable),
                "images_without_labels": len(self.records) - len(known),
            },
            per_item=pa.table(
                {
                    "class": list(classifier.class_names),
                    "images": found.support.numpy(),
                    "average_precision": [None if np.isnan(ap) else ap for ap in found.average_precision.tolist()],
                }
            ),
            figures={"average_precision": found, "unreadable_images": images.unreadable},
        )


def _labels(record: Record) -> tuple[int, ...] | None:
    if record.labels is not None:
        return record.labels
    return None if record.label is None else (record.label,)


def _interval(scores: Tensor, truth: Tensor, seed: int) -> tuple[float, float]:
    """Over resampled images; average precision is no mean of image values, so each resample is ranked anew."""
    generator = np.random.Generator(np.random.Philox(seed))
    values = []
    for _ in range(_RESAMPLES):
        rows = torch.from_numpy(generator.integers(0, len(scores), len(scores)))
        if truth[rows].any():
            values.append(label_average_precision(scores[rows], truth[rows]).mean())
    low, high = np.quantile(values, [0.025, 0.975]).tolist()
    return low, high
