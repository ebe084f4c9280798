"""The switch on the last block of a ViT that the methods for dense prediction share: another attention map there.

    with switched(encoder, lambda parts, grid: attention_map(parts), residual=True):     # the stock block
        encoder.encode_patches(images)

Each method chooses the map of the last block, and whether its residual path and MLP stay. Only the patches see the
switch: the class position keeps what the block gives it, so the pooled feature of a class-token ViT is the stock one,
to the bit. Nothing is written into the model; a hook adds the second way through the block, and goes when the block
ends. With the attention of the block itself (queries and keys), residual and MLP, the patches are those of the model.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlkit.errors import ConfigError, ModelError
from vlkit.models.attention import AttentionParts, attention_parts, feed_forward, mix_values
from vlkit.models.dual_encoder import DualEncoder

if TYPE_CHECKING:
    from vlkit.features.source import FeatureSource

# Queries, keys and values of the last block and the grid of patches -> the map (B,H,1+P,1+P).
Weighting = Callable[[AttentionParts, tuple[int, int]], Tensor]


@contextmanager
def switched(encoder: DualEncoder, weighting: Weighting, residual: bool) -> Iterator[None]:
    """Within it the patches of the last block are mixed by another map.

    Args:
        encoder: with an open_clip ViT.
        weighting: the map; the class position is row and column 0.
        residual: whether the block's input is added, and its MLP runs, as in the stock block.

    Raises:
        ModelError: a tower without a way in, or whose patches are not in the joint space.
    """
    require_patches(encoder)
    tower = encoder.vision_tower

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...], stock: Tensor) -> Tensor:
        x = inputs[0]
        parts = attention_parts(module, x)
        out = mix_values(module, weighting(parts, grid_of(x.shape[1] - 1, tower.grid)), parts.value)
        if residual:
            out = x + out
            out = out + feed_forward(module, out)
        return torch.cat([stock[:, :1], out[:, 1:]], dim=1)

    handle = tower.blocks[-1].module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def require_patches(encoder: DualEncoder) -> None:
    """Refuse towers whose patches are not in the space of the texts.

    Raises:
        ModelError: says what the tower is.
    """
    if "patches" not in encoder.gives:
        tower = encoder.vision_tower  # says what is wrong where there is no way in at all
        raise ModelError(
            f"This vision tower of {len(tower.blocks)} blocks normalises after pooling, so its patches have no place "
            "in the joint space and there is nothing to score. Take a model that normalises before pooling (any CLIP "
            "ViT)."
        )


def require_patches_of(source: "FeatureSource") -> None:
    """The same for the model of a source, when an add-on is fitted.

    Raises:
        ModelError: see `require_patches`.
    """
    require_patches(source.embedder.encoder)


def grid_of(num_patches: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of so many patches, for a tower whose own grid may be coarser: the same shape, finer."""
    rows, columns = grid
    if rows * columns == num_patches:
        return grid
    # Square models only: a finer stride makes as many rows as columns.
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ConfigError(
            f"The tower gives {num_patches} patches, which are no square, and its grid is {rows}x{columns}: prompts of "
            "another add-on stand among them. Leave learned image prompts out of a pipeline with this switch."
        )
    return side, side
