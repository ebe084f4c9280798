"""Nearest-neighbour normalisation (NNN): each gallery item loses a share of the mean of its k best similarities to a
bank of queries.

    b(r) = alpha * mean of the k largest s(q, r)

An item that is near to many queries of any meaning (a hub) is lowered most. With k = the size of the bank it is the
bias of DN, with k = 1 that of the nearest query.

Source: Chowdhury et al. 2024, "Nearest Neighbor Normalization Improves Multimodal Retrieval", arXiv:2410.24114:
alpha 0.75, k 128, a bank of a fifth of the training queries.
Differs: the whole bank is the default; a bank smaller than k is an error, not a smaller k.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from vlkit.addons.bank import banks, in_chunks, queries_for
from vlkit.addons.base import GalleryBias, Need, learned
from vlkit.addons.exchange import Vectors
from vlkit.contracts import Progress
from vlkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class TopKMean(GalleryBias):
    """A share of the mean of the k best similarities to the bank.

    Attributes:
        alpha: share of the mean; 0 changes nothing.
        k: nearest queries of the bank.
        bank_size: queries drawn by the reference's seed; None takes all.
    """

    uses: ClassVar[frozenset[Need]] = frozenset({"unlabelled_images", "captions"})

    alpha: float = 0.75
    k: int = 128
    bank_size: int | None = None
    images: Tensor | None = learned()  # (m,D)
    texts: Tensor | None = learned()  # (m,D)

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Keep the banks."""
        if self.k < 1:
            raise ConfigError(f"top_k_mean has k = {self.k}; expected at least 1.")
        images, texts = banks(reference, self.bank_size)
        for bank, what in ((images, "images"), (texts, "captions")):
            if bank is not None and len(bank) < self.k:
                raise DataError(f"top_k_mean takes k = {self.k}, but the bank holds {len(bank)} {what}. Lower k.")
        return replace(self, images=images, texts=texts)

    def bias(self, gallery: Vectors) -> Tensor:
        """(N,)."""
        bank = queries_for(gallery, self.images, self.texts, self.name)
        parts = [part.topk(self.k, dim=1).values.mean(1) for part in in_chunks(gallery.pooled, bank)]
        return self.alpha * torch.cat([gallery.pooled.new_empty(0), *parts])


ADDON = TopKMean
