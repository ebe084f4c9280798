"""Tip-Adapter-F: the keys of Tip-Adapter's cache are trained, starting from the few-shot features.

    logits + alpha exp(-beta (1 - x K^T)) L        K trained with cross-entropy; L stays one-hot

Source: Zhang et al. 2022, "Tip-Adapter: Training-free Adaption of CLIP for Few-shot Classification",
arXiv:2207.09519, and the authors' code: AdamW 1e-3 (eps 1e-4), batch 256, cosine, 20 epochs at the starting alpha 1.17
and beta 1, which are searched anew afterwards.
Differs: the last epoch counts (the authors keep the epoch that is best on the test set), and alpha and beta are chosen
on validation images where there are any, else the starting values stay. The authors augment every image anew in each
epoch; here the ten views the keys are made of take turns, so that images are encoded once.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import Vectors
from vlkit.addons.cache_model import START, CacheTerm, answer, few_shot_cache, view
from vlkit.addons.feature_training import Schedule, parameter, train
from vlkit.contracts import Progress

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class TipAdapterF(CacheTerm):
    """A cache with trained keys.

    Attributes:
        alpha: weight of the cache beside logits of 100 x cosine; None: trained at 1.17, then chosen on validation
            images.
        beta: sharpness; None: trained at 1, then chosen likewise.
        epochs: passes over the few-shot images; 0 is Tip-Adapter.
        lr: of AdamW.
    """

    epochs: int = 20
    lr: float = 1e-3

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Train the keys; choose alpha and beta."""
        assert reference.few_shot is not None and reference.logits is not None
        cache = few_shot_cache(reference.few_shot, len(reference.class_names))
        keys = self._trained(cache.keys, cache.values, reference, progress)
        return replace(self, keys=keys, values=cache.values).chosen(reference, reference.logits)

    def term(self, queries: Vectors, logits: Tensor) -> Tensor:
        """(Q,C)."""
        return self.weighted(queries)

    def _trained(self, start: Tensor, values: Tensor, reference: "Reference", progress: Progress | None) -> Tensor:
        shots, logits = reference.few_shot, reference.logits
        assert shots is not None and shots.labels is not None and logits is not None
        labels, keys = shots.labels, parameter(start)
        alpha = self.from_paper(START.alpha if self.alpha is None else self.alpha)
        beta = START.beta if self.beta is None else self.beta

        def loss(rows: Tensor, epoch: int) -> Tensor:
            seen = view(shots.vectors.rows(rows), epoch)
            with torch.no_grad():
                base = logits(seen)
            return F.cross_entropy(base + alpha * answer(seen.pooled @ keys.T, values, beta), labels[rows])

        schedule = Schedule(epochs=self.epochs, lr=self.lr, eps=1e-4)
        train([keys], schedule, len(labels), loss, reference.seed, progress)
        return keys.detach()


ADDON = TipAdapterF
