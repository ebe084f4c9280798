"""TFUP's cache of unlabelled images: which it holds, and how alike two images are on two levels.

Source: Long et al. 2024, "Training-Free Unsupervised Prompt for Vision-Language Models" (TFUP), arXiv:2404.16339, and
the authors' code.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.cache_model import divergence
from vlkit.errors import ConfigError

# Logits of 10 x cosine make the probabilities by which images are compared and chosen.
SIGNATURE_SCALE = 10.0
_LEAST, _MOST, _SHARE = 9, 16, 0.3


class Chosen(NamedTuple):
    """Images that stand for their predicted class."""

    rows: Tensor  # (k,) of the unlabelled images
    classes: Tensor  # (k,)


def shots_of(num_images: int, num_classes: int) -> int:
    """Images a class: 0.3 of those it would have if all had the same number, 9 to 16."""
    return min(_MOST, max(_LEAST, int(num_images * _SHARE / num_classes)))


def representatives(signatures: Tensor, shots: int) -> Chosen:
    """For each class the 2 x shots surest images, of which those that differ least from the others.

    Args:
        signatures: (n,C) log-probabilities.
        shots: images a class, fewer where there are fewer.

    Raises:
        ConfigError: shots below 1.
    """
    if shots < 1:
        raise ConfigError(f"shots is {shots}; the cache keeps at least 1 image of each class.")
    rows = []
    for one in range(signatures.shape[1]):
        surest = signatures[:, one].topk(min(2 * shots, len(signatures))).indices
        apart = divergence(signatures[surest], signatures[surest]).sum(1)
        rows.append(surest[apart.argsort()[:shots]])
    classes = torch.arange(len(rows)).repeat_interleave(len(rows[0]))
    return Chosen(torch.cat(rows), classes)


class UnlabelledCache(NamedTuple):
    """Images that stand for their predicted class, as keys with answers."""

    rows: Tensor  # (k,) of the unlabelled images
    keys: Tensor  # (k,D) unit norm
    values: Tensor  # (k,C) one-hot


def signature(logits: Tensor, logit_scale: float) -> Tensor:
    """(n,C) log-probabilities by which images are compared, of a model's logits (n,C)."""
    return (logits * (SIGNATURE_SCALE / logit_scale)).log_softmax(dim=-1)


def cache_of(images: Tensor, signatures: Tensor, shots: int | None) -> UnlabelledCache:
    """The representatives of unlabelled images.

    Args:
        images: (n,D).
        signatures: (n,C) log-probabilities.
        shots: images a class; None: see `shots_of`.

    Raises:
        ConfigError: shots below 1.
    """
    num_classes = signatures.shape[1]
    rows, classes = representatives(signatures, shots_of(len(images), num_classes) if shots is None else shots)
    return UnlabelledCache(rows, F.normalize(images[rows], dim=-1), F.one_hot(classes, num_classes).float())


def two_level_similarity(features: Tensor, keys: Tensor, queries: Tensor, signatures: Tensor) -> Tensor:
    """(Q,n) cosine x 2 (1 - divergence, from 0 at a query's nearest key to 1 at its farthest).

    Args:
        features: (Q,D) unit norm.
        keys: (n,D) unit norm.
        queries: (Q,C) log-probabilities of the queries.
        signatures: (n,C) of the keys.
    """
    apart = divergence(queries, signatures)
    least, greatest = apart.min(1, keepdim=True).values, apart.max(1, keepdim=True).values
    return features @ keys.T * 2 * (1 - (apart - least) / (greatest - least).clamp(min=1e-12))
