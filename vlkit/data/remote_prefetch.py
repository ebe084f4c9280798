"""Downloads the shards that the next batches will read, before they are read.

It looks ahead in the order of the batches, as far as the shards of all batches in view fit into the cache, holds these
shards there (see `Lease`) and downloads them in the order of their first use. What is out of view may be thrown out.
So of all shards those stay that are needed soonest, and where the cache holds what the order mixes with each other
(`window` in `pass_order.py`), each shard is downloaded once an epoch. The order itself does not change.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlkit.data.remote import bring_ahead, read_marker
from vlkit.data.remote_cache import Lease, ShardCache
from vlkit.data.remote_requests import StoppedError
from vlkit.data.shard_index import ShardSet
from vlkit.errors import ConfigError, VlkitError

Ids = NDArray[np.int64]

_DOWNLOADS = 8  # at a time
_SAMPLES_AHEAD = 262_144  # two windows of the plan
_AGAIN_SECONDS = 0.2  # when another process is at it, or nothing can be thrown out yet


class _Batch(NamedTuple):
    ids: Ids
    shards: list[int]  # remote ones
    ours: bool  # not of the epoch after


class Prefetcher:
    """Downloads for one loader; `close` ends its threads and lets go of its shards."""

    def __init__(self, shards: ShardSet, batches_in_use: int):
        """Look at the shards; nothing is downloaded before the first batch is asked for.

        Args:
            shards: of which some are remote, see `is_remote`.
            batches_in_use: given out last, which may still be read from.
        """
        self._paths = [shard.path for shard in shards.shards]
        self._sizes = {number: size for number, path in enumerate(self._paths) if (size := _size(path)) is not None}
        self._offsets, self._in_use = shards.offsets, batches_in_use
        self._cache = ShardCache.of(self._paths[next(iter(self._sizes))])
        self._limit = self._cache.limit
        self._uses: Counter[int] = Counter()  # batches in view that read a shard; insertion order is that of first use
        self._stop = threading.Event()
        # Shared with the threads, under the condition.
        self._changed = threading.Condition()
        self._wanted: list[int] = []
        self._urgent: set[int] = set()
        self._here: set[int] = set()
        self._busy: set[int] = set()
        self._later: dict[int, float] = {}
        self._failed: dict[int, str] = {}
        self._lease: Lease | None = None
        self._threads: list[threading.Thread] = []

    @staticmethod
    def is_remote(shards: ShardSet) -> bool:
        """Whether any shard is at a URL."""
        return any(_size(shard.path) is not None for shard in shards.shards)

    def follow(self, batches: Iterator[Ids], after: Iterator[Ids]) -> Iterator[Ids]:
        """The batches as they come, each after its shards have been asked for.

        Args:
            batches: ids of each batch.
            after: what is likely to be asked for then.

        Raises:
            ConfigError: the shards of a few batches do not fit into the cache together.
        """
        upcoming = chain((self._batch(ids, True) for ids in batches), (self._batch(ids, False) for ids in after))
        behind: deque[_Batch] = deque()
        ahead: deque[_Batch] = deque()
        self._uses.clear()
        spare: _Batch | None = None  # the first that did not fit
        while True:
            while len(behind) > self._in_use:
                self._uses.subtract(behind.popleft().shards)
            spare = self._look_ahead(ahead, spare, upcoming)
            if not ahead or not ahead[0].ours:
                return
            behind.append(ahead.popleft())
            self._ask_for({number for batch in behind for number in batch.shards})
            yield behind[-1].ids

    def close(self) -> None:
        """End the downloads. May be called twice; `follow` begins anew."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(1.0)  # one that waits for a silent server finds out later; it writes nothing that counts
        self._threads = []
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    def _batch(self, ids: Ids, ours: bool) -> _Batch:
        there = ids[ids >= 0]
        _, first = np.unique(np.searchsorted(self._offsets, there, side="right") - 1, return_index=True)
        numbers = (np.searchsorted(self._offsets, there[np.sort(first)], side="right") - 1).tolist()
        return _Batch(ids, [number for number in numbers if number in self._sizes], ours)

    def _look_ahead(self, ahead: deque[_Batch], spare: _Batch | None, upcoming: Iterator[_Batch]) -> _Batch | None:
        """Take batches into view while their shards fit; the one that does not is returned."""
        for number in [number for number, count in self._uses.items() if count <= 0]:
            del self._uses[number]
        held = sum(self._sizes[number] for number in self._uses)
        samples = sum(len(batch.ids) for batch in ahead)
        while samples < _SAMPLES_AHEAD or not ahead:
            batch = spare or next(upcoming, None)
            if batch is None:
                return None
            held += sum(self._sizes[number] for number in batch.shards if number not in self._uses)
            if held > self._limit:
                if ahead:
                    return batch
                raise self._too_small(held, batch)
            self._uses.update(batch.shards)
            ahead.append(batch)
            samples += len(batch.ids)
            spare = None
        return spare

    def _too_small(self, held: int, batch: _Batch) -> ConfigError:
        count = len({*self._uses, *batch.shards})
        return ConfigError(
            f"{self._in_use + 1} batches read from {count} shards at URLs with {held / 1e9:.3g} GB, but the cache "
            f"{self._cache.folder} is bounded to {self._limit / 1e9:.3g} GB. Raise data.cache_size (best so that it "
            "holds all shards that the order mixes with each other), or lower data.window, which mixes fewer."
        )

    def _ask_for(self, urgent: set[int]) -> None:
        """Say what is in view; `urgent` is read now."""
        if self._lease is None:
            self._stop = threading.Event()
            self._lease = Lease(self._cache)
            self._failed, self._later = {}, {}
        with self._changed:
            self._wanted, self._urgent = list(self._uses), urgent
            self._here &= self._uses.keys()  # others may be thrown out from now on
            self._say()
            self._here |= {number for number in self._uses.keys() - self._here if self._paths[number].exists()}
            self._say()
            self._changed.notify_all()
        if not self._threads:
            names = [f"vlkit-download-{number}" for number in range(min(_DOWNLOADS, len(self._sizes)))]
            self._threads = [
                threading.Thread(target=self._download, args=(self._stop,), name=name, daemon=True) for name in names
            ]
            for thread in self._threads:
                thread.start()

    def _say(self) -> None:
        if self._lease is not None:
            coming = [self._paths[number] for number in sorted(self._urgent - self._here)]
            failed = {str(self._paths[number]): message for number, message in self._failed.items()}
            self._lease.say([self._paths[number] for number in sorted(self._wanted)], coming, failed)

    def _download(self, stop: threading.Event) -> None:
        """A thread's life."""
        while not stop.is_set():
            with self._changed:
                number = self._next()
                if number is None:
                    self._changed.wait(_AGAIN_SECONDS)
                    continue
                self._busy.add(number)
                urgent = number in self._urgent
            done, failure = False, None
            try:
                done = bring_ahead(self._paths[number], stop, urgent)
            except StoppedError:
                return
            except VlkitError as error:
                failure = str(error)
            except Exception as error:  # whatever it is, those who wait for the shard must hear of it
                failure = f"{self._paths[number].name}: {type(error).__name__}: {error}"
            with self._changed:
                self._busy.discard(number)
                if done:
                    self._here.add(number)
                elif failure is not None and number in self._urgent:
                    self._failed[number] = failure
                else:
                    self._later[number] = time.monotonic() + _AGAIN_SECONDS
                if not stop.is_set():
                    self._say()

    def _next(self) -> int | None:
        """The shard to download next: what is read now, then what is used first."""
        now = time.monotonic()
        for number in chain((one for one in self._wanted if one in self._urgent), self._wanted):
            if number not in self._here | self._busy | self._failed.keys() and self._later.get(number, 0) <= now:
                return number
        return None


def _size(path: Path) -> int | None:
    """Bytes of a remote shard (0 where the server does not tell), None of a local one."""
    shard = read_marker(path)
    return None if shard is None else shard.size or 0
