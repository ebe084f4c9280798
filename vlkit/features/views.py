"""Views of an image for test-time augmentation: the image and its mirror image, or ten crops.

    embed_views(embedder, records, "ten-crop")      # (N,10,D); their mean is the usual feature of such a recipe

flip: the preprocessed image, then its mirror image.
ten-crop: the image preprocessed at 8/7 of the model's size (256 for 224), its four corners and its centre, then the
mirror images of the five.

Source: Krizhevsky et al. 2012, "ImageNet Classification with Deep Convolutional Neural Networks", section 4.1.
Differs: the square that is cropped comes from the model's own resize mode, so that nothing is stretched.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.data.images import ImageLike
from vlkit.errors import ConfigError, DataError, did_you_mean
from vlkit.models.embedder import Embedder

Recipe = Literal["flip", "ten-crop"]
NUM_VIEWS: dict[str, int] = {"flip": 2, "ten-crop": 10}


def check_recipe(recipe: str) -> Recipe:
    """The recipe, if there is one of that name.

    Raises:
        ConfigError: there is none.
    """
    if recipe not in NUM_VIEWS:
        raise ConfigError(f"Unknown recipe of views {recipe!r}. {did_you_mean(recipe, NUM_VIEWS)}")
    return recipe  # type: ignore[return-value]


def square_size(size: int, recipe: Recipe) -> int:
    """Side of the square that views of `size` pixels are cut from."""
    return size if recipe == "flip" else round(size * 8 / 7)


def cut_views(squares: Tensor, size: int, recipe: Recipe) -> Tensor:
    """Views (B,V,3,size,size) of squares (B,3,S,S) with S = `square_size(size, recipe)`."""
    if recipe == "flip":
        crops = [squares]
    else:
        far = squares.shape[-1] - size
        middle = round(far / 2)
        corners = ((0, 0), (0, far), (far, 0), (far, far), (middle, middle))
        crops = [squares[..., top : top + size, left : left + size] for top, left in corners]
    return torch.stack([*crops, *(crop.flip(-1) for crop in crops)], dim=1)


def embed_views(
    embedder: Embedder,
    images: Sequence[ImageLike],
    recipe: Recipe,
    batch_size: int = 64,
    workers: int | None = None,
) -> Tensor:
    """Features of all views: (N,V,D) float32, unit norm, on the CPU.

    Args:
        embedder: the model.
        images: N paths, pillow images or records.
        recipe: which views.
        batch_size: views per pass.
        workers: threads that decode; None is one per core, at most 8.

    Raises:
        DataError: an image cannot be read.
    """
    size, count = embedder.encoder.preprocess.size, NUM_VIEWS[recipe]
    preprocess = replace(embedder.encoder.preprocess, size=square_size(size, recipe))
    out = torch.empty(len(images), count, embedder.embed_dim)
    for chunk in embedder.iterate_pixels(images, max(1, batch_size // count), workers, preprocess):
        if chunk.failures:
            raise DataError(f"Image {chunk.failures[0][0]} of {len(images)}: {chunk.failures[0][1]}")
        views = cut_views(chunk.images, size, recipe)
        with torch.inference_mode():
            raw = embedder.encoder.encode_image(views.flatten(0, 1).to(embedder.device), normalize=False)
            unit = F.normalize(raw.float(), dim=-1).cpu()
        out[chunk.rows] = unit.unflatten(0, (-1, count))
    return out
