"""A zero-shot classifier: class names made vectors once, then any number of images.

classifier = ZeroShotClassifier.build(embedder, parse_class_list(["dog", "cat | kitten"]))
predictions = classifier.predict(embedder.embed_images(paths), k=5)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from vlkit.addons.class_names import ClassName, check_classes, parse_class, parse_class_list
from vlkit.addons.class_weights.templates import (
    DEFAULT_TEMPLATES,
    TextEmbedder,
    check_templates,
    load_templates,
    template_weights,
)
from vlkit.addons.exchange import ClassWeights
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

__all__ = [
    "ClassName",
    "Predictions",
    "ZeroShotClassifier",
    "check_classes",
    "parse_class",
    "parse_class_list",
]

Family = Literal["softmax", "sigmoid"]


class ClassifyingEmbedder(TextEmbedder, Protocol):
    """An embedder of texts that says how its scores become probabilities; `Embedder` does."""

    @property
    def logit_scale(self) -> float:
        """Multiplier of the cosine."""

    @property
    def logit_bias(self) -> float | None:
        """Added after scaling; None for softmax-trained models."""

    @property
    def family(self) -> Family:
        """Over the classes, or each class on its own."""


class Predictions(NamedTuple):
    """The k best classes of each image."""

    indices: Tensor  # (N, k) int64
    probabilities: Tensor  # (N, k) float32, falling
    rule: str  # how the probabilities were computed


@dataclass(frozen=True)
class ZeroShotClassifier:
    """Class weights with the encoder's own way of turning similarities into probabilities.

    Attributes:
        class_names: (C,) as shown to people.
        weights: the vectors of the classes.
        logit_scale: multiplier of the similarity, as learned by the encoder.
        logit_bias: added after scaling (sigmoid-trained encoders), else 0.
        family: "softmax" when one class is chosen among all, "sigmoid" when each class is judged alone.
        templates: the templates the weights were made with, for the record.
    """

    class_names: tuple[str, ...]
    weights: ClassWeights
    logit_scale: float
    logit_bias: float = 0.0
    family: Family = "softmax"
    templates: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.weights.num_classes == len(self.class_names), (self.weights.num_classes, len(self.class_names))

    @classmethod
    def build(
        cls,
        embedder: ClassifyingEmbedder,
        class_names: Sequence[str | ClassName],
        templates: str | Sequence[str] = DEFAULT_TEMPLATES,
        progress: Progress | None = None,
        distinct: bool = True,
    ) -> "ZeroShotClassifier":
        """Embed the prompts of every class.

        Args:
            embedder: the encoder whose images will be classified.
            class_names: C names; a string may be `name | synonym | synonym`.
            templates: a set's name, a file, one template, or a list of templates with `{}`.
            progress: called with (done, total) prompts.
            distinct: refuse a name that stands for two classes; ImageNet's published names hold two such.

        Raises:
            ConfigError: no class, an empty name, duplicates, or unusable templates.
        """
        classes = [parse_class(name) if isinstance(name, str) else name for name in class_names]
        if distinct or not classes:
            check_classes(classes)
        chosen = load_templates(templates) if isinstance(templates, str) else check_templates(templates, "the list")
        weights = template_weights(embedder, [item.names for item in classes], chosen, progress)
        return cls(
            class_names=tuple(item.shown for item in classes),
            weights=weights,
            logit_scale=embedder.logit_scale,
            logit_bias=embedder.logit_bias or 0.0,
            family=embedder.family,
            templates=chosen,
        )

    @property
    def rule(self) -> str:
        """How probabilities are computed, in words for a result."""
        if self.family == "sigmoid":
            return f"sigmoid({self.logit_scale:.4g} x similarity {self.logit_bias:+.4g}), each class alone"
        return f"softmax({self.logit_scale:.4g} x similarity) over {len(self.class_names)} classes"

    def probabilities(self, features: Tensor) -> Tensor:
        """Probabilities (N, C) of unit-norm image features (N, D)."""
        logits = self.logit_scale * self.weights.scores(features) + self.logit_bias
        return logits.sigmoid() if self.family == "sigmoid" else logits.softmax(dim=-1)

    def predict(self, features: Tensor, k: int = 5) -> Predictions:
        """The k best classes of each image, fewer when there are fewer classes.

        Args:
            features: (N, D) unit-norm image features.
            k: how many classes to give, at least 1.
        """
        if k < 1:
            raise ConfigError(f"top k is {k}; it must be at least 1.")
        best = self.probabilities(features).topk(min(k, len(self.class_names)), dim=-1)
        return Predictions(best.indices, best.values, self.rule)
