import pytest
import torch

from vlkit.addons.few_shot import sample_few_shot
from vlkit.errors import ConfigError, DataError

LABELS = torch.tensor([0, 1, 2] * 20)


def test_each_class_gives_its_shots_and_the_parts_are_disjoint() -> None:
    split = sample_few_shot(LABELS, 3, 5, seed=1)
    assert torch.bincount(LABELS[split.train]).tolist() == [5, 5, 5]
    assert torch.bincount(LABELS[split.val]).tolist() == [4, 4, 4]
    assert sorted(split.train + split.val + split.rest) == list(range(60))


def test_few_shots_are_among_the_more_and_seeds_differ() -> None:
    few, more = sample_few_shot(LABELS, 3, 2, seed=1), sample_few_shot(LABELS, 3, 8, seed=1)
    assert set(few.train) < set(more.train)
    assert sample_few_shot(LABELS, 3, 8, seed=1) == more
    assert set(sample_few_shot(LABELS, 3, 8, seed=2).train) != set(more.train)
    assert [len(sample_few_shot(LABELS, 3, shots, seed=0).val) for shots in (1, 2, 4, 16)] == [3, 6, 12, 12]


def test_too_few_images_name_the_class() -> None:
    labels = torch.tensor([0] * 30 + [1] * 20)
    with pytest.raises(DataError, match="Class 'dog' has 20 images, too few for 17 shots and 4 for validation"):
        sample_few_shot(labels, 2, 17, seed=0, class_names=["cat", "dog"])
    with pytest.raises(ConfigError, match="shots is 0"):
        sample_few_shot(labels, 2, 0, seed=0)
