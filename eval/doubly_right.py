"""Doubly right recognition: is the class right, and for the right reason.

    DoublyRightEvaluator(records, class_names).run(source, Pipeline([load_addon("addons/why")])).metrics["both"]

Each image brings its class and, as its caption, the reason for it. Candidates are all pairs of a class and a reason, as
"This is a photo of a {class} because there is {reason}".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch

from eval.features import IMAGES
from eval.metrics import Candidates, bootstrap_interval, judged
from eval.with_addons import addons_record, as_source, read_images
from vlkit.addons.class_names import check_classes, parse_class
from vlkit.addons.passes import Passes
from vlkit.addons.pipeline import PLAIN, Pipeline
from vlkit.addons.reference import Reference
from vlkit.addons.towers.why_prompt import TEMPLATE, rationale_texts, reasons_of, require_room
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record
from vlkit.errors import ConfigError, DataError
from vlkit.features.source import FeatureSource

METRICS = ("both", "only_class", "only_reason", "neither", "accuracy@1")


@dataclass(frozen=True)
class DoublyRightEvaluator(Evaluator):
    """How often class and reason are right, together and alone.

    Attributes:
        records: images with a class and a reason; those without a class are left out and counted.
        class_names: (C,) that labels point into.
        k: candidates that vote.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        seed: of the bootstrap, and of the order of equal scores.
        progress: called with (done, total) images.
    """

    records: Sequence[Record]
    class_names: Sequence[str]
    k: int = 5
    batch_size: int = 64
    workers: int | None = None
    seed: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: no image with a class, or one of these without a reason.
            ConfigError: an empty or repeated class name, or no candidate that votes.
        """
        if self.k < 1:
            raise ConfigError(f"k is {self.k}; at least one candidate votes.")
        if not self._labelled():
            raise DataError(
                f"None of the {len(self.records)} images has a class; expected a table with columns image, class and "
                "caption, the reason."
            )
        check_classes([parse_class(name) for name in self.class_names])
        reasons_of(self._labelled())

    def run(self, source: FeatureSource, pipeline: Pipeline = PLAIN) -> Evaluation:
        """Embed all pairs of class and reason, embed the images, let the best pairs vote.

        Args:
            source: the model.
            pipeline: add-ons that change pixels or towers, such as a fitted `why_prompt`.

        Returns:
            Metrics `both` (the doubly right accuracy), `only_class`, `only_reason` and `neither`, which sum to 1, and
            `accuracy@1` of the class; one row an image in `per_item`.

        Raises:
            ConfigError: other add-ons (class weights and terms know no reasons), or one that must be fitted first.
            GalleryError: an add-on that was fitted for another model.
            DataError: no readable image, or a text longer than the model takes.
        """
        others = [one.name for one in pipeline.addons if one.slot not in ("inputs", "towers")]
        if others:
            raise ConfigError(f"{', '.join(others)}: class and reason are told by cosine; only edits of the model fit.")
        model = as_source(source)
        passes = Passes(model, batch_size=self.batch_size, workers=self.workers, progress=self.progress)
        classes = tuple(parse_class(name) for name in self.class_names)
        fitted = pipeline if pipeline.fitted else pipeline.fit(Reference(class_names=classes, passes=passes), model)
        fitted.require_usable(model, "classification", classes)
        read = read_images(passes, self._labelled(), fitted)
        records = read.embedded.records
        distinct, own = reasons_of(records)
        pairs = rationale_texts([item.shown for item in classes], distinct)
        require_room(pairs.texts, model.embedder.encoder)
        texts = fitted.source(model).embed_texts(pairs.texts)
        labels = torch.tensor([record.label for record in records])
        scores = read.vectors.pooled @ texts.to(read.vectors.pooled).T
        pairs_of = Candidates(pairs.classes, pairs.reasons)
        right, reasoned = judged(scores, pairs_of, labels, own, self.k, self.seed)
        each = torch.stack([right & reasoned, right & ~reasoned, ~right & reasoned, ~right & ~reasoned, right], dim=1)
        low, high = bootstrap_interval(each.double(), seed=self.seed)
        return Evaluation(
            metrics=dict(zip(METRICS, each.double().mean(0).tolist(), strict=True)),
            intervals={name: (low[n].item(), high[n].item()) for n, name in enumerate(METRICS)},
            protocol={
                "images": IMAGES,
                "template": TEMPLATE,
                "candidates": "every class with every reason of these images",
                "votes": f"the {self.k} best candidates; of equal classes the one that comes first",
                "interval": f"95%, percentile bootstrap, 1000 resamples of images, seed {self.seed}",
            }
            | addons_record(fitted),
            counts={
                "images": len(records),
                "classes": len(classes),
                "reasons": len(distinct),
                "candidates": len(pairs.texts),
                "unreadable_images": len(read.embedded.unreadable),
                "images_without_labels": len(self.records) - len(self._labelled()),
            },
            per_item=pa.table(
                {
                    "key": [record.key for record in records],
                    "class": [classes[label].shown for label in labels.tolist()],
                    "reason": [distinct[reason] for reason in own.tolist()],
                    "class_right": right.numpy(),
                    "reason_right": reasoned.numpy(),
                }
            ),
            figures={"unreadable_images": read.embedded.unreadable},
        )

    def _labelled(self) -> list[Record]:
        return [record for record in self.records if record.label is not None]
