"""SCLIP: in the last block positions attend to those with like queries and to those with like keys.

    softmax(q q^T / sqrt d) + softmax(k k^T / sqrt d), rows sum to 2; residual path and MLP stay

Source: Wang, Mei and Yuille 2024, "SCLIP: Rethinking Self-Attention for Dense Vision-Language Inference", ECCV,
arXiv:2312.01597, equation 4, and the authors' code.
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
class Sclip(TowerEdit):
    """Correlative self-attention."""

    needs: ClassVar[frozenset[Need]] = frozenset({"patches"})

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Nothing; checks the tower."""
        require_patches_of(embedder)
        return self

    def edit(self, encoder: DualEncoder) -> AbstractContextManager[None]:
        """Patches of the joint space mixed with their like."""
        return switched(encoder, correlative_map, residual=True)


def correlative_map(parts: AttentionParts, grid: tuple[int, int]) -> Tensor:
    """(B,H,L,L): the sum of two softmaxes, as released; not their mean."""
    by_query = attention_logits(parts.query, parts.query).softmax(dim=-1)
    return by_query + attention_logits(parts.key, parts.key).softmax(dim=-1)


ADDON = Sclip
