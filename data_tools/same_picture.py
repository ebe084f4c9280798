"""Do two thumbnails show one picture? They are laid over each other, and what they share is compared.

A cropped or stretched copy lies a few pixels off, and correlation falls quickly with that. So position and scale of one
are first fitted to the other (Gauss-Newton on the four numbers of an axis-parallel map), starting from the pair of
windows whose hashes agreed.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from data_tools.perceptual_hash import THUMBNAIL, WINDOWS, luminance

MIN_CORRELATION = 0.95
_MAX_COLOUR = 25.0  # grey levels the mean colour of an eighth of the side may differ by, on average
_MIN_SHARED = 0.6  # share of the area, of either, that the other must show
_HOPELESS = 0.3  # correlation before the fit: crops of up to 15% a side start above it
_ITERATIONS = 6
_COLOUR_CELLS = 8
_PAIRS_AT_A_TIME = 256


class Match(NamedTuple):
    """How alike the two pictures of each pair are; P pairs."""

    correlation: NDArray[np.float32]  # (P,) of the luminance where they overlap, -1 to 1
    same: NDArray[np.bool_]  # (P,) copies: correlated, of one colour, and mostly overlapping


def compare(
    first: NDArray[np.uint8],
    second: NDArray[np.uint8],
    window: NDArray[np.int64],
    min_correlation: float = MIN_CORRELATION,
) -> Match:
    """Fit each `first` onto its `second` and compare them.

    Args:
        first, second: (P, 64, 64, 3) thumbnails.
        window: (P,) the window of `first` (a row of WINDOWS) that looks like the whole of `second`.
        min_correlation: of copies.
    """
    correlation, same = np.full(len(first), -1, np.float32), np.zeros(len(first), bool)
    for start in range(0, len(first), _PAIRS_AT_A_TIME):
        rows = slice(start, start + _PAIRS_AT_A_TIME)
        correlation[rows], colour = _compare_some(first[rows], second[rows], torch.tensor(WINDOWS)[window[rows]])
        same[rows] = (correlation[rows] >= min_correlation) & (colour <= _MAX_COLOUR)
    return Match(correlation, same)


def _compare_some(
    first: NDArray[np.uint8], second: NDArray[np.uint8], window: Tensor
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Correlation and colour distance of P pairs, starting from windows (P, 4)."""
    moving, fixed = luminance(first)[:, None], luminance(second)[:, None]
    offset, scale = window[:, :2], window[:, 2:] - window[:, :2]
    # Half the size is a quarter of the work, and fits as well: what is left are parts of a pixel.
    coarse = F.avg_pool2d(moving, 2), F.avg_pool2d(fixed, 2)
    correlation = _overlay(*coarse, offset, scale).correlation
    hopeful = correlation > _HOPELESS
    if hopeful.any():
        fit = _fit(coarse[0][hopeful], coarse[1][hopeful], offset[hopeful], scale[hopeful])
        offset[hopeful], scale[hopeful] = fit
        correlation[hopeful] = _overlay(moving[hopeful], fixed[hopeful], *fit).correlation
    return correlation.numpy(), _colour_distance(first, second, offset, scale).numpy()


class _Overlay(NamedTuple):
    """`first` laid over `second`, both standardized where they overlap; S pixels a side."""

    moved: Tensor  # (P, S, S)
    fixed: Tensor  # (P, S, S)
    inside: Tensor  # (P, S, S)
    correlation: Tensor  # (P,) -1 where they share too little, or the fit ran away


def _overlay(moving: Tensor, fixed: Tensor, offset: Tensor, scale: Tensor) -> _Overlay:
    grid, inside = _grid(offset, scale, fixed.shape[-1])
    count = inside.sum((1, 2))
    moved = _standardized(_warp(moving, grid)[:, 0], inside)
    still = _standardized(fixed[:, 0], inside)
    # What of `second` lies in `first`, and what of `first` that is.
    share = count / inside[0].numel()
    enough = (share >= _MIN_SHARED) & (share * scale.prod(1) >= _MIN_SHARED)
    found = torch.where(enough, (moved * still).sum((1, 2)) / count.clamp_min(1), torch.tensor(-1.0))
    return _Overlay(moved, still, inside, found)


