"""Active learning: one image of each blob, no image twice, thresholds, and the balance of clusters by hand."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

from vlkit.addons.active import Clusters, active_learning, balanced_choice, first_choice, priors, sure_rows, thresholds
from vlkit.addons.base import ClassWeighting, learned
from vlkit.addons.exchange import ClassWeights, Vectors
from vlkit.addons.pipeline import Pipeline
from vlkit.addons.reference import Part, Reference
from vlkit.errors import ConfigError, DataError

CLASSES = 4


@dataclass(frozen=True)
class Means(ClassWeighting):
    """The mean of the images of each class; its text where there are none."""

    needs: ClassVar[Any] = frozenset({"few_shot_labels", "class_names"})
    vectors: torch.Tensor | None = learned()

    def learn(self, reference: Any, embedder: Any, progress: Any = None) -> Any:
        shots, vectors = reference.few_shot, reference.weights.vectors.clone()
        for one in set(shots.labels.tolist()):
            vectors[one] = F.normalize(shots.vectors.pooled[shots.labels == one].mean(0), dim=-1)
        return replace(self, vectors=vectors)

    def weights(self, class_names: Any, embedder: Any) -> ClassWeights:
        assert self.vectors is not None
        return ClassWeights(self.vectors, torch.arange(CLASSES))


@pytest.fixture
def pool(tiny_source: Any) -> Any:
    def make(count: int = 6, noise: float = 0.05) -> tuple[Reference, list[int], Any]:
        from vlkit.addons.class_names import parse_class

        source = tiny_source()
        names = ["cat", "dog", "cow", "fox"]
        texts = source.embed_texts([f"a photo of a {name}." for name in names])
        labels = torch.arange(CLASSES).repeat(count)
        random = torch.Generator().manual_seed(0)
        images = F.normalize(texts[labels] + noise * torch.randn(len(labels), 16, generator=random), dim=-1)
        reference = Reference(
            class_names=tuple(parse_class(name) for name in names), images=Part("train", Vectors("image", images))
        )
        return reference, labels.tolist(), source

    return make


def test_round_0_returns_one_image_of_each_blob(pool: Any) -> None:
    reference, labels, _ = pool()
    rows = first_choice(reference.images.vectors.pooled, CLASSES, seed=42)
    assert sorted(labels[row] for row in rows) == [0, 1, 2, 3]
    images = reference.images.vectors.pooled
    for row in rows:  # the one nearest to the mean of its blob
        own = [other for other in range(len(labels)) if labels[other] == labels[row]]
        centre = images[own].mean(0)
        cosines = {other: float(F.cosine_similarity(images[other], centre, dim=0)) for other in own}
        assert max(cosines, key=lambda other: cosines[other]) == row


def test_a_sure_image_lies_at_its_class_vector() -> None:
    images = F.normalize(torch.randn(2, 5, generator=torch.Generator().manual_seed(1)), dim=-1)
    texts = torch.eye(3, 5)
    chances = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    found = priors(Vectors("image", images), chances, texts)
    assert torch.allclose(found[0], torch.cat([images[0], texts[1]]) / 2**0.5)
    assert torch.allclose(found.norm(dim=1), torch.ones(2))


def test_clusters_with_the_least_labels_come_first() -> None:
    points = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0], [0.3, 1.0], [-1.0, 0.0]])
    clusters = Clusters(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([0, 0, 1, 1, 1, 2]))
    # Shares 1/2, 0/3, 0/1: the larger of the two empty ones, then the other, then 1/3 of the second.
    assert balanced_choice(points, [0], 1, clusters) == [2]
    assert sorted(balanced_choice(points, [0], 2, clusters)) == [2, 5]
    assert sorted(balanced_choice(points, [0], 3, clusters)) == [2, 3, 5]
    assert sorted(balanced_choice(points, [0], 99, clusters)) == [1, 2, 3, 4, 5]


def test_thresholds_are_means_over_labelled_images() -> None:
    chances = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    assert thresholds(chances, {0: 0, 1: 0}).tolist() == pytest.approx([0.75, float("inf")])


@pytest.mark.parametrize("strategy", ["clusters", "random", "entropy"])
def test_no_image_is_asked_for_twice_and_the_learner_gets_all_answers(pool: Any, strategy: Any) -> None:
    reference, labels, source = pool()
    asked: list[int] = []

    def oracle(rows: Any) -> list[int]:
        asked.extend(rows)
        return [labels[row] for row in rows]

    rounds = list(active_learning(Means(), reference, source, oracle, rounds=8, strategy=strategy))
    assert len(asked) == len(set(asked)) == len(labels)  # 24 images: 6 rounds of 4, then nothing is left
    assert [one.questions for one in rounds] == [4, 8, 12, 16, 20, 24, 24, 24]
    assert rounds[1].addon.fitted is not None
    assert rounds[1].addon.fitted.seen["few_shot_labels"] == "train: 8"


def test_which_images_are_sure() -> None:
    chances = torch.tensor([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    assert sure_rows([0, 1, 2], chances, torch.tensor([0.95, 0.7])) == [2]
    assert sure_rows([0, 1, 2], chances, torch.full((2,), 1.1)) == []  # ask for every one
    assert sure_rows([0, 2], chances, torch.zeros(2)) == [0, 2]  # ask for none


def test_selective_rounds_ask_less_and_keep_the_two_kinds_apart(pool: Any) -> None:
    reference, labels, source = pool(noise=0.1)
    learner = Means()
    asked: list[int] = []

    def oracle(rows: Any) -> list[int]:
        asked.extend(rows)
        return [labels[row] for row in rows]

    rounds = list(active_learning(learner, reference, source, oracle, rounds=4, selective=True))
    assumed = [row for one in rounds for row in one.assumed]
    assert assumed and not rounds[0].assumed, "the first round asks for all"
    assert rounds[-1].questions == len(asked) == 16 - len(assumed)
    assert len({*asked, *assumed}) == 16
    last = rounds[-1].addon.fitted
    assert last is not None and last.seen["few_shot_labels"] == "train: 16"


def test_bad_input(pool: Any) -> None:
    reference, _, source = pool()
    learner = Means()
    with pytest.raises(DataError, match="from 0 to 3"):
        list(active_learning(learner, reference, source, lambda rows: [7] * len(rows)))
    with pytest.raises(ConfigError, match="pool"):
        list(active_learning(learner, replace(reference, images=None), source, lambda rows: []))


def test_a_learner_inside_the_towers_sees_the_pool_through_its_own_eyes(tower_case: Any) -> None:
    from vlkit.addons.towers.visual_prompt import VisualPrompt

    shots = tower_case.reference.few_shot
    pool = replace(tower_case.reference, few_shot=None, images=replace(shots, labels=None))
    learner = VisualPrompt(epochs=2, lr=5.0, batch_size=3, crop=1.0)
    labels = shots.labels.tolist()
    seen: list[list[int]] = []

    def oracle(rows: Any) -> list[int]:
        seen.append(list(rows))
        return [labels[row] for row in rows]

    passes = replace(pool, passes=type(pool.passes)(tower_case.source))
    rounds = list(active_learning(learner, passes, tower_case.source, oracle, rounds=2, budget=3, strategy="entropy"))
    assert passes.passes is not None and passes.passes.num_images == 12, "the pool went through the prompted tower"
    fitted = Pipeline([rounds[0].addon])
    vectors = passes.passes.read(shots.records, fitted.edits).vectors
    chances = fitted.classifier(pool.class_names, tower_case.source).probabilities(vectors)
    rest = [row for row in range(12) if row not in seen[0]]
    entropy = torch.special.entr(chances[rest]).sum(1)
    assert seen[1] == [rest[place] for place in entropy.argsort(descending=True, stable=True)[:3].tolist()]
    with pytest.raises(ConfigError, match=r"visual_prompt needs pixels"):
        bare = replace(pool, passes=None, images=replace(pool.images, records=()))
        list(active_learning(learner, bare, tower_case.source, oracle, rounds=1, budget=3))
