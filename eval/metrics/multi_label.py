"""Images with several classes: average precision of every class and its mean."""

from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics.arrays import Array, as_tensor
from eval.metrics.ranking import tie_bounds


class LabelPrecision(NamedTuple):
    """Average precision of every class over the images."""

    average_precision: Tensor  # (C,) float64; NaN for a class that no image has
    support: Tensor  # (C,) int64 images of the class

    def mean(self) -> float:
        """Over the classes that an image has. CLIP_benchmark counts the others as 0 and divides by all."""
        return self.average_precision[self.support > 0].mean().item()


def label_average_precision(scores: Array, labels: Array) -> LabelPrecision:
    """Non-interpolated average precision per class: mean over its images of the precision at their scores.

    Tied images are cut between all of them or none: precision is taken behind the tie, as scikit-learn does.

    Args:
        scores: (N,C) finite.
        labels: (N,C) bool.

    Raises:
        ValueError: shapes that differ, scores that are not finite, or no label at all.

    Source: CLIP_benchmark 1.6.1, metrics/zeroshot_classification.py, `average_precision_per_class`;
    scikit-learn, `average_precision_score`.
    Differs: ties as above; a class without an image is NaN rather than 0. The VOC 2007 11-point AP is another metric.
    """
    scores, labels = as_tensor(scores), as_tensor(labels)
    if scores.shape != labels.shape or scores.ndim != 2:
        raise ValueError(f"scores are {tuple(scores.shape)}, labels {tuple(labels.shape)}; expected (N,C) both.")
    if not scores.isfinite().all():
        raise ValueError(f"scores are not finite: {int((~scores.isfinite()).any(1).sum())} rows.")
    labels = labels.bool()
    if not labels.any():
        raise ValueError("No image has a class; expected at least one.")
    values = [_average_precision(scores[:, column], labels[:, column]) for column in range(scores.shape[1])]
    return LabelPrecision(torch.stack(values), labels.sum(0))


def _average_precision(scores: Tensor, right: Tensor) -> Tensor:
    own = scores[right].double()
    if not len(own):
        return own.new_tensor(float("nan"))
    low, _ = tie_bounds(own)
    everything, hits = scores.double().sort().values, own.sort().values
    reached = len(everything) - torch.searchsorted(everything, low)
    return ((len(hits) - torch.searchsorted(hits, low)) / reached).double().mean()
