"""Finer patches of a ViT at use: the same kernels at a smaller stride.

    with patch_stride(encoder, 4):
        encoder.encode_patches(images)      # four times as many rows and columns for patches of 16 pixels

Position embeddings are resized to the finer grid. Nothing is written into the weights, and afterwards the model
computes what it did before, to the bit.

Source: Mukhoti et al. 2023, arXiv:2212.04994: segmentation with the patch embedding at stride 4.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vlkit.errors import ConfigError
from vlkit.models.dual_encoder import DualEncoder


@contextmanager
def patch_stride(encoder: DualEncoder, stride: int) -> Iterator[None]:
    """Within it the vision tower cuts patches every `stride` pixels.

    Args:
        encoder: with an open_clip ViT.
        stride: from 1 to the size of a patch.

    Raises:
        ModelError: the encoder has no way into its vision tower.
        ConfigError: a stride larger than a patch, or below 1.
    """
    _ = encoder.vision_tower  # what it cannot be done to says so itself
    untyped: Any = encoder
    convolution = untyped.model.visual.conv1
    size = convolution.kernel_size[0]
    if not 1 <= stride <= size:
        raise ConfigError(f"A patch stride of {stride} pixels; patches of this model have {size}: expected 1 to that.")
    before = convolution.stride
    convolution.stride = (stride, stride)
    try:
        yield
    finally:
        convolution.stride = before
