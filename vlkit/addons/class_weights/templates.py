"""Class weights from prompt templates: the plain zero-shot classifier of CLIP.

    weights = template_weights(embedder, [["dog"], ["cat", "kitten"]], load_templates("imagenet80"))

For every name, the unit features of its prompts are averaged over the templates and brought to unit norm
again. A class may have several names (synonyms): each gets its own vector and the class scores the maximum.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020, section 3.1.4 (prompt ensembling over the embedding space).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol, Self

import torch
from torch import Tensor

from vlkit.addons.base import ClassWeighting, Need
from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import ClassWeights
from vlkit.contracts import Progress
from vlkit.models.prompt_templates import DEFAULT_TEMPLATES, TEMPLATE_SETS, check_templates, load_templates

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

__all__ = [
    "ADDON",
    "DEFAULT_TEMPLATES",
    "TEMPLATE_SETS",
    "TemplateWeighting",
    "Templates",
    "TextEmbedder",
    "check_templates",
    "load_templates",
    "template_weights",
    "templates_hash",
]


class TextEmbedder(Protocol):
    """Whatever turns texts into unit-norm vectors (N, D); `Embedder` does."""

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """(N, D) unit-norm float32 features, one row a text."""


def templates_hash(templates: Sequence[str]) -> str:
    """Twelve hex digits that are equal for equal template lists; written into results."""
    return hashlib.sha256("\n".join(templates).encode()).hexdigest()[:12]


def template_weights(
    embedder: TextEmbedder,
    class_synonyms: Sequence[Sequence[str]],
    templates: Sequence[str],
    progress: Progress | None = None,
) -> ClassWeights:
    """Class weights of names and their synonyms under a set of templates.

    Args:
        embedder: gives (N, D) unit-norm text features.
        class_synonyms: for each class its names, at least one.
        templates: each with exactly one `{}`.
        progress: called with (done, total) prompts.

    Returns:
        One vector for every name; a class's score is the maximum over its names.
    """
    names = [name for synonyms in class_synonyms for name in synonyms]
    class_of = [index for index, synonyms in enumerate(class_synonyms) for _ in synonyms]
    # A plain replace, not str.format: a class name may itself hold braces.
    prompts = [template.replace("{}", name) for name in names for template in templates]
    features = embedder.embed_texts(prompts, progress=progress).reshape(len(names), len(templates), -1)
    vectors = torch.nn.functional.normalize(features.mean(dim=1), dim=-1)
    return ClassWeights(vectors=vectors, class_of=torch.tensor(class_of), reduce="max")


@dataclass(frozen=True)
class TemplateWeighting(ClassWeighting):
    """Whatever makes class weights of names in templates, and learns nothing.

    Attributes:
        templates: a set's name, a file, or one template with `{}`.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"class_names"})

    templates: str = "imagenet80"

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Nothing."""
        load_templates(self.templates)  # a mistyped set is refused before the work
        return self


@dataclass(frozen=True)
class Templates(TemplateWeighting):
    """The plain zero-shot weights, as an add-on: other templates than the evaluator's."""

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """Of the classes' prompts."""
        return template_weights(embedder, [item.names for item in class_names], load_templates(self.templates))


ADDON = Templates
