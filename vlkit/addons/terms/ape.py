"""APE: Tip-Adapter on the channels that tell the classes apart, with keys weighed by how the class names see them.

    logits + alpha exp(-beta (1 - x' K'^T)) (exp(gamma KL(L || softmax(K' W'^T))) * L)     ' : best channels, unit norm

Channels are scored by - w (mean product of samples of different classes) + (1 - w) (variance of the class vectors).

Source: Zhu et al. 2023, "Not All Features Matter: Enhancing Few-shot CLIP with Adaptive Prior Refinement",
arXiv:2304.01195, and the authors' code: w 0.7 and 500 of 1024 channels on ImageNet; alpha 1, beta 1, gamma 0.1 to start
from; the divergence in bits.
Differs: alpha, beta and gamma are chosen on validation images on a grid of 8 x 7 x 6 values within the authors' ranges
(they take 20 x 200 x 20); without them the starting values hold. w and the share of channels, which the authors set
for each data set, stay those of ImageNet. A class with several names enters with the mean of their vectors. The class
vectors are those of the pipeline, the authors' are CuPL's.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import Vectors, learned
from vlkit.addons.cache_model import FewShotTerm, answer, best_setting, few_shot_cache, grid, settled
from vlkit.addons.channels import best_channels, channel_scores, single_vectors
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

_START = (1.0, 1.0, 0.1)
_ALPHAS = (0.1, 0.5, 1.0, 2.0, 3.0, 4.0, 5.5, 7.0)
_BETAS = (0.1, 0.5, 1.0, 2.0, 3.5, 5.0, 7.0)
_GAMMAS = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0)


@dataclass(frozen=True)
class Ape(FewShotTerm):
    """A cache on refined channels.

    Attributes:
        alpha: weight of the cache beside logits of 100 x cosine; None: chosen on validation images, else 1.
        beta: its sharpness; None: chosen likewise, else 1.
        gamma: how much more a key counts that the class vectors get wrong; None: chosen likewise, else 0.1.
        share: of the channels that are kept; 1 keeps all.
        balance: w.
    """

    alpha: float | None = None
    beta: float | None = None
    gamma: float | None = None
    share: float = 500 / 1024
    balance: float = 0.7
    channels: Tensor | None = learned()  # (d,)
    keys: Tensor | None = learned()  # (n,d) unit norm
    values: Tensor | None = learned()  # (n,C) one-hot
    divergence: Tensor | None = learned()  # (n,) bits

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Choose channels, fill the cache, choose the constants.

        Raises:
            ConfigError: class weights that depend on the image; a share that is not within (0, 1].
        """
        texts = texts_of(reference, "ape", self.share)
        shots = reference.few_shot
        assert shots is not None and shots.labels is not None
        cache = few_shot_cache(shots, len(reference.class_names))
        channels = best_channels(channel_scores(texts, cache.keys, shots.labels, self.balance), self.share)
        keys = F.normalize(cache.keys[:, channels], dim=-1)
        believed = (keys @ F.normalize(texts[:, channels], dim=-1).T).softmax(dim=-1)
        # Of a one-hot label the divergence is minus the logarithm of its probability.
        divergence = -believed.gather(1, shots.labels[:, None])[:, 0].log2()
        filled = replace(self, channels=channels, keys=keys, values=cache.values, divergence=divergence)
        return filled._chosen(reference)

    def term(self, queries: Vectors, logits: Tensor) -> Tensor:
        """(Q,C)."""
        assert self.alpha is not None and self.beta is not None and self.gamma is not None
        return self.from_paper(self.alpha) * self._answer(queries, self.beta, self.gamma)

    def _answer(self, queries: Vectors, beta: float, gamma: float) -> Tensor:
        assert self.channels is not None and self.keys is not None
        assert self.values is not None and self.divergence is not None
        refined = F.normalize(queries.pooled[:, self.channels], dim=-1)
        weighed = (gamma * self.divergence).exp()[:, None] * self.values
        return answer(refined @ self.keys.T, weighed, beta)

    def _chosen(self, reference: "Reference") -> Self:
        given = (self.alpha, self.beta, self.gamma)
        if reference.val is None or None not in given:
            alpha, beta, gamma = settled(given, _START)
            return replace(self, alpha=alpha, beta=beta, gamma=gamma)
        assert reference.logits is not None
        images = reference.val.vectors
        base = reference.logits(images)
        candidates = (
            ((alpha, beta, gamma), base + self.from_paper(alpha) * answered)
            for beta in grid(self.beta, _BETAS)
            for gamma in grid(self.gamma, _GAMMAS)
            for answered in [self._answer(images, beta, gamma)]
            for alpha in grid(self.alpha, _ALPHAS)
        )
        alpha, beta, gamma = best_setting(reference, candidates)
        return replace(self, alpha=alpha, beta=beta, gamma=gamma)


def texts_of(reference: "Reference", who: str, share: float) -> Tensor:
    """(C,D) one vector a class.

    Raises:
        ConfigError: class weights that depend on the image; a share that is not within (0, 1].
    """
    if not 0 < share <= 1:
        raise ConfigError(f"{who}: share is {share}; it is the share of channels kept, above 0 and at most 1.")
    if reference.weights is None:
        raise ConfigError(f"{who} scores channels by class vectors; weights that depend on the image have none.")
    return single_vectors(reference.weights.vectors, reference.weights.class_of)


ADDON = Ape
