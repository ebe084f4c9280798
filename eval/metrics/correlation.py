"""Pearson's and Spearman's correlation."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation of n pairs.

    Raises:
        ValueError: lengths that differ, fewer than two pairs, values that are not finite, or one side constant.
    """
    first, second = _checked(x, y)
    first, second = first - first.mean(), second - second.mean()
    return float((first @ second) / np.sqrt((first @ first) * (second @ second)))


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Spearman's correlation: Pearson's of the ranks, tied values sharing the mean of theirs.

    Raises:
        ValueError: as `pearson`.

    Source: `scipy.stats.spearmanr` gives the same values.
    """
    first, second = _checked(x, y)
    return pearson(_mean_ranks(first), _mean_ranks(second))


def _mean_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(count) - (count - 1) / 2)[place]
    return ranks


def _checked(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = finite_pairs(x, y)
    if (first == first[0]).all() or (second == second[0]).all():
        raise ValueError("One side has a single value; it correlates with nothing.")
    return first, second


def finite_pairs(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Two measurements (n,) of the same things.

    Raises:
        ValueError: lengths that differ, fewer than two pairs, or values that are not finite.
    """
    first, second = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if first.ndim != 1 or first.shape != second.shape or len(first) < 2:
        raise ValueError(f"x is {first.shape}, y {second.shape}; expected (n,) both, n at least 2.")
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("x and y must be finite.")
    return first, second
