"""CoOp: the words around the class name are learned, the same for all classes or of each class its own.

    prompt_c = [v_1 ... v_M] name_c .        W = unit(g(prompts))        loss: cross-entropy of scale x cos(x, W)

Source: Zhou, Yang, Loy and Liu 2022, "Learning to Prompt for Vision-Language Models", arXiv:2109.01134, and the
authors' code, commit ff61507: SGD 0.002, momentum 0.9, weight decay 5e-4, cosine after one epoch at 1e-5, batch 32,
50/100/200 epochs for 1/2-4/more images a class, 16 vectors from a normal of deviation 0.02, the last step counts.
Differs: features of the images are computed once, so there is no augmentation; the cosine falls in each step, not in
each epoch; a class with several names has a prompt for each and scores the best. `confidence` and `optimizer` are not
theirs, the defaults are: CLIP's logits of 100 x cosine are about as sure on their data sets as they are right. Where a
model is far surer than that, shared words lower the loss fastest by making the texts of all classes alike, whatever the
learning rate; with the fitted multiplier they do not (`vlkit.addons.confidence`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vlkit.addons.belonging import require_same_classes
from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import ClassWeights
from vlkit.addons.text_prompts import Learned, Loss, PromptTask, TextPrompts, features_of, made_weights

if TYPE_CHECKING:
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class CoOp(TextPrompts):
    """Learned words, see `TextPrompts` for the other settings.

    Attributes:
        per_class: each class has words of its own; then no other classes can be named.
    """

    per_class: bool = False

    @property
    def any_classes(self) -> bool:  # type: ignore[override]
        """Words of their own hold for the classes they were learned with."""
        return not self.per_class

    def start(self, task: PromptTask) -> Learned:
        """(M,W), or (C,M,W)."""
        if not self.per_class:
            return super().start(task)
        return {"vectors": self.first_vectors(task, sets=len(task.class_names))}

    def objective(self, task: PromptTask, found: Learned) -> Loss:
        """Cross-entropy."""
        owner = task.text.prompts.class_of

        def loss(rows: Tensor) -> Tensor:
            context = found["vectors"]
            return task.loss(rows, task.text.features(context[owner] if self.per_class else context))

        return loss

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """Of the prompts with what was learned.

        Raises:
            ConfigError: other classes than those with words of their own.
        """
        assert self.vectors is not None
        text = self.prompted(class_names, embedder)
        if not self.per_class:
            return made_weights(text, features_of(text, self.vectors))
        require_same_classes(self, class_names)
        return made_weights(text, features_of(text, self.vectors[text.prompts.class_of.cpu()]))


ADDON = CoOp
