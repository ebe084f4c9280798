"""PLOT: several prompts a class, matched with the patches of an image by optimal transport.

    S_mn = cos(patch_m, prompt_cn)      T = Sinkhorn(1 - S), uniform marginals      score of c: sum_mn T_mn S_mn

T is found without gradient; the prompts are trained by cross-entropy of scale x score.

Source: Chen et al. 2023, "PLOT: Prompt Learning with Optimal Transport for Vision-Language Models", arXiv:2210.01253,
and the authors' code: 4 prompts of 16 vectors, eps 0.1, at most 100 rounds, tolerance 0.01; SGD 0.002, 50 epochs, batch
128; on ImageNet the score of the whole image is added (`whole`).
Differs: class weights, not a pair score, because a transport plan belongs to all prompts of a class at once. Patches
are those of a ViT in the joint space, the authors' of a ResNet. Of a class's names the first counts. Training as
`coop`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import Need
from vlkit.addons.class_names import ClassName
from vlkit.addons.exchange import ImageConditionedWeights, Vectors
from vlkit.addons.prompted_text import PromptedText, first_names
from vlkit.addons.text_prompts import Learned, Loss, PromptTask, TextPrompts, features_of
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.features.source import FeatureSource

# Images scored together: 16 x 1000 classes x 196 patches x 4 prompts are 50 MB.
IMAGES_AT_ONCE = 16


@dataclass(frozen=True)
class Plot(TextPrompts):
    """Prompts and patches by optimal transport; see `TextPrompts` for the other settings.

    Attributes:
        prompts: n of a class.
        eps: softness of the transport.
        rounds: of Sinkhorn, at most.
        tolerance: rounds end when the scaling changes less on average.
        whole: add the score of the whole image with the mean prompt.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels", "class_names", "grad_text", "patches"})

    epochs: int | None = 50
    batch_size: int = 128
    prompts: int = 4
    eps: float = 0.1
    rounds: int = 100
    tolerance: float = 1e-2
    whole: bool = False

    def start(self, task: PromptTask) -> Learned:
        """(n,M,W)."""
        if self.prompts < 1 or self.eps <= 0 or self.rounds < 1:
            raise ConfigError(f"plot: {self.prompts} prompts, eps {self.eps}, {self.rounds} rounds; all are positive.")
        return {"vectors": self.first_vectors(task, sets=self.prompts)}

    def objective(self, task: PromptTask, found: Learned) -> Loss:
        """Cross-entropy of the transported score."""
        assert task.vectors.patches is not None, "the need `patches` was declared"
        patches = task.vectors.patches.to(task.images.device).clone()

        def loss(rows: Tensor) -> Tensor:
            features = task.text.features(found["vectors"][:, None])
            scores = self.scores(task.images[rows], patches[rows], features)
            return F.cross_entropy(task.scale * scores, task.labels[rows])

        return loss

    def scores(self, images: Tensor, patches: Tensor, features: Tensor) -> Tensor:
        """(B,C) of images (B,D) with patches (B,P,D) and prompts (n,C,D)."""
        similarity = torch.einsum("bpd,ncd->bcpn", patches, features)
        moved = (transport(1 - similarity.detach(), self.eps, self.rounds, self.tolerance) * similarity).sum((-2, -1))
        return moved + images @ features.mean(0).T if self.whole else moved

    def prompted(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> PromptedText:
        """With the first name of each class."""
        return super().prompted(first_names(class_names), embedder)

    def weights(self, class_names: Sequence[ClassName], embedder: "FeatureSource") -> ImageConditionedWeights:
        """Of the patches of each image."""
        assert self.vectors is not None
        features = features_of(self.prompted(class_names, embedder), self.vectors[:, None])

        def conditioned(images: Vectors) -> Tensor:
            if images.patches is None:
                raise ConfigError("plot compares patches; these images have none. Make `Passes` with local=True.")
            parts = zip(images.pooled.split(IMAGES_AT_ONCE), images.patches.split(IMAGES_AT_ONCE), strict=True)
            with torch.no_grad():
                found = [self.scores(pooled, patches, features) for pooled, patches in parts]
            return torch.cat([images.pooled.new_empty(0, len(class_names)), *found])

        return ImageConditionedWeights(conditioned, len(class_names))


@torch.no_grad()
def transport(cost: Tensor, eps: float, rounds: int, tolerance: float) -> Tensor:
    """Plans (...,P,n) of least cost with uniform marginals, softened by eps; their entries sum to 1.

    Source: Cuturi 2013, "Sinkhorn Distances", arXiv:1306.0895, algorithm 1.
    """
    kernel = (-cost / eps).exp()
    num_rows, num_columns = cost.shape[-2:]
    rows = cost.new_full((*cost.shape[:-1], 1), 1 / num_rows)
    columns = cost.new_full((*cost.shape[:-2], 1, num_columns), 1 / num_columns)
    for _ in range(rounds):
        before = rows
        rows = 1 / num_rows / (kernel * columns).sum(-1, keepdim=True)
        columns = 1 / num_columns / (kernel * rows).sum(-2, keepdim=True)
        if (rows - before).abs().mean() < tolerance:
            break
    return rows * kernel * columns


ADDON = Plot
