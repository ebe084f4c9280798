"""TFUP-T: an image adapter and a residual of the class vectors, trained on what TFUP's cache is sure of.

    x' = unit(0.2 MLP(x) + 0.8 x)    W' = unit(0.5 W + 0.5 R)    logits 100 x' W'^T + a cache(x')
    loss = cross-entropy with the labels that logits and cache give with probability above 0.9
           + 0.3 x (- entropy of the mean prediction of the batch)

The first 5 epochs take only images that stand for a class, with the labels of TFUP, and no entropy.

Source: Long et al. 2024, "Training-Free Unsupervised Prompt for Vision-Language Models", arXiv:2404.16339, and the
authors' code: AdamW 0.012, eps 0.003, weight decay 0.1, batch 256, cosine, 30 epochs.
Differs: transductive, as TFUP is here. The last epoch counts (the authors keep the one that is best on the test set).
Images are not augmented: features alone are there, so teacher and pupil see the same image, and the teacher knows more
by its cache. The authors' code reports the accuracy both with the cache and without; here it is part of the answer
(alpha 0 leaves it out).
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import ClassWeights, Need, Reduce, Term, Vectors, learned
from vlkit.addons.cache_model import answer
from vlkit.addons.feature_training import Schedule, bottleneck, fresh_bottleneck, parameter, train
from vlkit.addons.unlabelled_cache import cache_of, representatives, signature, two_level_similarity
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

IMAGE_RATIO, TEXT_RATIO = 0.2, 0.5
CONFIDENT, MARGINAL_WEIGHT = 0.9, 0.3
WARMUP_EPOCHS, WARMUP_SHARE = 5, 0.75


@dataclass(frozen=True)
class TfupT(Term):
    """Adapters trained on unlabelled images.

    Attributes:
        alpha: weight of the cache beside logits of 100 x cosine; 0 leaves it out.
        beta: its sharpness.
        shots: images kept of each class; None: 0.3 of an average class, 9 to 16.
        marginal_weight: of the entropy of the mean prediction, which keeps any class from being forgotten.
        epochs: passes over the images.
        lr: of AdamW.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"test_stream", "class_names"})

    alpha: float = 0.3
    beta: float = 1.0
    shots: int | None = None
    marginal_weight: float = MARGINAL_WEIGHT
    epochs: int = 30
    lr: float = 0.012
    keys: Tensor | None = learned()  # (k,D) unit norm
    values: Tensor | None = learned()  # (k,C) one-hot
    plain: Tensor | None = learned()  # (r,D) class vectors before
    texts: Tensor | None = learned()  # (r,D) and after
    class_of: Tensor | None = learned()  # (r,)
    reduce: Reduce | None = learned()
    down: Tensor | None = learned()  # (D/4,D)
    up: Tensor | None = learned()  # (D,D/4)

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Choose the images, train.

        Raises:
            ConfigError: class weights that are no text features; shots below 1.
        """
        weights = text_weights(reference, "tfup_t")
        assert reference.stream is not None and reference.logits is not None
        images = reference.stream.vectors
        signatures = signature(reference.logits(images), self.logit_scale)
        cache = cache_of(images.pooled, signatures, self.shots)
        kept = replace(self, keys=cache.keys, values=cache.values)
        base = replace(kept, plain=weights.vectors, class_of=weights.class_of, reduce=weights.reduce)
        return base._trained(images.pooled, signatures, reference.seed, progress)

    def term(self, queries: Vectors, logits: Tensor) -> Tensor:
        """(Q,C): what the adapted model says, less what the plain one does."""
        assert self.plain is not None and self.texts is not None and self.down is not None and self.up is not None
        adapted = bottleneck(queries.pooled, self.down, self.up, IMAGE_RATIO)
        scores = self._scores(adapted, self.texts)
        moved = self.logit_scale * (scores - self._scores(queries.pooled, self.plain))
        return moved + self._cached(adapted, scores, self.texts)

    def _cached(self, images: Tensor, scores: Tensor, texts: Tensor) -> Tensor:
        """(Q,C) the cache's answer to adapted images, by adapted class vectors."""
        assert self.keys is not None and self.values is not None
        of_keys = signature(self.logit_scale * self._scores(self.keys, texts), self.logit_scale)
        of_images = signature(self.logit_scale * scores, self.logit_scale)
        alike = two_level_similarity(images, self.keys, of_images, of_keys)
        return self.from_paper(self.alpha) * answer(alike, self.values, self.beta)

    def _scores(self, images: Tensor, texts: Tensor) -> Tensor:
        assert self.class_of is not None and self.reduce is not None
        return ClassWeights(texts, self.class_of, self.reduce).scores(images)

    def _trained(self, images: Tensor, signatures: Tensor, seed: int, progress: Progress | None) -> Self:
        assert self.plain is not None
        before, num_classes = self.plain, signatures.shape[1]
        down, up = (parameter(one) for one in fresh_bottleneck(images.shape[1], 4, seed))
        residual = parameter(torch.zeros_like(before))
        first = representatives(signatures, max(9, int(len(images) * WARMUP_SHARE / num_classes))).rows
        stands = torch.zeros(len(images), dtype=torch.bool).index_fill(0, first, True)
        plain = self._scores(images, before)
        believed = (self.logit_scale * plain + self._cached(images, plain, before)).argmax(1)

        def loss(rows: Tensor, epoch: int) -> Tensor:
            texts = residual_texts(before, residual)
            adapted = bottleneck(images[rows], down, up, IMAGE_RATIO)
            scores = self._scores(adapted, texts)
            logits = self.logit_scale * scores
            if epoch < WARMUP_EPOCHS:
                return cross_entropy_of(logits, believed[rows], stands[rows])
            with torch.no_grad():
                teacher = (logits + self._cached(adapted, scores, texts)).softmax(-1).max(-1)
            sure = cross_entropy_of(logits, teacher.indices, teacher.values > CONFIDENT)
            return sure - self.marginal_weight * marginal_entropy(logits)

        schedule = Schedule(epochs=self.epochs, lr=self.lr, eps=0.003, weight_decay=0.1)
        train([down, up, residual], schedule, len(images), loss, seed, progress)
        texts = residual_texts(before, residual.detach())
        return replace(self, texts=texts, down=down.detach(), up=up.detach())


def residual_texts(texts: Tensor, residual: Tensor) -> Tensor:
    """(r,D) unit norm: half of each."""
    return F.normalize((1 - TEXT_RATIO) * texts + TEXT_RATIO * residual, dim=-1)


def cross_entropy_of(logits: Tensor, labels: Tensor, which: Tensor) -> Tensor:
    """() mean over the images that `which` marks; 0 where it marks none."""
    each = F.cross_entropy(logits, labels, reduction="none")
    return (each * which).sum() / which.sum().clamp(min=1)


def marginal_entropy(logits: Tensor) -> Tensor:
    """() entropy, in nats, of the mean prediction of a batch."""
    mean = logits.softmax(-1).mean(0)
    return -(mean * (mean + 1e-6).log()).sum()


def text_weights(reference: "Reference", who: str) -> ClassWeights:
    """The class weights, which are text features.

    Raises:
        ConfigError: they depend on the image, or are learned.
    """
    weights = reference.weights
    if weights is None:
        raise ConfigError(f"{who} changes the class vectors; with weights that depend on the image there are none.")
    if not torch.allclose(weights.vectors.norm(dim=1), torch.ones(len(weights.vectors)), atol=1e-3):
        raise ConfigError(f"{who} starts from text features of unit norm; the class weights before it are others.")
    return weights


ADDON = TfupT
