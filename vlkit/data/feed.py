"""Batches of one epoch, prepared ahead by a pool of workers and handed over in order.

A batch is cut into parts of some dozen rows, which the workers write into a slot of shared memory; so all workers
are at work on the next batch, the first one comes soon, and memory is bounded by `prefetch` batches whatever the
number of workers. A thread does the bookkeeping, so that workers never wait for a training step to end.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlkit.data.sample_reader import Rows, SampleReader
from vlkit.data.worker_pool import WorkerPool

Ids = NDArray[np.int64]
Finished = TypeVar("Finished")


class ReadTask(NamedTuple):
    """Some rows of a batch."""

    epoch: int
    ids: Ids
    place: int  # first row in the shared memory


@dataclass(frozen=True)
class ReadJob:
    """What workers do: read samples into the shared memory."""

    reader: SampleReader

    def __call__(self, task: ReadTask, memory: Tensor) -> Rows:
        """Everything about the rows but the pixels, which are in `memory` then."""
        size = self.reader.preprocess.size
        images = memory.view(-1, 3, size, size)[task.place : task.place + len(task.ids)]
        return self.reader.read(task.epoch, task.ids, images)


@dataclass
class _Pending:
    """A batch the workers are at work on."""

    ids: Ids
    slot: int
    parts: list[Rows | None]


class Feed(Generic[Finished]):
    """Iterate to get the batches; `close` (or the end) stops the thread and leaves the pool idle.

    Args:
        pool: its memory holds `prefetch` batches.
        epoch: is passed to the workers.
        batches: the ids of each batch, in order; all of one length.
        size: image side, pixels.
        prefetch: batches that may be under way or waiting to be taken.
        finish: makes a batch of its ids, parts and images (a view that is valid during the call); runs in the thread.
    """

    def __init__(
        self,
        pool: WorkerPool,
        epoch: int,
        batches: Iterator[Ids],
        *,
        size: int,
        part_rows: int,
        prefetch: int,
        finish: Callable[[Ids, list[Rows], Tensor], Finished],
    ):
        self._pool, self._epoch, self._batches = pool, epoch, batches
        self._size, self._part_rows, self._prefetch, self._finish = size, part_rows, prefetch, finish
        self._free = list(range(prefetch))
        self._pending: deque[_Pending] = deque()
        self._tasks: deque[tuple[_Pending, int, ReadTask]] = deque()
        # Shared with the consumer, under the condition.
        self._changed = threading.Condition()
        self._ready: deque[Finished] = deque()
        self._error: BaseException | None = None
        self._ended = self._stop = False
        self._woken, self._wake = Pipe(duplex=False)
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._run, name="vlkit-feed", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Finished]:
        while True:
            with self._changed:
                while not self._ready and not self._ended:
                    self._changed.wait(1.0)  # with a time limit, for Ctrl-C on Windows
                if self._stop:  # closed meanwhile; what is ready still belongs to nobody, and the pipe is gone
                    return
                if not self._ready:
                    if self._error is not None:
                        raise self._error
                    return
                batch = self._ready.popleft()
            self._wake.send_bytes(b"\0")
            yield batch

    def close(self) -> None:
        """Stop early, or after the end; waits until the workers have finished their tasks. May be called twice."""
        if self._stop:
            return
        self._stop = True
        self._wake.send_bytes(b"\0")
        self._thread.join()
        self._wake.close()
        self._woken.close()

    @property
    def failed(self) -> bool:
        """Whether it ended by an error, after which the pool may not be used again."""
        return self._error is not None

    def _run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # else pinning would wake up GPU 0 from every rank
            while not self._stop and self._begin_batches():
                while self._tasks and self._pool.submit(self._tasks[0][:2], self._tasks[0][2]):
                    self._tasks.popleft()
                for (pending, part), rows in self._pool.wait(self._woken):
                    pending.parts[part] = rows
                while self._woken.poll():
                    self._woken.recv_bytes()
                self._finish_batches()
            self._pool.drain()
        except BaseException as error:
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _begin_batches(self) -> bool:
        """Cut further batches into tasks as far as there is room; False when all are done."""
        with self._changed:
            room = self._prefetch - len(self._pending) - len(self._ready)
        for ids in self._next_batches(room):
            slot = self._free.pop()
            starts = range(0, len(ids), self._part_rows)
            pending = _Pending(ids, slot, [None] * len(starts))
            self._pending.append(pending)
            for part, start in enumerate(starts):
                some = ids[start : start + self._part_rows]
                self._tasks.append((pending, part, ReadTask(self._epoch, some, slot * len(ids) + start)))
        return bool(self._pending) or room < 1

    def _next_batches(self, count: int) -> Iterator[Ids]:
        for _ in range(count):
            ids = next(self._batches, None)
            if ids is None:
                return
            yield ids

    def _finish_batches(self) -> None:
        while self._pending and all(part is not None for part in self._pending[0].parts):
            pending = self._pending.popleft()
            rows, first = len(pending.ids), pending.slot * len(pending.ids)
            images = self._pool.memory.view(-1, 3, self._size, self._size)[first : first + rows]
            batch = self._finish(pending.ids, [part for part in pending.parts if part is not None], images)
            self._free.append(pending.slot)
            with self._changed:
                self._ready.append(batch)
                self._changed.notify_all()
