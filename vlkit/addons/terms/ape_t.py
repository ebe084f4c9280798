"""APE-T: a residual of each class on the refined channels, shared by its name and its keys, and a weight of each key.

    100 x (W + R)^T + alpha exp(-beta (1 - x (K + R[label])^T)) (v * L)       R zero but on the best channels; v from 1

Source: Zhu et al. 2023, "Not All Features Matter: Enhancing Few-shot CLIP with Adaptive Prior Refinement",
arXiv:2304.01195, and the authors' code: AdamW, weight decay 0.1, batch 256, cosine; w 0.2 and 900 of 1024 channels;
trained at alpha 1 and beta 1; the epoch and afterwards alpha and beta are those that are best on validation images.
Differs: the learning rate 1e-3, eps 1e-3 and 30 epochs are those of the authors' Caltech101 file (ImageNet: 1e-4 and
20). Without validation images the last epoch and the starting values count. Views take turns instead of fresh
augmentations. R acts through x R^T on the logits, so a class with several names moves as a whole.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import Vectors, learned
from vlkit.addons.cache_model import Cache, CacheTerm, Constants, answer, few_shot_cache, view
from vlkit.addons.channels import best_channels, channel_scores
from vlkit.addons.feature_training import Schedule, parameter, train
from vlkit.addons.terms.ape import texts_of
from vlkit.contracts import Progress

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


_START = Constants(1.0, 1.0)


class _Epoch(NamedTuple):
    """What was learned by the end of an epoch."""

    accuracy: float
    residual: Tensor
    weights: Tensor


@dataclass(frozen=True)
class ApeT(CacheTerm):
    """A trained cache on refined channels.

    Attributes:
        alpha: weight of the cache beside logits of 100 x cosine; None: trained at 1, then chosen on validation images.
        beta: its sharpness; None: trained at 1, then chosen likewise.
        share: of the channels that may change.
        balance: w of the channel scores.
        epochs: passes over the few-shot images; 0 is Tip-Adapter with other constants.
        lr: of AdamW.
    """

    share: float = 900 / 1024
    balance: float = 0.2
    epochs: int = 30
    lr: float = 1e-3
    residual: Tensor | None = learned()  # (C,D) zero outside the chosen channels

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Train residual and weights; choose alpha and beta.

        Raises:
            ConfigError: class weights that depend on the image; a share that is not within (0, 1].
        """
        texts = texts_of(reference, "ape_t", self.share)
        shots = reference.few_shot
        assert shots is not None and shots.labels is not None
        cache = few_shot_cache(shots, len(reference.class_names))
        channels = best_channels(channel_scores(texts, cache.keys, shots.labels, self.balance), self.share)
        allowed = torch.zeros(texts.shape[1]).index_fill(0, channels, 1.0)
        # What cannot change is multiplied by zero, so that one tensor holds for both keys and texts.
        _, residual, weights = self._trained(cache, allowed, reference, progress)
        keys, values = cache.keys + residual[shots.labels], cache.values * weights[:, None]
        filled = replace(self, residual=residual, keys=keys, values=values)
        return filled.chosen(reference, lambda images: _plain(reference, images) + filled._moved(images), _START)

    def term(self, queries: Vectors, logits: Tensor) -> Tensor:
        """(Q,C)."""
        return self._moved(queries) + self.weighted(queries)

    def _moved(self, queries: Vectors) -> Tensor:
        """(Q,C) what the residual adds to the logits of the class vectors."""
        assert self.residual is not None
        return self.logit_scale * queries.pooled @ self.residual.T

    def _trained(self, cache: Cache, allowed: Tensor, reference: "Reference", progress: Progress | None) -> _Epoch:
        """The best epoch on the validation images, the last one without."""
        shots = reference.few_shot
        assert shots is not None and shots.labels is not None
        labels, num_classes = shots.labels, cache.values.shape[1]
        residual = parameter(torch.zeros(num_classes, len(allowed)))
        weights = parameter(torch.ones(len(labels)))
        alpha = self.from_paper(_START.alpha if self.alpha is None else self.alpha)
        beta = _START.beta if self.beta is None else self.beta
        best = [_Epoch(-1.0, residual.detach().clone(), weights.detach().clone())]

        def logits(images: Vectors) -> Tensor:
            moved = residual * allowed
            near = images.pooled @ (cache.keys + moved[labels]).T
            base = _plain(reference, images) + self.logit_scale * images.pooled @ moved.T
            return base + alpha * answer(near, cache.values * weights[:, None], beta)

        def loss(rows: Tensor, epoch: int) -> Tensor:
            return F.cross_entropy(logits(view(shots.vectors.rows(rows), epoch)), labels[rows])

        def after_epoch(epoch: int) -> None:
            accuracy = float(epoch)  # the last one counts
            if reference.val is not None and reference.val.labels is not None:
                accuracy = reference.metric(logits(reference.val.vectors), reference.val.labels)
            if accuracy > best[-1].accuracy:
                best.append(_Epoch(accuracy, (residual * allowed).detach(), weights.detach().clone()))

        schedule = Schedule(epochs=self.epochs, lr=self.lr, eps=1e-3, weight_decay=0.1)
        train([residual, weights], schedule, len(labels), loss, reference.seed, progress, after_epoch)
        return best[-1]


def _plain(reference: "Reference", images: Vectors) -> Tensor:
    """Logits without this add-on; no gradients."""
    assert reference.logits is not None
    with torch.no_grad():
        return reference.logits(images)


ADDON = ApeT
