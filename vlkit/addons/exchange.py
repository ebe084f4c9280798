"""What the slots hand to each other: vectors of images or texts, and the weights of classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["image", "text"]
Reduce = Literal["max", "mean"]
Rows = slice | Tensor | Sequence[int]


@dataclass(frozen=True)
class Vectors:
    """Features of n images or n texts, with what an add-on asked for besides.

    Attributes:
        kind: of what.
        pooled: (n,D) float32; unit norm while `unit` says so.
        unit: whether the rows of `pooled` have unit norm. A feature map that changes that says so.
        norm: (n,) length of the encoder's own output: `raw` is pooled x norm. None for texts and mapped vectors.
        patches: (n,P,D) unit norm in the joint space, for add-ons that need "patches".
        patch_tokens: (n,P,W) the tower's output before projection, for add-ons that need "patch_tokens".
        grid: rows and columns of the patches.
        views: (n,V,D) unit norm, the same images in other views, for add-ons that need "views".
    """

    kind: Kind
    pooled: Tensor
    unit: bool = True
    norm: Tensor | None = None
    patches: Tensor | None = None
    patch_tokens: Tensor | None = None
    grid: tuple[int, int] | None = None
    views: Tensor | None = None

    def __post_init__(self) -> None:
        assert self.pooled.ndim == 2, self.pooled.shape
        for rows in (self.norm, self.patches, self.patch_tokens, self.views):
            assert rows is None or len(rows) == len(self.pooled), (rows.shape, self.pooled.shape)

    def __len__(self) -> int:
        return len(self.pooled)

    @property
    def raw(self) -> Tensor:
        """(n,D) as the encoder gave them, before they were brought to unit norm."""
        assert self.norm is not None, f"the length of these {self.kind} features is not known"
        return self.pooled * self.norm[:, None]

    def rows(self, which: Rows) -> "Vectors":
        """Some of them, in the order asked for."""
        names = ("pooled", "norm", "patches", "patch_tokens", "views")
        chosen = {name: value[which] for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **chosen)

    def with_pooled(self, pooled: Tensor, unit: bool) -> "Vectors":
        """Other pooled vectors in the same order; patches and views stay as they are."""
        return replace(self, pooled=pooled, unit=unit, norm=None)

    def only(self, extras: frozenset[str]) -> "Vectors":
        """Without the patches, patch tokens and views that `extras` does not name."""
        return replace(
            self,
            patches=self.patches if "patches" in extras else None,
            patch_tokens=self.patch_tokens if "patch_tokens" in extras else None,
            views=self.views if "views" in extras else None,
        )


def no_vectors(kind: Kind, dim: int) -> Vectors:
    """None of a kind: what a map gets for a side that is not there."""
    return Vectors(kind, torch.empty(0, dim))


@dataclass(frozen=True)
class ClassWeights:
    """Vectors that images are compared with, several a class where a class has synonyms or descriptions.

    Attributes:
        vectors: (r, D) float32; unit norm where they are text features, any length for learned weights.
        class_of: (r,) int64, the class of each vector; every class 0..C-1 owns at least one.
        reduce: how the similarities of one class become its score: "max" or "mean".
        bias: (C,) added to the scores, or None.
    """

    vectors: Tensor
    class_of: Tensor
    reduce: Reduce = "max"
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        counts = torch.bincount(self.class_of)
        assert self.vectors.ndim == 2, self.vectors.shape
        assert len(self.class_of) == len(self.vectors), (len(self.class_of), len(self.vectors))
        assert bool((counts > 0).all()), f"classes without a vector: {(counts == 0).nonzero().flatten().tolist()}"

    @property
    def num_classes(self) -> int:
        """C, the number of classes."""
        return int(self.class_of.max()) + 1

    def scores(self, features: Tensor) -> Tensor:
        """Similarity of each image with each class.

        Args:
            features: (B, D) unit-norm image features.

        Returns:
            (B, C) cosine similarities, reduced over the vectors of each class, plus the bias.
        """
        return self.reduced(features @ self.vectors.T)

    def reduced(self, similarity: Tensor) -> Tensor:
        """(B, r) similarities with the vectors to (B, C) scores of the classes, plus the bias."""
        if len(self.vectors) == self.num_classes and torch.equal(self.class_of, torch.arange(self.num_classes)):
            scores = similarity
        else:
            index = self.class_of.expand(len(similarity), -1)
            start = similarity.new_zeros((len(similarity), self.num_classes))
            scores = start.scatter_reduce(
                1, index, similarity, reduce="amax" if self.reduce == "max" else "mean", include_self=False
            )
        return scores if self.bias is None else scores + self.bias


@dataclass(frozen=True)
class ImageConditionedWeights:
    """Class weights that depend on the image: prompts with a network of the image, prompts tuned on each image.

    Attributes:
        conditioned: image vectors -> (B, C) scores on the scale of the cosine.
        num_classes: C.
    """

    conditioned: Callable[[Vectors], Tensor]
    num_classes: int

    def scores(self, images: Vectors) -> Tensor:
        """(B, C)."""
        scores = self.conditioned(images)
        assert scores.shape == (len(images), self.num_classes), (scores.shape, len(images), self.num_classes)
        return scores


Weights = ClassWeights | ImageConditionedWeights
