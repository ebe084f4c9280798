"""MaPLe: deep prompts in the text tower, and in the vision tower what linear maps make of them.

    image prompts of layer j = A_j P_j + b_j,    P_j the text prompts of layer j

Gradients of the image reach the text's prompts, so that both towers move together.

Source: Khattak et al. 2023, "MaPLe: Multi-modal Prompt Learning", arXiv:2210.03117, section 3.2, and the authors' code:
2 vectors at 9 layers, the first ones "a photo" (of "a photo of a {}."), deeper ones normal(0, 0.02^2), maps as torch
draws linear layers, those of the deeper layers all alike at first; SGD 0.0035, batch 4, 5 epochs.
Differs: prompts of the image come in behind the norm of the embedded patches. Towers of unequal depth have prompts up
to the shallower one's last layer.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import learned
from vlkit.addons.tower_learning import Learned, TowerTask, WordedLearner
from vlkit.addons.tower_prompts import OfLayer, image_prompts, text_prompts, width
from vlkit.addons.towers.ivlp import text_start
from vlkit.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class Maple(WordedLearner):
    """Coupled prompts in both towers.

    Attributes:
        text_tokens: vectors in front of a layer, of either tower.
        depth: layers that have them, from the first; more than a tower has: all of it.
    """

    epochs: int = 5
    lr: float = 0.0035
    batch_size: int = 4
    text_tokens: int = 2
    depth: int = 9
    text: Tensor | None = learned()  # (J,n,W)
    maps: Tensor | None = learned()  # (J,V,W) from the width of the text tower to that of the vision tower
    offsets: Tensor | None = learned()  # (J,V)

    def start(self, task: TowerTask) -> Learned:
        """The words and random numbers; maps as torch draws them."""
        random = torch.Generator().manual_seed(task.reference.seed)
        vision = task.encoder.vision_tower.blocks
        depth = min(self.depth, len(vision))
        text = text_start(task.encoder, self.words, self.text_tokens, depth, self.name, random)
        bound = 1 / math.sqrt(text.shape[2])
        # One draw for the first layer, one for all others.
        maps = (2 * torch.rand(2, width(vision), text.shape[2], generator=random) - 1) * bound
        offsets = (2 * torch.rand(2, width(vision), generator=random) - 1) * bound
        which = [0] + [1] * (len(text) - 1)
        return {"text": text, "maps": maps[which], "offsets": offsets[which]}

    @contextmanager
    def acting(self, encoder: DualEncoder, found: Learned) -> Iterator[None]:
        """Prompts in both towers."""
        text = found["text"]
        with text_prompts(encoder, text, self.words), image_prompts(encoder, text, coupling(found)):
            yield


def coupling(found: Learned) -> OfLayer:
    """Text prompts (n,W) of a layer to the image prompts (n,V) that belong to them."""

    def of_layer(layer: int, text: Tensor) -> Tensor:
        return F.linear(text, found["maps"][layer].to(text), found["offsets"][layer].to(text))

    return of_layer


ADDON = Maple
