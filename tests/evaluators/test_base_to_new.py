"""CoOp's protocols with a learner whose answers are known."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from eval.base_to_new import (
    BaseToNewEvaluator,
    CrossDatasetEvaluator,
    GeneralisationSet,
    Learned,
    Learner,
    ZeroShot,
    harmonic_mean,
)
from eval.labelled import Labelled
from vlkit.data.records import ImageRef, Record
from vlkit.errors import ConfigError, DataError


def data(name: str, num_classes: int, num: int = 6) -> GeneralisationSet:
    names = tuple(f"{name} {label}" for label in range(num_classes))
    parts = [
        tuple(
            Record(f"{name}/{part}/{label}/{row}", ImageRef(data=b""), label=label)
            for label in range(num_classes)
            for row in range(num)
        )
        for part in ("train", "test")
    ]
    return GeneralisationSet(name, names, *parts)


@dataclass
class Prototype(Learner, Learned):
    """The mean of the shots of each class; knows nothing of classes it never saw."""

    seen: list[tuple[tuple[str, ...], int]]
    means: Tensor | None = None
    name: str = "prototype"

    def fit(self, source: Any, shots: Labelled, class_names: Sequence[str], seed: int) -> Learned:
        self.seen.append((tuple(class_names), len(shots.labels)))
        means = torch.stack([shots.features[shots.labels == c].mean(0) for c in range(len(class_names))])
        return Prototype(self.seen, means)

    def scores(self, source: Any, class_names: Sequence[str], features: Tensor) -> Tensor:
        assert self.means is not None
        if len(class_names) == len(self.means):
            return features @ self.means.T
        return torch.zeros(len(features), len(class_names))


def zero_shot(source: Any, names: Sequence[str], records: Sequence[Record], first: int) -> float:
    prompts = torch.stack([source.vector(f"a {name}") for name in names])
    hits = [(prompts @ source.vector(r.key)).argmax().item() == (r.label or 0) - first for r in records]
    return sum(hits) / len(hits)


def test_zero_shot_in_both_halves_and_the_mean_of_averages(named_vectors: Callable[..., Any]) -> None:
    sets = [data("birds", 5), data("cars", 4)]
    source = named_vectors(dim=8)
    evaluation = BaseToNewEvaluator(sets, ZeroShot("a {}")).run(source)
    expected: dict[str, list[float]] = {"base": [], "new": []}
    for one, num_base in zip(sets, (3, 2), strict=True):  # ceil(C/2)
        base = [record for record in one.test if (record.label or 0) < num_base]
        new = [record for record in one.test if (record.label or 0) >= num_base]
        expected["base"].append(zero_shot(source, one.class_names[:num_base], base, 0))
        expected["new"].append(zero_shot(source, one.class_names[num_base:], new, num_base))
        for half in ("base", "new"):
            assert evaluation.metrics[f"{one.name}/{half}/accuracy@1"] == pytest.approx(expected[half][-1])
    base_mean, new_mean = (sum(expected[half]) / 2 for half in ("base", "new"))
    assert evaluation.metrics["harmonic_mean"] == pytest.approx(2 * base_mean * new_mean / (base_mean + new_mean))
    assert evaluation.per_item is not None and evaluation.per_item.num_rows == 54
    assert harmonic_mean(0.0, 0.0) == 0.0


def test_a_learner_sees_shots_of_base_classes_only(named_vectors: Callable[..., Any]) -> None:
    learner = Prototype([])
    vectors = {
        record.key: torch.eye(4)[record.label or 0] + 0.1
        for one in [data("birds", 4)]
        for record in (*one.train, *one.test)
    }
    evaluation = BaseToNewEvaluator([data("birds", 4)], learner, shots=2, seeds=(1, 2)).run(named_vectors(vectors))
    assert learner.seen == [(("birds 0", "birds 1"), 4)] * 2
    # Prototypes name base classes; on the new ones, of which there are as many, they point anywhere.
    assert evaluation.metrics["birds/base/accuracy@1"] == 1.0
    assert evaluation.metrics["birds/new/accuracy@1"] == pytest.approx(0.5)


def test_cross_dataset_learns_once_and_averages_targets_without_the_source(named_vectors: Callable[..., Any]) -> None:
    learner = Prototype([])
    first, *targets = data("source", 3), data("birds", 4), data("cars", 5)
    vectors = {record.key: torch.eye(3)[record.label or 0] for record in (*first.train, *first.test)}
    evaluation = CrossDatasetEvaluator(first, targets, learner, seeds=(1,)).run(named_vectors(vectors))
    assert learner.seen == [(first.class_names, 18)]
    assert evaluation.metrics["source/accuracy@1"] == 1.0
    # Nothing is known of the others: every class ties, which is chance.
    assert evaluation.metrics["birds/accuracy@1"] == pytest.approx(1 / 4)
    assert evaluation.metrics["targets/accuracy@1"] == pytest.approx((1 / 4 + 1 / 5) / 2)


def test_bad_input_is_refused(named_vectors: Callable[..., Any]) -> None:
    birds = data("birds", 4)
    with pytest.raises(ConfigError, match="each under a name of its own"):
        BaseToNewEvaluator([birds, birds]).run(named_vectors(dim=4))
    with pytest.raises(ConfigError, match="no target"):
        CrossDatasetEvaluator(birds, []).run(named_vectors(dim=4))
    lacking = GeneralisationSet("birds", birds.class_names, tuple(r for r in birds.train if r.label), birds.test)
    with pytest.raises(DataError, match="birds: base classes for training: 1 of 2 have no readable image"):
        BaseToNewEvaluator([lacking]).run(named_vectors(dim=4))
    with pytest.raises(DataError, match="0 train and 24 test images"):
        GeneralisationSet("birds", birds.class_names, (), birds.test)
