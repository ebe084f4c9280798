"""Epochs in which several groups of samples have exact shares: mixtures of sources, balanced classes.

    plan = SharePlan(SourceDraws([[0, 500, 1000], [1000, 1200]], seed=0), weights=[2.0, 1.0], seed=0,
                     global_batch_size=256, samples_per_epoch=1200)
    plan.batch(0, 3)             # ids; 170 or 171 of them from the first source
    plan.counts(step)            # samples of each group in the batches before a step

Every group is a stream without end: its samples in random order, each exactly once, then again in another order; or
drawn with replacement. An epoch takes its share of each stream from where the epoch before stopped, so a group too
large for its share is seen in full over several epochs, and one too small is seen several times in each. Where a
stream begins anew, one batch may hold a sample twice.

All of it follows from the seed and the number of the batch; every rank works out the whole global batch (a few
milliseconds) and takes its own rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vlkit.data.epoch_plan import Ids, Plan
from vlkit.data.pass_order import WINDOW, PassOrder
from vlkit.data.randomness import mixed, permutation, raw, scatter
from vlkit.data.shares import Shares
from vlkit.errors import ConfigError

_LEAST_WINDOW = 8192
# Draws with replacement read from so many shards at a time; each window draws others.
_SHARDS_AT_ONCE = 64


class Draws(ABC):
    """Streams of samples, one a group, that can be asked for any place.

    Attributes:
        sizes: (S,) samples of each group.
    """

    sizes: Ids

    @abstractmethod
    def ids(self, groups: Ids, starts: Ids, counts: Ids) -> Ids:
        """Sample numbers at places starts..starts+counts-1 of the streams of `groups`, one stream after another."""


class SourceDraws(Draws):
    """A stream for each source of a mixture, each sample once a pass over it.

    Args:
        offsets: for each source the number of the first sample of each of its shards, and the end of the last.
        seed: of the run.
        shares: (S,) of a batch.
        window: see `PassOrder`; of all sources together, so that no more shards are read at a time than of one alone.
    """

    def __init__(
        self,
        offsets: Sequence[Sequence[int] | Ids],
        *,
        seed: int,
        shares: Sequence[float] | None = None,
        window: int = WINDOW,
    ):
        shares = shares or [1 / len(offsets)] * len(offsets)
        windows = [max(min(_LEAST_WINDOW, window), round(window * share)) for share in shares]
        self._orders = [
            PassOrder(part, seed=seed, window=size, name=f" of source {number}")
            for number, (part, size) in enumerate(zip(offsets, windows, strict=True))
        ]
        self.sizes = np.array([order.num_samples for order in self._orders])

    def ids(self, groups: Ids, starts: Ids, counts: Ids) -> Ids:
        """See `Draws`."""
        parts = []
        for group, start, count in zip(groups.tolist(), starts.tolist(), counts.tolist(), strict=True):
            order = self._orders[group]
            while count:
                number, place = divmod(start, order.num_samples)
                some = order.at(number, place, place + count)
                parts.append(some)
                start, count = start + len(some), count - len(some)
        return np.concatenate(parts)


class ReplacementDraws(Draws):
    """A stream for each source, each place drawn from all its samples alike, whatever was drawn before.

    A source of more than 64 shards is read 64 at a time: a window of places draws them, a shard as likely as it is
    large, and every place draws one of these and a sample in it. A sample's chance is the same either way.
    Nothing is kept but the offsets.

    Args:
        offsets, seed: see `SourceDraws`.
        window: places that share their shards.
    """

    def __init__(self, offsets: Sequence[Sequence[int] | Ids], *, seed: int, window: int = WINDOW):
        self._offsets = [np.asarray(part, np.int64) for part in offsets]
        self._seed, self._window = seed, window
        self.sizes = np.array([part[-1] - part[0] for part in self._offsets])

    def ids(self, groups: Ids, starts: Ids, counts: Ids) -> Ids:
        """See `Draws`."""
        parts = []
        for group, start, count in zip(groups.tolist(), starts.tolist(), counts.tolist(), strict=True):
            while count:
                window, place = divmod(start, self._window)
                length = min(count, self._window - place)
                parts.append(self._drawn(group, window, place, length))
                start, count = start + length, count - length
        return np.concatenate(parts)

    def _drawn(self, group: int, window: int, first: int, count: int) -> Ids:
        offsets = self._offsets[group]
        numbers = raw(self._seed, window, group, "draws with replacement", 2 * count, 2 * first).reshape(count, 2)
        if len(offsets) - 1 <= _SHARDS_AT_ONCE:
            drawn: Ids = offsets[0] + below(numbers[:, 0], int(self.sizes[group]))
            return drawn
        chosen = raw(self._seed, window, group, "shards with replacement", _SHARDS_AT_ONCE)
        within = offsets[0] + below(chosen, int(self.sizes[group]))
        shard = (np.searchsorted(offsets, within, side="right") - 1)[below(numbers[:, 0], _SHARDS_AT_ONCE)]
        drawn = offsets[shard] + below(numbers[:, 1], offsets[shard + 1] - offsets[shard])
        return drawn


class GroupDraws(Draws):
    """A stream for each of many groups of single samples, e.g. classes; each sample once a pass over its group.

    Args:
        members: (N,) sample numbers, group after group.
        starts: (S+1,) where each group begins in `members`.
        seed: of the run.
    """

    def __init__(self, members: Ids, starts: Ids, *, seed: int):
        self._members, self._starts = members, starts
        self._key = raw(seed, 0, 0, "order in group", 1)
        self.sizes = np.diff(starts)

    def ids(self, groups: Ids, starts: Ids, counts: Ids) -> Ids:
        """See `Draws`."""
        group = np.repeat(groups, counts)
        place = np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(len(group))
        number, place = np.divmod(place, self.sizes[group])
        keys = mixed(mixed(self._key + group.astype(np.uint64)) + number.astype(np.uint64))
        found: Ids = self._members[self._starts[group] + scatter(place, self.sizes[group], keys)]
        return found


class SharePlan(Plan):
    """Batches that hold each group's share; see the module's head."""

    def __init__(
        self,
        draws: Draws,
        *,
        weights: Sequence[float],
        seed: int,
        global_batch_size: int,
        samples_per_epoch: int,
        rank: int = 0,
        world_size: int = 1,
    ):
        """Check the settings.

        Args:
            draws: the groups' streams.
            weights: (S,) of the groups; only their ratios count.
            seed: of the run.
            global_batch_size: samples per step over all ranks.
            samples_per_epoch: rounded down to whole batches.
            rank, world_size: which of how many processes this is.

        Raises:
            ConfigError: the global batch cannot be split over the ranks, an epoch is shorter than a batch, or a
                group's share of an epoch is no whole sample.
        """
        super().__init__(global_batch_size, rank, world_size)
        self._draws, self._seed = draws, seed
        self.num_samples = int(draws.sizes.sum())
        self.num_batches = samples_per_epoch // global_batch_size
        if not self.num_batches:
            raise ConfigError(
                f"An epoch of {samples_per_epoch} samples is shorter than one global batch of {global_batch_size}. "
                "Raise data.samples_per_epoch or lower data.global_batch_size."
            )
        self._shares = Shares(weights, global_batch_size, self.num_batches)
        self.per_epoch = self._shares.per_epoch
        if not self.per_epoch.all():
            raise ConfigError(
                f"Group number {int(self.per_epoch.argmin())} of {len(self.per_epoch)} has no sample in an epoch of "
                f"{self.num_batches * global_batch_size}: its weight is too small. Raise it, or "
                "data.samples_per_epoch."
            )

    def batch(self, epoch: int, index: int) -> Ids:
        """(batch_size,) numbers of the samples of one batch on this rank."""
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of {self.num_batches}")
        before = self._shares.before(index)
        counts = self._shares.before(index + 1) - before
        groups = np.flatnonzero(counts)
        ids = self._draws.ids(groups, epoch * self.per_epoch[groups] + before[groups], counts[groups])
        order = permutation(self._seed, epoch, index, "order in batch", self.global_batch_size)
        own: Ids = ids[order[self.rank * self.batch_size : (self.rank + 1) * self.batch_size]]
        return own

    def counts(self, step: int) -> Ids:
        """(S,) samples of each group in the global batches before `step`."""
        epoch, index = self.position(step)
        counts: Ids = epoch * self.per_epoch + self._shares.before(index)
        return counts


def below(numbers: NDArray[np.uint64], limit: int | Ids) -> Ids:
    """64-bit numbers to 0..limit-1; the bias is below limit / 2**64."""
    return (numbers % np.asarray(limit).astype(np.uint64)).astype(np.int64)
