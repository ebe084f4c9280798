"""DualIS: the inverted softmax with two banks, one of queries and one of items such as those in the gallery.

    b(r) = (LSE_R(b1 s(., r)) + LSE_Q(b2 s(., r))) / (b1 + b2)        LSE_X(b s) = log mean_{x in X} exp(b s(x, r))

Q holds queries (captions where images are searched), R items of the gallery's own kind. An item is lowered when many
queries are near it and when it lies amid many items like it.

Source: Wang, Jian, Xue 2023, "Balance Act: Mitigating Hubness in Cross-Modal Retrieval with Query and Gallery Banks",
arXiv:2310.11612, and the authors' code (DBNorm).
Differs: the additive form of the product of both ratios, see `log_sum_exp`; means instead of sums, which changes no
ranking. The authors' code has b1 = 1/1.99 and b2 = 3 for scores that are no cosines; here b2 is 20, as in
`log_sum_exp`, and b1 stays. Their gated form (DualDIS) is not part of it. The bank R is of another split than the
gallery; the authors' re-ranking script passes the gallery's similarities where those of the test are expected.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from vlkit.addons.bank import banks, soft_maximum
from vlkit.addons.base import GalleryBias, Need, learned
from vlkit.addons.exchange import Vectors
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class DualIS(GalleryBias):
    """Soft maxima of the similarities to both banks.

    Attributes:
        beta_gallery: sharpness for the bank of the gallery's kind; 0 leaves that bank out.
        beta_queries: sharpness for the bank of queries.
        bank_size: of each bank, drawn by the reference's seed; None takes all.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"unlabelled_images", "captions"})

    beta_gallery: float = 1 / 1.99
    beta_queries: float = 20.0
    bank_size: int | None = None
    images: Tensor | None = learned()  # (m,D)
    texts: Tensor | None = learned()  # (m,D)

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Keep the banks.

        Raises:
            ConfigError: a negative sharpness, or none for the queries.
        """
        if self.beta_gallery < 0 or not self.beta_queries > 0:
            raise ConfigError(
                f"dual_is has beta_gallery = {self.beta_gallery} and beta_queries = {self.beta_queries}; expected the "
                "first to be at least 0 and the second above 0."
            )
        images, texts = banks(reference, self.bank_size)
        return replace(self, images=images, texts=texts)

    def bias(self, gallery: Vectors) -> Tensor:
        """(N,)."""
        assert self.images is not None and self.texts is not None
        own, queries = (self.images, self.texts) if gallery.kind == "image" else (self.texts, self.images)
        amount = self.beta_queries * soft_maximum(gallery.pooled, queries, self.beta_queries)
        if self.beta_gallery:
            amount = amount + self.beta_gallery * soft_maximum(gallery.pooled, own, self.beta_gallery)
        return amount / (self.beta_gallery + self.beta_queries)


ADDON = DualIS
