"""Tip-Adapter: a cache of few-shot features answers beside the class weights; nothing is trained.

    logits + alpha exp(-beta (1 - x K^T)) L        K: unit mean over ten augmented views of each image, L: one-hot

Source: Zhang et al. 2022, "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification",
arXiv:2207.09519, and the authors' code: alpha 1.17 and beta 1 to start from, beside logits of 100 x cosine.
Differs: alpha and beta are searched on validation images where there are any (the authors' ImageNet script searches on
the test set), each over 1..20; of equals the smallest alpha. Without validation images the starting values hold. A
constant of the paper is taken relative to the model's own logit scale.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from vlkit.addons.base import Need, Term, Vectors, learned
from vlkit.addons.cache_model import answer, chosen_constants, few_shot_cache
from vlkit.addons.views import TEN_CROPS, ViewRecipe
from vlkit.contracts import Progress

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class TipAdapter(Term):
    """A cache of few-shot features.

    Attributes:
        alpha: weight of the cache beside logits of 100 x cosine; None: chosen on validation images, else 1.17.
        beta: sharpness; None: chosen likewise, else 1.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels", "class_names", "views"})
    uses: ClassVar[frozenset[Need]] = frozenset({"val_labels"})
    fit_views: ClassVar[ViewRecipe | None] = TEN_CROPS

    alpha: float | None = None
    beta: float | None = None
    keys: Tensor | None = learned()  # (n,D) unit norm
    values: Tensor | None = learned()  # (n,C) one-hot

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Fill the cache; choose alpha and beta."""
        assert reference.few_shot is not None and reference.logits is not None
        cache = few_shot_cache(reference.few_shot, len(reference.class_names))
        filled = replace(self, keys=cache.keys, values=cache.values)
        alpha, beta = chosen_constants(
            reference, (self.alpha, self.beta), reference.logits, filled._answer, self.from_paper(1.0)
        )
        return replace(filled, alpha=alpha, beta=beta)

    def term(self, queries: Vectors, logits: Tensor) -> Tensor:
        """(Q,C)."""
        assert self.alpha is not None and self.beta is not None
        return self.from_paper(self.alpha) * self._answer(queries, self.beta)

    def _answer(self, queries: Vectors, beta: float) -> Tensor:
        assert self.keys is not None and self.values is not None
        return answer(queries.pooled @ self.keys.T, self.values, beta)


ADDON = TipAdapter
