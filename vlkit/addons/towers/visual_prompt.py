"""VPT: learned vectors among the patches of a frozen ViT, in front of its first layer (shallow) or of each (deep).

    x_0 = [class, patches, P_0];    deep: in front of layer j, P_j takes the place of what layer j-1 made of P_(j-1)

Source: Jia et al. 2022, "Visual Prompt Tuning", arXiv:2203.12119, sections 3.2 and 3.3, and the authors' code: uniform
start within sqrt(6 / (3 p^2 + W)) for patches of p pixels, 5 vectors.
Differs: CLIP in place of a classifier trained with labels: the head is the zero-shot one and stays as it is, and the
loss is cross-entropy over its logits, trained as in MaPLe's code (its variant with prompts in the vision tower alone).
The vectors stand behind the patches, not before them, which for a ViT is the same, and come in behind the norm of the
embedded patches.
"""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from vlkit.addons.base import learned
from vlkit.addons.tower_learning import Learned, TowerLearner, TowerTask
from vlkit.addons.tower_prompts import image_prompts, layers, width
from vlkit.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class VisualPrompt(TowerLearner):
    """Prompts in the vision tower.

    Attributes:
        tokens: vectors in front of a layer.
        depth: layers that have them, from the first; 1 is VPT shallow, more is VPT deep. More than there are: all.
    """

    tokens: int = 5
    depth: int = 12
    prompts: Tensor | None = learned()  # (J,n,W)

    def start(self, task: TowerTask) -> Learned:
        """Uniform numbers, small for wide towers."""
        tower = task.encoder.vision_tower
        patch = task.encoder.image_size // tower.grid[0]
        bound = math.sqrt(6 / (3 * patch**2 + width(tower.blocks)))
        shape = layers(self.depth, tower.blocks, self.name), self.tokens, width(tower.blocks)
        random = torch.Generator().manual_seed(task.reference.seed)
        return {"prompts": (2 * torch.rand(shape, generator=random) - 1) * bound}

    def acting(self, encoder: DualEncoder, found: Learned) -> AbstractContextManager[None]:
        """Prompts behind the patches."""
        return image_prompts(encoder, found["prompts"])


ADDON = VisualPrompt
