"""A gallery bias folded into the vectors: an ordinary index of unit vectors then gives the corrected order.

    folded = fold_bias(fitted_bias, Vectors("image", features))
    index = EmbeddingIndex.build(folded.vectors, ids)
    found = index.search(folded.queries(texts), k=10)
    folded.scores(found.scores, texts)            # q . r - b(r), as without an index

s(q, r) - b(r) is the inner product of [q, -1] and [r, b(r)]. Indexes here hold unit vectors, so the gallery gets one
more number that fills every vector up to the length of the longest, and both sides are brought to unit norm: all scores
of a query shrink by the same factor.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import GalleryBias, GatedGalleryBias
from vlkit.addons.exchange import Vectors
from vlkit.errors import ConfigError


@dataclass(frozen=True)
class FoldedGallery:
    """Vectors whose cosines rank as the corrected scores do.

    Attributes:
        vectors: (N,D+2) unit norm.
        length: of every gallery vector before it was brought to unit norm.
    """

    vectors: Tensor
    length: float

    def queries(self, queries: Tensor) -> Tensor:
        """(Q,D) to (Q,D+2) unit norm."""
        ones, zeros = queries.new_ones(len(queries), 1), queries.new_zeros(len(queries), 1)
        return F.normalize(torch.cat([queries, -ones, zeros], dim=1), dim=1)

    def scores(self, found: Tensor, queries: Tensor) -> Tensor:
        """Scores (Q,K) of an index back on the scale of the cosine, bias subtracted."""
        return found * self.length * (queries.square().sum(1, keepdim=True) + 1).sqrt()


def fold_bias(bias: GalleryBias, gallery: Vectors) -> FoldedGallery:
    """The gallery with its bias in it.

    Args:
        bias: fitted.
        gallery: (N,D) as the feature maps before the bias leave them; N at least 1.

    Raises:
        ConfigError: a bias that only counts for some queries, or an empty gallery.
    """
    if isinstance(bias, GatedGalleryBias):
        raise ConfigError(
            f"{bias.name} corrects some queries only, which no inner product can tell. Score without an index, or take "
            "a bias that holds for all queries, such as log_sum_exp."
        )
    if not len(gallery):
        raise ConfigError("There is no vector in the gallery to fold a bias into.")
    extended = torch.cat([gallery.pooled, bias.bias(gallery)[:, None]], dim=1)
    squared = extended.double().square().sum(1)
    longest = squared.max()
    fill = (longest - squared).clamp(min=0).sqrt().to(extended.dtype)
    return FoldedGallery(F.normalize(torch.cat([extended, fill[:, None]], dim=1), dim=1), longest.sqrt().item())
