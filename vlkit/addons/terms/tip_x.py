"""TIP-X: keys also answer by how alike their class signatures are; nothing is trained.

    logits + alpha exp(-beta (1 - x K^T)) L + gamma a L
    a = - KL(p(x) || p(key)), brought into the range of x K^T;    p = softmax(cosines with the class weights / 0.5)

The support set is whatever stands for the few shots: labelled photographs, or images found or made by class name
(SuS-X), which need no labels.

Source: Udandarao, Gupta and Albanie 2023, "SuS-X: Training-Free Name-Only Transfer of Vision-Language Models",
arXiv:2211.16198, and the authors' code (temperature 0.5; alpha, beta and gamma searched).
Differs: the authors bring the divergences of a whole test set into the range of its similarities at once, so that an
image's score depends on the other test images; here both ranges are those among the keys themselves, known after
fitting, and an image counts alone. The grid is 5 x 5 x 6 values of 0.5..20, 1..30 and 0..20 on validation images
instead of 20 x 200 x 50; without them alpha 1.17, beta 1 (Tip-Adapter's) and gamma 1 hold, the paper naming none.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor

from vlkit.addons.base import Vectors, learned
from vlkit.addons.cache_model import START, FewShotTerm, answer, best_setting, divergence, few_shot_cache, grid, settled
from vlkit.contracts import Progress
from vlkit.errors import DataError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

GAMMA = 1.0
_ALPHAS = (0.5, 1.0, 3.0, 8.0, 20.0)
_BETAS = (1.0, 3.0, 7.0, 15.0, 30.0)
_GAMMAS = (0.0, 0.5, 1.0, 3.0, 8.0, 20.0)


@dataclass(frozen=True)
class TipX(FewShotTerm):
    """A cache asked in two ways.

    Attributes:
        alpha: weight of the cache beside logits of 100 x cosine; None: chosen on validation images, else 1.17.
        beta: its sharpness; None: chosen likewise, else 1.
        gamma: weight of the signatures; None: chosen likewise, else 1; 0 is Tip-Adapter.
        temperature: of the signatures, which are softmaxes of cosines.
    """

    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    temperature: float = 0.5
    keys: Tensor | None = learned()  # (n,D) unit norm
    values: Tensor | None = learned()  # (n,C) one-hot
    signatures: Tensor | None = learned()  # (n,C) log-probabilities of the keys
    ranges: Tensor | None = learned()  # (4,) least and greatest divergence, least and greatest similarity, of keys

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Fill the cache; choose the constants.

        Raises:
            DataError: a single image.
        """
        shots = reference.few_shot
        assert shots is not None and reference.logits is not None
        cache = few_shot_cache(shots, len(reference.class_names))
        if len(cache.keys) < 2:
            raise DataError("tip_x compares its images with each other, and there is one. Give at least two.")
        signatures = self._signature(reference.logits(shots.vectors.with_pooled(cache.keys, unit=True)))
        others = ~torch.eye(len(cache.keys), dtype=torch.bool)
        apart, alike = divergence(signatures, signatures)[others], (cache.keys @ cache.keys.T)[others]
        filled = replace(
            self,
            keys=cache.keys,
            values=cache.values,
            signatures=signatures,
            ranges=torch.stack([apart.min(), apart.max(), alike.min(), alike.max()]),
        )
        return filled._chosen(reference)

    def term(self, queries: Vectors, logits: Tensor) -> Tensor:
        """(Q,C)."""
        assert self.alpha is not None and self.beta is not None and self.gamma is not None
        by_features = self.from_paper(self.alpha) * self._by_features(queries, self.beta)
        return by_features + self.from_paper(self.gamma) * self._by_signature(logits)

    def _by_features(self, queries: Vectors, beta: float) -> Tensor:
        assert self.keys is not None and self.values is not None
        return answer(queries.pooled @ self.keys.T, self.values, beta)

    def _by_signature(self, logits: Tensor) -> Tensor:
        """(Q,C): minus the divergences of each class's keys, in the range of similarities."""
        assert self.signatures is not None and self.ranges is not None and self.values is not None
        apart = divergence(self._signature(logits), self.signatures)
        least, greatest, low, high = self.ranges
        # Keys that all look alike to the classes tell nothing: every image then gets the same.
        spread = float(greatest - least)
        share = (apart - least) / spread if spread > 1e-6 else torch.zeros_like(apart)
        answered: Tensor = -(low + share * (high - low)) @ self.values
        return answered

    def _signature(self, logits: Tensor) -> Tensor:
        return (logits / (self.logit_scale * self.temperature)).log_softmax(dim=-1)

    def _chosen(self, reference: "Reference") -> Self:
        given = (self.alpha, self.beta, self.gamma)
        if reference.val is None or None not in given:
            alpha, beta, gamma = settled(given, (*START, GAMMA))
            return replace(self, alpha=alpha, beta=beta, gamma=gamma)
        assert reference.logits is not None
        images = reference.val.vectors
        base = reference.logits(images)
        by_signature = self._by_signature(base)
        candidates = (
            ((gamma, alpha, beta), base + self.from_paper(alpha) * by_features + self.from_paper(gamma) * by_signature)
            for beta in grid(self.beta, _BETAS)
            for by_features in [self._by_features(images, beta)]
            for alpha in grid(self.alpha, _ALPHAS)
            for gamma in grid(self.gamma, _GAMMAS)
        )
        gamma, alpha, beta = best_setting(reference, candidates)
        return replace(self, alpha=alpha, beta=beta, gamma=gamma)


ADDON = TipX
