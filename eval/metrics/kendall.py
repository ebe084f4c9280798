"""Kendall's rank correlation in both forms that caption judgement uses, exact in O(n log n) memory and time."""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.metrics.correlation import finite_pairs

Variant = Literal["b", "c"]


def kendall_tau(x: ArrayLike, y: ArrayLike, variant: Variant = "b") -> float:
    """Kendall's tau between two measurements of n items.

    tau-b = (P - Q) / sqrt((n0 - n1)(n0 - n2)) and tau-c = 2 (P - Q) / (n^2 (m - 1) / m), with P concordant and Q
    discordant pairs, n0 all pairs, n1 and n2 the pairs tied in x and in y, m the smaller number of distinct values.

    Args:
        x: (n,) finite.
        y: (n,) finite.
        variant: "b" corrects for ties on both sides; "c" suits two scales of very different numbers of values.

    Raises:
        ValueError: lengths that differ, fewer than two items, values that are not finite, or only one value.

    Source: Kendall 1945 (tau-b); Stuart 1953 (tau-c); `scipy.stats.kendalltau` gives the same values.
    """
    first, second = finite_pairs(x, y)
    ranks_x, ranks_y = (np.unique(values, return_inverse=True)[1] for values in (first, second))
    distinct = min(ranks_x.max(), ranks_y.max()) + 1
    if distinct < 2:
        raise ValueError("One side has a single value; there is no order to compare.")
    total = len(first) * (len(first) - 1) // 2
    tied_x, tied_y = _tied_pairs(ranks_x), _tied_pairs(ranks_y)
    tied_both = _tied_pairs(ranks_x * (int(ranks_y.max()) + 1) + ranks_y)
    discordant = _discordant(ranks_x, ranks_y)
    difference = total - tied_x - tied_y + tied_both - 2 * discordant
    if variant == "b":
        return float(difference / np.sqrt(float(total - tied_x) * float(total - tied_y)))
    return float(2 * difference / (len(first) ** 2 * (distinct - 1) / distinct))


def _tied_pairs(ranks: NDArray[np.int64]) -> int:
    counts = np.bincount(np.unique(ranks, return_inverse=True)[1])
    return int((counts * (counts - 1) // 2).sum())


def _discordant(x: NDArray[np.int64], y: NDArray[np.int64]) -> int:
    """Pairs that x and y order differently.

    Sorted by x, they are the inversions of y. Two values are told apart at the highest bit in which they differ:
    bit by bit, from the top, within items that agree so far, each 1 before a 0 is an inversion.
    """
    values = y[np.lexsort((y, x))]  # ties in x in ascending y make no inversion
    found = 0
    for bit in range(int(values.max()).bit_length() - 1, -1, -1):
        agreed = values >> (bit + 1)
        order = np.argsort(agreed, kind="stable")
        group, one = agreed[order], (values[order] >> bit) & 1
        ones = np.cumsum(one)
        before = ones[np.searchsorted(group, group)] - one[np.searchsorted(group, group)]
        found += int(((ones - before) * (1 - one)).sum())
    return found
