"""Whether probabilities mean what they say: reliability bins and the expected calibration error."""

from typing import NamedTuple

import torch
from torch import Tensor

from eval.metrics.arrays import Array, as_tensor


class Reliability(NamedTuple):
    """Answers sorted into bins of equal width by the probability given to them."""

    edges: Tensor  # (b+1,) float64 from 0 to 1
    size: Tensor  # (b,) int64: answers in each bin
    confidence: Tensor  # (b,) float64 mean probability; NaN in an empty bin
    accuracy: Tensor  # (b,) float64 share of right answers; NaN in an empty bin


def reliability(probability: Array, right: Array, num_bins: int = 15) -> Reliability:
    """The bins of a reliability diagram.

    Args:
        probability: (N,) of the answer given, in [0,1].
        right: (N,) in [0,1], 1 where the answer is right.
        num_bins: bins of equal width, each open on the left: (edge, next edge].

    Raises:
        ValueError: shapes that differ, no item, probabilities outside [0,1] or not finite.
    """
    probability, right = as_tensor(probability), as_tensor(right)
    if probability.shape != right.shape or probability.ndim != 1 or not len(probability):
        raise ValueError(f"{tuple(probability.shape)} probabilities, {tuple(right.shape)} answers; expected (N,) each.")
    if not ((probability >= 0) & (probability <= 1)).all():
        raise ValueError("probabilities must be finite and within 0 and 1.")
    edges = torch.linspace(0, 1, num_bins + 1, dtype=torch.float64)
    place = (torch.bucketize(probability.double(), edges) - 1).clamp(0, num_bins - 1)
    count = torch.bincount(place, minlength=num_bins)
    sums = [torch.bincount(place, weights=one.double(), minlength=num_bins) for one in (probability, right)]
    return Reliability(edges, count, sums[0] / count, sums[1] / count)


def expected_calibration_error(bins: Reliability) -> float:
    """Mean distance between a bin's confidence and its accuracy, weighted by its answers.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", arXiv:1706.04599, equation 3.
    """
    filled = bins.size > 0
    gap = (bins.confidence - bins.accuracy).abs()[filled]
    return ((gap * bins.size[filled]).sum() / bins.size.sum()).item()
