"""CHiLS: a class is recognised through its sub-classes, which a file names.

    p(sub | x) = softmax over all sub-classes of all classes, times p(class of sub | x) where it is reweighted
    the class of the best sub-class wins

The softmaxes divide by the same numbers for every sub-class, so the best one is that with the highest

    (s(x, sub) + s(x, class)) / 2

Source: Novack et al. 2023, "CHiLS: Zero-Shot Image Classification with Hierarchical Label Sets", arXiv:2302.02551, and
the authors' code, which puts the class's own name among its sub-classes.
Differs: half of the sum, so that scores stay on the scale of the cosine and a class whose only sub-class is itself
scores as without; the winner is the same. A class with several names counts with the best of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch

from vlkit.addons.base import ClassWeighting, Need, learned
from vlkit.addons.class_names import ClassName
from vlkit.addons.class_texts import read_class_texts, texts_of
from vlkit.addons.class_weights.templates import DEFAULT_TEMPLATES, template_weights
from vlkit.addons.exchange import ClassWeights
from vlkit.contracts import Progress
from vlkit.models.prompt_templates import load_templates

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class Chils(ClassWeighting):
    """Sub-classes of each class.

    Attributes:
        file: JSON, class name -> list of its sub-classes.
        reweight: whether the class's own score counts beside that of the sub-class.
        with_class: whether the class's own name is among its sub-classes.
        templates: a set's name, a file, or one template with `{}`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"class_names"})
    text_space: ClassVar[bool] = False  # means of two text features, whose length counts

    file: str = ""
    reweight: bool = True
    with_class: bool = True
    templates: str = DEFAULT_TEMPLATES
    texts: dict[str, list[str]] | None = learned()

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Read the file; its names are saved with the add-on.

        Raises:
            ConfigError: there is no file, or no such templates.
            DataError: the file is no such table, or lacks a class.
        """
        load_templates(self.templates)
        table = read_class_texts(self.file, self.name)
        texts_of(reference.class_names, table, self.file)
        return replace(self, texts=table)

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """A vector for each sub-class, and for each name of the class where it is reweighted."""
        templates = load_templates(self.templates)
        subs = template_weights(embedder, self.sub_classes(class_names), templates)
        if not self.reweight:
            return subs
        supers = template_weights(embedder, [item.names for item in class_names], templates)
        vectors, class_of = [], []
        for place in range(len(class_names)):
            own, names = subs.vectors[subs.class_of == place], supers.vectors[supers.class_of == place]
            # The best sub-class plus the best name is the best sum of both.
            vectors.append(((own[:, None] + names[None]) / 2).flatten(0, 1))
            class_of.append(torch.full((len(own) * len(names),), place))
        return ClassWeights(torch.cat(vectors), torch.cat(class_of), reduce="max")

    def sub_classes(self, class_names: Sequence[ClassName]) -> list[list[str]]:
        """Names of each class's sub-classes.

        Raises:
            DataError: a class that the file lacked.
        """
        assert self.texts is not None
        found = texts_of(class_names, self.texts, self.file)
        if not self.with_class:
            return found
        return [
            texts if item.shown in texts else [item.shown, *texts]
            for item, texts in zip(class_names, found, strict=True)
        ]


ADDON = Chils
