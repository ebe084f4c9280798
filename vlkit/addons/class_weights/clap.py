"""CLAP: a linear probe that starts at the class vectors and is held there, the more the better a class was known.

    logits tau cos(x, w_c)        loss = cross-entropy + mean_c a_c |w_c - t_c|^2
    a_c: mean zero-shot probability of class c on its own few-shot images

No validation images are used, and nothing is searched. Without the second term (strength 0) it is ZS-LP.

Source: Silva-Rodriguez, Hajimiri, Ben Ayed and Dolz 2024, "A Closer Look at the Few-Shot Adaptation of Large
Vision-Language Models", arXiv:2312.12730, and the authors' code: SGD 0.1, momentum 0.9, batch 256, 300 epochs, cosine,
one warm-up epoch at 1e-5; a_c stays as it is.
Differs: the authors' t has the length the text tower gives it, about 10, which decides how far a step turns w; text
features come here with unit norm, so t is 10 times the feature. The second term is stepped implicitly, as the minimum
of itself beside the step of the first (divided by 1 - momentum, which leaves the optimum where it is): a strong one
then holds w where an explicit step would overshoot. Ten views take turns instead of 20 augmented passes. The authors'
option of updating a_c after each epoch is left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import ClassWeighting, ClassWeights, Need, Reduce, learned
from vlkit.addons.cache_model import view
from vlkit.addons.class_names import ClassName
from vlkit.addons.feature_training import MOMENTUM, Schedule, parameter, train
from vlkit.addons.views import TEN_CROPS, ViewRecipe
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

# About the length of CLIP's text features before they are brought to unit norm.
LENGTH = 10.0


@dataclass(frozen=True)
class Clap(ClassWeighting):
    """A linear probe held at the class vectors.

    Attributes:
        strength: factor of the second term; 1 is the paper's, 0 leaves it out, a huge one keeps the class vectors.
        epochs: passes over the few-shot images.
        lr: of SGD.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels", "class_names", "views"})
    any_classes: ClassVar[bool] = False
    text_space: ClassVar[bool] = False
    fit_views: ClassVar[ViewRecipe | None] = TEN_CROPS

    strength: float = 1.0
    epochs: int = 300
    lr: float = 0.1
    vectors: Tensor | None = learned()  # (r,D) unit norm
    class_of: Tensor | None = learned()  # (r,)
    reduce: Reduce | None = learned()

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Train.

        Raises:
            ConfigError: class weights that depend on the image, or a negative strength.
        """
        weights, shots = reference.weights, reference.few_shot
        if weights is None:
            raise ConfigError("clap starts at class vectors; weights that depend on the image have none.")
        if self.strength < 0:
            raise ConfigError(f"clap: strength is {self.strength}; it cannot be negative.")
        assert shots is not None and shots.labels is not None and reference.logits is not None
        labels, start = shots.labels, LENGTH * weights.vectors
        known = known_before(reference.logits(shots.vectors).softmax(-1), labels)[weights.class_of]
        pull = (2 * self.strength / len(start) * known)[:, None]
        vectors = parameter(start)

        def loss(rows: Tensor, epoch: int) -> Tensor:
            seen = view(shots.vectors.rows(rows), epoch)
            moved = replace(weights, vectors=F.normalize(vectors, dim=-1))
            return F.cross_entropy(self.logit_scale * moved.scores(seen.pooled), labels[rows])

        def after_step(lr: float) -> None:
            rate = lr / (1 - MOMENTUM) * pull
            vectors.copy_((vectors + rate * start) / (1 + rate))

        schedule = Schedule(self.epochs, self.lr, optimizer="sgd", weight_decay=0.0, warmup_epochs=1)
        train([vectors], schedule, len(labels), loss, reference.seed, progress, after_step=after_step)
        found = F.normalize(vectors.detach(), dim=-1)
        return replace(self, vectors=found, class_of=weights.class_of, reduce=weights.reduce)

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """Those learned."""
        assert self.vectors is not None and self.class_of is not None and self.reduce is not None
        return ClassWeights(self.vectors, self.class_of, self.reduce)


def known_before(probabilities: Tensor, labels: Tensor) -> Tensor:
    """(C,) mean probability of each class on its own images.

    Args:
        probabilities: (n,C) of the zero-shot classifier.
        labels: (n,) every class at least once.
    """
    own = probabilities.gather(1, labels[:, None])[:, 0]
    num_classes = probabilities.shape[1]
    sums = torch.zeros(num_classes).index_add(0, labels, own)
    return sums / torch.bincount(labels, minlength=num_classes)


ADDON = Clap
