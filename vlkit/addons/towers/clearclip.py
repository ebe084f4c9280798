"""ClearCLIP: the last block without its residual path and MLP, positions attending to those with like queries.

    softmax(q q^T / sqrt d)

Source: Lan et al. 2024, "ClearCLIP: Decomposing CLIP Representations for Dense Vision-Language Inference", ECCV,
arXiv:2407.12442, and the authors' code with its default attention (q-q).
Differs: None in the arithmetic. The class position keeps the block's own output.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

from torch import Tensor

from vlkit.addons.base import Need, TowerEdit
from vlkit.addons.last_block import require_patches_of, switched
from vlkit.contracts import Progress
from vlkit.models.attention import AttentionParts, attention_logits
from vlkit.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class ClearClip(TowerEdit):
    """Query-query attention alone."""

    needs: ClassVar[frozenset[Need]] = frozenset({"patches"})

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Nothing; checks the tower."""
        require_patches_of(embedder)
        return self

    def edit(self, encoder: DualEncoder) -> AbstractContextManager[None]:
        """Patches of the joint space without what the residual path carries."""
        return switched(encoder, query_map, residual=False)


def query_map(parts: AttentionParts, grid: tuple[int, int]) -> Tensor:
    """(B,H,L,L)."""
    return attention_logits(parts.query, parts.query).softmax(dim=-1)


ADDON = ClearClip