def _fit(moving: Tensor, fixed: Tensor, offset: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The best offset and scale (P, 2), in x and y, that the steps came by."""
    best, best_correlation = (offset, scale), torch.full((len(offset),), -2.0)
    for step in range(_ITERATIONS + 1):
        found = _overlay(moving, fixed, offset, scale)
        better = (found.correlation > best_correlation)[:, None]
        best_correlation = torch.maximum(best_correlation, found.correlation)
        best = (torch.where(better, offset, best[0]), torch.where(better, scale, best[1]))
        if step < _ITERATIONS:
            offset, scale = _step(found, offset, scale)
    return best


def _step(found: _Overlay, offset: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """One Gauss-Newton step."""
    cells = found.moved.shape[-1]
    slope_y, slope_x = torch.gradient(found.moved, spacing=1 / cells, dim=(1, 2))
    line = (torch.arange(cells) + 0.5) / cells
    # The slope is along `second`; along `first` it is that divided by the scale.
    slope_x, slope_y = slope_x / scale[:, :1, None], slope_y / scale[:, 1:, None]
    parts = [slope_x, slope_y, slope_x * line[None, None, :], slope_y * line[None, :, None]]
    jacobian = torch.stack([part * found.inside for part in parts], -1).flatten(1, 2)
    residual = ((found.fixed - found.moved) * found.inside).flatten(1, 2)
    normal = jacobian.transpose(1, 2) @ jacobian + 1e-3 * torch.eye(4)
    change = torch.linalg.solve(normal, jacobian.transpose(1, 2) @ residual[..., None])[..., 0]
    change = change.clamp(-0.05, 0.05)  # a step past the neighbourhood of the images would not come back
    return offset + change[:, :2], (scale + change[:, 2:]).clamp(0.5, 2)


def _grid(offset: Tensor, scale: Tensor, cells: int) -> tuple[Tensor, Tensor]:
    """Where the cells of `second` lie in `first`: (P, cells, cells, 2) in 0..1, and which of them lie inside."""
    line = (torch.arange(cells) + 0.5) / cells
    y, x = torch.meshgrid(line, line, indexing="ij")
    grid = offset[:, None, None] + scale[:, None, None] * torch.stack([x, y], -1)
    return grid, ((grid >= 0) & (grid <= 1)).all(-1)


def _warp(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid * 2 - 1, padding_mode="border", align_corners=False)


def _standardized(image: Tensor, inside: Tensor) -> Tensor:
    """(P, S, S) with mean 0 and mean square 1 where `inside`, 0 elsewhere."""
    count = inside.sum((1, 2), keepdim=True).clamp_min(1)
    centred = (image - (image * inside).sum((1, 2), keepdim=True) / count) * inside
    return centred / (centred.square().sum((1, 2), keepdim=True) / count).sqrt().clamp_min(1e-3)


def _colour_distance(first: NDArray[np.uint8], second: NDArray[np.uint8], offset: Tensor, scale: Tensor) -> Tensor:
    """(P,) mean absolute difference of the colours of coarse cells, in grey levels."""
    grid, inside = _grid(offset, scale, THUMBNAIL)
    cells = THUMBNAIL // _COLOUR_CELLS
    colours = _warp(torch.from_numpy(first).permute(0, 3, 1, 2).float(), grid)
    difference = (colours - torch.from_numpy(second).permute(0, 3, 1, 2)) * inside[:, None]
    count = F.avg_pool2d(inside[:, None].float(), cells)
    coarse = F.avg_pool2d(difference, cells).abs()
    return coarse.sum((1, 2, 3)) / (3 * count.sum((1, 2, 3))).clamp_min(1)
