"""How well one score tells two sets apart: AUROC and the false positive rate at 95% true positives."""

from typing import NamedTuple

import torch

from eval.metrics.arrays import Array, as_tensor


class Separation(NamedTuple):
    """Of in-distribution items (positive) against others."""

    auroc: float  # probability that a positive scores above a negative, ties counting half
    fpr95: float  # share of negatives accepted by the highest threshold that accepts 95% of the positives


def separation(positive: Array, negative: Array, true_positive_rate: float = 0.95) -> Separation:
    """AUROC and FPR at a true positive rate, exact.

    Args:
        positive: (n,) finite scores of what should be accepted.
        negative: (m,) finite scores of what should be refused.
        true_positive_rate: share of positives that the threshold accepts at least.

    Raises:
        ValueError: an empty set, or scores that are not finite.

    Source: Hendrycks and Gimpel 2017, arXiv:1610.02136 (AUROC); Liang et al. 2018, arXiv:1706.02690 (FPR95).
    """
    positive, negative = as_tensor(positive), as_tensor(negative)
    for name, scores in (("positive", positive), ("negative", negative)):
        if scores.ndim != 1 or not len(scores) or not scores.isfinite().all():
            raise ValueError(f"{name} scores are {tuple(scores.shape)}; expected (n,) finite ones, at least 1.")
    positive, negative = positive.double().sort().values, negative.double().sort().values
    below = torch.searchsorted(negative, positive)
    upto = torch.searchsorted(negative, positive, right=True)
    auroc = ((below + upto).double() / 2).sum() / (len(positive) * len(negative))
    # The k-th highest positive, k the least number that is the wanted share of them.
    accepted = int(torch.tensor(true_positive_rate * len(positive), dtype=torch.float64).sub(1e-9).ceil())
    threshold = positive[len(positive) - max(accepted, 1)]
    refused = int(torch.searchsorted(negative, threshold))
    return Separation(auroc.item(), (len(negative) - refused) / len(negative))
