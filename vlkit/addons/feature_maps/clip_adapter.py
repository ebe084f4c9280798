"""CLIP-Adapter: a small network changes image features, and most of each feature stays as it is.

    x' = unit(ratio relu(U relu(D x)) + (1 - ratio) x)        D to a quarter of the channels, U back, no biases

Source: Gao et al. 2021, "CLIP-Adapter: Better Vision-Language Models with Feature Adapters", arXiv:2110.04544, and the
authors' code: ratio 0.2.
Differs: the ratio is chosen among 0.2, 0.4, 0.6 and 0.8 on validation images where there are any (the authors choose it
for each data set), else 0.2. Trained on features in views that take turns. The optimiser is not fixed by the sources
read (the paper: 1e-5, later re-implementations: SGD at 0.01 and 0.1): ours is AdamW 1e-3, batch 256, cosine,
100 epochs.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.base import FeatureMap, Need, Task, Vectors, learned
from vlkit.addons.cache_model import best_setting, grid, view
from vlkit.addons.feature_training import Schedule, bottleneck, fresh_bottleneck, parameter, train
from vlkit.addons.views import TEN_CROPS, ViewRecipe
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource

RATIO = 0.2
_RATIOS = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class ClipAdapter(FeatureMap):
    """A small network on image features.

    Attributes:
        ratio: share of the network's output; None: chosen on validation images, else 0.2. 0 changes nothing.
        reduction: how many times narrower the network is in the middle.
        epochs: passes over the few-shot images.
        lr: of AdamW.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"few_shot_labels", "class_names", "views"})
    uses: ClassVar[frozenset[Need]] = frozenset({"val_labels"})
    tasks: ClassVar[frozenset[Task]] = frozenset({"classification"})
    fit_views: ClassVar[ViewRecipe | None] = TEN_CROPS

    ratio: float | None = None
    reduction: int = 4
    epochs: int = 100
    lr: float = 1e-3
    down: Tensor | None = learned()  # (D/reduction,D)
    up: Tensor | None = learned()  # (D,D/reduction)

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Train, once for each ratio there is to choose from.

        Raises:
            ConfigError: class weights that depend on the image, or a reduction below 1.
        """
        if reference.weights is None:
            raise ConfigError("clip_adapter learns beside class vectors; weights that depend on the image have none.")
        if self.reduction < 1:
            raise ConfigError(f"clip_adapter: reduction is {self.reduction}; expected at least 1.")
        if reference.val is None or self.ratio is not None:
            return self._trained(reference, RATIO if self.ratio is None else self.ratio, progress)
        tried = {ratio: self._trained(reference, ratio, progress) for ratio in grid(None, _RATIOS)}
        assert reference.logits is not None
        logits, images = reference.logits, reference.val.vectors
        (ratio,) = best_setting(reference, (((ratio,), logits(one._changed(images))) for ratio, one in tried.items()))
        return tried[ratio]

    def map(self, images: Vectors, texts: Vectors) -> tuple[Vectors, Vectors]:
        """Images changed, texts as they are."""
        return self._changed(images), texts

    def _changed(self, images: Vectors) -> Vectors:
        assert self.down is not None and self.up is not None and self.ratio is not None
        if self.ratio == 0:
            return images
        return images.with_pooled(bottleneck(images.pooled, self.down, self.up, self.ratio), unit=True)

    def _trained(self, reference: "Reference", ratio: float, progress: Progress | None) -> Self:
        shots, logits = reference.few_shot, reference.logits
        assert shots is not None and shots.labels is not None and logits is not None
        labels, dim = shots.labels, shots.vectors.pooled.shape[1]
        down, up = (parameter(one) for one in fresh_bottleneck(dim, self.reduction, reference.seed))

        def loss(rows: Tensor, epoch: int) -> Tensor:
            seen = view(shots.vectors.rows(rows), epoch)
            changed = seen.with_pooled(bottleneck(seen.pooled, down, up, ratio), unit=True)
            return F.cross_entropy(logits(changed), labels[rows])

        if ratio != 0:
            train([down, up], Schedule(self.epochs, self.lr), len(labels), loss, reference.seed, progress)
        return replace(self, ratio=ratio, down=down.detach(), up=up.detach())


ADDON = ClipAdapter
