"""Calibration, classes, multi-label precision, separation, Kendall's tau and paired tests against other libraries."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, permutation_test
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    jaccard_score,
    precision_recall_fscore_support,
    roc_auc_score,
    roc_curve,
)
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_jaccard_index

from eval.metrics import (
    class_iou,
    class_table,
    confusion_matrix,
    expected_calibration_error,
    kendall_tau,
    label_average_precision,
    macro_f1,
    mean_iou,
    paired_difference,
    reliability,
    separation,
)

GENERATOR = np.random.default_rng(0)
TRUE = torch.from_numpy(GENERATOR.integers(0, 6, 400))
GIVEN = torch.from_numpy(np.where(GENERATOR.random(400) < 0.6, TRUE.numpy(), GENERATOR.integers(0, 6, 400)))


def test_class_table_equals_scikit_learn() -> None:
    table = class_table(confusion_matrix(TRUE, GIVEN, 6))
    precision, recall, f1, support = precision_recall_fscore_support(TRUE, GIVEN)
    assert table.precision.numpy() == pytest.approx(precision)
    assert table.recall.numpy() == pytest.approx(recall)
    assert table.f1.numpy() == pytest.approx(f1)
    assert table.support.tolist() == support.tolist()
    assert table.recall.mean().item() == pytest.approx(balanced_accuracy_score(TRUE, GIVEN))
    assert macro_f1(confusion_matrix(TRUE, GIVEN, 6)) == pytest.approx(f1_score(TRUE, GIVEN, average="macro"))


def test_a_class_that_is_not_there_is_nan_and_left_out_of_means() -> None:
    """Classes 0, 1, 2; nobody is 2 and nobody is called 2."""
    confusion = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    table = class_table(confusion)
    assert table.recall.tolist()[:2] == [0.75, 1.0] and math.isnan(table.recall[2])
    assert mean_iou(confusion) == pytest.approx((3 / 4 + 4 / 5) / 2)
    assert macro_f1(confusion) == pytest.approx((6 / 7 + 8 / 9) / 2)


def test_mean_iou_equals_torchmetrics_and_scikit_learn() -> None:
    confusion = confusion_matrix(TRUE, GIVEN, 6)
    expected = multiclass_jaccard_index(GIVEN, TRUE, num_classes=6, average="macro").item()
    assert mean_iou(confusion) == pytest.approx(expected, abs=1e-6)
    assert class_iou(confusion).numpy() == pytest.approx(jaccard_score(TRUE, GIVEN, average=None))


def test_calibration_equals_torchmetrics() -> None:
    scores = torch.from_numpy(GENERATOR.normal(size=(400, 6)) * 2).softmax(1)
    best = scores.max(1)
    bins = reliability(best.values, (best.indices == TRUE).double(), 10)
    expected = multiclass_calibration_error(scores, TRUE, num_classes=6, n_bins=10, norm="l1").item()
    assert expected_calibration_error(bins) == pytest.approx(expected, abs=1e-6)
    assert int(bins.size.sum()) == 400 and bins.edges.tolist() == pytest.approx([i / 10 for i in range(11)])


def test_calibration_by_hand() -> None:
    # Bin (0.4, 0.6]: confidence 0.5, one of two right. Bin (0.8, 1]: confidence 0.9, all right: off by 0.1.
    bins = reliability(torch.tensor([0.5, 0.5, 0.9, 0.9]), torch.tensor([1.0, 0.0, 1.0, 1.0]), 5)
    assert bins.size.tolist() == [0, 0, 2, 0, 2]
    assert expected_calibration_error(bins) == pytest.approx(0.05, abs=1e-6)
    with pytest.raises(ValueError, match="finite and within 0 and 1"):
        reliability(torch.tensor([torch.nan]), torch.tensor([1.0]))


def clip_benchmark_average_precision(scores: np.ndarray, targets: np.ndarray) -> float:
    """The peer's definition, looped: precision at every positive in falling order, their mean."""
    order = np.argsort(-scores, kind="stable")
    hits = targets[order]
    return float(np.mean([hits[: i + 1].mean() for i in np.flatnonzero(hits)]))


