"""Single-label classification out of scores: accuracy@K, recall per class, confusion.

The tie rule of `eval.metrics.ranking` holds: a label tied with t wrong classes counts 1 / (t + 1) at K = 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eval.metrics.arrays import Array, as_tensor
from eval.metrics.ranking import Ranks, hit_probability, tie_bounds


@torch.no_grad()
def label_ranks(scores: Array, labels: Array) -> Ranks:
    """Where the true class stands among all C.

    Args:
        scores: (N,C) finite, higher is more likely; cosine or logits.
        labels: (N,) int64 in 0..C-1.

    Raises:
        ValueError: shapes or labels that do not fit, scores that are not finite.
    """
    scores, labels = as_tensor(scores), as_tensor(labels)
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(f"scores are {tuple(scores.shape)}, labels {tuple(labels.shape)}; expected (N,C) and (N,).")
    if len(labels) and (labels.min() < 0 or labels.max() >= scores.shape[1]):
        raise ValueError(f"labels must be integers from 0 to {scores.shape[1] - 1}.")
    if not scores.isfinite().all():
        raise ValueError(f"scores are not finite: {int((~scores.isfinite()).any(1).sum())} rows.")
    scores = scores.double()
    own = scores.gather(1, labels.long()[:, None])
    low, high = tie_bounds(own)
    better = (scores > high).sum(1)
    # The true class is within its own bounds; take it out of the tie's wrong answers.
    tied = (scores >= low).sum(1) - better - 1
    return Ranks(better, tied, torch.ones_like(better))


def accuracy(scores: Array, labels: Array, ks: Sequence[int] = (1, 5)) -> dict[str, float]:
    """The share of items whose true class is among the first K of (N,C) scores.

    Returns:
        `accuracy@{K}` for every K up to C: with K > C there is nothing to measure, and the key is left out.

    Raises:
        ValueError: as `label_ranks`; or no items at all.
    """
    if not len(labels):
        raise ValueError("No items; expected at least one.")
    ranks = label_ranks(scores, labels)
    return {f"accuracy@{k}": hit_probability(ranks, k).mean().item() for k in ks if k <= scores.shape[1]}


def mean_per_class_recall(hits: Array, labels: Array) -> float:
    """The mean over classes of each class's share of hits; classes without an item are left out.

    Args:
        hits: (N,) in [0,1], e.g. `hit_probability(label_ranks(scores, labels), 1)`.
        labels: (N,) int64.

    Source: scikit-learn, `balanced_accuracy_score` (same value where nothing ties).
    """
    hits, labels = as_tensor(hits), as_tensor(labels)
    counts = labels.bincount()
    sums = labels.bincount(weights=hits.double())
    return (sums[counts > 0] / counts[counts > 0]).mean().item()


def confusion_matrix(labels: Array, predicted: Array, num_classes: int) -> Tensor:
    """(C,C) int64 counts: rows are true classes, columns predicted ones; both inputs are (N,) int64."""
    labels, predicted = as_tensor(labels).long(), as_tensor(predicted).long()
    return (labels * num_classes + predicted).bincount(minlength=num_classes**2).view(num_classes, num_classes)
