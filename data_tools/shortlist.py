"""From perceptual hashes to the pairs worth a second look."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from data_tools.confirm_pairs import Shortlist
from data_tools.hamming_search import HammingIndex, Hashes
from data_tools.perceptual_hash import WINDOWS

_QUERIES_AT_ONCE = 1 << 14


class Shortlister:
    """A gallery of images, to be asked which of them other images may be copies of."""

    def __init__(self, hashes: Hashes, shown: NDArray[np.bool_], radius: int):
        """Index the gallery.

        Args:
            hashes: (N, len(WINDOWS)).
            shown: (N,) images to search among; the hashes of the others mean nothing.
            radius: bits.
        """
        self._hashes, self._shown = hashes, np.flatnonzero(shown)
        self._whole = HammingIndex(hashes[self._shown, 0], radius)
        self._windows = HammingIndex(hashes[self._shown, 1:].ravel(), radius)

    def against(self, hashes: Hashes, shown: NDArray[np.bool_], threads: int = 1) -> Shortlist:
        """Pairs (other image, gallery image) in which a window of the other image looks like the gallery's whole."""
        rows = np.flatnonzero(shown)
        queries = hashes[rows].ravel()
        query, item, distance = _search(self._whole, queries, threads)
        row, window = np.divmod(query, len(WINDOWS))
        return _closest(rows[row], self._shown[item], window, distance)

    def windows_against(self, hashes: Hashes, shown: NDArray[np.bool_], threads: int = 1) -> Shortlist:
        """Pairs (gallery image, other image) in which a window of the gallery's image looks like the whole other."""
        rows = np.flatnonzero(shown)
        query, item, distance = _search(self._windows, hashes[rows, 0], threads)
        place, window = np.divmod(item, len(WINDOWS) - 1)
        return _closest(self._shown[place], rows[query], window + 1, distance)


def shortlist_within(hashes: Hashes, shown: NDArray[np.bool_], radius: int, threads: int = 1) -> Shortlist:
    """Pairs of different images of one set that may be copies, each once, in the direction that fits best."""
    rows = np.flatnonzero(shown)
    query, item, distance = _search(HammingIndex(hashes[rows, 0], radius), hashes[rows].ravel(), threads)
    row, window = np.divmod(query, len(WINDOWS))
    other = row != item
    return _closest(rows[row[other]], rows[item[other]], window[other], distance[other], unordered=True)


def _search(
    index: HammingIndex, queries: Hashes, threads: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint8]]:
    """All pairs found; threads, as numpy works outside the interpreter's lock."""

    def some(start: int) -> list[NDArray[np.int64]]:
        found = [near for near in index.search(queries[start : start + _QUERIES_AT_ONCE]) if len(near.query)]
        if not found:
            return [np.zeros(0, np.int64)] * 3
        columns = [np.concatenate(column) for column in zip(*found, strict=True)]
        return [columns[0] + start, *columns[1:]]

    starts = range(0, len(queries), _QUERIES_AT_ONCE)
    with ThreadPoolExecutor(max(threads, 1), thread_name_prefix="vlkit-search") as pool:
        parts = list(pool.map(some, starts)) if len(queries) else []
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.uint8)
    query, item, distance = (np.concatenate(column) for column in zip(*parts, strict=True))
    return query, item, distance.astype(np.uint8)


def _closest(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    window: NDArray[np.int64],
    distance: NDArray[np.uint8],
    unordered: bool = False,
) -> Shortlist:
    """Of several windows of one pair the closest, and of both directions too where pairs are unordered."""
    low, high = (np.minimum(first, second), np.maximum(first, second)) if unordered else (first, second)
    order = np.lexsort((window, first, distance, high, low))
    low, high = low[order], high[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (low[1:] != low[:-1]) | (high[1:] != high[:-1])
    chosen = order[fresh]
    return Shortlist(first[chosen], second[chosen], window[chosen])
