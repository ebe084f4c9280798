"""TDA: two caches that fill while test images stream past; no labels, no gradients.

    positive: the 3 images of lowest entropy of each predicted class
    negative: 2 of each class with entropy within 0.2..0.5 of the greatest
    logits + alpha exp(-beta (1 - x K^T)) onehot - alpha' exp(-beta' (1 - x K'^T)) [0.03 < p < 1]

An image enters the caches before it is scored. What an image scores depends on those before it.

Source: Karmanov et al. 2024, "Efficient Test-Time Adaptation of Vision-Language Models" (TDA), arXiv:2403.18293, and
the authors' code: alpha 2, beta 5, alpha' 0.117, beta' 1 (the ImageNet file; the authors set them for each data set).
Differs: entropy is in nats and the greatest one log2(C), as in the code. One view an image: the authors' ImageNet runs
average the surest tenth of 64 AugMix views. Probabilities are softmaxes of the model's logits before this term,
whatever its scale.
"""

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import Need, Step, StreamingTerm, Vectors, learned
from vlkit.addons.cache_model import answer
from vlkit.contracts import Progress

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

# Entropies, as shares of log2(C), of the images the negative cache takes; probabilities its answers lie between.
ENTROPY_WITHIN = (0.2, 0.5)
MASK_WITHIN = (0.03, 1.0)


class _Slots(NamedTuple):
    """A cache: some keys of each predicted class, those of lowest entropy."""

    keys: Tensor  # (n,D)
    values: Tensor  # (n,C)
    predicted: Tensor  # (n,) int64
    entropy: Tensor  # (n,)

    def with_image(self, key: Tensor, value: Tensor, predicted: int, entropy: float, capacity: int) -> "_Slots":
        """With one more, or in the place of its class's least certain one, or unchanged."""
        new = _Slots(key, value, torch.tensor([predicted]), torch.tensor([entropy]))
        own = (self.predicted == predicted).nonzero().flatten()
        if len(own) < capacity:
            return _Slots(*(torch.cat(both) for both in zip(self, new, strict=True)))
        worst = own[self.entropy[own].argmax()]
        if entropy >= float(self.entropy[worst]):
            return self
        changed = [column.clone() for column in self]
        for column, row in zip(changed, new, strict=True):
            column[worst] = row[0]
        return _Slots(*changed)


@dataclass(frozen=True)
class Tda(StreamingTerm):
    """Two caches of test images.

    Attributes:
        alpha: weight of the positive cache beside logits of 100 x cosine.
        beta: its sharpness.
        negative_alpha: weight of the negative cache; 0 leaves it out.
        negative_beta: its sharpness.
        shots: images of a class in the positive cache.
        negative_shots: in the negative one.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"test_stream", "class_names"})

    alpha: float = 2.0
    beta: float = 5.0
    negative_alpha: float = 0.117
    negative_beta: float = 1.0
    shots: int = 3
    negative_shots: int = 2
    keys: Tensor | None = learned()  # (n,D)
    values: Tensor | None = learned()  # (n,C) one-hot
    predicted: Tensor | None = learned()  # (n,)
    entropy: Tensor | None = learned()  # (n,) nats
    negative_keys: Tensor | None = learned()  # (m,D)
    negative_values: Tensor | None = learned()  # (m,C) 0 or 1
    negative_predicted: Tensor | None = learned()  # (m,)
    negative_entropy: Tensor | None = learned()  # (m,) nats

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Nothing: the caches start empty, whatever the stream holds."""
        return self

    def step(self, query: Vectors, logits: Tensor) -> Step:
        """Take one image in, then score it."""
        num_classes = logits.shape[1]
        probabilities, predicted = logits.softmax(-1), int(logits.argmax())
        entropy = float(torch.special.entr(probabilities).sum())
        positive, negative = self._caches(query.pooled.shape[1], num_classes)
        if self.shots > 0:
            value = F.one_hot(torch.tensor([predicted]), num_classes).float()
            positive = positive.with_image(query.pooled, value, predicted, entropy, self.shots)
        low, high = (share * math.log2(num_classes) for share in ENTROPY_WITHIN)
        if low < entropy < high and self.negative_shots > 0:
            mask = ((probabilities > MASK_WITHIN[0]) & (probabilities < MASK_WITHIN[1])).float()
            negative = negative.with_image(query.pooled, mask, predicted, entropy, self.negative_shots)
        term = self.from_paper(self.alpha) * answer(query.pooled @ positive.keys.T, positive.values, self.beta)
        against = answer(query.pooled @ negative.keys.T, negative.values, self.negative_beta)
        return Step(term - self.from_paper(self.negative_alpha) * against, self._with(positive, negative))

    def _caches(self, dim: int, num_classes: int) -> tuple[_Slots, _Slots]:
        if self.keys is None:
            none = (torch.empty(0, dim), torch.empty(0, num_classes), torch.empty(0, dtype=torch.int64), torch.empty(0))
            return _Slots(*none), _Slots(*none)
        positive = (self.keys, self.values, self.predicted, self.entropy)
        negative = (self.negative_keys, self.negative_values, self.negative_predicted, self.negative_entropy)
        return _Slots(*positive), _Slots(*negative)  # type: ignore[arg-type]

    def _with(self, positive: _Slots, negative: _Slots) -> Self:
        return replace(
            self,
            **positive._asdict(),
            **{f"negative_{name}": column for name, column in negative._asdict().items()},
        )


ADDON = Tda
