"""CoCoOp: CoOp whose words move with the image, by a small network of its feature.

    context(x) = [v_1 + n(x) ... v_M + n(x)]     n(x) = B relu(A x + a) + b     A: D -> D/16, B: D/16 -> width

Class weights are those of each image: at use, all prompts go through the text tower once an image.

Source: Zhou, Yang, Loy and Liu 2022, "Conditional Prompt Learning for Vision-Language Models", arXiv:2203.05557, and
the authors' code, commit ff61507: 4 vectors from "a photo of a", batch 1, 10 epochs, SGD 0.002; the network drawn as
torch draws linear layers.
Differs: as `coop`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import learned
from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import ImageConditionedWeights, Vectors
from vlkit.addons.prompt_fit import frozen
from vlkit.addons.text_prompts import Learned, Loss, PromptTask, TextPrompts

if TYPE_CHECKING:
    from vlkit.features.source import FeatureSource

REDUCTION = 16
# Images whose prompts go through the text tower together at use.
IMAGES_AT_ONCE = 16


@dataclass(frozen=True)
class CoCoOp(TextPrompts):
    """Learned words that move with the image; see `TextPrompts` for the settings."""

    words: str = "a photo of a"
    epochs: int | None = 10
    batch_size: int = 1
    down: Tensor | None = learned()  # A (D/16,D)
    down_bias: Tensor | None = learned()
    up: Tensor | None = learned()  # B (W,D/16)
    up_bias: Tensor | None = learned()

    def start(self, task: PromptTask) -> Learned:
        """The words, and the network."""
        dim, width = task.images.shape[1], task.text.words.shape[-1]
        inner = max(1, dim // REDUCTION)
        random = torch.Generator().manual_seed(task.seed + 1)

        def drawn(*shape: int, fan: int) -> Tensor:
            return ((torch.rand(*shape, generator=random) * 2 - 1) / math.sqrt(fan)).to(task.images)

        network = {
            "down": drawn(inner, dim, fan=dim),
            "down_bias": drawn(inner, fan=dim),
            "up": drawn(width, inner, fan=inner),
            "up_bias": drawn(width, fan=inner),
        }
        return super().start(task) | network

    def objective(self, task: PromptTask, found: Learned) -> Loss:
        """Cross-entropy, each image with prompts of its own."""

        def loss(rows: Tensor) -> Tensor:
            images = task.images[rows]
            features = task.text.features(moved(found, images))
            return F.cross_entropy(task.scale * task.text.per_image_scores(images, features), task.labels[rows])

        return loss

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ImageConditionedWeights:
        """Of each image."""
        text = self.prompted(class_names, embedder)
        device = text.encoder.device
        found = {name: getattr(self, name).to(device) for name in ("vectors", "down", "down_bias", "up", "up_bias")}

        def conditioned(images: Vectors) -> Tensor:
            scores = [images.pooled.new_empty(0, len(class_names))]
            with torch.no_grad(), frozen(text.encoder):
                for part in F.normalize(images.pooled, dim=-1).to(device).split(IMAGES_AT_ONCE):
                    scores.append(text.per_image_scores(part, text.features(moved(found, part))).cpu())
            return torch.cat(scores)

        return ImageConditionedWeights(conditioned, len(class_names))


def moved(found: Learned, images: Tensor) -> Tensor:
    """(B,1,M,W) words of images (B,D)."""
    inner = F.relu(images @ found["down"].T + found["down_bias"])
    shift = inner @ found["up"].T + found["up_bias"]
    return (found["vectors"] + shift[:, None])[:, None]


ADDON = CoCoOp
