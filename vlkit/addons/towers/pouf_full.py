"""POUF, whole models: both towers are fine-tuned on unlabelled images, whose classes should be clear and even.

    S = cos(x, W)      p = softmax(scale x S)      x and W: of both towers as they are now
    L = mean_i sum_c p_ic (1 - S_ic) + mean_c sum_i softmax_i(scale S)_ic (1 - S_ic)
        + 0.3 (mean_i H(p_i) - H(mean_i p_i))

The words stay "a photo of a"; `pouf` tunes these instead, on cached features.

Source: Tanwisuth et al. 2023, "POUF: Prompt-oriented Unsupervised Fine-tuning for Large Pre-trained Models",
arXiv:2305.00350, sections 3.1 to 3.3, and the authors' code, commit 5d92a72 (without --learn-prompt): no period at the
end, SGD with Nesterov's momentum, lr 0.01 x 5e-5, weight decay 1e-3, batch 96, random crops and mirrored images.
Differs: the authors keep the epoch that does best on labelled validation images; here the last one counts. 10 passes
over the images, where the authors take 10 x 500 steps whatever the size of the set. Half a cosine to zero, not
(1 + 0.0002 t)^-0.75. The scale of the logits stays (at that rate it hardly moves). The last batch of an epoch is
smaller instead of dropped; what the authors add inside logarithms (1e-5, 1e-6) is left out.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vlkit.addons.base import Need
from vlkit.addons.class_weights.pouf import transport_cost, unclear
from vlkit.addons.prompt_fit import Plan
from vlkit.addons.prompted_text import encoder_of, prompt_tokens, word_ids
from vlkit.addons.tower_learning import Learned, Loss, TowerTask
from vlkit.addons.tower_weights import WeightLearner

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class PoufFull(WeightLearner):
    """Both towers fine-tuned without labels.

    Attributes:
        entropy_weight: of clear and even classes.
    """

    needs: ClassVar[frozenset[Need]] = frozenset(
        {"unlabelled_images", "class_names", "pixels", "grad_image", "grad_text"}
    )

    epochs: int = 10
    lr: float = 5e-7
    batch_size: int = 96
    entropy_weight: float = 0.3

    @property
    def template(self) -> str:
        """The words and the class name."""
        return f"{self.words} {{}}"

    def task(self, reference: "Reference", embedder: "FeatureSource") -> TowerTask:
        """On all images; their labels, 0, mean nothing."""
        images = reference.images
        assert images is not None
        unlabelled = replace(images, labels=torch.zeros(len(images), dtype=torch.int64))
        task = super().task(replace(reference, few_shot=unlabelled, partial=True), embedder)
        encoder = encoder_of(embedder)
        tokens = prompt_tokens(encoder, reference.class_names, word_ids(encoder, self.words), closing="")
        return replace(task, prompts=tokens)

    def plan(self, task: TowerTask) -> Plan:
        """The authors'."""
        return replace(super().plan(task), weight_decay=1e-3, nesterov=True, warmup_epochs=0)

    def objective(self, task: TowerTask, found: Learned) -> Loss:
        """Transport and mutual information."""

        def loss(rows: Tensor) -> Tensor:
            similarity = task.texts().scores(task.encode(task.images(rows)))
            logits = task.scale * similarity
            return transport_cost(logits, similarity) + self.entropy_weight * unclear(logits)

        return loss


ADDON = PoufFull
