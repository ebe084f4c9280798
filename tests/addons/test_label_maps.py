import pytest
import torch
from scipy.optimize import linear_sum_assignment

from vlkit.addons.label_maps import frequency_map, matched_map, nearest_map, random_map
from vlkit.errors import ConfigError


@pytest.mark.parametrize("shape", [(1, 1), (4, 4), (6, 9), (20, 31)])
def test_the_matching_is_the_best_there_is(shape: tuple[int, int]) -> None:
    for seed in range(5):
        likeness = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        found = matched_map(likeness)
        rows, columns = linear_sum_assignment(likeness.double().numpy(), maximize=True)
        assert found[rows, columns].sum() == shape[0] == found.sum()
        assert found.sum(0).max() == 1


def test_one_source_each_where_the_nearest_would_be_taken_twice() -> None:
    likeness = torch.tensor([[0.9, 0.8], [0.9, 0.1]])
    assert nearest_map(likeness, 1).tolist() == [[1, 0], [1, 0]]
    assert matched_map(likeness).tolist() == [[0, 1], [1, 0]]


def test_a_mixture_against_a_slow_loop() -> None:
    likeness = torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    found = nearest_map(likeness, 3)
    for row, table in zip(likeness.tolist(), found, strict=True):
        best = sorted(range(7), key=lambda place: -row[place])[:3]
        total = sum(2.718281828459045 ** (row[place] / 0.05) for place in best)
        slow = [2.718281828459045 ** (row[place] / 0.05) / total if place in best else 0 for place in range(7)]
        assert torch.allclose(table, torch.tensor(slow), atol=1e-5)
    assert torch.equal(nearest_map(likeness, 1).argmax(1), likeness.argmax(1))  # k = 1: the independent arg max


def test_the_frequency_map_takes_the_largest_count_first() -> None:
    # Source 2 is said 5 times of class 0 and 6 times of class 1, which gets it; class 0 has its second best.
    predicted = torch.tensor([2] * 5 + [0] * 2 + [2] * 6 + [1])
    labels = torch.tensor([0] * 7 + [1] * 7)
    assert frequency_map(predicted, labels, 2, 3).tolist() == [[1, 0, 0], [0, 0, 1]]
    diagonal = torch.arange(4).repeat_interleave(3)
    assert torch.equal(frequency_map(diagonal, diagonal, 4, 4), torch.eye(4))


def test_too_few_sources_and_the_seed() -> None:
    for broken in (lambda: matched_map(torch.rand(3, 2)), lambda: random_map(3, 2, 0)):
        with pytest.raises(ConfigError, match="3 classes cannot each have a source"):
            broken()
    assert torch.equal(random_map(3, 9, 0), random_map(3, 9, 0))
    assert random_map(3, 9, 0).sum(1).tolist() == [1, 1, 1] and random_map(3, 9, 0).sum(0).max() == 1
