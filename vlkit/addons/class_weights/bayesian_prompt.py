"""Bayesian prompt learning: the words carry a random shift whose distribution is learned, and held near a normal one.

    r ~ N(mu, sigma^2)      context = [v_1 + r ... v_M + r]
    loss = -log mean over draws of p(y | x, r) + beta KL(N(mu, sigma^2) || N(0, I))

mu and sigma are parameters, or (`conditional`) what a network of the image's feature says. Prediction is the mean
probability over `draws` shifts.

Source: Derakhshani et al. 2023, "Bayesian Prompt Learning for Image-Language Model Generalization", arXiv:2210.02390,
and the authors' code: "a photo of a", mu from 0, log-variance from uniform(0, 1), 3 layers of 256 with ELU, beta 0.001,
lr 0.002; 5 to 40 draws and 10 to 60 epochs by data set.
Differs: 20 draws and 20 epochs for all, of Caltech-101; batch 32 where the authors' is 1. The divergence is summed over
channels; beta is beside logits of 100 x cosine, as much smaller as the multiplier is. Shifts of prediction are drawn
once by the seed of fitting. Training as `coop`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import learned
from vlkit.addons.class_names import ClassName
from vlkit.addons.class_weights.upl import mean_of_probabilities
from vlkit.addons.exchange import ImageConditionedWeights, Vectors
from vlkit.addons.prompt_fit import frozen
from vlkit.addons.prompted_text import PromptedText
from vlkit.addons.text_prompts import Learned, Loss, PromptTask, TextPrompts, features_of
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

HIDDEN = 256
# Of the network, in order: two hidden layers and the output.
LAYERS = ("first", "second", "third")


@dataclass(frozen=True)
class BayesianPrompt(TextPrompts):
    """Words with a learned distribution; see `TextPrompts` for the other settings.

    Attributes:
        draws: L, shifts in a training step and in a prediction.
        beta: weight of the divergence.
        conditional: the distribution depends on the image; prediction then costs L x C prompts for each.
    """

    words: str = "a photo of a"
    epochs: int | None = 20
    draws: int = 20
    beta: float = 1e-3
    conditional: bool = False
    mean: Tensor | None = learned()  # mu (W,)
    log_variance: Tensor | None = learned()  # (W,)
    first: Tensor | None = learned()  # (256,D+1), the last column is the bias
    second: Tensor | None = learned()  # (256,257)
    third: Tensor | None = learned()  # (2W,257)
    noise: Tensor | None = learned()  # (L,W) standard normal, of prediction

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Train.

        Raises:
            ConfigError: no draw, a negative beta, or what `TextPrompts.learn` refuses.
        """
        if self.draws < 1 or self.beta < 0:
            raise ConfigError(f"bayesian_prompt: {self.draws} draws (from 1), beta {self.beta} (from 0).")
        done = super().learn(reference, embedder, progress)
        assert done.vectors is not None
        random = torch.Generator().manual_seed(reference.seed + 1)
        return replace(done, noise=torch.randn(self.draws, done.vectors.shape[1], generator=random))

    def start(self, task: PromptTask) -> Learned:
        """The words, and the distribution."""
        width, dim = task.text.words.shape[-1], task.images.shape[1]
        random = torch.Generator().manual_seed(task.seed + 2)
        if not self.conditional:
            log_variance = torch.rand(width, generator=random).to(task.images)
            return super().start(task) | {"mean": torch.zeros_like(log_variance), "log_variance": log_variance}
        sizes = [(HIDDEN, dim), (HIDDEN, HIDDEN), (2 * width, HIDDEN)]
        layers = [
            (torch.rand(rows, columns + 1, generator=random) * 2 - 1).to(task.images) / math.sqrt(columns)
            for rows, columns in sizes
        ]
        return super().start(task) | dict(zip(LAYERS, layers, strict=True))

    def objective(self, task: PromptTask, found: Learned) -> Loss:
        """The bound on the evidence."""
        random = torch.Generator().manual_seed(task.seed + 3)
        width, beta = task.text.words.shape[-1], task.from_paper(self.beta)

        def loss(rows: Tensor) -> Tensor:
            images, labels = task.images[rows], task.labels[rows]
            noise = torch.randn(self.draws, width, generator=random).to(images)
            mean, log_variance = self._distribution(found, images)
            likely = mean_of_probabilities(task.scale * self._scores(task.text, found, images, noise))
            return F.nll_loss(likely, labels) + beta * divergence(mean, log_variance).mean()

        return loss

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ImageConditionedWeights:
        """The mean probability over the shifts, as scores."""
        assert self.vectors is not None and self.noise is not None
        text, noise = self.prompted(class_names, embedder), self.noise
        scale = self.scale or self.logit_scale  # probabilities are mixed as sure as they were trained
        names = LAYERS if self.conditional else ("mean", "log_variance")
        found = {name: getattr(self, name).to(text.encoder.device) for name in ("vectors", *names)}
        fixed = None
        if not self.conditional:
            fixed = features_of(text, shifted(found["vectors"], found["mean"], found["log_variance"], noise))

        def conditioned(images: Vectors) -> Tensor:
            if fixed is not None:
                scores = torch.stack([text.scores(images.pooled, one) for one in fixed])
                return mean_of_probabilities(scale * scores) / scale
            parts = [images.pooled.new_empty(0, len(class_names))]
            with torch.no_grad(), frozen(text.encoder):
                for one in images.pooled.to(text.encoder.device).split(1):
                    scores = self._scores(text, found, one, noise.to(one))
                    parts.append((mean_of_probabilities(scale * scores) / scale).cpu())
            return torch.cat(parts)

        return ImageConditionedWeights(conditioned, len(class_names))

    def _distribution(self, found: Learned, images: Tensor) -> tuple[Tensor, Tensor]:
        """mu and log sigma^2, (1,W), or (B,W) of images (B,D)."""
        if not self.conditional:
            return found["mean"][None], found["log_variance"][None]
        inner = images
        for name in LAYERS[:-1]:
            inner = F.elu(_linear(inner, found[name]))
        mean, log_variance = _linear(inner, found[LAYERS[-1]]).chunk(2, dim=-1)
        return mean, log_variance

    def _scores(self, text: PromptedText, found: Learned, images: Tensor, noise: Tensor) -> Tensor:
        """(L,B,C) cosines."""
        mean, log_variance = self._distribution(found, images)
        if len(mean) == 1:
            features = text.features(shifted(found["vectors"], mean[0], log_variance[0], noise))
            return torch.stack([text.scores(images, one) for one in features])
        each = [shifted(found["vectors"], *one, noise) for one in zip(mean, log_variance, strict=True)]
        features = text.features(torch.stack(each, dim=1))  # (L,B,R,D)
        return torch.stack([text.per_image_scores(images, one) for one in features])


def shifted(vectors: Tensor, mean: Tensor, log_variance: Tensor, noise: Tensor) -> Tensor:
    """(L,1,M,W) words (M,W) with each of L shifts."""
    shift = mean + (log_variance / 2).exp() * noise.to(mean)
    return (vectors + shift[:, None])[:, None]


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """(n,) KL of normal distributions (n,W) from the standard one."""
    return 0.5 * (log_variance.exp() + mean**2 - 1 - log_variance).sum(-1)


def _linear(inputs: Tensor, layer: Tensor) -> Tensor:
    return inputs @ layer[:, :-1].T + layer[:, -1]


ADDON = BayesianPrompt
