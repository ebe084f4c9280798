"""TPT: the words are tuned on each test image alone, so that its surest views agree; then they are forgotten.

For 64 views of the image: keep the tenth with the lowest entropy, take one step of AdamW down the entropy of their mean
probability, predict the image itself with the words it gave.

Source: Shu et al. 2022, "Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models",
arXiv:2209.07511, and the authors' code: "a photo of a", lr 5e-3, one step.
Differs: views are random crops of at least 0.3 of the area, mirrored or not, the same for an image in every run. The
images of a batch are tuned together, which changes nothing: their words are their own, and AdamW treats each number on
its own. Views of the images must be there at use; an image's label or other images are not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from vlkit.addons.base import Need
from vlkit.addons.class_names import ClassName
from vlkit.addons.confidence import require_labels
from vlkit.addons.exchange import ImageConditionedWeights, Vectors
from vlkit.addons.prompt_fit import frozen, parameter
from vlkit.addons.prompted_text import PromptedText
from vlkit.addons.text_prompts import TextPrompts
from vlkit.addons.views import TUNING_VIEWS, ViewRecipe
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class Tpt(TextPrompts):
    """Words tuned on each image; of the settings of `TextPrompts`, epochs, optimizer, batch_size and max_seconds say
    nothing here.

    Attributes:
        tuning_steps: of AdamW on each image.
        share: of the views, those with the lowest entropy.
        together: images tuned at a time.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"class_names", "grad_text", "views"})
    views: ClassVar[ViewRecipe | None] = TUNING_VIEWS

    words: str = "a photo of a"
    lr: float = 5e-3
    tuning_steps: int = 1
    share: float = 0.1
    together: int = 4

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Nothing: the words are those of the start for each image.

        Raises:
            ConfigError: settings out of range, no words to start from, or names too long for them.
        """
        if not 0 < self.share <= 1 or self.tuning_steps < 0 or self.together < 1 or not self.words:
            raise ConfigError(
                f"tpt: share {self.share} (above 0 to 1), tuning_steps {self.tuning_steps} (from 0), together "
                f"{self.together} (from 1), words {self.words!r} (some)."
            )
        require_labels(self, self.confidence)
        self.prompted(reference.class_names, embedder)
        return self

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ImageConditionedWeights:
        """Of each image."""
        text = self.prompted(class_names, embedder)

        def conditioned(images: Vectors) -> Tensor:
            if images.views is None:
                raise ConfigError("tpt tunes on views of the images, which were embedded without.")
            device = text.encoder.device
            parts = zip(images.pooled.split(self.together), images.views.split(self.together), strict=True)
            scores = [self._tuned(text, pooled.to(device), views.to(device)).cpu() for pooled, views in parts]
            return torch.cat([images.pooled.new_empty(0, len(class_names)), *scores])

        return ImageConditionedWeights(conditioned, len(class_names))

    def _tuned(self, text: PromptedText, images: Tensor, views: Tensor) -> Tensor:
        """(B,C) scores of images (B,D), after tuning on their views (B,V,D)."""
        with torch.inference_mode(False), torch.enable_grad(), frozen(text.encoder):
            images, views = images.clone(), views.clone()
            context = parameter(text.words[0].expand(len(images), 1, -1, -1))
            optimizer = torch.optim.AdamW([context], self.lr)
            for _ in range(self.tuning_steps):
                features = text.features(context)  # (B,R,D)
                scores = text.view_scores(views, features)
                optimizer.zero_grad()
                agreement(self.logit_scale * scores, self.share).sum().backward()
                optimizer.step()
            with torch.no_grad():
                return text.per_image_scores(images, text.features(context))


def agreement(logits: Tensor, share: float) -> Tensor:
    """(B,) entropy of the mean probability of the surest views.

    Args:
        logits: (B,V,C).
        share: of the views that count, at least one.
    """
    log_chances = logits.log_softmax(-1)
    entropy = -(log_chances.exp() * log_chances).sum(-1)
    kept = max(1, int(share * logits.shape[1]))
    rows = entropy.argsort(dim=1)[:, :kept]
    chosen = log_chances.gather(1, rows[..., None].expand(-1, -1, logits.shape[2]))
    mean = chosen.logsumexp(1) - torch.tensor(float(kept)).log()
    return -(mean.exp() * mean).sum(-1)


ADDON = Tpt
