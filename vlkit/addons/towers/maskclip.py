"""MaskCLIP: in the last block every patch keeps its own value, and nothing is mixed into it.

Source: Zhou, Loy and Dai 2022, "Extract Free Dense Labels from CLIP", ECCV, arXiv:2112.01071, section 3.2.
Differs: The code released for ViTs keeps the residual path and the MLP of the last block, which the equation (the
value through the output projection, then the head) does not; `residual=true` is the released form. Key smoothing,
which needs the classes inside the tower, is left out; prompt denoising is `patch_scores.denoised`.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor

from vlkit.addons.base import Need, TowerEdit
from vlkit.addons.last_block import require_patches_of, switched
from vlkit.contracts import Progress
from vlkit.models.attention import AttentionParts
from vlkit.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class MaskClip(TowerEdit):
    """Values only.

    Attributes:
        residual: keep the residual path and the MLP of the last block, as the released code does.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"patches"})

    residual: bool = False

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Nothing; checks the tower."""
        require_patches_of(embedder)
        return self

    def edit(self, encoder: DualEncoder) -> AbstractContextManager[None]:
        """Patches of the joint space made of their own values."""
        return switched(encoder, identity_map, self.residual)


def identity_map(parts: AttentionParts, grid: tuple[int, int]) -> Tensor:
    """(L,L) for all images and heads: each position attends to itself."""
    value = parts.value
    return torch.eye(value.shape[-2], dtype=value.dtype, device=value.device)


ADDON = MaskClip
