"""InvGC with LocalAdj: each gallery item moves away from its nearest neighbours in two banks.

    away(x; B, r) = unit(x - (r / p) sum of (x . b) b over the p nearest b in B)        p a share of the bank
    x'            = unit((away(x; G, r_g) + away(x; Q, r_q)) / 2)

G holds items of the gallery's own kind, Q queries. Only the gallery moves; queries stay as they are.

Source: Jian and Wang 2023, "InvGC: Robust Cross-Modal Retrieval by Inverse Graph Convolution", arXiv:2310.13276, and
the authors' code: LocalAdj over one hundredth of each bank.
Differs: the code gives no values for both rates; here they are 0.5, to be chosen on a dev split. The form without
LocalAdj subtracts a mean over the whole gallery and is left out, because an item's feature would depend on the others.
At least one neighbour counts, however small the bank. To classify, the gallery are the class vectors, and the bank of
their kind are these vectors themselves.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.bank import CHUNK, sampled
from vlkit.addons.base import FeatureMap, Need, Vectors, learned
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class InvGC(FeatureMap):
    """Moves the gallery away from its neighbours.

    Attributes:
        rate_gallery: how far from neighbours of the gallery's kind.
        rate_queries: how far from neighbours among queries; both 0 change nothing.
        share: of each bank that counts as near, above 0, at most 1.
        gallery: which side moves; "auto": images in retrieval (to search images), class vectors in classification.
        bank_size: of each bank, drawn by the reference's seed; None takes all.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"unlabelled_images"})
    uses: ClassVar[frozenset[Need]] = frozenset({"captions", "class_names"})

    rate_gallery: float = 0.5
    rate_queries: float = 0.5
    share: float = 0.01
    gallery: Literal["auto", "image", "text"] = "auto"
    bank_size: int | None = None
    images: Tensor | None = learned()  # (m,D)
    texts: Tensor | None = learned()  # (m,D)

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Keep the banks.

        Raises:
            ConfigError: a share that is none, or no texts to fit on.
            DataError: fewer images or texts than asked for.
        """
        if not 0 < self.share <= 1:
            raise ConfigError(f"inv_gc has share = {self.share}; expected a number above 0, at most 1.")
        assert reference.images is not None
        images = sampled(reference.images.vectors, self.bank_size, reference.seed, "unlabelled images")
        if reference.task == "classification":
            texts = None if reference.weights is None else reference.weights.vectors
        else:
            captions = None if reference.captions is None else reference.captions.vectors
            texts = sampled(captions, self.bank_size, reference.seed + 1, "captions")
        if texts is None:
            raise ConfigError(
                "inv_gc needs the class names (to classify) or captions of another split than the test split (to "
                "retrieve); --reference names them."
            )
        side: Literal["image", "text"] = "text" if reference.task == "classification" else "image"
        return replace(self, images=images, texts=texts, gallery=side if self.gallery == "auto" else self.gallery)

    def map(self, images: Vectors, texts: Vectors) -> tuple[Vectors, Vectors]:
        """The gallery changed, queries as they are."""
        assert self.images is not None and self.texts is not None
        if self.gallery == "image":
            return self._moved(images, self.images, self.texts), texts
        return images, self._moved(texts, self.texts, self.images)

    def _moved(self, side: Vectors, own: Tensor, queries: Tensor) -> Vectors:
        if not len(side) or self.rate_gallery == self.rate_queries == 0:
            return side
        both = away(side.pooled, own, self.rate_gallery, self.share)
        both = both + away(side.pooled, queries, self.rate_queries, self.share)
        return side.with_pooled(F.normalize(both, dim=-1), unit=True)


def away(items: Tensor, bank: Tensor, rate: float, share: float) -> Tensor:
    """(n,D) unit: items moved away from their nearest neighbours in a bank (m,D)."""
    near = max(1, int(share * len(bank)))
    parts = []
    for part in items.split(CHUNK):
        best = (part @ bank.T).topk(near, dim=1)
        weights = torch.zeros(len(part), len(bank)).scatter(1, best.indices, best.values)
        parts.append(F.normalize(part - rate / near * (weights @ bank), dim=-1))
    return torch.cat(parts)


ADDON = InvGC
