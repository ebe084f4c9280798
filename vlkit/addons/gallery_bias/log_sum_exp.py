"""The inverted softmax as a gallery bias: each gallery item loses the soft maximum of its similarities to a bank.

    b(r) = (1 / beta) log mean_q exp(beta s(q, r))

exp(beta s) / sum_q exp(beta s) ranks a gallery as s - b does. beta towards 0 gives the mean, a large beta the maximum.

Source: Smith et al. 2017, "Offline bilingual word vectors, orthogonal transformations and the inverted softmax",
arXiv:1702.03859; beta 20 is the default of Bogolin et al. 2022, "Cross Modal Retrieval with Querybank Normalisation",
arXiv:2112.12777.
Differs: the additive form, in float32 by log-sum-exp, which does not overflow; the mean instead of the sum, a constant
that changes no ranking and makes the limit beta -> 0 the mean itself.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from vlkit.addons.bank import banks, queries_for, soft_maximum
from vlkit.addons.base import GalleryBias, Need, learned
from vlkit.addons.exchange import Vectors
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class LogSumExp(GalleryBias):
    """The soft maximum of the similarities to the bank.

    Attributes:
        beta: sharpness, on the scale of the cosine.
        bank_size: queries drawn by the reference's seed; None takes all.
    """

    uses: ClassVar[frozenset[Need]] = frozenset({"unlabelled_images", "captions"})

    beta: float = 20.0
    bank_size: int | None = None
    images: Tensor | None = learned()  # (m,D)
    texts: Tensor | None = learned()  # (m,D)

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Keep the banks."""
        if not self.beta > 0:
            raise ConfigError(f"log_sum_exp has beta = {self.beta}; expected a number above 0.")
        images, texts = banks(reference, self.bank_size)
        return replace(self, images=images, texts=texts)

    def bias(self, gallery: Vectors) -> Tensor:
        """(N,)."""
        bank = queries_for(gallery, self.images, self.texts, self.name)
        return soft_maximum(gallery.pooled, bank, self.beta)


ADDON = LogSumExp
