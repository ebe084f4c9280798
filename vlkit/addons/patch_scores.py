"""Scores of patches for classes, and of whole pictures of any size through a sliding window: zero-shot segmentation.

    def score(squares):                                                  # (b,3,S,S) uint8 -> (b,P,C)
        return patch_scores(encoder.encode_patches(squares), weights)

    maps = window_scores(score, pixels, Window(short_side=96, size=64, stride=32))     # (C,h,w)
    labels = segmented(enlarged(maps, height, width) * 40, threshold=0.1)             # (H,W), -1: background

What `score` does is free: `with editing(encoder, [ClearClip()])` or a finer `patch_stride(encoder, 4)` around it, a
head (`pacl.patches_of(encoder.patch_tokens(squares))`), or `surgery_scores`.

Source: Wang et al. 2024, arXiv:2312.01597 (windows and their mean), Zhou et al. 2022, arXiv:2112.01071 (prompt
denoising), Mukhoti et al. 2023, arXiv:2212.04994 (cosines of patches, enlarged bilinearly).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.addons.exchange import ClassWeights
from vlkit.addons.last_block import grid_of
from vlkit.data.resizing import Interpolation, interpolate
from vlkit.errors import ConfigError
from vlkit.models.dual_encoder import DualEncoder

BACKGROUND = -1
# Windows that are scored together.
_BATCH = 16
# A strip one pixel high would be enlarged to gigabytes.
_MAX_ASPECT = 16


class Window(NamedTuple):
    """How a picture is gone through, in pixels of the model."""

    short_side: int  # of the picture, after it is resized
    size: int  # of the square that the model takes
    stride: int  # from one window to the next


def window_of(encoder: DualEncoder, short_side: int | None = None, stride: int | None = None) -> Window:
    """The window of a model; by default 1.5 of it on the short side, moved by half of it (SCLIP: 336, 224, 112).

    Raises:
        ConfigError: a short side below the window, or a stride that leaves gaps.
    """
    size = encoder.image_size
    found = Window(short_side or size * 3 // 2, size, stride or max(1, size // 2))
    if found.short_side < size or not 1 <= found.stride <= size:
        raise ConfigError(
            f"A window of {size} pixels cannot be moved by {found.stride} over a short side of {found.short_side}; "
            f"expected a short side of at least {size} and a stride of 1 to {size}."
        )
    return found


def patch_scores(patches: Tensor, weights: ClassWeights) -> Tensor:
    """Cosine of each patch with each class, reduced over the vectors of a class.

    Args:
        patches: (B,P,D) of any length.
        weights: of C classes.

    Returns:
        (B,P,C), on the device of the patches.
    """
    unit = F.normalize(patches.float(), dim=-1)
    bias = None if weights.bias is None else weights.bias.to(unit)
    here = ClassWeights(weights.vectors.to(unit), weights.class_of.to(unit.device), weights.reduce, bias)
    found: Tensor = here.scores(unit.flatten(0, 1)).unflatten(0, patches.shape[:2])
    return found


@torch.inference_mode()
def window_scores(
    score: Callable[[Tensor], Tensor], pixels: Tensor, window: Window, interpolation: Interpolation = "bicubic"
) -> Tensor:
    """Scores of every part of one picture: of each window enlarged bilinearly, and where windows overlap their mean.

    The last window of a row or column ends at the edge.

    Args:
        score: squares (b,3,S,S) uint8 on the CPU -> scores (b,P,C) of their patches, on any device.
        pixels: (3,H,W) uint8 of any size.
        window: see `window_of`.
        interpolation: of the picture to its short side.

    Returns:
        (C,h,w) float32 on the CPU, at the size the picture was resized to.

    Raises:
        ConfigError: a picture longer than 16 times its width.
    """
    resized = _resized(pixels, window.short_side, interpolation)
    places = [(top, left) for top in _starts(resized.shape[1], window) for left in _starts(resized.shape[2], window)]
    total, count = torch.zeros(0), torch.zeros(resized.shape[1:])
    for first in range(0, len(places), _BATCH):
        chunk = places[first : first + _BATCH]
        cut = torch.stack([resized[:, top : top + window.size, left : left + window.size] for top, left in chunk])
        maps = _as_maps(score(cut).float().cpu())
        large = enlarged(maps, window.size, window.size)
        if not len(total):
            total = torch.zeros(maps.shape[1], *resized.shape[1:])
        for (top, left), one in zip(chunk, large, strict=True):
            total[:, top : top + window.size, left : left + window.size] += one
            count[top : top + window.size, left : left + window.size] += 1
    return total / count


def enlarged(maps: Tensor, height: int, width: int) -> Tensor:
    """Maps (C,h,w) or (B,C,h,w) to that size, bilinearly."""
    batch = maps if maps.ndim == 4 else maps[None]
    found = F.interpolate(batch, (height, width), mode="bilinear", align_corners=False)
    return found if maps.ndim == 4 else found[0]


def segmented(logits: Tensor, threshold: float = 0.0) -> Tensor:
    """The class of each pixel, or BACKGROUND where no class has so much probability.

    Args:
        logits: (C,H,W), a multiple of the scores: papers take 40 or 50 in place of the model's scale.
        threshold: least probability (softmax over the classes) of a class that is named.

    Returns:
        (H,W) int64.
    """
    best = logits.softmax(dim=0).max(dim=0)
    return best.indices.masked_fill(best.values < threshold, BACKGROUND)


def denoised(logits: Tensor, threshold: float = 0.5) -> Tensor:
    """Prompt denoising: a class that is nowhere in the picture more probable than `threshold` is left out (-inf).

    Args:
        logits: (C,H,W). The most probable class always stays.
        threshold: of the softmax over the classes.
    """
    highest = logits.softmax(dim=0).flatten(1).amax(dim=1)
    out = highest < min(threshold, float(highest.max()))
    return logits.masked_fill(out[:, None, None], -torch.inf)


def _resized(pixels: Tensor, short_side: int, interpolation: Interpolation) -> Tensor:
    height, width = pixels.shape[1:]
    short = min(height, width)
    if max(height, width) > _MAX_ASPECT * short:
        raise ConfigError(f"A picture of {width} x {height} pixels is too narrow to be gone through window by window.")
    size = [max(short_side, round(side * short_side / short)) for side in (height, width)]
    return interpolate(pixels, size[0], size[1], interpolation)


def _starts(length: int, window: Window) -> list[int]:
    return [*range(0, length - window.size, window.stride), length - window.size]


def _as_maps(scores: Tensor) -> Tensor:
    """(B,P,C) of a square of patches to (B,C,rows,columns)."""
    maps: Tensor = scores.transpose(1, 2).unflatten(2, grid_of(scores.shape[1], (0, 0)))
    return maps
