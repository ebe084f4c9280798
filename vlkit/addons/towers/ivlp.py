"""IVLP: deep prompts in both towers, learned independently of each other.

Text: in place of the first words of "a photo of a {}.", and again in front of each layer. Image: as VPT deep.

Source: Khattak et al. 2023, "MaPLe: Multi-modal Prompt Learning", arXiv:2210.03117, section 4.2 (independent V-L
prompting), and the authors' code: 2 + 2 vectors, start of the deeper ones and of the image's normal(0, 0.02^2); SGD.
Differs: prompts of the image come in behind the norm of the embedded patches. `depth` 9, as PromptSRC, which is IVLP
with regularisers, has it; MaPLe's table names 12.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from vlkit.addons.base import learned
from vlkit.addons.prompt_fit import RANDOM_STD
from vlkit.addons.tower_learning import Learned, TowerTask, WordedLearner
from vlkit.addons.tower_prompts import first_words, image_prompts, layers, text_prompts, width
from vlkit.models.dual_encoder import DualEncoder


@dataclass(frozen=True)
class IndependentPrompts(WordedLearner):
    """Whatever learns prompts in both towers, each tower its own: IVLP, and the methods that add to it.

    Attributes:
        text_tokens: vectors in front of a layer of the text tower; they start as the first tokens of `words`.
        image_tokens: the same in the vision tower.
        depth: layers that have them, from the first; more than a tower has: all of it.
    """

    epochs: int = 20
    lr: float = 0.0025
    batch_size: int = 4
    text_tokens: int = 2
    image_tokens: int = 2
    depth: int = 9
    text: Tensor | None = learned()  # (J,n,W) of the text tower
    image: Tensor | None = learned()  # (J,n,W) of the vision tower

    def start(self, task: TowerTask) -> Learned:
        """The words in front of the first layer of the text, small random numbers elsewhere."""
        random = torch.Generator().manual_seed(task.reference.seed)
        return {
            "text": text_start(task.encoder, self.words, self.text_tokens, self.depth, self.name, random),
            "image": image_start(task.encoder, self.image_tokens, self.depth, self.name, random),
        }

    @contextmanager
    def acting(self, encoder: DualEncoder, found: Learned) -> Iterator[None]:
        """Prompts in both towers."""
        with text_prompts(encoder, found["text"], self.words), image_prompts(encoder, found["image"]):
            yield


@dataclass(frozen=True)
class Ivlp(IndependentPrompts):
    """Independent prompts, and nothing else."""


def text_start(encoder: DualEncoder, words: str, count: int, depth: int, who: str, random: torch.Generator) -> Tensor:
    """(J,n,W) of the text tower: the words, then random numbers."""
    blocks = encoder.text_tower.blocks
    deeper = torch.randn(layers(depth, blocks, who) - 1, count, width(blocks), generator=random) * RANDOM_STD
    return torch.cat([first_words(encoder, words, count).float().cpu()[None], deeper])


def image_start(encoder: DualEncoder, count: int, depth: int, who: str, random: torch.Generator) -> Tensor:
    """(J,n,W) of the vision tower: random numbers."""
    blocks = encoder.vision_tower.blocks
    return torch.randn(layers(depth, blocks, who), count, width(blocks), generator=random) * RANDOM_STD


ADDON = Ivlp
