"""Class weights from prompt templates: the plain zero-shot classifier of CLIP.

    weights = template_weights(embedder, [["dog"], ["cat", "kitten"]], load_templates("imagenet80"))

For every name, the unit features of its prompts are averaged over the templates and brought to unit norm
again. A class may have several names (synonyms): each gets its own vector and the class scores the maximum.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
arXiv:2103.00020, section 3.1.4 (prompt ensembling over the embedding space).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from vlkit.addons.base import ClassWeights
from vlkit.contracts import Progress
from vlkit.errors import ConfigError, did_you_mean
from vlkit.models.zero_shot_text import imagenet_templates, simple_templates

TEMPLATE_SETS = {
    "none": lambda: ("{}",),
    "photo": lambda: ("a photo of a {}.",),
    "simple": simple_templates,
    "imagenet80": imagenet_templates,
}
DEFAULT_TEMPLATES = "simple"


class TextEmbedder(Protocol):
    """Whatever turns texts into unit-norm vectors (N, D); `Embedder` does."""

    def embed_texts(self, texts: Sequence[str], batch_size: int = 256, progress: Progress | None = None) -> Tensor:
        """(N, D) unit-norm float32 features, one row a text."""


def load_templates(choice: str) -> tuple[str, ...]:
    """Templates named by a set, given in a file (one a line), or written out as one template with `{}`.

    Args:
        choice: a key of TEMPLATE_SETS, the path of a text file, or a template such as "a drawing of a {}".

    Raises:
        ConfigError: none of the three, or a template without exactly one `{}`.
    """
    if choice in TEMPLATE_SETS:
        return TEMPLATE_SETS[choice]()
    if "{}" in choice:
        return check_templates((choice,), "the option")
    path = Path(choice)
    if path.is_file():
        lines = path.read_text(encoding="utf-8").splitlines()
        return check_templates(tuple(line.strip() for line in lines if line.strip()), str(path))
    raise ConfigError(
        f"Templates {choice!r} are neither a set ({', '.join(TEMPLATE_SETS)}), nor a file, nor a text with {{}}. "
        f"{did_you_mean(choice, TEMPLATE_SETS)} Give a file with one template a line, or a template in quotes."
    )


def check_templates(templates: Sequence[str], where: str) -> tuple[str, ...]:
    """The templates, once each holds exactly one `{}`.

    Raises:
        ConfigError: there is no template, or one has no `{}` or several.
    """
    if not templates:
        raise ConfigError(f"No template in {where}; write one a line, each with {{}} where the class name goes.")
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(
                f"Template {template!r} in {where} has {template.count('{}')} placeholders; "
                f"each template needs exactly one {{}} where the class name goes."
            )
    return tuple(templates)


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
