"""WeiCom: words and image weighted once their similarities are on one scale.

    s = share * Phi((s_t - mean s_t) / std s_t) + (1 - share) * Phi((s_i - mean s_i) / std s_i)

Mean and deviation are of one query's similarities with the whole gallery, Phi is the normal distribution. Similarities
of two images are larger and spread otherwise than those of text and image; without this the image decides alone.

Source: Psomas et al. 2024, "Composed Image Retrieval for Remote Sensing", IGARSS, arXiv:2405.15587; released code
rscir (`norm_cdf`, "Weighted Similarities Norm"). The code's default is 0.5; 0.3 was best for CLIP, 0.6 for RemoteCLIP.
Differs: a query to which all images are equally similar gives every image 1/2 (the released code divides by zero).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from vlkit.addons.base import Merge, Task
from vlkit.addons.merges.arithmetic import two_parts
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class WeiCom(Merge):
    """A weighted mean of similarities, each brought to [0,1] for its own query.

    Attributes:
        share: of the words.
    """

    tasks: ClassVar[frozenset[Task]] = frozenset({"retrieval"})

    share: float = 0.5

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Nothing.

        Raises:
            ConfigError: a share outside [0,1].
        """
        self._check()
        return self

    def merge(self, scores: Sequence[Tensor]) -> Tensor:
        """(Q,N) similarities of the words, then of the image, with the whole gallery, to one (Q,N) in [0,1].

        Raises:
            ConfigError: not two parts.
        """
        self._check()
        text, image = two_parts(scores, self.name)
        return self.share * on_one_scale(text) + (1 - self.share) * on_one_scale(image)

    def _check(self) -> None:
        if not 0 <= self.share <= 1:
            raise ConfigError(f"weicom:share is {self.share}; expected 0 to 1.")


def on_one_scale(scores: Tensor) -> Tensor:
    """Each row of (Q,N) through the normal distribution fitted to it."""
    centred = scores - scores.mean(dim=-1, keepdim=True)
    deviation = centred.square().sum(dim=-1, keepdim=True).div(max(scores.shape[-1] - 1, 1)).sqrt()
    # Rounding leaves a constant row a deviation of about 1e-8.
    level = torch.where(deviation > 1e-6 * scores.abs().amax(dim=-1, keepdim=True), centred / deviation, 0.0)
    return 0.5 * (1 + torch.erf(level / math.sqrt(2)))


ADDON = WeiCom
