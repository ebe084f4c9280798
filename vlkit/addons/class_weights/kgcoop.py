"""KgCoOp: CoOp whose class vectors are held near those of the hand-written template, for the sake of other classes.

    loss = cross-entropy + weight x (1 - mean over classes of cos(learned, template))           of 100 x cosine

Source: Yao, Zhang and Xu 2023, "Visual-Language Prompt Tuning with Knowledge-guided Context Optimization",
arXiv:2303.13283, and the authors' code: 4 vectors from "a photo of a", batch 128, 100 epochs, lr 0.002, weight 8.
Differs: as `coop`. The weight is the paper's beside logits of 100 x cosine, and as much smaller as the multiplier of
the training is, for the gradient that it works against grows with that. Their template is one per data set; here it is
`template`, for all. The authors' code carries a network of the image and an adapter that it does not use; both are left
out.
"""

from dataclasses import dataclass

from torch import Tensor

from vlkit.addons.text_prompts import Learned, Loss, PromptTask, TextPrompts


@dataclass(frozen=True)
class KgCoOp(TextPrompts):
    """Learned words held near a template, see `TextPrompts` for the other settings.

    Attributes:
        weight: of what holds, beside cross-entropy of 100 x cosine; 0 is `coop`.
        template: one text with `{}`.
    """

    words: str = "a photo of a"
    epochs: int | None = 100
    batch_size: int = 128
    weight: float = 8.0
    template: str = "a photo of a {}."

    def objective(self, task: PromptTask, found: Learned) -> Loss:
        """Cross-entropy and the distance from the template."""
        anchors, weight = task.template_features(self.template), task.from_paper(self.weight)

        def loss(rows: Tensor) -> Tensor:
            features = task.text.features(found["vectors"])
            return task.loss(rows, features) + weight * (1 - (features * anchors).sum(1).mean())

        return loss


ADDON = KgCoOp
