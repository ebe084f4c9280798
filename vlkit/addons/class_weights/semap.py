"""SeMap: the classes of a closed-set model mapped to other classes by the meaning of their names.

    A[c, s] = cos(t_c, t_s)                                    text features of both names, one template
    one        logit_c = o[m(c)]                               m: one source a class, the best sum of A
    many       logit_c = sum of softmax(A[c, T] / 0.05) o[T]   T: the k sources nearest to c
    frequency  logit_c = o[m(c)]                               m: sources predicted most often on images of c
    random     logit_c = o[m(c)]                               the control

The closed-set model is a linear head on this encoder's features (a file), or the zero-shot weights of its names.

Source: Yang et al. 2023, "From Visual Prompt Learning to Zero-Shot Transfer: Mapping Is All You Need", arXiv:2303.05266
(map by meaning); frequency and random mapping as in Chen et al. 2023, "Understanding and Improving Visual Prompting: A
Label-Mapping Perspective" (ILM-VP), arXiv:2211.11635, and its code.
Differs: only SeMap's abstract was to be had. Formula, text encoder, k 5 and temperature 0.05 are choices of ours, and
no number of the paper is claimed for them. The iterative mapping of ILM-VP is `frequency_map`, called each epoch by
whatever trains a prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vlkit.addons.base import ClassWeighting, Need, learned
from vlkit.addons.class_names import ClassName, parse_class_list
from vlkit.addons.class_weights.templates import template_weights
from vlkit.addons.exchange import ClassWeights
from vlkit.addons.label_maps import frequency_map, matched_map, nearest_map, random_map
from vlkit.contracts import Progress
from vlkit.errors import CheckpointError, ConfigError
from vlkit.models.prompt_templates import check_templates

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class SeMap(ClassWeighting):
    """A closed-set model's classes mapped to others.

    Attributes:
        names: a file with the S names the model knows, one a line.
        head: safetensors with `weight` (S,D) and, if it has one, `bias` (S,), for unit features; None: the zero-shot
            weights of the names.
        mapping: see above.
        k: sources a class, for "many".
        template: one template with `{}`, for names on both sides.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"class_names"})
    uses: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels"})
    text_space: ClassVar[bool] = False  # vectors of a head

    names: str = ""
    head: str | None = None
    mapping: Literal["one", "many", "frequency", "random"] = "many"
    k: int = 5
    template: str = "a photo of a {}."
    sources: list[str] | None = learned()  # (S,)
    vectors: Tensor | None = learned()  # (S,D) on the scale of the cosine
    bias: Tensor | None = learned()  # (S,) likewise
    chosen: Tensor | None = learned()  # (C,S), for frequency and random: only known where they were fitted

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Read the model; count, where the mapping asks for images.

        Raises:
            ConfigError: a file that is not there, too few sources, or images that are missing.
            CheckpointError: a head that is none.
        """
        check_templates((self.template,), "the add-on semap")
        sources = _read_names(self.names)
        if self.k < 1:
            raise ConfigError(f"semap has k = {self.k}; expected at least 1.")
        known = [(name,) for name in sources]
        if self.head is None:
            vectors, bias = template_weights(embedder, known, (self.template,)).vectors, None
        else:
            vectors, bias = _read_head(self.head, len(sources), embedder.embed_dim, self.logit_scale)
        fitted = replace(self, sources=sources, vectors=vectors, bias=bias)
        return replace(fitted, chosen=fitted._counted(reference))

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """Sums of the sources' vectors; of a class's synonyms the shown name counts."""
        assert self.vectors is not None
        table = self.table(class_names, embedder)
        bias = None if self.bias is None else table @ self.bias
        return ClassWeights(table @ self.vectors, torch.arange(len(class_names)), bias=bias)

    def table(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> Tensor:
        """(C,S): which sources make up each class.

        Raises:
            ConfigError: more classes than sources, or other classes than the images were of.
        """
        assert self.sources is not None and self.fitted is not None
        shown = tuple(item.shown for item in class_names)
        if self.chosen is not None:
            if shown != self.fitted.class_names:
                raise ConfigError(
                    f"semap's mapping {self.mapping} holds for the classes it was fitted for. Fit it anew."
                )
            return self.chosen
        sides = [template_weights(embedder, [(n,) for n in side], (self.template,)) for side in (shown, self.sources)]
        likeness = sides[0].vectors @ sides[1].vectors.T
        return matched_map(likeness) if self.mapping == "one" else nearest_map(likeness, self.k)

    def _counted(self, reference: "Reference") -> Tensor | None:
        assert self.vectors is not None and self.sources is not None
        num_classes, num_sources = len(reference.class_names), len(self.sources)
        if self.mapping in ("one", "many"):
            return None
        if self.mapping == "random":
            return random_map(num_classes, num_sources, reference.seed)
        shots = reference.few_shot
        if shots is None or shots.labels is None:
            raise ConfigError("semap with mapping=frequency needs few_shot_labels (labelled images of every class).")
        scores = shots.vectors.pooled @ self.vectors.T + (0 if self.bias is None else self.bias)
        return frequency_map(scores.argmax(1), shots.labels, num_classes, num_sources)


def _read_names(file: str) -> list[str]:
    if not file:
        raise ConfigError("semap needs the names of the classes the model knows: --addon semap:names=names.txt")
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"semap cannot read the names in {file}: {error}.") from error
    return [item.shown for item in parse_class_list(lines, file)]


def _read_head(file: str, num_sources: int, dim: int, logit_scale: float) -> tuple[Tensor, Tensor | None]:
    """Weights and bias of a linear head, divided by the scale that scores are multiplied with later."""
    try:
        found = load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"semap cannot read the head {file}: {error}.") from error
    weight, bias = found.get("weight"), found.get("bias")
    if weight is None or weight.shape != (num_sources, dim) or (bias is not None and bias.shape != (num_sources,)):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(found.items())) or "nothing"
        raise CheckpointError(
            f"The head {file} holds {shapes}; expected weight ({num_sources}, {dim}) and, if it has one, bias "
            f"({num_sources},): one row for each name, as wide as this encoder's features."
        )
    return weight.float() / logit_scale, None if bias is None else bias.float() / logit_scale


ADDON = SeMap
