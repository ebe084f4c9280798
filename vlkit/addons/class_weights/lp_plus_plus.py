"""LP++: a linear probe that blends class vectors learned from few shots with those of the names, without tuning.

    logit_c = w_c . x + b_c + alpha_c (x . t_c)         trained with cross-entropy on all few-shot images at a time

    w     starts at the sum of a class's features; step 4 N / lambda_max(X^T X)
    alpha starts at 250 x the mean of x . t_y for all classes; step N / (4 max_c sum_i (x_i . t_c)^2), each tenth epoch

Source: Huang et al. 2024, "LP++: A Surprisingly Strong Linear Probe for Few-Shot CLIP", arXiv:2404.02285, and the
authors' code: momentum 0.9 for w and b, 300 epochs, the epoch that does best on the validation images.
Differs: b takes steps of at most 2, half of what the rule gives for a feature that is always 1; the authors step it
as w, and then the loss can rise where images share little. The step of alpha uses the gradient of its own epoch; in
the authors' code the gradients of all epochs so far have added up, because they are never cleared. 250 stands beside
logits of 100 x cosine and is taken relative to the model's own scale. A class with several names enters with the mean
of their vectors. Without validation images the last epoch counts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import ClassWeighting, ClassWeights, Need, learned
from vlkit.addons.channels import single_vectors
from vlkit.addons.class_names import ClassName
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

ALPHA_START = 250.0
ALPHA_EVERY = 10
BIAS_STEP = 2.0


class Blend(NamedTuple):
    """What is learned."""

    vectors: Tensor  # w (C,D)
    bias: Tensor  # (C,)
    alpha: Tensor  # (C,)

    def logits(self, images: Tensor, texts: Tensor) -> Tensor:
        """(n,C)."""
        return images @ self.vectors.T + self.bias + self.alpha * (images @ texts.T)


@dataclass(frozen=True)
class LpPlusPlus(ClassWeighting):
    """A linear probe blended with class vectors.

    Attributes:
        epochs: steps, each over all few-shot images; 0 leaves the start.
        momentum: of w and b.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels", "class_names"})
    uses: ClassVar[frozenset[Need]] = frozenset({"val_labels"})
    any_classes: ClassVar[bool] = False
    text_space: ClassVar[bool] = False

    epochs: int = 300
    momentum: float = 0.9
    vectors: Tensor | None = learned()  # (C,D) w + alpha t, on the scale of the cosine
    bias: Tensor | None = learned()  # (C,) likewise

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Train; keep the epoch that does best.

        Raises:
            ConfigError: class weights that depend on the image.
        """
        if reference.weights is None:
            raise ConfigError("lp_plus_plus blends class vectors; weights that depend on the image have none.")
        shots = reference.few_shot
        assert shots is not None and shots.labels is not None
        texts = single_vectors(reference.weights.vectors, reference.weights.class_of)
        images, labels = shots.vectors.pooled, shots.labels
        start = blend_at_start(images, labels, texts, self.from_paper(ALPHA_START))
        best, most = start, -1.0
        for epoch, blend in enumerate(blends(start, images, labels, texts, self.epochs, self.momentum), start=1):
            right = 0.0 if reference.val is None else _on_validation(reference, blend, texts)
            if right >= most:  # of equals the last
                best, most = blend, right
            if progress:
                progress(epoch, self.epochs)
        together = best.vectors + best.alpha[:, None] * texts
        return replace(self, vectors=together / self.logit_scale, bias=best.bias / self.logit_scale)

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """Those learned."""
        assert self.vectors is not None
        return ClassWeights(self.vectors, torch.arange(len(self.vectors)), bias=self.bias)


def blend_at_start(images: Tensor, labels: Tensor, texts: Tensor, alpha: float) -> Blend:
    """Before the first step.

    Args:
        images: (n,D) unit norm.
        labels: (n,) every class at least once.
        texts: (C,D) unit norm.
        alpha: factor of the mean similarity of images with the text of their class, classes alike.
    """
    sums = torch.zeros_like(texts).index_add(0, labels, images)
    counts = torch.bincount(labels, minlength=len(texts))
    own = (sums * texts).sum(1) / counts
    return Blend(sums, torch.zeros(len(texts)), (alpha * own.mean()).expand(len(texts)).clone())


def blends(
    start: Blend, images: Tensor, labels: Tensor, texts: Tensor, epochs: int, momentum: float
) -> Iterator[Blend]:
    """After each epoch."""
    step, alpha_step = step_sizes(images, texts)
    bias_step = min(step, BIAS_STEP)
    similarity, one_hot = images @ texts.T, F.one_hot(labels, len(texts)).float()
    vectors, bias, alpha = start
    velocity, bias_velocity = torch.zeros_like(vectors), torch.zeros_like(bias)
    for epoch in range(1, epochs + 1):
        error = (Blend(vectors, bias, alpha).logits(images, texts).softmax(-1) - one_hot) / len(images)
        velocity = momentum * velocity + error.T @ images
        bias_velocity = momentum * bias_velocity + error.sum(0)
        vectors, bias = vectors - step * velocity, bias - bias_step * bias_velocity
        if epoch % ALPHA_EVERY == 0:
            alpha = alpha - alpha_step * (error * similarity).sum(0)
        yield Blend(vectors, bias, alpha)


def step_sizes(images: Tensor, texts: Tensor) -> tuple[float, float]:
    """Of w, and of alpha."""
    features = images.double()
    largest = float(torch.linalg.eigvalsh(features.T @ features)[-1])
    steepest = float(((features @ texts.double().T) ** 2).sum(0).max())
    return 4 * len(images) / largest, len(images) / (4 * max(steepest, 1e-12))


def _on_validation(reference: "Reference", blend: Blend, texts: Tensor) -> float:
    assert reference.val is not None and reference.val.labels is not None
    return reference.metric(blend.logits(reference.val.vectors.pooled, texts), reference.val.labels)


ADDON = LpPlusPlus
