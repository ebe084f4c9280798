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
        averages: dict[str, list[float]] = {"base": [], "new": []}
        found = _Found()
        for place, one in enumerate(_named(self.sets)):
            num_base = (len(one.class_names) + 1) // 2
            halves = {"base": range(num_base), "new": range(num_base, len(one.class_names))}
            pool = found.read(embed_labelled(source, one.train, self.batch_size, self.workers, None))
            test = found.read(embed_labelled(source, one.test, self.batch_size, self.workers, None))
            base = _only(pool, halves["base"], f"{one.name}: base classes for training")
            learned = _learned(self.learner, source, base, one.class_names[:num_base], self.shots, self.seeds)
            for half, classes in halves.items():
                part = _only(test, classes, f"{one.name}: {half} classes for testing")
                accuracy = found.test(learned, source, one, half, classes, part)
                metrics[f"{one.name}/{half}/accuracy@1"] = accuracy
                averages[half].append(accuracy)
            if self.progress:
                self.progress(place + 1, len(self.sets))
        base_mean, new_mean = (sum(values) / len(values) for values in averages.values())
        metrics |= {"base/accuracy@1": base_mean, "new/accuracy@1": new_mean}
        metrics["harmonic_mean"] = harmonic_mean(base_mean, new_mean)
        protocol = {
            "shots": self.shots,
            "seeds": list(self.seeds),
            "classes": "first ceil(C/2) labels base, the rest new; each half tested among its own classes",
            "harmonic_mean": "of the averages over sets",
        }
        return found.evaluation(metrics, self.learner, self.sets, protocol)


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
        found, names = _Found(), self.learn_on.class_names
        drawn = found.read(embed_labelled(source, self.learn_on.train, self.batch_size, self.workers, None))
        pool = _only(drawn, range(len(names)), f"{self.learn_on.name}: classes for training")
        learned = _learned(self.learner, source, pool, names, self.shots, self.seeds)
        metrics: dict[str, float] = {}
        for place, one in enumerate(targets):
            test = found.read(embed_labelled(source, one.test, self.batch_size, self.workers, None))
            group, classes = "source" if place == 0 else "target", range(len(one.class_names))
            metrics[f"{one.name}/accuracy@1"] = found.test(learned, source, one, group, classes, test)
            if self.progress:
                self.progress(place + 1, len(targets))
        others = [metrics[f"{one.name}/accuracy@1"] for one in targets[1:]]
        metrics["targets/accuracy@1"] = sum(others) / len(others)
        protocol = {"learned_on": self.learn_on.name, "shots": self.shots, "seeds": list(self.seeds)}
        return found.evaluation(metrics, self.learner, targets, protocol)


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


def _learned(
    learner: Learner,
    source: ClassifyingSource,
    images: Labelled,
    class_names: Sequence[str],
    shots: int,
    seeds: Sequence[int],
) -> list[Learned]:
    """What is learned from the shots of each seed."""
    drawn = ((images.at(draw_shots(images.labels, shots, seed)[0]), seed) for seed in seeds)
    return [learner.fit(source, some, class_names, seed) for some, seed in drawn]


class _Found:
    """What both protocols write down as they go from set to set."""

    def __init__(self) -> None:
        self._rows: list[dict[str, object]] = []
        self._unreadable: list[tuple[str, str]] = []

    def read(self, images: Labelled) -> Labelled:
        """The images; those that could not be read are noted."""
        self._unreadable += images.unreadable
        return images

    def test(
        self,
        learned: Sequence[Learned],
        source: ClassifyingSource,
        one: GeneralisationSet,
        group: str,
        classes: range,
        images: Labelled,
    ) -> float:
        """The accuracy among some classes of a set, from the first of which labels are counted; mean over seeds."""
        names = one.class_names[classes.start : classes.stop]
        scores = [each.scores(source, names, images.features) for each in learned]
        hits = torch.stack([hit_probability(label_ranks(of_seed, images.labels), 1) for of_seed in scores]).mean(0)
        self._rows += [
            {"set": one.name, "part": group, "key": record.key, "class": names[label], "hit@1": hit}
            for record, label, hit in zip(images.records, images.labels.tolist(), hits.tolist(), strict=True)
        ]
        return hits.mean().item()

    def evaluation(
        self,
        metrics: dict[str, float],
        learner: Learner,
        sets: Sequence[GeneralisationSet],
        protocol: dict[str, object],
    ) -> Evaluation:
        """All of it, with the facts of the protocol."""
        parts = {one.name: one.parts for one in sets}
        return Evaluation(
            metrics=metrics,
            intervals={},
            protocol={"images": IMAGES, **_learner_facts(learner), **protocol, "parts": parts},
            counts={"sets": len(sets), "images": len(self._rows), "unreadable_images": len(self._unreadable)},
            per_item=pa.Table.from_pylist(self._rows),
            figures={"unreadable_images": tuple(self._unreadable)},
        )
