"""Pixel-adaptive mask refinement (PAMR): scores flow between neighbouring pixels that look alike.

refined = refine_masks(pixels, logits, steps=10)      # (3,H,W) uint8, (C,H,W) -> (C,H,W)
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vlkit.errors import ConfigError

DILATIONS = (8, 16)
# Sharpness of the affinity: differences count in tenths of the local standard deviation.
_SHARPNESS = 0.1
_NEIGHBOURS = [(row, column) for row in (-1, 0, 1) for column in (-1, 0, 1) if (row, column) != (0, 0)]


def check_refinement(steps: int, dilations: Sequence[int]) -> None:
    """Refuse what cannot be refined with.

    Raises:
        ConfigError: a negative number of steps, no dilation, or one below 1.
    """
    if steps < 0 or not dilations or min(dilations) < 1:
        raise ConfigError(f"PAMR with {steps} steps and dilations {list(dilations)}: expected steps >= 0 and pixels.")


def refine_masks(pixels: Tensor, masks: Tensor, steps: int = 10, dilations: Sequence[int] = DILATIONS) -> Tensor:
    """Each step gives a pixel the mean of its neighbours' scores, weighted by how alike they are to it.

    The neighbours of pixel i are the eight around it at each dilation. With channels c of the photograph x, over the
    eight neighbours and the pixel itself at every dilation taken together, s_c(i) is the standard deviation, and

        a(i,j) = softmax over j of  - mean over c of |x_c(i) - x_c(j)| / (0.1 s_c(i))

    is the weight of neighbour j. Beyond the edge, the edge's own pixels are repeated.

    Args:
        pixels: (3,H,W) of any range: the weights do not depend on it.
        masks: (C,H,W) scores of classes, on the same grid.
        steps: how often.
        dilations: distances of the neighbours, in pixels.

    Returns:
        (C,H,W) float32; memory is that of three times `masks` and of 8 x len(dilations) maps.

    Source: Araslanov and Roth 2020, "Single-Stage Semantic Segmentation from Image Labels", arXiv:2005.08104, section
    3.4; released code visinf/1-stage-wseg, commit bebc9a6, models/mods/pamr.py. The defaults (10 steps, dilations 8
    and 16, on scores at the photograph's size before the softmax) are SCLIP's, arXiv:2312.01597.
    Differs: the authors' own configuration refines with dilations 1, 2, 4, 8, 12 and 24.
    """
    check_refinement(steps, dilations)
    image, refined = pixels.float(), masks.float()
    if not steps:
        return refined
    weights = _affinity(image, dilations)
    for _ in range(steps):
        found = torch.zeros_like(refined)
        for weight, neighbour in zip(weights, _shifted(refined, dilations), strict=True):
            found.addcmul_(neighbour, weight)
        refined = found
    return refined


def _affinity(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """(P,H,W): the weight of each of the P neighbours of each pixel; they sum to 1."""
    around = torch.stack(list(_shifted(image, dilations)))
    # The pixel itself counts once for each dilation.
    deviation = torch.cat([around, image.expand(len(dilations), *image.shape)]).std(0)
    closeness = -(around - image).abs() / (1e-8 + _SHARPNESS * deviation)
    return closeness.mean(1).softmax(0)


def _shifted(maps: Tensor, dilations: Sequence[int]) -> Iterator[Tensor]:
    """(C,H,W) of the neighbours in turn, for each dilation the eight around a pixel."""
    height, width = maps.shape[1:]
    for distance in dilations:
        padded = F.pad(maps[None], [distance] * 4, mode="replicate")[0]
        for row, column in _NEIGHBOURS:
            top, left = distance * (1 + row), distance * (1 + column)
            yield padded[:, top : top + height, left : left + width]