def test_multi_label_precision_equals_scikit_learn_and_clip_benchmark() -> None:
    scores = torch.from_numpy(GENERATOR.normal(size=(80, 5)))
    labels = torch.from_numpy(GENERATOR.random((80, 5)) < 0.2)
    labels[:, 4] = False
    found = label_average_precision(scores, labels)
    columns = [(scores[:, c].numpy(), labels[:, c].numpy()) for c in range(4)]
    expected = [average_precision_score(right, score) for score, right in columns]
    assert found.average_precision[:4].numpy() == pytest.approx(np.array(expected))
    assert expected == pytest.approx([clip_benchmark_average_precision(*column) for column in columns])
    assert math.isnan(found.average_precision[4]) and found.support[4] == 0
    assert found.mean() == pytest.approx(np.mean(expected))
    coarse = (scores * 2).round()
    tied = label_average_precision(coarse, labels).average_precision[:4].numpy()
    assert tied == pytest.approx(np.array([average_precision_score(labels[:, c], coarse[:, c]) for c in range(4)]))
    with pytest.raises(ValueError, match="not finite: 1 rows"):
        label_average_precision(scores.index_fill(0, torch.tensor([3]), torch.nan), labels)


@pytest.mark.parametrize("coarse", [False, True])
def test_separation_equals_scikit_learn(coarse: bool) -> None:
    positive, negative = GENERATOR.normal(1, 1, 230), GENERATOR.normal(0, 1, 170)
    if coarse:
        positive, negative = positive.round(), negative.round()
    found = separation(torch.from_numpy(positive), torch.from_numpy(negative))
    truth, scores = np.repeat([1, 0], [230, 170]), np.concatenate([positive, negative])
    false, true, _ = roc_curve(truth, scores, drop_intermediate=False)
    assert found.auroc == pytest.approx(roc_auc_score(truth, scores))
    assert found.fpr95 == pytest.approx(false[true >= 0.95 - 1e-12].min())


def test_equal_scores_do_not_separate() -> None:
    found = separation(torch.ones(5), torch.ones(7))
    assert found == (0.5, 1.0)
    with pytest.raises(ValueError, match="negative scores"):
        separation(torch.ones(5), torch.tensor([torch.inf]))


@pytest.mark.parametrize("levels", [(2, 50), (4, 1000), (50, 50), (1000, 3)])
def test_kendall_equals_scipy(levels: tuple[int, int]) -> None:
    x = GENERATOR.integers(0, levels[0], 300)
    y = x * levels[1] / levels[0] + GENERATOR.integers(0, levels[1], 300) // 2
    for variant in ("b", "c"):
        assert kendall_tau(x, y, variant) == pytest.approx(kendalltau(x, y, variant=variant).statistic, abs=1e-12)


def test_kendall_by_hand() -> None:
    # Pairs: (1,2) vs (1,3): of the six pairs 4 are concordant, 1 discordant, 1 tied in y.
    x, y = [1, 2, 3, 4], [1, 3, 2, 3]
    pairs = [np.sign(x[j] - x[i]) * np.sign(y[j] - y[i]) for i, j in itertools.combinations(range(4), 2)]
    assert sum(pairs) == 3
    assert kendall_tau(x, y, "b") == pytest.approx(3 / math.sqrt(6 * 5))
    assert kendall_tau(x, y, "c") == pytest.approx(2 * 3 / (16 * 2 / 3))
    with pytest.raises(ValueError, match="single value"):
        kendall_tau([1, 1], [1, 2])
    with pytest.raises(ValueError, match="finite"):
        kendall_tau([1, math.nan], [1, 2])


def test_paired_p_value_equals_scipy_and_exhaustive_exchange() -> None:
    first, second = GENERATOR.random(10), GENERATOR.random(10) + 0.2
    found = paired_difference(torch.from_numpy(first), torch.from_numpy(second), num_permutations=20_000)
    exact = permutation_test(
        (second, first), lambda a, b: np.mean(a - b), permutation_type="samples", n_resamples=np.inf
    )
    assert found.difference == pytest.approx(exact.statistic)
    assert found.p_value == pytest.approx(exact.pvalue, abs=0.01)
    assert found.low < found.difference < found.high


def test_pairing_sees_what_separate_intervals_hide() -> None:
    """Each item improves by 0.01 while items differ by 1: certain when paired, and none when exchanged at random."""
    base = torch.from_numpy(GENERATOR.normal(size=200))
    found = paired_difference(base, base + 0.01)
    assert found.low == pytest.approx(0.01) == found.high and found.p_value < 0.001
    same = paired_difference(base, base.flip(0))
    assert same.difference == pytest.approx(0, abs=1e-12) and same.p_value == pytest.approx(1)


def test_units_are_exchanged_as_a_whole() -> None:
    """Five copies of one observation are no evidence more than one."""
    first, second = torch.zeros(6), torch.tensor([1.0, 1, 1, 1, -1, 1])
    once = paired_difference(first, second)
    units = torch.arange(6).repeat_interleave(5)
    five = paired_difference(first.repeat_interleave(5), second.repeat_interleave(5), units=units)
    assert five == pytest.approx(once)
    with pytest.raises(ValueError, match="expected the same"):
        paired_difference(first, second[:3])
