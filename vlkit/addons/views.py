"""Further views of an image: random crops and mirrorings, the same in every run.

    recipe = ViewRecipe(num_views=10)
    recipe.of(pixels, preprocess, number=3)      # (V,3,S,S) uint8

Recipes are shared constants: add-ons that want the same views cost one pass of the image tower together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vlkit.data.augment import Augment
from vlkit.data.randomness import generator
from vlkit.data.transforms import Preprocess


@dataclass(frozen=True)
class ViewRecipe:
    """How V views are made of one image. View 0 is the plain one where `plain_first`.

    Attributes:
        num_views: V.
        crop_scale: smallest and largest share of the image's area that a view shows.
        hflip: probability of mirroring.
        plain_first: whether the model's own preprocessing is the first of the V views.
        seed: of the draws; an image gets the same views whenever it is asked for.
    """

    num_views: int
    crop_scale: tuple[float, float] = (0.5, 1.0)
    hflip: float = 0.5
    plain_first: bool = False
    seed: int = 0

    def of(self, pixels: Tensor, preprocess: Preprocess, number: int) -> Tensor:
        """(3,H,W) uint8 to (V,3,S,S) uint8.

        Args:
            pixels: the decoded image.
            preprocess: of the model.
            number: of the image; decides the draws.
        """
        augment = Augment(crop_scale=self.crop_scale, hflip=self.hflip)
        views = [preprocess(pixels)] if self.plain_first else []
        for view in range(len(views), self.num_views):
            random = generator(self.seed, view, number, "views")
            views.append(augment.apply(pixels, preprocess.size, preprocess.interpolation, random))
        return torch.stack(views)


# Few-shot keys: mean over ten augmented passes (Tip-Adapter, APE, TIP-X).
TEN_CROPS = ViewRecipe(10)
# Test-time augmentation: the image itself and nine crops.
TEST_VIEWS = ViewRecipe(10, crop_scale=(0.6, 1.0), plain_first=True, seed=1)
# Test-time tuning: the image itself and 63 crops (TPT).
TUNING_VIEWS = ViewRecipe(64, crop_scale=(0.3, 1.0), plain_first=True, seed=2)
