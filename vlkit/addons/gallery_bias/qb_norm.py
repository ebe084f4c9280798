"""QB-Norm: the inverted softmax, but only for queries whose best answer is a known hub.

    activation set A = gallery items that are among the k best of some query of the bank
    s'(q, r) = s(q, r) - b(r)    where the best item of q is in A,    else s(q, r)
    b(r)     = (1 / beta) log mean_q' exp(beta s(q', r))

A query that no bank query resembles keeps its ranking, so a bank from elsewhere does less harm.

Source: Bogolin et al. 2022, "Cross Modal Retrieval with Querybank Normalisation", arXiv:2112.12777, and the authors'
code (dynamic inverted softmax): beta 20, k 1.
Differs: the additive form, as in `log_sum_exp`: within a query the ranking is that of the ratio, and scores stay on the
scale of the cosine. The authors take beta 1/1.99 for models whose scores are no cosines.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from vlkit.addons.bank import banks, in_chunks, queries_for, soft_maximum
from vlkit.addons.base import GatedGalleryBias, Need, learned
from vlkit.addons.exchange import Vectors
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class QbNorm(GatedGalleryBias):
    """The inverted softmax for some queries.

    Attributes:
        beta: sharpness, on the scale of the cosine.
        k: best items of each query of the bank that count as hubs; 0: none does, and nothing is corrected.
        bank_size: queries drawn by the reference's seed; None takes all.
    """

    uses: ClassVar[frozenset[Need]] = frozenset({"unlabelled_images", "captions"})

    beta: float = 20.0
    k: int = 1
    bank_size: int | None = None
    images: Tensor | None = learned()  # (m,D)
    texts: Tensor | None = learned()  # (m,D)

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Keep the banks.

        Raises:
            ConfigError: beta that is not positive, or a negative k.
        """
        if not self.beta > 0:
            raise ConfigError(f"qb_norm has beta = {self.beta}; expected a number above 0.")
        if self.k < 0:
            raise ConfigError(f"qb_norm has k = {self.k}; expected 0 or more.")
        images, texts = banks(reference, self.bank_size)
        return replace(self, images=images, texts=texts)

    def bias(self, gallery: Vectors) -> Tensor:
        """(N,)."""
        return soft_maximum(gallery.pooled, self._bank(gallery), self.beta)

    def gate(self, scores: Tensor, gallery: Vectors) -> Tensor:
        """(Q,) whether a query's best item is a hub."""
        if not len(gallery):
            return torch.zeros(len(scores), dtype=torch.bool)
        return self.hubs(gallery)[scores.argmax(1)]

    def hubs(self, gallery: Vectors) -> Tensor:
        """(N,) bool: the activation set."""
        found = torch.zeros(len(gallery), dtype=torch.bool)
        k = min(self.k, len(gallery))
        for part in in_chunks(self._bank(gallery), gallery.pooled):
            found[part.topk(k, dim=1).indices.flatten()] = True
        return found

    def _bank(self, gallery: Vectors) -> Tensor:
        return queries_for(gallery, self.images, self.texts, self.name)


ADDON = QbNorm
