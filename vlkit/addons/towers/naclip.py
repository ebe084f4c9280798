"""NACLIP: the last block without residual path and MLP, patches attending to like keys and to their neighbours.

    softmax(k k^T / sqrt d + g),   g_ij = exp(-|p_i - p_j|^2 / (2 sigma^2)), p the place on the grid

Source: Hajimiri, Ben Ayed and Dolz 2025, "Pay Attention to Your Neighbours: Training-Free Open-Vocabulary Semantic
Segmentation", WACV, arXiv:2404.08181, and the authors' code: sigma 5, nothing added in the row and column of the class
position.
Differs: None in the arithmetic. The class position keeps the block's own output. The pixel-adaptive refinement (PAMR)
of their tables is no part of the method.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from vlkit.addons.base import Need, TowerEdit
from vlkit.addons.last_block import require_patches_of, switched
from vlkit.contracts import Progress
from vlkit.errors import ConfigError
from vlkit.models.attention import AttentionParts, attention_logits
from vlkit.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class NaClip(TowerEdit):
    """Key-key attention that prefers neighbours.

    Attributes:
        sigma: of the Gaussian, in patches.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"patches"})

    sigma: float = 5.0

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: a width that is not above 0.
        """
        if not self.sigma > 0:
            raise ConfigError(f"naclip:sigma is {self.sigma}; expected a number of patches above 0.")

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Nothing; checks the tower."""
        require_patches_of(embedder)
        return self

    def edit(self, encoder: DualEncoder) -> AbstractContextManager[None]:
        """Patches of the joint space mixed with like neighbours."""
        return switched(encoder, self.map_of, residual=False)

    def map_of(self, parts: AttentionParts, grid: tuple[int, int]) -> Tensor:
        """(B,H,L,L)."""
        near = neighbourhood(grid, self.sigma).to(parts.key)
        return attention_logits(parts.key, parts.key, near).softmax(dim=-1)


def neighbourhood(grid: tuple[int, int], sigma: float) -> Tensor:
    """(1+P,1+P): the Gaussian of the distance of two patches, with a row and a column of zeros for the class."""
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in grid)
    places = torch.cartesian_prod(rows, columns)  # row by row, as the patches stand
    squared = (places[:, None] - places[None]).square().sum(dim=-1)
    near = torch.exp(-squared / (2 * sigma**2))
    return torch.nn.functional.pad(near, (1, 0, 1, 0))


ADDON = NaClip
