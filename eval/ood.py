"""Out-of-distribution detection: do zero-shot scores tell images of known classes from others?

sets = [OutSet("near", "tiny_imagenet", near.records), OutSet("shifted", "sketches", sketches.records)]
OodEvaluator(known.records, class_names, sets).run(embedder).metrics["near/tiny_imagenet/mcm/auroc"]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import pyarrow as pa
import torch
from torch import Tensor

from eval.features import IMAGES, ClassifyingSource, embed_records, parts_of
from eval.metrics import separation
from vlkit.addons.class_weights.templates import DEFAULT_TEMPLATES, load_templates, templates_hash
from vlkit.addons.classifier import ZeroShotClassifier, check_classes, parse_class
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record
from vlkit.errors import ConfigError, DataError

Kind = Literal["near", "far", "shifted"]
KINDS: tuple[Kind, ...] = ("near", "far", "shifted")


class OutSet(NamedTuple):
    """Images that are not as the known ones.

    `near` and `far` hold other classes, alike or unlike the known ones; `shifted` holds the known classes looking
    otherwise. The three answer different questions and are never averaged together.
    """

    kind: Kind
    name: str
    records: Sequence[Record]


@dataclass(frozen=True)
class OodEvaluator(Evaluator):
    """AUROC and FPR95 of four scores of known classes, for each outside set and the mean of each kind.

    Attributes:
        records: images of the known classes; their labels are not looked at.
        class_names: (C,) as in prompts.
        outside: sets to tell apart.
        templates: a set's name, a file, one template with `{}`.
        temperature: of MCM's softmax over cosines.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        progress: called with (done, total) over prompts and images.
    """

    records: Sequence[Record]
    class_names: Sequence[str]
    outside: Sequence[OutSet]
    templates: str = DEFAULT_TEMPLATES
    temperature: float = 1.0
    batch_size: int = 64
    workers: int | None = None
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: no known image, or an outside set without images.
            ConfigError: no outside set, one of an unknown kind, two of one name, or fewer than two classes.
        """
        names = [(one.kind, one.name) for one in self.outside]
        if not names:
            raise ConfigError("There is no outside set. Give at least one with --near, --far or --shifted.")
        if len(set(names)) != len(names) or any(kind not in KINDS for kind, _ in names):
            listed = ", ".join(f"{kind} {name}" for kind, name in names)
            raise ConfigError(f"Outside sets are {listed}; each must be {' | '.join(KINDS)} and have its own name.")
        if not self.records or not all(one.records for one in self.outside):
            raise DataError("A set has no image; both the known and every outside set need some.")
        if len(check_classes([parse_class(name) for name in self.class_names])) < 2:
            raise ConfigError("There is one known class; its softmax is 1 for every image. Name at least two.")
        if not self.temperature > 0:
            raise ConfigError(f"The temperature is {self.temperature}; it must be above 0.")

    def run(self, source: ClassifyingSource, pipeline: None = None) -> Evaluation:
        """Embed all sets, score, separate.

        Args:
            source: the model.
            pipeline: there are no add-ons for this evaluator yet.

        Returns:
            Metrics `{kind}/{name}/{score}/auroc` and `.../fpr95`, and `{kind}/{score}/...` as the mean of the kind's
            sets; `per_item` one row an image with its scores.

        Raises:
            DataError: no readable image in a set.
            GalleryError: features that are not finite.
        """
        templates = load_templates(self.templates)
        num_prompts = len(templates) * sum(len(parse_class(name).names) for name in self.class_names)
        sizes = [num_prompts, len(self.records), *(len(one.records) for one in self.outside)]
        of_prompts, of_known, *of_others = parts_of(self.progress, *sizes)
        classifier = ZeroShotClassifier.build(source, self.class_names, templates, progress=of_prompts)
        known = embed_records(source, self.records, self.batch_size, self.workers, of_known)
        inside = ood_scores(classifier, known.features, self.temperature)
        tables = [_table("known", "", known.records, inside)]
        counts = {"known_images": len(known.records), "classes": len(self.class_names)}
        unreadable = list(known.unreadable)
        metrics: dict[str, float] = {}
        sums: dict[str, list[float]] = {}
        for one, report in zip(self.outside, of_others, strict=True):
            other = embed_records(source, one.records, self.batch_size, self.workers, report)
            unreadable += other.unreadable
            scores = ood_scores(classifier, other.features, self.temperature)
            tables.append(_table(one.kind, one.name, other.records, scores))
            counts[f"{one.kind}/{one.name}_images"] = len(other.records)
            for name, values in scores.items():
                for metric, value in separation(inside[name], values)._asdict().items():
                    metrics[f"{one.kind}/{one.name}/{name}/{metric}"] = value
                    sums.setdefault(f"{one.kind}/{name}/{metric}", []).append(value)
        metrics |= {key: sum(values) / len(values) for key, values in sums.items()}
        counts["unreadable_images"] = len(unreadable)
        return Evaluation(
            metrics=metrics,
            intervals={},
            protocol={
                "images": IMAGES,
                "positive": "images of the known classes score higher",
                "mcm_temperature": self.temperature,
                "logit_scale": round(classifier.logit_scale, 4),
                "templates": self.templates,
                "templates_hash": templates_hash(templates),
            },
            counts=counts,
            per_item=pa.concat_tables(tables),
            figures={"unreadable_images": tuple(unreadable)},
        )


def ood_scores(classifier: ZeroShotClassifier, features: Tensor, temperature: float = 1.0) -> dict[str, Tensor]:
    """Four scores (N,) of image features (N,D) that are high for images of the classes.

    `mcm`: the largest softmax of cosine / temperature. `max_softmax`: that of the model's own logits.
    `energy`: log-sum-exp of the logits. `max_similarity`: the largest cosine.

    Source: Ming et al. 2022 (MCM), arXiv:2211.13445, equation 1; Hendrycks and Gimpel 2017, arXiv:1610.02136;
    Liu et al. 2020 (energy), arXiv:2010.03759, equation 4 with temperature 1.
    Differs: a class with synonyms enters with its best one.
    """
    similarity = classifier.weights.scores(features).double()
    logits = classifier.logit_scale * similarity
    return {
        "mcm": (similarity / temperature).softmax(1).amax(1),
        "max_softmax": logits.softmax(1).amax(1),
        "energy": torch.logsumexp(logits, dim=1),
        "max_similarity": similarity.amax(1),
    }


def _table(kind: str, name: str, records: Sequence[Record], scores: dict[str, Tensor]) -> pa.Table:
    columns = {"kind": [kind] * len(records), "set": [name] * len(records), "key": [one.key for one in records]}
    return pa.table(columns | {key: values.numpy() for key, values in scores.items()})
