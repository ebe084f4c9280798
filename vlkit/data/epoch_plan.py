"""Which samples each batch of each epoch holds: a pure function of (shard sizes, seed, epoch, batch).

    plan = EpochPlan(shards.offsets, seed=0, global_batch_size=256)
    epoch, index = plan.position(step)
    ids = plan.batch(epoch, index)                 # (B,) int64 numbers in the shard index; -1 is padding

The shards of an epoch are put in random order and laid end to end; that line is cut into windows of about
`window` samples, and the samples of a window are permuted. So an epoch holds each sample exactly once, while reading
stays within few shards at a time. Nothing needs to be saved but the step number: any batch can be asked for directly,
on any number of ranks, and the global batch (the batches of all ranks in rank order) does not depend on how many
ranks there are. Workers are handed parts of batches, so their number cannot matter either.

Only the window being read is in memory: a plan over 400 million samples starts at once.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlkit.data.randomness import permutation
from vlkit.errors import ConfigError, DataError, did_you_mean

Remainder = Literal["drop", "keep"]
Ids = NDArray[np.int64]

PADDING = -1
_WINDOWS_IN_MEMORY = 3


class EpochPlan:
    """The order of all epochs, seen from one rank.

    Attributes:
        num_samples: of all shards.
        num_batches: per epoch, the same on every rank.
        num_dropped: samples an epoch leaves out with remainder "drop": other ones each epoch.
        num_padding: rows without a sample in the last global batch of an epoch with remainder "keep".
        batch_size: rows of a batch on this rank.
    """

    def __init__(
        self,
        offsets: Sequence[int] | Ids,
        *,
        seed: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        remainder: Remainder = "drop",
        shuffle: bool = True,
        window: int = 131_072,
    ):
        """Check the settings; nothing is read or drawn.

        Args:
            offsets: (S+1,) number of the first sample of every shard, and of all samples.
            seed: of the run.
            global_batch_size: samples per step over all ranks.
            rank, world_size: which of how many processes this is.
            remainder: what becomes of the samples that do not fill a global batch: "drop" leaves them out, "keep"
                fills the batch up with padding rows (id -1), so that shapes never change.
            shuffle: False keeps the order of the shards.
            window: samples that are permuted with each other.

        Raises:
            ConfigError: the global batch cannot be split over the ranks.
            DataError: there are fewer samples than one global batch and remainder is "drop".
        """
        self.offsets: Ids = np.asarray(offsets, dtype=np.int64)
        self.num_samples = int(self.offsets[-1])
        self.seed, self.shuffle = seed, shuffle
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        self._check(remainder)
        self.batch_size = global_batch_size // world_size
        full, rest = divmod(self.num_samples, global_batch_size)
        keep = remainder == "keep" and rest > 0
        self.num_batches = full + 1 if keep else full
        self.num_dropped = 0 if keep else rest
        self.num_padding = global_batch_size - rest if keep else 0
        self._num_windows = max(1, round(self.num_samples / window))
        self._windows: OrderedDict[tuple[int, int], Ids] = OrderedDict()
        self._lines: OrderedDict[int, tuple[Ids, Ids]] = OrderedDict()

    def position(self, step: int) -> tuple[int, int]:
        """The epoch and the batch in it that come after `step` batches."""
        return divmod(step, self.num_batches)

    def batch(self, epoch: int, index: int) -> Ids:
        """(batch_size,) numbers of the samples of one batch on this rank; -1 is a padding row."""
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of {self.num_batches}")
        start = index * self.global_batch_size + self.rank * self.batch_size
        ids = self._at(epoch, start, min(start + self.batch_size, self.num_samples))
        missing = self.batch_size - len(ids)
        return np.concatenate([ids, np.full(missing, PADDING)]) if missing else ids

    def _at(self, epoch: int, start: int, stop: int) -> Ids:
        """Sample numbers at places start..stop-1 of the epoch's order; empty past its end."""
        parts = [np.empty(0, dtype=np.int64)]
        while start < stop:
            number = self._window_of(start)
            first, last = self._window_bounds(number)
            parts.append(self._window(epoch, number)[start - first : stop - first])
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

    def _window(self, epoch: int, number: int) -> Ids:
        key = (epoch, number)
        if key not in self._windows:
            first, last = self._window_bounds(number)
            ids = self._line(epoch, first, last)
            if self.shuffle:
                ids = ids[permutation(self.seed, epoch, number, "order in window", last - first)]
            self._windows[key] = ids
            if len(self._windows) > _WINDOWS_IN_MEMORY:
                self._windows.popitem(last=False)
        return self._windows[key]

    def _line(self, epoch: int, first: int, last: int) -> Ids:
        """Sample numbers at places first..last-1 of the shards laid end to end in the epoch's order."""
        if epoch not in self._lines:
            count = len(self.offsets) - 1
            order = permutation(self.seed, epoch, 0, "order of shards", count) if self.shuffle else np.arange(count)
            ends = np.cumsum(np.diff(self.offsets)[order])
            self._lines[epoch] = (order, ends)
            if len(self._lines) > 2:
                self._lines.popitem(last=False)
        order, ends = self._lines[epoch]
        places = np.arange(first, last)
        nth = np.searchsorted(ends, places, side="right")
        # Counted from the shard's end, which needs no shifted copy of `ends`.
        ids: Ids = self.offsets[order[nth] + 1] - (ends[nth] - places)
        return ids

    def _check(self, remainder: str) -> None:
        if remainder not in ("drop", "keep"):
            raise ConfigError(f"remainder is {remainder!r}. {did_you_mean(remainder, ('drop', 'keep'))}")
        if self.global_batch_size < 1 or self.global_batch_size % self.world_size:
            raise ConfigError(
                f"The global batch size is {self.global_batch_size}, which does not split evenly over "
                f"{self.world_size} processes. Use a multiple of {self.world_size}."
            )
        if remainder == "drop" and self.num_samples < self.global_batch_size:
            raise DataError(
                f"The shards hold {self.num_samples} samples, fewer than one global batch of {self.global_batch_size}. "
                "Lower the batch size, use more data, or keep the remainder (remainder='keep')."
            )
        assert 0 <= self.rank < self.world_size, (self.rank, self.world_size)
