"""Test-time augmentation (TTA): the feature of an image is the mean over views of it.

    x' = unit(mean_v unit(f(view_v)))        view 0 is the image as the model sees it, the others are random crops

With `distribution_norm` behind it this is TTA + DN: the reference images go through the same views, so that the means
that are subtracted are means of averaged features.

Source: Zhou et al. 2023, "Test-Time Distribution Normalization for Contrastively Learned Vision-language Models",
arXiv:2302.11084, rows TTA and TTA + DN: features of augmented views are averaged before DN.
Differs: which augmentations is said neither in the paper nor in the authors' code; ours are the image itself and nine
crops of 0.6 to 1.0 of its area, half of them mirrored. The lengths of the views' features are not kept, so that DN in
its classification form acts on unit features behind TTA.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch.nn.functional as F

from vlkit.addons.base import FeatureMap, Need, Vectors
from vlkit.addons.views import TEST_VIEWS, ViewRecipe
from vlkit.contracts import Progress
from vlkit.errors import ConfigError

if TYPE_CHECKING:
    from vlkit.addons.reference import Reference
    from vlkit.features.source import FeatureSource


@dataclass(frozen=True)
class AveragedViews(FeatureMap):
    """The mean over views of each image.

    Attributes:
        crops: share of the views' mean in the feature; the rest is the image as it is. 0 changes nothing.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"views"})
    views: ClassVar[ViewRecipe | None] = TEST_VIEWS

    crops: float = 1.0

    def learn(self, reference: "Reference", embedder: "FeatureSource", progress: Progress | None = None) -> Self:
        """Nothing."""
        if not 0 <= self.crops <= 1:
            raise ConfigError(f"tta has crops = {self.crops}; expected a share from 0 to 1.")
        return self

    def map(self, images: Vectors, texts: Vectors) -> tuple[Vectors, Vectors]:
        """Images changed, texts as they are.

        Raises:
            ConfigError: images whose views nobody made.
        """
        if not len(images) or self.crops == 0:
            return images, texts
        if images.views is None:
            raise ConfigError(
                "tta averages views of each image, but only one feature of each is there (a stored gallery, or a query "
                "image). Encode the images with their views, or leave tta out."
            )
        mean = (1 - self.crops) * images.pooled + self.crops * images.views.mean(1)
        return images.with_pooled(F.normalize(mean, dim=-1), unit=True), texts


ADDON = AveragedViews
