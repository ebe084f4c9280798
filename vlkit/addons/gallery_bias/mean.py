"""DN as a gallery bias: each gallery item loses a share of its mean similarity to a bank of queries.

    b(r) = lam * mean_q s(q, r)

Source: Zhou et al. 2023, "Test-Time Distribution Normalization for Contrastively Learned Vision-language Models",
arXiv:2302.11084; the paper's DN is lam = 0.5, its DN* (and the released code) lam = 0.25.
Differs: only the part of DN that changes a ranking: terms that are constant for a query are left out. The paper draws
100 queries; here the whole bank is the default, since it costs one matrix product.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from vlkit.addons.bank import banks, queries_for
from vlkit.addons.base import GalleryBias, Need, learned
from vlkit.addons.exchange import Vectors
from vlkit.contracts import Progress

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class Mean(GalleryBias):
    """A share of the mean similarity to the bank.

    Attributes:
        lam: share of the mean similarity; 0 changes nothing.
        bank_size: queries drawn by the reference's seed; None takes all.
    """

    uses: ClassVar[frozenset[Need]] = frozenset({"unlabelled_images", "captions"})

    lam: float = 0.5
    bank_size: int | None = None
    images: Tensor | None = learned()  # (m,D)
    texts: Tensor | None = learned()  # (m,D)

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Keep the mean of each bank: the mean of inner products is the inner product with the mean."""
        images, texts = banks(reference, self.bank_size)
        means = [None if bank is None else bank.mean(0, keepdim=True) for bank in (images, texts)]
        return replace(self, images=means[0], texts=means[1])

    def bias(self, gallery: Vectors) -> Tensor:
        """(N,)."""
        bank = queries_for(gallery, self.images, self.texts, self.name)
        return self.lam * (gallery.pooled @ bank.T)[:, 0]


ADDON = Mean
