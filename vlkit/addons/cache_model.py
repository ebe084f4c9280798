"""What the cache methods share: few shots as keys, how they answer, constants chosen on validation images.

    exp(-beta (1 - similarity)) values        similarity (Q,n) of queries and keys, values (n,C)

Source: Zhang et al. 2022 (Tip-Adapter), arXiv:2207.09519.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.exchange import Vectors

if TYPE_CHECKING:
    from vlkit.addons.reference import Part, Reference

_GRID = tuple(float(number) for number in range(1, 21))

Setting = tuple[float, ...]


class Cache(NamedTuple):
    """Few-shot images as keys with answers."""

    keys: Tensor  # (n,D) unit norm
    values: Tensor  # (n,C) one-hot


class Constants(NamedTuple):
    """Weight and sharpness of a cache."""

    alpha: float
    beta: float


# Where the authors of Tip-Adapter start their search.
START = Constants(1.17, 1.0)


def few_shot_cache(shots: "Part", num_classes: int) -> Cache:
    """Keys are unit means over the views of each image."""
    assert shots.labels is not None and shots.vectors.views is not None
    keys = F.normalize(shots.vectors.views.mean(1), dim=-1)
    return Cache(keys, F.one_hot(shots.labels, num_classes).float())


def answer(similarity: Tensor, values: Tensor, beta: float) -> Tensor:
    """(Q,C): each key's values, weighted by how near it is.

    Args:
        similarity: (Q,n) of queries and keys, 1 where they are equal.
        values: (n,C).
        beta: sharpness; large ones leave the nearest key alone.
    """
    return torch.exp(-beta * (1 - similarity)) @ values


def divergence(queries: Tensor, keys: Tensor) -> Tensor:
    """(Q,n) KL(query || key) of log-probabilities (Q,C) and (n,C)."""
    probabilities = queries.exp()
    return (probabilities * queries).sum(1, keepdim=True) - probabilities @ keys.T


def view(vectors: Vectors, number: int) -> Vectors:
    """The images as one of their views shows them, the views in turn: epoch after epoch another."""
    assert vectors.views is not None
    return vectors.with_pooled(vectors.views[:, number % vectors.views.shape[1]], unit=vectors.unit)


def best_setting(reference: "Reference", candidates: Iterable[tuple[Setting, Tensor]]) -> Setting:
    """The setting whose logits (n,C) do best on the validation images; of equals the smallest, number by number."""
    assert reference.val is not None and reference.val.labels is not None
    labels = reference.val.labels
    found = [(reference.metric(logits, labels), tuple(-number for number in setting)) for setting, logits in candidates]
    return tuple(-number for number in max(found)[1])


def grid(given: float | None, values: Iterable[float] = _GRID) -> list[float]:
    """What is searched: the one value that is given, else all."""
    return list(values) if given is None else [given]


def chosen_constants(
    reference: "Reference",
    given: tuple[float | None, float | None],
    base: Callable[[Vectors], Tensor],
    cache: Callable[[Vectors, float], Tensor],
    unit: float,
    start: Constants = START,
) -> Constants:
    """Alpha and beta: as given, else the best on the validation images, else those of the authors.

    Args:
        reference: with validation images, or without.
        given: alpha and beta; None is chosen.
        base: logits (n,C) of images without the cache.
        cache: the cache's answer (n,C) to images at a beta.
        unit: what an alpha of 1 is in the logits of this model.
        start: those of the authors.
    """
    alpha, beta = given
    if reference.val is None or (alpha is not None and beta is not None):
        return Constants(start.alpha if alpha is None else alpha, start.beta if beta is None else beta)
    with torch.no_grad():
        images = reference.val.vectors
        without = base(images)
        candidates = (
            ((one, sharp), without + one * unit * answered)
            for sharp in grid(beta)
            for answered in [cache(images, sharp)]
            for one in grid(alpha)
        )
        return Constants(*best_setting(reference, candidates))
