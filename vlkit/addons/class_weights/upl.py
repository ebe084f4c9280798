"""UPL: CoOp without labels. The images the model is surest of stand for the classes; several trainings are averaged.

For each class the zero-shot model predicts, the K images with the highest probability are kept under that class.
p(y | x) = mean over runs of softmax(scale x cos(x, W_run))

Source: Huang, Chu and Wei 2022, "Unsupervised Prompt Learning for Vision-Language Models", arXiv:2204.03649, and the
authors' code: K 16, 16 vectors, 50 epochs, lr 0.002, batch 32, the mean of the predictions of 16 runs.
Differs: 4 runs by default, as each is a whole training. UPL*, with pseudo-labels of eight models, is left out. Training
as `coop`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from vlkit.addons.base import Need
from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import ImageConditionedWeights, Vectors
from vlkit.addons.text_prompts import Examples, TextPrompts, features_of
from vlkit.contracts import Progress
from vlkit.errors import ConfigError, DataError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class Upl(TextPrompts):
    """Learned words without labels; see `TextPrompts` for the other settings.

    Attributes:
        per_class: K, images kept of each predicted class.
        runs: trainings from different draws, whose probabilities are averaged.
        missing: what to do about classes that are predicted for no image: refuse, or train without images of them.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"unlabelled_images", "class_names", "grad_text"})

    epochs: int | None = 50
    per_class: int = 16
    runs: int = 4
    missing: Literal["refuse", "accept"] = "refuse"

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Choose the images, and train the runs one after the other.

        Raises:
            DataError: classes without an image, where these are refused.
            ConfigError: no run, or what `TextPrompts.learn` refuses.
        """
        if self.runs < 1 or self.per_class < 1:
            raise ConfigError(f"upl: {self.runs} runs, {self.per_class} images a class; at least one of each.")
        shared = None if self.max_seconds is None else self.max_seconds / self.runs
        one = replace(self, max_seconds=shared)
        made = []
        for run in range(self.runs):
            report = None if progress is None else _part_of(progress, run, self.runs)
            drawn = replace(reference, seed=reference.seed * self.runs + run)
            made.append(super(Upl, one).learn(drawn, embedder, report))
        vectors = torch.stack([found.vectors for found in made if found.vectors is not None])
        return replace(self, vectors=vectors, steps=sum(one.steps or 0 for one in made), trained=vectors.numel())

    def examples(self, reference: "Reference") -> Examples:
        """The surest images of each predicted class."""
        assert reference.images is not None and reference.logits is not None
        chances = reference.logits(reference.images.vectors).softmax(-1)
        rows, labels = surest(chances, self.per_class)
        absent = sorted(set(range(chances.shape[1])) - set(labels.tolist()))
        if (absent and self.missing == "refuse") or len(labels) == 0:
            named = ", ".join(repr(reference.class_names[one].shown) for one in absent[:5])
            raise DataError(
                f"{len(absent)} of {chances.shape[1]} classes are predicted for none of {len(reference.images)} images "
                f"(first: {named}). Give more images, leave these classes out, or accept it with upl:missing=accept."
            )
        return Examples(reference.images.vectors.rows(rows), labels)

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ImageConditionedWeights:
        """The mean of the runs' probabilities, as scores."""
        assert self.vectors is not None
        text = self.prompted(class_names, embedder)
        features = features_of(text, self.vectors[:, None])

        def conditioned(images: Vectors) -> Tensor:
            logits = torch.stack([self.logit_scale * text.scores(images.pooled, one) for one in features])
            return mean_of_probabilities(logits) / self.logit_scale

        return ImageConditionedWeights(conditioned, len(class_names))


def surest(chances: Tensor, per_class: int) -> tuple[Tensor, Tensor]:
    """Rows of the surest images of each predicted class, and these classes.

    Args:
        chances: (n,C) probabilities.
        per_class: images of a class at most.
    """
    highest, predicted = chances.max(1)
    rows = []
    for one in range(chances.shape[1]):
        own = (predicted == one).nonzero().flatten()
        rows.append(own[highest[own].argsort(descending=True, stable=True)[:per_class]])
    chosen = torch.cat(rows)
    return chosen, predicted[chosen]


def mean_of_probabilities(logits: Tensor) -> Tensor:
    """Logits (S,B,C) to (B,C) whose softmax is the mean of their softmaxes."""
    return logits.log_softmax(-1).logsumexp(0) - torch.tensor(float(len(logits))).log()


def _part_of(progress: Progress, run: int, runs: int) -> Progress:
    return lambda done, total: progress(run * total + done, runs * total)


ADDON = Upl
