"""How far a mean would move on another sample of the same size: seeded bootstrap intervals.

All columns of `values` are resampled together, so the intervals of several metrics, or of the difference of
two runs on the same items, are paired.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.metrics.arrays import Array, as_tensor

NUM_RESAMPLES = 1000
# Counts drawn at a time: 16 MB of int64, so memory does not grow with the number of resamples.
_CHUNK = 2_000_000


def bootstrap_interval(
    values: Array,
    *,
    units: Array | None = None,
    groups: Array | None = None,
    confidence: float = 0.95,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> Tensor:
    """Percentile interval of the mean of every column of `values`.

    Args:
        values: (n,) or (n,S) per-item values, e.g. hits at K = 1, 5, 10.
        units: (n,) int64, what is drawn: items of one unit come and go together (the captions of an image).
            Default: every item is its own unit.
        groups: (n,) int64; the statistic is then the mean over groups of the group's mean (recall per class),
            over the groups that a resample holds. Default: one group.
        confidence: the share of resampled statistics inside, in (0,1).
        num_resamples: how many resamples.
        seed: the same seed draws the same resamples for the same number of units.

    Returns:
        (2,) or (2,S) float64 on the CPU: low and high.

    Raises:
        ValueError: no items.

    Source: Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13 (percentile interval).
    """
    if not len(values):
        raise ValueError("No items; expected at least one.")
    values = as_tensor(values)
    columns = values.double().cpu().reshape(len(values), -1).numpy()
    items = torch.arange(len(values))
    unit = items if units is None else as_tensor(units)
    group = torch.zeros_like(items) if groups is None else as_tensor(groups)
    cells = _Cells(columns, _consecutive(unit), _consecutive(group))
    drawn = _resamples(cells.num_units, num_resamples, seed)
    statistics = np.concatenate([cells.statistic(times) for times in drawn])
    tail = (1 - confidence) / 2
    bounds = torch.from_numpy(np.quantile(statistics, [tail, 1 - tail], axis=0))
    return bounds.reshape(2, *values.shape[1:])


class _Cells:
    """Sums and counts of the items of each (group, unit), ordered by group: all that a resample needs."""

    def __init__(self, columns: NDArray[np.float64], unit: NDArray[np.int64], group: NDArray[np.int64]) -> None:
        self.num_units = int(unit.max()) + 1
        cell, cell_of = np.unique(group * self.num_units + unit, return_inverse=True)
        self.unit = cell % self.num_units
        self.group_starts = np.unique(cell // self.num_units, return_index=True)[1]
        self.count = np.bincount(cell_of).astype(np.float64)
        self.sums = [np.bincount(cell_of, weights=column) for column in columns.T]

    def statistic(self, times: NDArray[np.int64]) -> NDArray[np.float64]:
        """(r,S) out of (r,U), how often each of r resamples drew each unit."""
        weight = times[:, self.unit].astype(np.float64)
        count = self._per_group(weight * self.count)  # (r,G)
        present = count > 0
        share = [self._per_group(weight * of_cell) / np.where(present, count, 1) for of_cell in self.sums]
        return np.stack([of_group.sum(1) / present.sum(1) for of_group in share], axis=1)

    def _per_group(self, of_cell: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.add.reduceat(of_cell, self.group_starts, axis=1)


def _consecutive(values: Tensor) -> NDArray[np.int64]:
    """(n,) numbers from 0 without gaps, equal where `values` are equal."""
    return np.unique(values.cpu().numpy(), return_inverse=True)[1]


def _resamples(num_units: int, num_resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Chunks (r,U) of how often each unit is drawn, `num_resamples` rows in all; the chunking changes nothing."""
    generator = np.random.Generator(np.random.Philox(seed))
    rows = max(1, _CHUNK // num_units)
    for first in range(0, num_resamples, rows):
        size = min(rows, num_resamples - first)
        drawn = generator.integers(0, num_units, (size, num_units)) + np.arange(size)[:, None] * num_units
        yield np.bincount(drawn.ravel(), minlength=size * num_units).reshape(size, num_units)
