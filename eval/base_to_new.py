"""CoOp's two generalisation protocols: base to new classes, and one data set to others.

    split = GeneralisationSet("caltech101", class_names, train, test)
    BaseToNewEvaluator([split]).run(embedder).metrics["harmonic_mean"]

A `Learner` is what learns from the shots; `ZeroShot` learns nothing and is where every comparison starts.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from eval.features import IMAGES, ClassifyingSource
from eval.labelled import Labelled, draw_shots, embed_labelled
from eval.metrics import hit_probability, label_ranks
from vlkit.addons.class_weights.templates import DEFAULT_TEMPLATES, load_templates, templates_hash
from vlkit.addons.classifier import ZeroShotClassifier
from vlkit.contracts import Evaluation, Evaluator, Progress
from vlkit.data.records import Record
from vlkit.errors import ConfigError, DataError

SHOTS = 16


class Learned(ABC):
    """What was learned from some classes, ready to name others."""

    @abstractmethod
    def scores(self, source: ClassifyingSource, class_names: Sequence[str], features: Tensor) -> Tensor:
        """(N,C) scores of image features (N,D) over these class names."""


class Learner(ABC):
    """Learns from labelled shots of some classes."""

    name: str

    @abstractmethod
    def fit(self, source: ClassifyingSource, shots: Labelled, class_names: Sequence[str], seed: int) -> Learned:
        """Learn from shots; their labels point into `class_names`."""


@dataclass(frozen=True)
class ZeroShot(Learner, Learned):
    """Prompts alone; the shots are not looked at.

    Attributes:
        templates: a set's name, a file, or one template with `{}`.
    """

    templates: str = DEFAULT_TEMPLATES
    name: str = "zero-shot"

    def fit(self, source: ClassifyingSource, shots: Labelled, class_names: Sequence[str], seed: int) -> "ZeroShot":
        """Nothing."""
        return self

    def scores(self, source: ClassifyingSource, class_names: Sequence[str], features: Tensor) -> Tensor:
        """Cosine with the class prompts."""
        return ZeroShotClassifier.build(source, class_names, self.templates).weights.scores(features)


@dataclass(frozen=True)
class GeneralisationSet:
    """One data set of the protocol; `label` of its records points into `class_names`, in the order of label ids."""

    name: str
    class_names: tuple[str, ...]
    train: tuple[Record, ...]
    test: tuple[Record, ...]
    parts: str = "as given"  # how train and test came about

    def __post_init__(self) -> None:
        """Check.

        Raises:
            DataError: no training or test image, or fewer than two classes.
        """
        if not self.train or not self.test:
            raise DataError(f"{self.name}: {len(self.train)} train and {len(self.test)} test images; both are needed.")
        if len(self.class_names) < 2:
            raise DataError(f"{self.name} has {len(self.class_names)} class; at least two are needed.")


@dataclass(frozen=True)
class BaseToNewEvaluator(Evaluator):
    """Learn from shots of the first half of the classes; test both halves, each among its own classes only.

    Attributes:
        sets: the data sets.
        learner: what learns.
        shots: images a base class.
        seeds: of the draws; results are means over them.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        progress: called with (done, total) data sets.
    """

    sets: Sequence[GeneralisationSet]
    learner: Learner = ZeroShot()
    shots: int = SHOTS
    seeds: tuple[int, ...] = (1, 2, 3)
    batch_size: int = 64
    workers: int | None = None
    progress: Progress | None = None

    def run(self, source: ClassifyingSource, pipeline: None = None) -> Evaluation:
        """Measure all sets.

        Args:
            source: the model.
            pipeline: the learner takes its place.

        Returns:
            Metrics `{set}/base/accuracy@1`, `{set}/new/accuracy@1`, their means over sets without the set's name,
            and `harmonic_mean`, the harmonic mean of the two means (not the mean of harmonic means).

        Raises:
            DataError: a half without a test image, or a base class without a training image.
            ConfigError: no set.

        Source: Zhou et al. 2022 (CoCoOp), arXiv:2203.05557, section 4.1; CoOp's code, commit ff61507: the first
        ceil(C/2) classes by label are base.
        """
        metrics: dict[str, float] = {}
        rows: list[dict[str, object]] = []
        averages: dict[str, list[float]] = {"base": [], "new": []}
        unreadable: list[tuple[str, str]] = []
        for place, one in enumerate(_named(self.sets)):
            num_base = (len(one.class_names) + 1) // 2
            halves = {"base": range(num_base), "new": range(num_base, len(one.class_names))}
            pool = self._embed(source, one.train)
            test = self._embed(source, one.test)
            unreadable += [*pool.unreadable, *test.unreadable]
            base = _only(pool, halves["base"], f"{one.name}: base classes for training")
            learned = [
                self.learner.fit(source, _shots(base, self.shots, seed), one.class_names[:num_base], seed)
                for seed in self.seeds
            ]
            for half, classes in halves.items():
                part = _only(test, classes, f"{one.name}: {half} classes for testing")
                names = one.class_names[classes.start : classes.stop]
                hits = _mean_hits(learned, source, names, part)
                metrics[f"{one.name}/{half}/accuracy@1"] = hits.mean().item()
                averages[half].append(hits.mean().item())
                rows += _rows(part, one, half, classes.start, hits)
            if self.progress:
                self.progress(place + 1, len(self.sets))
        base_mean, new_mean = (sum(values) / len(values) for values in averages.values())
        metrics |= {"base/accuracy@1": base_mean, "new/accuracy@1": new_mean}
        metrics["harmonic_mean"] = harmonic_mean(base_mean, new_mean)
        return Evaluation(
            metrics=metrics,
            intervals={},
            protocol=self._protocol(),
            counts={"sets": len(self.sets), "images": len(rows), "unreadable_images": len(unreadable)},
            per_item=pa.Table.from_pylist(rows),
            figures={"unreadable_images": tuple(unreadable)},
        )

    def _embed(self, source: ClassifyingSource, records: Sequence[Record]) -> Labelled:
        return embed_labelled(source, records, self.batch_size, self.workers, None)

    def _protocol(self) -> dict[str, object]:
        return {
            "images": IMAGES,
            **_learner_facts(self.learner),
            "shots": self.shots,
            "seeds": list(self.seeds),
            "classes": "first ceil(C/2) labels base, the rest new; each half tested among its own classes",
            "harmonic_mean": "of the averages over sets",
            "parts": {one.name: one.parts for one in self.sets},
        }


@dataclass(frozen=True)
class CrossDatasetEvaluator(Evaluator):
    """Learn from shots of one data set, then name the classes of others, unchanged.

    Attributes:
        learn_on: the data set that the shots are drawn from.
        targets: the data sets tested.
        learner: what learns.
        shots: images a class.
        seeds: of the draws; results are means over them.
        batch_size: images encoded together.
        workers: threads that decode; None is one per core.
        progress: called with (done, total) data sets.
    """

    learn_on: GeneralisationSet
    targets: Sequence[GeneralisationSet]
    learner: Learner = ZeroShot()
    shots: int = SHOTS
    seeds: tuple[int, ...] = (1, 2, 3)
    batch_size: int = 64
    workers: int | None = None
    progress: Progress | None = None

    def run(self, source: ClassifyingSource, pipeline: None = None) -> Evaluation:
        """Measure the source set and all targets.

        Args:
            source: the model.
            pipeline: the learner takes its place.

        Returns:
            Metrics `{set}/accuracy@1` of the source set and every target, and `targets/accuracy@1`, their mean
            without the source set.

        Raises:
            DataError: a class of the source set without a training image.
            ConfigError: no target, or two sets of one name.

        Source: Zhou et al. 2022 (CoCoOp), arXiv:2203.05557, section 4.2.
        """
        targets = _named([self.learn_on, *self.targets])
        if len(targets) < 2:
            raise ConfigError("There is no target data set; name at least one besides the source.")
        drawn = embed_labelled(source, self.learn_on.train, self.batch_size, self.workers, None)
        pool = _only(drawn, range(len(self.learn_on.class_names)), f"{self.learn_on.name}: classes for training")
        learned = [
            self.learner.fit(source, _shots(pool, self.shots, seed), self.learn_on.class_names, seed)
            for seed in self.seeds
        ]
        metrics: dict[str, float] = {}
        rows: list[dict[str, object]] = []
        unreadable = list(drawn.unreadable)
        for place, one in enumerate(targets):
            test = embed_labelled(source, one.test, self.batch_size, self.workers, None)
            unreadable += test.unreadable
            hits = _mean_hits(learned, source, one.class_names, test)
            metrics[f"{one.name}/accuracy@1"] = hits.mean().item()
            rows += _rows(test, one, "source" if place == 0 else "target", 0, hits)
            if self.progress:
                self.progress(place + 1, len(targets))
        others = [metrics[f"{one.name}/accuracy@1"] for one in targets[1:]]
        return Evaluation(
            metrics=metrics | {"targets/accuracy@1": sum(others) / len(others)},
            intervals={},
            protocol={
                "images": IMAGES,
                **_learner_facts(self.learner),
                "learned_on": self.learn_on.name,
                "shots": self.shots,
                "seeds": list(self.seeds),
                "parts": {one.name: one.parts for one in targets},
            },
            counts={"sets": len(targets), "images": len(rows), "unreadable_images": len(unreadable)},
            per_item=pa.Table.from_pylist(rows),
            figures={"unreadable_images": tuple(unreadable)},
        )


def harmonic_mean(base: float, new: float) -> float:
    """2BN / (B + N); 0 where both are 0."""
    return 2 * base * new / (base + new) if base + new else 0.0


def _named(sets: Sequence[GeneralisationSet]) -> Sequence[GeneralisationSet]:
    names = [one.name for one in sets]
    if not names or len(set(names)) != len(names):
        raise ConfigError(f"Data sets {names}: expected at least one, each under a name of its own.")
    return sets


def _learner_facts(learner: Learner) -> dict[str, object]:
    facts: dict[str, object] = {"learner": learner.name}
    if isinstance(learner, ZeroShot):
        facts |= {"templates": learner.templates, "templates_hash": templates_hash(load_templates(learner.templates))}
    return facts


def _only(images: Labelled, classes: range, what: str) -> Labelled:
    """Images of these classes, their labels counted from the first of them."""
    rows = ((images.labels >= classes.start) & (images.labels < classes.stop)).nonzero().flatten()
    found = set(images.labels[rows].tolist())
    if not found or ("training" in what and len(found) < len(classes)):
        raise DataError(f"{what}: {len(classes) - len(found)} of {len(classes)} have no readable image.")
    chosen = images.at(rows)
    return chosen._replace(labels=chosen.labels - classes.start)


def _shots(images: Labelled, shots: int, seed: int) -> Labelled:
    rows, _ = draw_shots(images.labels, shots, seed)
    return images.at(rows)


def _mean_hits(learned: Sequence[Learned], source: ClassifyingSource, names: Sequence[str], part: Labelled) -> Tensor:
    scores = [one.scores(source, names, part.features) for one in learned]
    return torch.stack([hit_probability(label_ranks(one, part.labels), 1) for one in scores]).mean(0)


def _rows(part: Labelled, one: GeneralisationSet, group: str, first: int, hits: Tensor) -> list[dict[str, object]]:
    return [
        {"set": one.name, "part": group, "key": record.key, "class": one.class_names[first + label], "hit@1": hit}
        for record, label, hit in zip(part.records, part.labels.tolist(), hits.tolist(), strict=True)
    ]
