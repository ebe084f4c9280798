"""Tip-Adapter: a cache of few-shot features answers beside the class weights; nothing is trained.

    logits + alpha exp(-beta (1 - x K^T)) L        K: unit mean over ten augmented views of each image, L: one-hot

Source: Zhang et al. 2022, "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification",
arXiv:2207.09519, and the authors' code: alpha 1.17 and beta 1 to start from, beside logits of 100 x cosine.
Differs: alpha and beta are searched on validation images where there are any (the authors' ImageNet script searches on
the test set), each over 1..20; of equals the smallest alpha. Without validation images the starting values hold. A
constant of the paper is taken relative to the model's own logit scale.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from torch import Tensor

from vlkit.addons.base import Vectors
from vlkit.addons.cache_model import CacheTerm, few_shot_cache
from vlkit.contracts import Progress

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class TipAdapter(CacheTerm):
    """A cache of few-shot features.

    Attributes:
        alpha: weight of the cache beside logits of 100 x cosine; None: chosen on validation images, else 1.17.
        beta: sharpness; None: chosen likewise, else 1.
    """

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Fill the cache; choose alpha and beta."""
        assert reference.few_shot is not None and reference.logits is not None
        cache = few_shot_cache(reference.few_shot, len(reference.class_names))
        return replace(self, keys=cache.keys, values=cache.values).chosen(reference, reference.logits)

    def term(self, queries: Vectors, logits: Tensor) -> Tensor:
        """(Q,C)."""
        return self.weighted(queries)


ADDON = TipAdapter
