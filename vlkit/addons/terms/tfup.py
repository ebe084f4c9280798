"""TFUP: unlabelled test images that stand for a class answer beside the class weights; nothing is trained.

    100 x W^T + a exp(-b (1 - R S)) L      R: cosine with each kept image, S: how alike both see the classes, 0 to 2

For each class the surest images by softmax(10 x cosine) are taken, twice as many as kept; those with the least sum of
divergences from the rest are kept under that class.

Source: Long et al. 2024, "Training-Free Unsupervised Prompt for Vision-Language Models", arXiv:2404.16339, and the
authors' code: a 0.3, b 1; 0.3 of the images of an average class are kept, 9 to 16.
Differs: transductive, as the authors run it on all sets but DomainNet: the images kept are the unlabelled test images.
S is one less the divergence brought to 0..1 over the keys, times 2; the authors standardise the divergences before,
which that undoes. Class vectors are those of the pipeline, the authors' are means of generated descriptions.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from vlkit.addons.base import Need, Term, Vectors, learned
from vlkit.addons.cache_model import answer
from vlkit.addons.unlabelled_cache import cache_of, signature, two_level_similarity
from vlkit.contracts import Progress

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class Tfup(Term):
    """A cache of unlabelled images.

    Attributes:
        alpha: a, weight of the cache beside logits of 100 x cosine.
        beta: b, its sharpness.
        shots: images kept of each class; None: 0.3 of an average class, 9 to 16.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"test_stream", "class_names"})

    alpha: float = 0.3
    beta: float = 1.0
    shots: int | None = None
    keys: Tensor | None = learned()  # (k,D) unit norm
    values: Tensor | None = learned()  # (k,C) one-hot
    signatures: Tensor | None = learned()  # (k,C) log-probabilities

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Choose the images.

        Raises:
            ConfigError: shots below 1.
        """
        assert reference.stream is not None and reference.logits is not None
        images = reference.stream.vectors
        signatures = signature(reference.logits(images), self.logit_scale)
        cache = cache_of(images.pooled, signatures, self.shots)
        return replace(self, keys=cache.keys, values=cache.values, signatures=signatures[cache.rows])

    def term(self, queries: Vectors, logits: Tensor) -> Tensor:
        """(Q,C)."""
        assert self.keys is not None and self.values is not None and self.signatures is not None
        alike = two_level_similarity(queries.pooled, self.keys, signature(logits, self.logit_scale), self.signatures)
        return self.from_paper(self.alpha) * answer(alike, self.values, self.beta)


ADDON = Tfup
