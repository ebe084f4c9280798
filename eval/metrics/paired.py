"""Whether one run is better than another on the same items: paired bootstrap and paired permutation."""

from typing import NamedTuple

import numpy as np
import torch

from eval.metrics.arrays import Array, as_tensor
from eval.metrics.bootstrap import NUM_RESAMPLES, bootstrap_interval

NUM_PERMUTATIONS = 10_000
# Signs drawn at a time: 32 MB of float64.
_CHUNK = 4_000_000


class PairedDifference(NamedTuple):
    """What changes from the first run to the second, on the same items."""

    difference: float  # mean of second - first
    low: float  # 95% percentile bootstrap
    high: float
    p_value: float  # two-sided, of the permutation test


def paired_difference(
    first: Array,
    second: Array,
    *,
    units: Array | None = None,
    num_resamples: int = NUM_RESAMPLES,
    num_permutations: int = NUM_PERMUTATIONS,
    seed: int = 0,
) -> PairedDifference:
    """Compare two runs item by item.

    The interval resamples units with both runs' values together. The p-value is the share of random exchanges of the
    two runs, unit by unit, whose difference is at least as large as the one found, the found one counted in.

    Args:
        first: (n,) values of the first run, e.g. hits at K = 1.
        second: (n,) of the second run, the same items in the same order.
        units: (n,) int64, what is drawn and exchanged as a whole (all captions of an image); default each item.
        num_resamples: of the bootstrap.
        num_permutations: random exchanges.
        seed: of both.

    Raises:
        ValueError: lengths that differ, no item, or values that are not finite.

    Source: Efron and Tibshirani 1993, chapters 13 and 15; Phipson and Smyth 2010 (p-values are never zero).
    """
    first, second = as_tensor(first), as_tensor(second)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(
            f"{tuple(first.shape)} and {tuple(second.shape)} values; expected the same (n,), n at least 1."
        )
    change = second.double() - first.double()
    if not change.isfinite().all():
        raise ValueError("values must be finite.")
    low, high = bootstrap_interval(change, units=units, num_resamples=num_resamples, seed=seed).tolist()
    unit = torch.arange(len(change)) if units is None else as_tensor(units).unique(return_inverse=True)[1]
    sums = torch.bincount(unit, weights=change).numpy()
    found = abs(sums.sum())
    generator = np.random.Generator(np.random.Philox(seed))
    extreme, rows = 0, max(1, _CHUNK // len(sums))
    for start in range(0, num_permutations, rows):
        size = min(rows, num_permutations - start)
        signs = generator.integers(0, 2, (size, len(sums)), dtype=np.int8) * 2.0 - 1.0
        # Sums of the same numbers in another order differ in the last bits.
        extreme += int((np.abs(signs @ sums) >= found * (1 - 1e-12) - 1e-12).sum())
    return PairedDifference(change.mean().item(), low, high, (extreme + 1) / (num_permutations + 1))
