"""Rankings with several right answers, against slow loops, scikit-learn and CLIP_benchmark's definition."""

import itertools
import math
import tracemalloc

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, ndcg_score
from torch import Tensor
from torch.nn.functional import normalize

from eval.metrics import SameLabel, positive_positions, retrieval_recall


def ragged(seed: int, num: int = 30, size: int = 57, dim: int = 12) -> tuple[Tensor, Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    queries = normalize(torch.randn(num, dim, generator=generator), dim=1)
    gallery = normalize(torch.randn(size, dim, generator=generator), dim=1)
    counts = torch.randint(1, 9, (num,), generator=generator).tolist()
    return queries, gallery, [torch.randperm(size, generator=generator)[:count] for count in counts]


def slow(order: list[int], right: dict[int, float], k: int) -> dict[str, float]:
    """Every metric of one order of the gallery, from the definitions."""
    hits = [1 if item in right else 0 for item in order]
    precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(order))]
    num = len(right)
    gain = [right.get(item, 0.0) for item in order]
    ideal = sorted(right.values(), reverse=True)
    return {
        "ap": sum(p for p, hit in zip(precision, hits, strict=True) if hit) / num,
        "ap@k": sum(p for p, hit in zip(precision[:k], hits, strict=False) if hit) / min(k, num),
        "recall": sum(hits[:k]) / num,
        "hit": float(any(hits[:k])),
        "precision": sum(hits[:k]) / k,
        "r": sum(hits[:num]) / num,
        "ndcg": sum(g / math.log2(i + 2) for i, g in enumerate(gain[:k]))
        / sum(g / math.log2(i + 2) for i, g in enumerate(ideal[:k])),
    }


@pytest.mark.parametrize("rows", [None, 1, 7])
def test_equals_the_definitions_without_ties(rows: int | None) -> None:
    queries, gallery, relevant = ragged(0)
    gains = [torch.arange(1.0, len(one) + 1) for one in relevant]
    found = positive_positions(queries, gallery, relevant, gains=gains, rows=rows)
    scores = queries.double() @ gallery.double().T
    for row in range(len(queries)):
        right = dict(zip(relevant[row].tolist(), gains[row].tolist(), strict=True))
        expected = slow(scores[row].argsort(descending=True).tolist(), right, 5)
        assert found.average_precision()[row].item() == pytest.approx(expected["ap"])
        assert found.average_precision(5)[row].item() == pytest.approx(expected["ap@k"])
        assert found.recall(5)[row].item() == pytest.approx(expected["recall"])
        assert found.hit(5)[row].item() == pytest.approx(expected["hit"])
        assert found.precision(5)[row].item() == pytest.approx(expected["precision"])
        assert found.r_precision()[row].item() == pytest.approx(expected["r"])
        assert found.ndcg(5)[row].item() == pytest.approx(expected["ndcg"])


def test_equals_scikit_learn() -> None:
    queries, gallery, relevant = ragged(1)
    gains = [torch.arange(1.0, len(one) + 1) for one in relevant]
    truth = np.zeros((len(queries), len(gallery)))
    for row, (one, gain) in enumerate(zip(relevant, gains, strict=True)):
        truth[row, one.numpy()] = gain.numpy()
    scores = (queries.double() @ gallery.double().T).numpy()
    found = positive_positions(queries, gallery, relevant, gains=gains)
    precision = [average_precision_score(t > 0, s) for t, s in zip(truth, scores, strict=True)]
    assert found.average_precision().numpy() == pytest.approx(np.array(precision))
    assert found.ndcg().mean().item() == pytest.approx(ndcg_score(truth, scores))
    assert found.ndcg(10).mean().item() == pytest.approx(ndcg_score(truth, scores, k=10))


def test_ties_are_the_mean_over_every_order() -> None:
    """Gallery of six: two score 1, three score 0.5, one 0; the right ones stand in both ties."""
    queries = torch.tensor([[1.0, 0.0]])
    values = [1.0, 1.0, 0.5, 0.5, 0.5, 0.0]
    gallery = torch.tensor([[value, 0.0] for value in values])
    right = {1: 2.0, 2: 1.0, 4: 3.0}
    found = positive_positions(
        queries, gallery, [torch.tensor(list(right))], gains=[torch.tensor(list(right.values()))]
    )
    orders = [
        [*first, *second, 5] for first in itertools.permutations((0, 1)) for second in itertools.permutations((2, 3, 4))
    ]
    for k in (1, 2, 3, 4, 6):
        expected = {
            name: np.mean([slow(order, right, k)[name] for order in orders]) for name in slow(orders[0], right, k)
        }
        assert found.average_precision().item() == pytest.approx(expected["ap"])
        assert found.average_precision(k).item() == pytest.approx(expected["ap@k"])
        assert found.recall(k).item() == pytest.approx(expected["recall"])
        assert found.precision(k).item() == pytest.approx(expected["precision"])
        assert found.r_precision().item() == pytest.approx(expected["r"])
        assert found.ndcg(k).item() == pytest.approx(expected["ndcg"])


