"""Ideal words: texts of composed classes ("wet dog", "wet cat", "dry dog") as sums of one vector for each word.

    u_0    = mean of u_z over all tuples z of words               u_z unit text features
    u_i    = mean of u_z over the tuples that hold word i - u_0
    uhat_z = u_0 + u_{z_1} + ... + u_{z_k}                        not brought to unit norm again

The best tuple for an image is then the tuple of the best words, and n_1 + ... + n_k products score all of them. A
factor that is left out of the sum no longer counts: class vectors without the background, for one.

Source: Trager et al. 2023, "Linear Spaces of Meanings: Compositional Structures in Vision-Language Models",
arXiv:2302.14383, with weights of words as in the paper (uniform by default).
Differs: the authors' code was not to be found; the equations are as two independent implementations have them.
Distances are squared everywhere, as the paper's text says (its tables seem to mix). Tuples that are no classes are
encoded too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import ClassWeighting, Need
from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import ClassWeights
from vlkit.contracts import Progress
from vlkit.errors import ConfigError
from vlkit.models.prompt_templates import check_templates

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


class IdealWords(NamedTuple):
    """Vectors of words."""

    origin: Tensor  # (D,)
    factors: tuple[Tensor, ...]  # (n_i,D) each

    def composed(self) -> Tensor:
        """(n_1,...,n_k,D) of all tuples."""
        return self.origin + reduce(lambda sums, words: sums.unsqueeze(-2) + words, self.factors[1:], self.factors[0])

    def scores(self, images: Tensor) -> Tensor:
        """(B,n_1,...,n_k) inner products with all tuples, out of those with the words."""
        found = images @ self.origin
        for words in self.factors:
            found = found.unsqueeze(-1) + (images @ words.T).reshape(len(images), *[1] * (found.ndim - 1), -1)
        return found


def ideal_words(vectors: Tensor, weights: Sequence[Tensor] | None = None) -> IdealWords:
    """The vectors of words that fit the tuples best.

    Args:
        vectors: (n_1,...,n_k,D) of all tuples; k at least 1.
        weights: (n_i,) of each factor's words, sum 1; None: uniform. Each factor's vectors have weighted mean 0.
    """
    shape = vectors.shape[:-1]
    if weights is None:
        weights = [torch.full((size,), 1 / size) for size in shape]
    assert [len(one) for one in weights] == list(shape), (shape, [len(one) for one in weights])
    exact = vectors.double()
    origin = _averaged(exact, weights, keep=None)
    factors = tuple((_averaged(exact, weights, keep=place) - origin).to(vectors.dtype) for place in range(len(shape)))
    return IdealWords(origin.to(vectors.dtype), factors)


def compositionality(vectors: Tensor) -> tuple[float, float]:
    """Mean squared distance of the tuples (n_1,...,n_k,D) from their sums of words, and that of two tuples."""
    flat = vectors.flatten(0, -2).double()
    own = (flat - ideal_words(vectors).composed().flatten(0, -2)).square().sum(1).mean().item()
    between = torch.cdist(flat, flat).square().sum().item() / max(1, len(flat) * (len(flat) - 1))
    return own, between


@dataclass(frozen=True)
class IdealWordWeights(ClassWeighting):
    """Composed classes as sums of words.

    Attributes:
        separator: what stands between the words of a class name, each of which is one factor.
        spurious: contexts that must not count, as "on land|on water": each class is encoded in all of them, and only
            its own vector is kept; None: names are split at the separator instead.
        template: one template with `{}` for the words of a tuple, with blanks between.
        normalise: whether sums are brought to unit norm; then a tuple is no longer the tuple of the best words.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"class_names"})
    text_space: ClassVar[bool] = False  # sums, whose length counts

    separator: str = " "
    spurious: str | None = None
    template: str = "an image of a {}"
    normalise: bool = False

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Nothing but checks.

        Raises:
            ConfigError: a template without `{}`, one context, or names that are not made alike.
        """
        check_templates((self.template,), "the add-on ideal_words")
        self._tuples(reference.class_names)
        return self

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ClassWeights:
        """A vector for each name."""
        tuples = self._tuples(class_names)
        contexts = [] if self.spurious is None else [[one.strip() for one in self.spurious.split("|")]]
        factors = [list(dict.fromkeys(words)) for words in zip(*tuples, strict=True)] + contexts
        texts = [self.template.replace("{}", " ".join(words)) for words in product(*factors)]
        vectors = embedder.embed_texts(texts).unflatten(0, [len(words) for words in factors])
        found = ideal_words(vectors)
        sums = [
            found.origin + sum(of[words.index(word)] for of, words, word in zip(found.factors, factors, one))  # noqa: B905
            for one in tuples
        ]
        composed = torch.stack(sums)
        class_of = torch.tensor([place for place, item in enumerate(class_names) for _ in item.names])
        return ClassWeights(F.normalize(composed, dim=-1) if self.normalise else composed, class_of)

    def _tuples(self, class_names: Sequence[ClassName]) -> list[tuple[str, ...]]:
        """The words of each name."""
        names = [name for item in class_names for name in item.names]
        if self.spurious is not None:
            if len([one for one in self.spurious.split("|") if one.strip()]) < 2:
                raise ConfigError(f"ideal_words has spurious = {self.spurious!r}; expected two contexts or more, a|b.")
            return [(name,) for name in names]
        tuples = [tuple(part for part in name.split(self.separator) if part) for name in names]
        length = len(tuples[0])
        for name, words in zip(names, tuples, strict=True):
            if len(words) != length or length < 2:
                raise ConfigError(
                    f"ideal_words splits names at {self.separator!r} and expects as many words, two or more, in each; "
                    f"{name!r} has {len(words)}, {names[0]!r} has {length}. Name another separator, or contexts with "
                    "spurious=a|b."
                )
        return tuples


def _averaged(vectors: Tensor, weights: Sequence[Tensor], keep: int | None) -> Tensor:
    """Weighted means over all factors but one: (D,), or (n,D)."""
    for place in reversed(range(len(weights))):
        if place != keep:
            vectors = torch.tensordot(weights[place].double(), vectors, dims=([0], [place]))
    return vectors


ADDON = IdealWordWeights
