"""Counts in named ranges, as JSON, as text and for a page."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

_BAR = 40  # characters of the longest bar


@dataclass(frozen=True)
class Histogram:
    """How many values fall in [edges[i], edges[i+1]); the last range is open above. E edges, E counts."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    smallest: float | None  # None without values
    median: float | None
    mean: float | None
    largest: float | None

    def ranges(self) -> list[tuple[str, int]]:
        """(label, count) from the first to the last range that is not empty."""
        filled = [place for place, count in enumerate(self.counts) if count]
        if not filled:
            return []
        return [(self._label(place), self.counts[place]) for place in range(filled[0], filled[-1] + 1)]

    def to_lines(self) -> list[str]:
        """One bar a range, then smallest, median, mean and largest."""
        ranges = self.ranges()
        if not ranges:
            return ["  (none)"]
        width, most = max(len(label) for label, _ in ranges), max(count for _, count in ranges)
        lines = [
            f"  {label:>{width}}  {count:>9,} {'█' * round(_BAR * count / most)}".rstrip() for label, count in ranges
        ]
        return [*lines, f"  {self.line()}"]

    def line(self) -> str:
        """Smallest, median, mean and largest in words."""
        if self.mean is None:
            return "no values"
        return f"min {self.smallest:.4g}, median {self.median:.4g}, mean {self.mean:.4g}, max {self.largest:.4g}"

    def _label(self, place: int) -> str:
        low = self.edges[place]
        if place == len(self.edges) - 1:
            return f">= {low:.4g}"
        high = self.edges[place + 1]
        if all(float(edge).is_integer() for edge in self.edges):
            return f"{low:.0f}" if high == low + 1 else f"{low:.0f}-{high - 1:.0f}"
        return f"{low:.2f}-{high:.2f}"


def histogram(values: ArrayLike, edges: Sequence[float]) -> Histogram:
    """Count values (n,) in ranges that begin at `edges` (ascending); none may lie below the first."""
    numbers = np.asarray(values, float)
    places = np.searchsorted(edges, numbers, side="right") - 1
    assert (places >= 0).all(), (numbers.min(), edges[0])
    counts = np.bincount(places, minlength=len(edges))
    smallest = median = mean = largest = None
    if len(numbers):
        smallest, largest = float(numbers.min()), float(numbers.max())
        median, mean = float(np.median(numbers)), float(numbers.mean())
    return Histogram(tuple(edges), tuple(counts.tolist()), smallest, median, mean, largest)