@pytest.mark.parametrize("dim", [192, 512])
def test_constant_features_score_chance(dim: int) -> None:
    vector = normalize(torch.randn(dim, generator=torch.Generator().manual_seed(dim)), dim=0)
    labels = torch.arange(60) % 6
    found = positive_positions(vector.expand(60, dim), vector.expand(60, dim), SameLabel(labels, labels), rows=7)
    assert found.recall(6).mean().item() == pytest.approx(0.1)
    assert found.precision(6).mean().item() == pytest.approx(1 / 6)


def test_true_recall_beside_the_hit_rate_of_clip_benchmark() -> None:
    queries, gallery, _ = ragged(2, num=9, size=31)
    owner = torch.arange(31) % 9
    found = positive_positions(queries, gallery, SameLabel(torch.arange(9), owner))
    # CLIP_benchmark: true recall first, a hit where it is above 0.
    first = (queries @ gallery.T).topk(5, dim=1).indices
    true = torch.stack([(owner[first[row]] == row).sum() / (owner == row).sum() for row in range(9)])
    assert found.recall(5).numpy() == pytest.approx(true.numpy())
    rate = retrieval_recall(queries, gallery, owner, ks=(5,))["image_to_text/recall@5"]
    assert found.hit(5).mean().item() == pytest.approx(rate) == (true > 0).float().mean().item()


def test_the_query_itself_is_ignored_and_a_query_without_answers_is_named() -> None:
    features = normalize(torch.randn(12, 5, generator=torch.Generator().manual_seed(3)), dim=1)
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 3])
    own = [torch.tensor([row]) for row in range(12)]
    found = positive_positions(features, features, SameLabel(labels, labels, range(12)), ignored=own)
    scores = features @ features.T
    scores.fill_diagonal_(-torch.inf)
    first = labels[scores.argmax(1)] == labels
    assert found.hit(1).tolist() == first.double().tolist()
    assert found.num_right.tolist() == [2] * 6 + [4] * 5 + [0]
    assert found.average_precision()[11] == 0 and len(found.answered(found.average_precision())) == 11


def test_a_callback_scores_the_chunks_and_memory_stays_flat() -> None:
    queries, gallery, relevant = ragged(4)
    asked: list[tuple[int, ...]] = []

    def negative(chunk: Tensor, all_of_it: Tensor) -> Tensor:
        asked.append((len(chunk), len(all_of_it)))
        return -chunk @ all_of_it.T

    found = positive_positions(queries, gallery, relevant, score=negative, rows=8)
    assert asked == [(8, 57), (8, 57), (8, 57), (6, 57)]
    assert found.average_precision().tolist() == pytest.approx(
        positive_positions(-queries, gallery, relevant).average_precision().tolist()
    )
    tracemalloc.start()
    positive_positions(queries, gallery, relevant, rows=1)
    assert tracemalloc.get_traced_memory()[1] < 4e6
    tracemalloc.stop()


def test_bad_input_is_refused() -> None:
    queries, gallery, relevant = ragged(5)
    broken = gallery.clone()
    broken[3, 0] = torch.nan
    with pytest.raises(ValueError, match="gallery features are not finite: 1 rows"):
        positive_positions(queries, broken, relevant)
    with pytest.raises(ValueError, match="outside 0 to 56"):
        positive_positions(queries, gallery, [torch.tensor([57])] * len(queries))
    with pytest.raises(ValueError, match="right answers of 1; expected one list for each"):
        positive_positions(queries, gallery, relevant[:1])
    with pytest.raises(ValueError, match="both right and ignored"):
        positive_positions(queries, gallery, relevant, ignored=relevant)
    with pytest.raises(ValueError, match="k is 0"):
        positive_positions(queries, gallery, relevant).recall(0)
