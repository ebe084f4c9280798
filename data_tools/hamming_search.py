"""All pairs of 64-bit hashes that differ in few bits, exactly, without comparing all with all.

The bits are cut into bands. Two hashes within the radius agree in at least one band up to radius // bands bits, so
looking up every near value of every band finds all of them (multi-index hashing). The number of bands is the one that
needs the fewest comparisons for the number of hashes at hand; with one band everything is compared.

Source: Norouzi, Punjani, Fleet 2012, "Fast Search in Hamming Space with Multi-Index Hashing".
"""

from collections.abc import Iterator
from itertools import combinations
from math import comb
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Positions = NDArray[np.int64]

_BITS = 64
_BAND_COUNTS = (1, 3, 4, 5, 6, 8)  # two bands would need a table of 2 ** 32 entries
_AT_ONCE = 1 << 21  # comparisons in memory: some 100 MB
_LOOKUP = 8  # what finding one bucket costs, in comparisons


class Near(NamedTuple):
    """Pairs found."""

    query: Positions  # (P,)
    item: Positions  # (P,)
    distance: NDArray[np.uint8]  # (P,) bits


class _Band(NamedTuple):
    shift: int
    width: int
    reach: int  # bits that may differ here
    order: Positions  # (N,) items by their value
    starts: Positions  # (2 ** width + 1,) where in `order` the items of each value begin

    def bucket(self, values: Hashes) -> tuple[Positions, Positions]:
        """Where in `order` the items of each value begin, and how many there are."""
        low = self.starts[values]
        return low, self.starts[values + np.uint64(1)] - low


class HammingIndex:
    """Hashes to be searched; equal ones may occur, though many of them are better searched as one."""

    def __init__(self, hashes: Hashes, radius: int):
        """Index (N,) hashes for searches within `radius` bits, 0 to 64."""
        if not 0 <= radius <= _BITS:
            raise ValueError(f"radius = {radius}: expected 0 to {_BITS} bits.")
        self.hashes, self.radius = np.ascontiguousarray(hashes, np.uint64), radius
        count = min(_BAND_COUNTS, key=lambda bands: _cost(bands, radius, len(hashes)))
        self._bands = [] if count == 1 else [self._band(place) for place in _cut(count, radius)]

    def search(self, queries: Hashes) -> Iterator[Near]:
        """Every pair of a query and an item within the radius once, in portions that fit into memory."""
        queries = np.ascontiguousarray(queries, np.uint64)
        if not self._bands:
            yield from self._compare_all(queries)
        for number, band in enumerate(self._bands):
            own = _value(queries, band.shift, band.width)
            for mask in _masks(band.width, band.reach):
                for query, place in _expand(*band.bucket(own ^ np.uint64(mask))):
                    yield self._check(queries, query, band.order[place], number)

    def _band(self, place: tuple[int, int, int]) -> _Band:
        shift, width, reach = place
        values = _value(self.hashes, shift, width)
        starts = np.zeros((1 << width) + 1, np.int64)
        np.cumsum(np.bincount(values.astype(np.int64), minlength=1 << width), out=starts[1:])
        return _Band(shift, width, reach, np.argsort(values, kind="stable"), starts)

    def _compare_all(self, queries: Hashes) -> Iterator[Near]:
        step = max(_AT_ONCE // max(len(self.hashes), 1), 1)
        for start in range(0, len(queries), step):
            distance = np.bitwise_count(queries[start : start + step, None] ^ self.hashes)
            query, item = np.nonzero(distance <= self.radius)
            yield Near(query + start, item, distance[query, item])

    def _check(self, queries: Hashes, query: Positions, item: Positions, number: int) -> Near:
        """Those within the radius which no earlier band has found."""
        different = queries[query] ^ self.hashes[item]
        distance = np.bitwise_count(different)
        good = distance <= self.radius
        query, item, different, distance = query[good], item[good], different[good], distance[good]
        fresh = np.ones(len(query), bool)
        for band in self._bands[:number]:
            fresh &= np.bitwise_count(_value(different, band.shift, band.width)) > band.reach
        return Near(query[fresh], item[fresh], distance[fresh])


def _cut(bands: int, radius: int) -> list[tuple[int, int, int]]:
    """Shift, width and reach of each band; the last ones need reach one bit less far."""
    edges = [_BITS * band // bands for band in range(bands + 1)]
    reach, rest = divmod(radius, bands)
    places = [(edges[i], edges[i + 1] - edges[i], reach if i <= rest else reach - 1) for i in range(bands)]
    return [place for place in places if place[2] >= 0]


def _cost(bands: int, radius: int, num_items: int) -> float:
    """Comparisons a query needs if values are spread evenly."""
    if bands == 1:
        return num_items
    cost = 0.0
    for _, width, reach in _cut(bands, radius):
        cost += sum(comb(width, bits) for bits in range(reach + 1)) * (_LOOKUP + num_items / 2**width)
    return cost


def _value(hashes: Hashes, shift: int, width: int) -> Hashes:
    return (hashes >> np.uint64(shift)) & np.uint64((1 << width) - 1)


def _masks(width: int, reach: int) -> Iterator[int]:
    for bits in range(reach + 1):
        for chosen in combinations(range(width), bits):
            yield sum(1 << bit for bit in chosen)


def _expand(low: Positions, count: Positions) -> Iterator[tuple[Positions, Positions]]:
    """Query and place of all places low .. low + count of each query, at most `_AT_ONCE` in a portion."""
    hit = np.flatnonzero(count)
    low, count = low[hit], count[hit]
    ends = np.cumsum(count)
    total = int(ends[-1]) if len(ends) else 0
    for start in range(0, total, _AT_ONCE):
        number = np.arange(start, min(start + _AT_ONCE, total))
        query = np.searchsorted(ends, number, "right")
        yield hit[query], low[query] + number - (ends - count)[query]
