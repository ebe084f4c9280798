"""Scores of words and image joined by plain arithmetic: what every other merge has to beat.

    sum: share * text + (1 - share) * image;  product: text * image;  minimum: min(text, image);  text, image: one alone

Source: the baselines of Psomas et al. 2024 (arXiv:2405.15587) and Efthymiadis et al. 2024 (arXiv:2412.03297).
Differs: products are of (1 + score) / 2, so that two negative similarities do not make a large one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from torch import Tensor

from vlkit.addons.base import Merge, Task
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class Arithmetic(Merge):
    """One rule for all queries.

    Attributes:
        rule: see the module.
        share: of the words, with `sum`.
    """

    tasks: ClassVar[frozenset[Task]] = frozenset({"retrieval"})

    rule: Literal["sum", "product", "minimum", "text", "image"] = "sum"
    share: float = 0.5

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Nothing.

        Raises:
            ConfigError: an unknown rule, a share outside [0,1], or one that has no effect.
        """
        self._check()
        return self

    def merge(self, scores: Sequence[Tensor]) -> Tensor:
        """(Q,N) cosines of the words, then of the image, to one (Q,N).

        Raises:
            ConfigError: not two parts.
        """
        self._check()
        text, image = two_parts(scores, self.name)
        if self.rule == "sum":
            return self.share * text + (1 - self.share) * image
        if self.rule == "product":
            return (1 + text) / 2 * (1 + image) / 2
        if self.rule == "minimum":
            return torch.minimum(text, image)
        return text if self.rule == "text" else image

    def _check(self) -> None:
        rules = ("sum", "product", "minimum", "text", "image")
        if self.rule not in rules:
            raise ConfigError(f"arithmetic:rule is {self.rule!r}; expected one of {', '.join(rules)}.")
        if not 0 <= self.share <= 1 or (self.share != 0.5 and self.rule != "sum"):
            raise ConfigError(f"arithmetic:share is {self.share}; expected 0 to 1, and only with the rule `sum`.")


def two_parts(scores: Sequence[Tensor], name: str) -> tuple[Tensor, Tensor]:
    """The scores of words and image.

    Raises:
        ConfigError: the query has not both.
    """
    if len(scores) != 2:
        raise ConfigError(f"{name} joins words and an image, but the query has {len(scores)} part. Give both.")
    return scores[0], scores[1]


ADDON = Arithmetic
