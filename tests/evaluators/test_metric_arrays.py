"""Every metric gives the same for NumPy arrays, also read-only ones, as for tensors."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from eval import metrics

GENERATOR = torch.Generator().manual_seed(0)
SCORES = torch.randn(12, 4, generator=GENERATOR)
LABELS = torch.arange(12) % 4
IMAGE = torch.nn.functional.normalize(torch.randn(5, 8, generator=GENERATOR), dim=1)
TEXT = torch.nn.functional.normalize(torch.randn(12, 8, generator=GENERATOR), dim=1)
OWNERS = torch.arange(12) % 5
COUNTS = torch.randint(1, 9, (4, 4), generator=GENERATOR)
PAIRS = metrics.Candidates(torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 0, 1]))


def _relevant(queries: Any, gallery: Any, *rows: Any) -> Any:
    found = metrics.positive_positions(queries, gallery, rows)
    return found.average_precision().tolist(), found.ndcg(3).tolist(), found.r_precision().tolist()


CASES: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
    (metrics.retrieval_recall, (IMAGE, TEXT, OWNERS)),
    (metrics.retrieval_ranks, (IMAGE, TEXT, OWNERS)),
    (_relevant, (IMAGE, TEXT, *[torch.eq(OWNERS, row).nonzero().flatten() for row in range(5)])),
    (metrics.accuracy, (SCORES, LABELS)),
    (metrics.label_ranks, (SCORES, LABELS)),
    (metrics.mean_per_class_recall, (SCORES[:, 0].sigmoid(), LABELS)),
    (lambda labels, predicted: metrics.confusion_matrix(labels, predicted, 4), (LABELS, SCORES.argmax(1))),
    (metrics.reliability, (SCORES[:, 0].sigmoid(), (SCORES[:, 1] > 0).double())),
    (metrics.label_average_precision, (SCORES, SCORES.roll(1, 0) > 0)),
    (metrics.class_table, (COUNTS,)),
    (metrics.macro_f1, (COUNTS,)),
    (metrics.mean_iou, (COUNTS,)),
    (metrics.class_iou, (COUNTS,)),
    (metrics.cluster_accuracy, (LABELS, SCORES.argmax(1))),
    (metrics.separation, (SCORES[:, 0], SCORES[:, 1])),
    (metrics.paired_difference, (SCORES[:, 0], SCORES[:, 1])),
    (lambda values, units: metrics.bootstrap_interval(values, units=units, groups=units), (SCORES, LABELS)),
    (lambda s, y, r: metrics.doubly_right(s, PAIRS, y, r, k=2), (SCORES, LABELS, LABELS % 2)),
]


@pytest.mark.parametrize(("metric", "inputs"), CASES)
def test_arrays_are_as_good_as_tensors(metric: Callable[..., Any], inputs: tuple[Tensor, ...]) -> None:
    arrays = [one.numpy().copy() for one in inputs]
    for one in arrays:
        one.flags.writeable = False
    _same(metric(*arrays), metric(*inputs))


def test_stored_halves_and_narrow_indices(tmp_path: Any) -> None:
    np.save(tmp_path / "image.npy", IMAGE.numpy().astype(np.float16))
    image = np.load(tmp_path / "image.npy", mmap_mode="r")
    found = metrics.retrieval_recall(image, TEXT.numpy(), OWNERS.numpy().astype(np.int32))
    assert found == metrics.retrieval_recall(IMAGE.half(), TEXT, OWNERS)
    assert metrics.accuracy(SCORES.numpy(), LABELS.numpy().astype(np.int32)) == metrics.accuracy(SCORES, LABELS)


def _same(found: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert torch.equal(torch.nan_to_num(found, -1.0), torch.nan_to_num(expected, -1.0))
    elif isinstance(expected, tuple):
        for one, other in zip(found, expected, strict=True):
            _same(one, other)
    else:
        assert found == expected
