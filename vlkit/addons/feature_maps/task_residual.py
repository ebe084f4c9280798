"""TaskRes: each class vector gets a residual of its own; names and prompts stay as they are.

    W' = unit(W + alpha R)        R zero at the start

Source: Yu et al. 2023, "Task Residual for Tuning Vision-Language Models", arXiv:2211.10277, and the authors' code:
alpha 0.5; Adam 2e-3, batch 256, cosine, one warm-up epoch at 1e-5; 100 epochs up to 4 shots, 200 from there.
Differs: the weight decay is that of CoOp's code, 5e-4, for which the sources read give none. The authors' enhanced
base, a text projection trained before, is not part of it. Trained on features in views that take turns. A class with
several names has a residual for each.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import FeatureMap, Need, Task, Vectors, learned
from vlkit.addons.cache_model import view
from vlkit.addons.feature_training import Schedule, parameter, train
from vlkit.addons.views import TEN_CROPS, ViewRecipe
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class TaskResidual(FeatureMap):
    """Residuals of class vectors.

    Attributes:
        alpha: scale of the residuals; 0 changes nothing.
        epochs: passes over the few-shot images; None: 100 up to 4 shots, else 200.
        lr: of Adam.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels", "class_names", "views"})
    tasks: ClassVar[frozenset[Task]] = frozenset({"classification"})
    any_classes: ClassVar[bool] = False
    fit_views: ClassVar[ViewRecipe | None] = TEN_CROPS

    alpha: float = 0.5
    epochs: int | None = None
    lr: float = 2e-3
    residual: Tensor | None = learned()  # (r,D)

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Train the residuals.

        Raises:
            ConfigError: class weights that depend on the image.
        """
        weights, shots = reference.weights, reference.few_shot
        if weights is None:
            raise ConfigError("task_residual changes class vectors; weights that depend on the image have none.")
        assert shots is not None and shots.labels is not None
        labels, residual = shots.labels, parameter(torch.zeros_like(weights.vectors))

        def loss(rows: Tensor, epoch: int) -> Tensor:
            seen = view(shots.vectors.rows(rows), epoch)
            moved = replace(weights, vectors=self._moved(weights.vectors, residual))
            return F.cross_entropy(self.logit_scale * moved.scores(seen.pooled), labels[rows])

        epochs = self.epochs
        if epochs is None:
            epochs = 100 if len(labels) <= 4 * weights.num_classes else 200
        schedule = Schedule(epochs, self.lr, optimizer="adam", weight_decay=5e-4, warmup_epochs=1)
        train([residual], schedule, len(labels), loss, reference.seed, progress)
        return replace(self, residual=residual.detach())

    def map(self, images: Vectors, texts: Vectors) -> tuple[Vectors, Vectors]:
        """Class vectors changed, images as they are.

        Raises:
            ConfigError: texts that are not the class vectors it was fitted with.
        """
        assert self.residual is not None
        if not len(texts):
            return images, texts
        if len(texts) != len(self.residual):
            raise ConfigError(
                f"task_residual learned a residual for each of {len(self.residual)} class vectors, but there are "
                f"{len(texts)}. Use the names and class weights it was fitted with."
            )
        return images, texts.with_pooled(self._moved(texts.pooled, self.residual), unit=True)

    def _moved(self, texts: Tensor, residual: Tensor) -> Tensor:
        return F.normalize(texts + self.alpha * residual, dim=-1)


ADDON = TaskResidual
