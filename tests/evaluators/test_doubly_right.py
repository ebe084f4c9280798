from collections import Counter

import pytest
import torch

from eval.metrics import Candidates, DoublyRight, doubly_right
from vlkit.errors import DataError


def slow(
    scores: torch.Tensor, candidates: Candidates, labels: torch.Tensor, reasons: torch.Tensor, k: int
) -> DoublyRight:
    """Image by image, as the paper words it."""
    counts: Counter[tuple[bool, bool]] = Counter()
    for row, label, reason in zip(scores.tolist(), labels.tolist(), reasons.tolist(), strict=True):
        best = sorted(range(len(row)), key=lambda place: -row[place])[:k]
        pairs = [(candidates.classes[place].item(), candidates.reasons[place].item()) for place in best]
        votes = Counter(one for one, _ in pairs)
        chosen = next(one for one, _ in pairs if votes[one] == max(votes.values()))
        counts[chosen == label, (chosen, reason) in pairs] += 1
    kinds = ((True, True), (True, False), (False, True), (False, False))
    return DoublyRight(*(counts[kind] / len(scores) for kind in kinds))


@pytest.fixture
def case() -> tuple[torch.Tensor, Candidates, torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    candidates = Candidates(torch.arange(4).repeat_interleave(3), torch.arange(3).repeat(4))
    labels, reasons = torch.randint(0, 4, (600,), generator=random), torch.randint(0, 3, (600,), generator=random)
    scores = torch.rand(600, 12, generator=random)
    scores[torch.arange(600), labels * 3 + reasons] += 0.3
    return scores, candidates, labels, reasons


@pytest.mark.parametrize("k", [1, 3, 5, 20])
def test_rates_are_those_of_a_loop(case: tuple[torch.Tensor, Candidates, torch.Tensor, torch.Tensor], k: int) -> None:
    found = doubly_right(*case, k=k)
    assert tuple(found) == pytest.approx(tuple(slow(*case, k=k)), abs=1e-6)
    assert sum(found) == pytest.approx(1)


def test_by_hand() -> None:
    # cat because of whiskers, cat because of fur, dog because of whiskers, dog because of fur
    candidates = Candidates(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1]))
    scores = torch.tensor([[4.0, 3, 2, 1], [4, 1, 3, 2], [1, 2, 4, 3], [1, 2, 3, 4]])
    found = doubly_right(scores, candidates, torch.zeros(4).long(), torch.zeros(4).long(), k=3)
    # 0: cat twice, with whiskers. 1: dog twice, with whiskers. 2, 3: dog twice, with whiskers.
    assert found == DoublyRight(0.25, 0.0, 0.75, 0.0)
    found = doubly_right(scores, candidates, torch.zeros(4).long(), torch.zeros(4).long(), k=1)
    assert found == DoublyRight(0.5, 0.0, 0.25, 0.25)


def test_order_of_candidates_does_not_matter(case: tuple[torch.Tensor, Candidates, torch.Tensor, torch.Tensor]) -> None:
    scores, candidates, labels, reasons = case
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    moved = Candidates(candidates.classes[order], candidates.reasons[order])
    assert doubly_right(scores[:, order], moved, labels, reasons) == doubly_right(*case)


def test_one_reason_a_class_and_one_candidate_is_accuracy() -> None:
    random = torch.Generator().manual_seed(0)
    scores, labels = torch.rand(50, 4, generator=random), torch.randint(0, 4, (50,), generator=random)
    found = doubly_right(scores, Candidates(torch.arange(4), torch.arange(4)), labels, labels, k=1)
    accuracy = (scores.argmax(1) == labels).double().mean().item()
    assert found.both == pytest.approx(accuracy, abs=1e-6)
    assert found.only_class == 0, "a right class brings its reason"


def test_constant_scores_measure_chance() -> None:
    candidates = Candidates(torch.arange(10).repeat_interleave(2), torch.arange(2).repeat(10))
    labels, reasons = torch.zeros(4000).long(), torch.zeros(4000).long()
    found = doubly_right(torch.ones(4000, 20), candidates, labels, reasons, k=1)
    assert found.both == pytest.approx(1 / 20, abs=0.015) and found.only_class == pytest.approx(1 / 20, abs=0.015)


def test_sizes_that_do_not_go_together(case: tuple[torch.Tensor, Candidates, torch.Tensor, torch.Tensor]) -> None:
    scores, candidates, labels, reasons = case
    with pytest.raises(DataError, match=r"Scores are \(600, 12\) for 5 labels"):
        doubly_right(scores, candidates, labels[:5], reasons)
