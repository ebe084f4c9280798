"""What the cache methods share: few shots as keys, how they answer, constants chosen on validation images.

    exp(-beta (1 - similarity)) values        similarity (Q,n) of queries and keys, values (n,C)

Source: Zhang et al. 2022 (Tip-Adapter), arXiv:2207.09519.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import Need, Term, Vectors, learned
from vlkit.addons.views import TEN_CROPS, ViewRecipe

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


def settled(given: Sequence[float | None], usual: Sequence[float]) -> Setting:
    """The constants that are given, and the usual ones in place of the others."""
    return tuple(other if one is None else one for one, other in zip(given, usual, strict=True))


@dataclass(frozen=True)
class FewShotTerm(Term):
    """Whatever answers from few-shot images in ten crops, with constants that validation images choose."""

    needs: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels", "class_names", "views"})
    uses: ClassVar[frozenset[Need]] = frozenset({"val_labels"})
    fit_views: ClassVar[ViewRecipe | None] = TEN_CROPS


@dataclass(frozen=True)
class CacheTerm(FewShotTerm):
    """One with two constants, whose keys are asked by cosine.

    Attributes:
        alpha: weight of the answer beside logits of 100 x cosine; None: see `chosen`.
        beta: sharpness of the answer; None: likewise.
    """

    alpha: float | None = None
    beta: float | None = None
    keys: Tensor | None = learned()  # (n,D)
    values: Tensor | None = learned()  # (n,C)

    def answered(self, queries: Vectors, beta: float) -> Tensor:
        """(Q,C) of images by the cache as it was learned."""
        assert self.keys is not None and self.values is not None
        return answer(queries.pooled @ self.keys.T, self.values, beta)

    def weighted(self, queries: Vectors) -> Tensor:
        """(Q,C) the same with alpha and beta as they were chosen, for the logits of this model."""
        assert self.alpha is not None and self.beta is not None
        return self.from_paper(self.alpha) * self.answered(queries, self.beta)

    def chosen(self, reference: "Reference", base: Callable[[Vectors], Tensor], start: Constants = START) -> Self:
        """With alpha and beta as given, else the best on the validation images, else those of the authors.

        Args:
            reference: with validation images, or without.
            base: logits (n,C) of images without the cache.
            start: those of the authors.
        """
        given = (self.alpha, self.beta)
        if reference.val is None or None not in given:
            alpha, beta = settled(given, start)
            return replace(self, alpha=alpha, beta=beta)
        unit = self.from_paper(1.0)  # what an alpha of 1 is in the logits of this model
        with torch.no_grad():
            images = reference.val.vectors
            without = base(images)
            candidates = (
                ((one, sharp), without + one * unit * answered)
                for sharp in grid(self.beta)
                for answered in [self.answered(images, sharp)]
                for one in grid(self.alpha)
            )
            alpha, beta = best_setting(reference, candidates)
        return replace(self, alpha=alpha, beta=beta)
