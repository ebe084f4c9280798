"""Which samples each batch of each epoch holds: a pure function of (shard sizes, seed, epoch, batch).

    plan = EpochPlan(shards.offsets, seed=0, global_batch_size=256)
    epoch, index = plan.position(step)
    ids = plan.batch(epoch, index)                 # (B,) int64 numbers in the shard index; -1 is padding

Nothing needs to be saved but the step number: any batch can be asked for directly, on any number of ranks, and the
global batch (the batches of all ranks in rank order) does not depend on how many ranks there are. Workers are handed
parts of batches, so their number cannot matter either.

`EpochPlan` is each sample once an epoch, in the order of `pass_order.py`. Mixtures, sampling with replacement and
balanced batches are in `share_plan.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vlkit.data.pass_order import WINDOW, PassOrder
from vlkit.errors import ConfigError, DataError, did_you_mean

Remainder = Literal["drop", "keep"]
Ids = NDArray[np.int64]

PADDING = -1


class Plan(ABC):
    """The order of all epochs, seen from one rank.

    Attributes:
        num_samples: there are to choose from.
        num_batches: per epoch, the same on every rank.
        num_dropped: samples an epoch leaves out because they do not fill a batch: other ones each epoch.
        num_padding: rows without a sample in the last global batch of an epoch.
        global_batch_size: rows of a batch over all ranks.
        batch_size: rows of a batch on this rank.
        rank, world_size: which of how many processes this is.
    """

    num_samples: int
    num_batches: int
    num_dropped: int = 0
    num_padding: int = 0

    def __init__(self, global_batch_size: int, rank: int, world_size: int):
        """Check that the batch splits over the ranks.

        Raises:
            ConfigError: it does not.
        """
        if global_batch_size < 1 or global_batch_size % world_size:
            raise ConfigError(
                f"The global batch size is {global_batch_size}, which does not split evenly over "
                f"{world_size} processes. Use a multiple of {world_size}."
            )
        assert 0 <= rank < world_size, (rank, world_size)
        self.global_batch_size, self.rank, self.world_size = global_batch_size, rank, world_size
        self.batch_size = global_batch_size // world_size

    def position(self, step: int) -> tuple[int, int]:
        """The epoch and the batch in it that come after `step` batches."""
        return divmod(step, self.num_batches)

    @abstractmethod
    def batch(self, epoch: int, index: int) -> Ids:
        """(batch_size,) numbers of the samples of one batch on this rank; -1 is a padding row."""


class EpochPlan(Plan):
    """Each sample once an epoch, but for the remainder that does not fill a batch."""

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
        window: int = WINDOW,
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
        super().__init__(global_batch_size, rank, world_size)
        self._order = PassOrder(offsets, seed=seed, shuffle=shuffle, window=window)
        self.num_samples = self._order.num_samples
        self._check(remainder)
        full, rest = divmod(self.num_samples, global_batch_size)
        keep = remainder == "keep" and rest > 0
        self.num_batches = full + 1 if keep else full
        self.num_dropped = 0 if keep else rest
        self.num_padding = global_batch_size - rest if keep else 0

    def batch(self, epoch: int, index: int) -> Ids:
        """(batch_size,) numbers of the samples of one batch on this rank; -1 is a padding row."""
        if not 0 <= index < self.num_batches:
            raise IndexError(f"batch {index} of {self.num_batches}")
        start = index * self.global_batch_size + self.rank * self.batch_size
        ids = self._order.at(epoch, start, start + self.batch_size)
        missing = self.batch_size - len(ids)
        return np.concatenate([ids, np.full(missing, PADDING)]) if missing else ids

    def _check(self, remainder: str) -> None:
        if remainder not in ("drop", "keep"):
            raise ConfigError(f"remainder is {remainder!r}. {did_you_mean(remainder, ('drop', 'keep'))}")
        if remainder == "drop" and self.num_samples < self.global_batch_size:
            raise DataError(
                f"The shards hold {self.num_samples} samples, fewer than one global batch of {self.global_batch_size}. "
                "Lower the batch size, use more data, or keep the remainder (remainder='keep')."
            )
