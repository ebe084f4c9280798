"""The order of the samples in one pass over some shards: shuffled, yet read nearly in sequence.

    order = PassOrder(shards.offsets, seed=0)
    order.at(3, 1000, 1256)              # numbers of the samples at places 1000..1255 of pass 3

The shards of a pass are put in random order and laid end to end; that line is cut into windows of about `window`
samples, and the samples of a window are permuted. Only the windows being read are in memory, so an order of 400
million samples is there at once.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlkit.data.randomness import permutation

Ids = NDArray[np.int64]

WINDOW = 131_072
_WINDOWS_IN_MEMORY = 3


class PassOrder:
    """Each sample once a pass, in another order each pass.

    Args:
        offsets: (S+1,) number of the first sample of every shard, and the end of the last.
        seed: of the run.
        shuffle: False keeps the order of the shards.
        window: samples that are permuted with each other.
        name: keeps the orders of several sources apart.
    """

    def __init__(
        self, offsets: Sequence[int] | Ids, *, seed: int, shuffle: bool = True, window: int = WINDOW, name: str = ""
    ):
        self.offsets: Ids = np.asarray(offsets, dtype=np.int64)
        self.num_samples = int(self.offsets[-1] - self.offsets[0])
        self.seed, self.shuffle, self._name = seed, shuffle, name
        self._num_windows = max(1, round(self.num_samples / window))
        self._windows: OrderedDict[tuple[int, int], Ids] = OrderedDict()
        self._lines: OrderedDict[int, tuple[Ids, Ids]] = OrderedDict()

    def at(self, number: int, start: int, stop: int) -> Ids:
        """Sample numbers at places start..stop-1 of pass `number`; empty past its end."""
        parts = [np.empty(0, dtype=np.int64)]
        stop = min(stop, self.num_samples)
        while start < stop:
            window = self._window_of(start)
            first, last = self._window_bounds(window)
            parts.append(self._window(number, window)[start - first : stop - first])
            start = min(stop, last)
        return np.concatenate(parts)

    def _window_of(self, place: int) -> int:
        number = place * self._num_windows // self.num_samples
        # Rounding in `_window_bounds` may have put the border one further on.
        return number + 1 if place >= self._window_bounds(number)[1] else number

    def _window_bounds(self, number: int) -> tuple[int, int]:
        return (
            number * self.num_samples // self._num_windows,
            (number + 1) * self.num_samples // self._num_windows,
        )

    def _window(self, number: int, window: int) -> Ids:
        key = (number, window)
        if key not in self._windows:
            first, last = self._window_bounds(window)
            ids = self._line(number, first, last)
            if self.shuffle:
                ids = ids[permutation(self.seed, number, window, f"order in window{self._name}", last - first)]
            self._windows[key] = ids
            if len(self._windows) > _WINDOWS_IN_MEMORY:
                self._windows.popitem(last=False)
        return self._windows[key]

    def _line(self, number: int, first: int, last: int) -> Ids:
        """Sample numbers at places first..last-1 of the shards laid end to end in the pass's order."""
        if number not in self._lines:
            count = len(self.offsets) - 1
            purpose = f"order of shards{self._name}"
            order = permutation(self.seed, number, 0, purpose, count) if self.shuffle else np.arange(count)
            ends = np.cumsum(np.diff(self.offsets)[order])
            self._lines[number] = (order, ends)
            if len(self._lines) > 2:
                self._lines.popitem(last=False)
        order, ends = self._lines[number]
        places = np.arange(first, last)
        nth = np.searchsorted(ends, places, side="right")
        # Counted from the shard's end, which needs no shifted copy of `ends`.
        ids: Ids = self.offsets[order[nth] + 1] - (ends[nth] - places)
        return ids
