"""Which channels of the features tell classes apart: APE's refinement.

Source: Zhu et al. 2023, "Not All Features Matter: Enhancing Few-shot CLIP with Adaptive Prior Refinement" (APE),
arXiv:2304.01195, and the authors' code.
"""

import torch
from torch import Tensor


def channel_scores(texts: Tensor, shots: Tensor, labels: Tensor, balance: float) -> Tensor:
    """(D,) higher for channels in which classes differ.

    - balance x (mean product of two samples of different classes, texts and images alike) + (1 - balance) x
    variance of the texts.

    Args:
        texts: (C,D) class vectors.
        shots: (n,D) few-shot features.
        labels: (n,) their classes.
        balance: weight of the first criterion.
    """
    samples = torch.cat([texts, shots])
    classes = torch.cat([torch.arange(len(texts)), labels])
    # Sum over pairs of different classes = square of the whole sum - squares of the sums of classes.
    sums = torch.zeros_like(texts).index_add(0, classes, samples)
    counts = torch.bincount(classes).double()
    pairs = (counts.sum() ** 2 - (counts**2).sum()).clamp(min=1)
    between = (sums.sum(0) ** 2 - (sums**2).sum(0)) / pairs
    spread = texts.var(0) if len(texts) > 1 else torch.zeros_like(between)
    return (-balance * between + (1 - balance) * spread).to(texts.dtype)


def best_channels(scores: Tensor, share: float) -> Tensor:
    """Numbers of the channels kept, rising: a share of all, at least one."""
    kept = max(1, round(share * len(scores)))
    return scores.topk(kept).indices.sort().values


def single_vectors(vectors: Tensor, class_of: Tensor) -> Tensor:
    """(C,D) one unit vector a class: the mean over those of its names."""
    num_classes = int(class_of.max()) + 1
    sums = torch.zeros(num_classes, vectors.shape[1]).index_add(0, class_of, vectors)
    return torch.nn.functional.normalize(sums, dim=-1)
