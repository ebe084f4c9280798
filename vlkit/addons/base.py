"""What an add-on's slots exchange: today the class weights of a zero-shot classifier."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Reduce = Literal["max", "mean"]


@dataclass(frozen=True)
class ClassWeights:
    """Vectors that images are compared with, several a class where a class has synonyms or descriptions.

    Attributes:
        vectors: (r, D) unit norm, float32.
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
        similarity = features @ self.vectors.T
        if len(self.vectors) == self.num_classes and torch.equal(self.class_of, torch.arange(self.num_classes)):
            scores = similarity
        else:
            index = self.class_of.expand(len(features), -1)
            start = similarity.new_zeros((len(features), self.num_classes))
            scores = start.scatter_reduce(
                1, index, similarity, reduce="amax" if self.reduce == "max" else "mean", include_self=False
            )
        return scores if self.bias is None else scores + self.bias
