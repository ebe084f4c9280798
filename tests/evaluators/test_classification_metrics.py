"""Accuracy, recall per class and confusion against scikit-learn and against cases worked by hand."""

import pytest
import torch
from sklearn import metrics as sklearn_metrics

from eval.metrics import accuracy, confusion_matrix, hit_probability, label_ranks, mean_per_class_recall


def random_case(seed: int, num_items: int = 200, num_classes: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes - 1, (num_items,), generator=generator)  # the last class has no item
    scores = torch.randn(num_items, num_classes, generator=generator)
    scores[torch.arange(num_items), labels] += 1
    return scores, labels


def test_equals_scikit_learn() -> None:
    scores, labels = random_case(0)
    measured = accuracy(scores, labels, ks=(1, 5))
    classes = range(9)
    for k in (1, 5):
        expected = sklearn_metrics.top_k_accuracy_score(labels, scores, k=k, labels=classes)
        assert measured[f"accuracy@{k}"] == pytest.approx(expected)
    hits = hit_probability(label_ranks(scores, labels), 1)
    predicted = scores.argmax(1)
    recalls = sklearn_metrics.recall_score(labels, predicted, labels=labels.unique(), average=None)
    assert mean_per_class_recall(hits, labels) == pytest.approx(recalls.mean())
    expected_matrix = sklearn_metrics.confusion_matrix(labels, predicted, labels=classes)
    assert confusion_matrix(labels, predicted, 9).tolist() == expected_matrix.tolist()


def test_ties_by_hand() -> None:
    scores = torch.tensor([[0.5, 0.5, 0.1], [0.9, 0.2, 0.2], [0.3, 0.3, 0.3]])
    labels = torch.tensor([0, 1, 2])
    assert accuracy(scores, labels, ks=(1, 2)) == pytest.approx(
        {"accuracy@1": (1 / 2 + 0 + 1 / 3) / 3, "accuracy@2": (1 + 1 / 2 + 2 / 3) / 3}
    )


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_constant_scores_are_chance(scale: float) -> None:
    scores, labels = torch.full((50, 9), 0.3) * scale, torch.arange(50) % 9
    assert accuracy(scores, labels) == pytest.approx({"accuracy@1": 1 / 9, "accuracy@5": 5 / 9})
    hits = hit_probability(label_ranks(scores, labels), 1)
    assert mean_per_class_recall(hits, labels) == pytest.approx(1 / 9)


def test_k_beyond_the_classes_is_left_out() -> None:
    scores, labels = random_case(1, num_classes=3)
    assert list(accuracy(scores, labels, ks=(1, 5))) == ["accuracy@1"]


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.ones(2, 3), torch.tensor([0, 3]), "integers from 0 to 2"),
        (torch.ones(2, 3), torch.tensor([0]), "expected"),
        (torch.full((2, 3), torch.nan), torch.tensor([0, 1]), "not finite: 2 rows"),
        (torch.ones(0, 3), torch.zeros(0, dtype=torch.int64), "No items"),
    ],
)
def test_what_does_not_fit_is_refused(scores: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accuracy(scores, labels)
