"""POUF: the words and the scale of the logits are tuned on unlabelled images, whose classes should be clear and even.

    S = cos(x, W)      p = softmax(scale x S)
    L = mean_i sum_c softmax_c(scale S)_ic (1 - S_ic) + mean_c sum_i softmax_i(scale S)_ic (1 - S_ic)
        + 0.3 (mean_i H(p_i) - H(mean_i p_i))

Source: Tanwisuth et al. 2023, "POUF: Prompt-oriented Unsupervised Fine-tuning for Large Pre-trained Models",
arXiv:2305.00350, and the authors' code, commit 5d92a72 (--learn-prompt): "a photo of a {}.", SGD with Nesterov's
momentum, lr 0.01 x 0.1 for the words and 0.01 x 5e-5 for the logarithm of the scale, weight decay 1e-3, batch 96.
Differs: the authors keep the epoch that does best on labelled validation images; here the last one counts. 10 epochs,
as the authors' 500 steps an epoch suit large sets. The scale that is learned stands beside the model's own, so weight
decay pulls it to that and not to 1. Training otherwise as `coop`. Whole models: `pouf_full`, in the towers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vlkit.addons.base import Need, learned
from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import ClassWeights
from vlkit.addons.prompt_fit import Plan
from vlkit.addons.text_prompts import Examples, Learned, Loss, PromptTask, TextPrompts, features_of
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class Pouf(TextPrompts):
    """Words tuned on unlabelled images; see `TextPrompts` for the other settings.

    Attributes:
        entropy_weight: of clear and even classes.
        scale_lr: learning rate of the logarithm of the scale, beside `lr` of the words.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"unlabelled_images", "class_names", "grad_text"})
    text_space: ClassVar[bool] = False  # the learned scale is in the length of the vectors

    words: str = "a photo of a"
    epochs: int | None = 10
    lr: float = 1e-3
    batch_size: int = 96
    entropy_weight: float = 0.3
    scale_lr: float = 5e-7
    log_scale: Tensor | None = learned()  # () of the multiplier beside the model's own

    def examples(self, reference: "Reference") -> Examples:
        """All images; their labels, 0, mean nothing."""
        assert reference.images is not None
        vectors = reference.images.vectors
        return Examples(vectors, torch.zeros(len(vectors), dtype=torch.int64))

    def plan(self, examples: Examples, num_classes: int) -> Plan:
        """The authors'.

        Raises:
            ConfigError: another optimizer than theirs, on which the rate of the scale rests.
        """
        if self.optimizer != "sgd":
            raise ConfigError("pouf: the scale's learning rate is made with sgd; leave it at optimizer=sgd.")
        epochs = 10 if self.epochs is None else self.epochs
        return Plan(epochs, self.lr, self.batch_size, self.max_seconds, weight_decay=1e-3, nesterov=True)

    def start(self, task: PromptTask) -> Learned:
        """The words, and no other scale."""
        return super().start(task) | {"log_scale": torch.zeros((), device=task.images.device)}

    def objective(self, task: PromptTask, found: Learned) -> Loss:
        """Transport and mutual information."""
        ratio = self.scale_lr / self.lr if self.lr else 0.0
        if found["log_scale"].requires_grad:  # SGD is linear in the gradient: a share of it is a rate of its own
            found["log_scale"].register_hook(lambda gradient: ratio * gradient)

        def loss(rows: Tensor) -> Tensor:
            similarity = task.text.scores(task.images[rows], task.text.features(found["vectors"]))
            logits = task.scale * found["log_scale"].exp() * similarity
            return transport_cost(logits, similarity) + self.entropy_weight * unclear(logits)

        return loss

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """Of length exp(log_scale)."""
        assert self.vectors is not None and self.log_scale is not None
        text = self.prompted(class_names, embedder)
        features = self.log_scale.exp() * features_of(text, self.vectors)
        return ClassWeights(features, text.prompts.class_of.cpu())


def transport_cost(logits: Tensor, similarity: Tensor) -> Tensor:
    """() cost 1 - similarity (B,C), moved from images to classes and from classes to images."""
    cost = 1 - similarity
    return (logits.softmax(1) * cost).sum(1).mean() + (logits.softmax(0) * cost).sum(0).mean()


def unclear(logits: Tensor) -> Tensor:
    """() mean entropy of the images (B,C) less the entropy of their mean."""
    chances = logits.softmax(1)
    each = -(chances * logits.log_softmax(1)).sum(1).mean()
    mean = chances.mean(0)
    return each + (mean * mean.clamp(min=1e-12).log()).sum()


ADDON = Pouf
