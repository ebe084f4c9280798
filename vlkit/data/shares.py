"""How many samples of each group a batch holds, so that every batch and every epoch has its exact share.

    shares = Shares([2.0, 1.0], batch_size=256, num_batches=1000)
    shares.per_epoch             # [170667, 85333]: the largest remainder gets the sample that is left
    shares.before(12)            # how many of each the batches 0..11 hold: a formula, nothing is stored

A group that has `n` samples in an epoch of `N` batches has floor(n/N) or ceil(n/N) of them in each. Its `n mod N`
batches with one more are spread over the epoch by steps of the golden ratio.

Source: largest remainders: Hamilton's method. One group's extras follow another's round the batches as jobs do in
    McNaughton 1959, "Scheduling with Deadlines and Loss Functions" (the wrap-around rule), which is why every batch
    comes out full.
"""

from collections.abc import Sequence
from fractions import Fraction
from math import gcd

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]

_GOLDEN = (5**0.5 - 1) / 2
_NEAR = 100


class Shares:
    """The counts of S groups over the batches of an epoch; every epoch has the same.

    Attributes:
        per_epoch: (S,) samples of each group in an epoch; within one sample of weight / sum of weights.
    """

    def __init__(self, weights: Sequence[float], batch_size: int, num_batches: int):
        """Args:
        weights: (S,) above 0.
        batch_size: samples of a batch.
        num_batches: of an epoch.
        """
        self._num_batches = num_batches
        self.per_epoch: Counts = np.array(largest_remainder(weights, batch_size * num_batches), np.int64)
        self._base, self._extra = np.divmod(self.per_epoch, num_batches)
        # The extras of all groups stand in one row that goes round and round over the batches.
        self._first = (np.cumsum(self._extra) - self._extra) % num_batches
        self._stride = _golden_stride(num_batches)

    def before(self, index: int) -> Counts:
        """(S,) samples of each group in the batches before batch `index`."""
        n, stride = self._num_batches, self._stride
        # Batch i stands at i * stride modulo n; a group has extras at the `extra` places from `first` on.
        shifted = 2 * n - self._first
        return (
            self._base * index
            + _floor_sum(index, n, stride, shifted)
            - _floor_sum(index, n, stride, shifted - self._extra)
        )


def largest_remainder(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers with this sum, nearest to proportional: each is its quota rounded down or up.

    Ties go to the group named first. Exact: no rounding error of floats.
    """
    parts = [Fraction(weight) for weight in weights]
    whole = sum(parts)
    quotas = [total * part / whole for part in parts]
    counts = [int(quota) for quota in quotas]
    by_rest = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in by_rest[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _golden_stride(count: int) -> int:
    """A whole number near `count` times the golden ratio whose multiples modulo `count` fill it most evenly.

    Multiples are the more even the smaller the quotients in Euclid's algorithm, which are all 1 for the golden ratio.
    """
    start = round(count * _GOLDEN)
    near = [stride for stride in range(max(start - _NEAR, 1), start + _NEAR) if gcd(stride, count) == 1]
    return min(near, key=lambda stride: (_largest_quotient(stride, count), abs(stride - start)), default=1)


def _largest_quotient(a: int, b: int) -> int:
    largest = 0
    while a:
        largest = max(largest, b // a)
        a, b = b % a, a
    return largest


def _floor_sum(n: int, m: int, a: int, b: Counts) -> Counts:
    """(S,) for each b: the sum over i < n of floor((a * i + b) / m), in a number of turns like Euclid's algorithm.

    Source: Graham, Knuth, Patashnik 1994, "Concrete Mathematics", section 3.5 (sums of floors).
    """
    total = np.zeros_like(b)
    counts = np.full_like(b, n)
    while counts.any():
        total += counts * (counts - 1) // 2 * (a // m) + counts * (b // m)
        a, b = a % m, b % m
        counts, b = np.divmod(a * counts + b, m)
        if a == 0:
            break
        m, a = a, m
    return total
