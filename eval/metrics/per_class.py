"""Precision, recall and F1 of every class out of a confusion matrix, and their mean over classes."""

from typing import NamedTuple

from torch import Tensor

from eval.metrics.arrays import Array, as_tensor


class ClassTable(NamedTuple):
    """One row a class; NaN where there is nothing to divide by."""

    support: Tensor  # (C,) int64: items of the class
    predicted: Tensor  # (C,) int64: items given to the class
    precision: Tensor  # (C,) float64; NaN for a class nothing was given to
    recall: Tensor  # (C,) float64; NaN for a class without items
    f1: Tensor  # (C,) float64; NaN for a class without items that nothing was given to


def class_table(confusion: Array) -> ClassTable:
    """Per-class numbers of a confusion matrix.

    Args:
        confusion: (C,C) counts, rows true classes.

    Raises:
        ValueError: not square, or negative.
    """
    confusion = as_tensor(confusion)
    if confusion.ndim != 2 or confusion.shape[0] != confusion.shape[1] or (confusion < 0).any():
        raise ValueError(f"The confusion matrix is {tuple(confusion.shape)}; expected (C,C) counts.")
    support, predicted, hits = confusion.sum(1), confusion.sum(0), confusion.diagonal().double()
    # 0 / 0 is NaN on purpose: a class that was not there has no recall, rather than a recall of 0.
    return ClassTable(support, predicted, hits / predicted, hits / support, 2 * hits / (support + predicted))


def macro_f1(confusion: Array) -> float:
    """Mean F1 over the classes that have an item or a prediction.

    Source: scikit-learn, `f1_score(average="macro")` (same value).
    """
    f1 = class_table(confusion).f1
    return f1[~f1.isnan()].mean().item()


def mean_iou(confusion: Array) -> float:
    """Mean over classes of intersection over union, classes in neither truth nor prediction left out.

    Args:
        confusion: (C,C) counts of pixels, rows true classes.

    Source: Long et al. 2015, arXiv:1411.4038, section 5 (mean IU); torchmetrics' `MulticlassJaccardIndex` agrees.
    """
    iou = class_iou(confusion)
    return iou[~iou.isnan()].mean().item()


def class_iou(confusion: Array) -> Tensor:
    """(C,) float64 intersection over union of each class; NaN for a class in neither truth nor prediction."""
    table = class_table(confusion)
    hits = as_tensor(confusion).diagonal().double()
    return hits / (table.support + table.predicted - hits)
