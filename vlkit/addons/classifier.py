"""A zero-shot classifier: class names made vectors once, then any number of images.

    classifier = ZeroShotClassifier.build(embedder, parse_class_list(["dog", "cat | kitten"]))
    predictions = classifier.predict(embedder.embed_images(paths), k=5)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from vlkit.addons.base import ClassWeights
from vlkit.addons.class_weights.templates import (
    DEFAULT_TEMPLATES,
    TextEmbedder,
    check_templates,
    load_templates,
    template_weights,
)
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

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


class ClassName(NamedTuple):
    """A class as it is shown, and every name it goes by in prompts (the shown one first)."""

    shown: str
    names: tuple[str, ...]


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
    ) -> "ZeroShotClassifier":
        """Embed the prompts of every class.

        Args:
            embedder: the encoder whose images will be classified.
            class_names: C names; a string may be `name | synonym | synonym`.
            templates: a set's name, a file, one template, or a list of templates with `{}`.
            progress: called with (done, total) prompts.

        Raises:
            ConfigError: no class, an empty name, duplicates, or unusable templates.
        """
        classes = check_classes([parse_class(name) if isinstance(name, str) else name for name in class_names])
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


def parse_class(line: str) -> ClassName:
    """`name | synonym | synonym` as a class shown under its first name.

    Raises:
        ConfigError: a name between the bars is empty.
    """
    names = tuple(part.strip() for part in line.split("|"))
    if not all(names):
        raise ConfigError(f"Class {line!r} has an empty name; write `name` or `name | synonym`.")
    return ClassName(names[0], names)


def parse_class_list(lines: Sequence[str], where: str = "the class list") -> list[ClassName]:
    """The classes of a file's lines or of a comma-separated option, checked.

    Raises:
        ConfigError: a blank line (named by its number), no class at all, or duplicates.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            raise ConfigError(
                f"Entry {number} of {where} is blank; every entry must be a class name. Remove the blank line."
            )
    return check_classes([parse_class(line) for line in lines], where)


def check_classes(classes: Sequence[ClassName], where: str = "the class list") -> list[ClassName]:
    """The classes, once there is at least one and no name stands for two of them.

    Raises:
        ConfigError: empty, or a name occurs twice (letter case ignored).
    """
    if not classes:
        raise ConfigError(f"There is no class in {where}; give at least one name.")
    owner: dict[str, str] = {}
    for item in classes:
        for name in item.names:
            if name.lower() in owner:
                raise ConfigError(
                    f"Class name {name!r} stands twice in {where} (under {owner[name.lower()]!r} and {item.shown!r}); "
                    "every name may belong to one class only. Remove one."
                )
            owner[name.lower()] = item.shown
    return list(classes)

