"""PromptSRC: independent deep prompts in both towers, held near what the model knew, averaged over the epochs.

    loss = CE + 25 mean|t - t0| + 10 mean|x - x0| + KL(p0 || p) / (B C)                         of 100 x cosine

t, x: text and image features with prompts; x0 of the frozen tower; t0 of the frozen tower, mean over many templates;
p, p0: probabilities of (x, t) and (x0, t0). What is kept is the mean of the prompts after each epoch, weighted by a
Gaussian over the epochs: the first ones have learned little, the last ones fit the few images too well.

Source: Khattak et al. 2023, "Self-regulating Prompts: Foundational Model Adaptation without Forgetting",
arXiv:2307.06948, equations 3 to 6, and the authors' code: 4 + 4 vectors at 9 layers, SGD 0.0025, batch 4, 20 epochs (50
with few shots), Gaussian of standard deviation 1 centred at epoch 15 (30, or 45).
Differs: the weights 25 and 10 are those beside logits of 100 x cosine, and as much smaller as the multiplier of the
training is, for the gradient that they work against grows with that; so does that of KL. t0 is the mean over any set
of templates, by default the 80 for ImageNet; the authors' 60 are a choice of these. The centre is three quarters of the
epochs. Where `max_seconds` ends the training, the weights of the epochs that were done are brought to sum 1; with none
done, the last values stay. Prompts of the image come in behind the norm of the embedded patches.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.class_weights.templates import load_templates, template_weights
from vlkit.addons.exchange import ClassWeights
from vlkit.addons.tower_learning import EpochMean, Learned, Loss, TowerTask
from vlkit.addons.tower_prompts import stock_image_features
from vlkit.addons.towers.ivlp import IndependentPrompts
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class PromptSrc(IndependentPrompts):
    """Self-regulated prompts.

    Attributes:
        keep_text, keep_image, keep_logits: weights of the three regularisers, beside cross-entropy of 100 x cosine;
            with 0 for all it is IVLP, averaged.
        templates: a set, a file or a template that the frozen text features are made with.
        centre: epoch, from 1, that counts most; None: three quarters of the epochs.
        spread: standard deviation of the Gaussian, in epochs.
    """

    text_tokens: int = 4
    image_tokens: int = 4
    keep_text: float = 25.0
    keep_image: float = 10.0
    keep_logits: float = 1.0
    templates: str = "imagenet80"
    centre: float | None = None
    spread: float = 1.0

    def task(self, reference: "Reference", embedder: "FeatureSource") -> TowerTask:
        """With the frozen text features: they are made before there are prompts."""
        names = [item.names for item in reference.class_names]
        known = template_weights(embedder, names, load_templates(self.templates)).vectors
        return replace(super().task(reference, embedder), known=known)

    def objective(self, task: TowerTask, found: Learned) -> Loss:
        """Cross-entropy and the three regularisers."""
        assert task.known is not None
        known = task.known.to(task.encoder.device)
        keep_text, keep_image = task.from_paper(self.keep_text), task.from_paper(self.keep_image)

        def loss(rows: Tensor) -> Tensor:
            images, texts = task.images(rows), task.texts()
            with torch.no_grad():
                known_images = task.autocast(lambda: stock_image_features(task.encoder, images))
            features = task.encode(images)
            logits = task.logits(features, texts)
            before = task.logits(known_images, ClassWeights(known, texts.class_of))
            held = regularisers(Sides(features, texts.vectors, logits), Sides(known_images, known, before))
            kept = keep_image * held.image + keep_text * held.text + self.keep_logits * held.logits
            return F.cross_entropy(logits, task.labels[rows]) + kept

        return loss

    def average(self, found: Learned) -> EpochMean:
        """By a Gaussian over the epochs."""
        return EpochMean(found, gaussian(self.epochs, self.centre, self.spread))


class Sides(NamedTuple):
    """What a model makes of a batch."""

    image: Tensor  # (B,D) unit norm
    text: Tensor  # (R,D) unit norm
    logits: Tensor  # (B,C)


def regularisers(now: Sides, before: Sides) -> Sides:
    """() each: how far image features, text features and logits have moved; 0 where nothing has changed."""
    divergence = F.kl_div(now.logits.log_softmax(1), before.logits.log_softmax(1), reduction="sum", log_target=True)
    return Sides(
        image=(now.image - before.image).abs().mean(),
        text=(now.text - before.text).abs().mean(),
        logits=divergence / now.logits.numel(),
    )


def gaussian(epochs: int, centre: float | None, spread: float) -> Tensor:
    """(epochs,) float64 weights that sum to 1.

    Raises:
        ConfigError: no width.
    """
    if spread <= 0:
        raise ConfigError(f"prompt_src: spread is {spread}; a Gaussian has a width above 0 epochs.")
    middle = 0.75 * epochs if centre is None else centre
    return (-0.5 * ((torch.arange(1, epochs + 1).double() - middle) / spread).square()).softmax(0)


ADDON = PromptSrc
