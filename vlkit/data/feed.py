"""Batches prepared ahead by a pool of workers and handed over in order, epoch after epoch.

A batch is cut into parts of some dozen rows, which the workers write into a slot of shared memory; so all workers
are at work on the next batch, the first one comes soon, and memory is bounded by `prefetch` batches whatever the
number of workers. A thread does the bookkeeping, so that workers never wait for a training step to end. The stream
of batches has no end: while the last of an epoch are used, the first of the next are being read.
"""

import math
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

from vlkit.data.collate import as_images
from vlkit.data.sample_reader import Rows, SampleReader
from vlkit.data.shared_block import Slots
from vlkit.data.worker_pool import WorkerPool

Ids = NDArray[np.int64]
Finished = TypeVar("Finished")

# Batches the consumer may hold without a copy: the one in use, and the one just asked for.
SPARE_SLOTS = 2


class ReadTask(NamedTuple):
    """Some rows of a batch."""

    epoch: int
    ids: Ids
    slot: int
    first: int  # row of the batch


@dataclass(frozen=True)
class ReadJob:
    """What workers do: read samples into the shared memory."""

    reader: SampleReader
    rows: int  # of a batch

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a batch's pixels: (V,B,3,size,size)."""
        size = self.reader.preprocess.size
        return (self.reader.num_views, self.rows, 3, size, size)

    def __call__(self, task: ReadTask, memory: Tensor) -> Rows:
        """Everything about the rows but the pixels, which are in `memory` then."""
        num_bytes = math.prod(self.shape)
        images = as_images(memory[task.slot * num_bytes : (task.slot + 1) * num_bytes], self.shape)
        return self.reader.read(task.epoch, task.ids, images[:, task.first : task.first + len(task.ids)])


@dataclass
class _Pending:
    """A batch the workers are at work on."""

    ids: Ids
    slot: int
    parts: list[Rows | None]


class _Ready(NamedTuple, Generic[Finished]):
    """A batch that waits to be taken; its pixels are in the slot, or in pinned memory."""

    finished: Finished
    slot: int | None
    pinned: Tensor | None


class Feed(Generic[Finished]):
    """`next` gives the batches; `close` stops the thread and leaves the pool idle.

    Args:
        pool: its memory holds the slots.
        slots: `prefetch` + `SPARE_SLOTS` of them.
        batches: epoch and ids of each batch, in order; all of one length.
        shape: of a batch's pixels.
        part_rows: rows a worker reads at a time.
        prefetch: batches that may be under way or waiting to be taken.
        finish: makes what is handed over of ids and parts; runs in the thread.
        pinned: whether pixels are copied to pinned memory, in the thread, from which a GPU can fetch them by itself.
    """

    def __init__(
        self,
        pool: WorkerPool,
        slots: Slots,
        batches: Iterator[tuple[int, Ids]],
        *,
        shape: tuple[int, ...],
        part_rows: int,
        prefetch: int,
        finish: Callable[[Ids, list[Rows]], Finished],
        pinned: bool,
    ):
        self._pool, self._slots, self._batches, self._shape = pool, slots, batches, shape
        self._part_rows, self._prefetch, self._finish, self._pinned = part_rows, prefetch, finish, pinned
        self._pending: deque[_Pending] = deque()
        self._tasks: deque[tuple[_Pending, int, ReadTask]] = deque()
        # Shared with the consumer, under the condition.
        self._changed = threading.Condition()
        self._ready: deque[_Ready[Finished]] = deque()
        self._error: BaseException | None = None
        self._ended = self._stop = False
        self._woken, self._wake = Pipe(duplex=False)
        self._device = torch.cuda.current_device() if pinned else None
        self._thread = threading.Thread(target=self._run, name="vlkit-feed", daemon=True)
        self._thread.start()

    def next(self) -> tuple[Finished, Tensor] | None:
        """The next batch and its pixels; None after `close`.

        Raises:
            DataError: a worker ended.
            VlkitError: one that a worker raised.
        """
        with self._changed:
            while not self._ready and not self._ended:
                self._changed.wait(1.0)  # with a time limit, for Ctrl-C on Windows
            if self._stop:  # closed meanwhile; what is ready still belongs to nobody, and the pipe is gone
                return None
            if not self._ready:
                assert self._error is not None
                raise self._error
        ready = self._ready[0]  # it counts as waiting until its slot is lent or free again
        images = ready.pinned if ready.slot is None else self._images_in(ready.slot)
        assert images is not None
        with self._changed:
            self._ready.popleft()
        self._wake.send_bytes(b"\0")
        return ready.finished, as_images(images, self._shape)

    def _images_in(self, slot: int) -> Tensor:
        if self._slots.num_lent < SPARE_SLOTS:
            return self._slots.lend(slot)
        copied = self._slots.view(slot).clone()  # the consumer keeps many batches
        self._slots.give_back(slot)
        return copied

    def close(self) -> None:
        """Stop early, or after the end; waits until the workers have finished their tasks. May be called twice."""
        if self._stop:
            return
        self._stop = True
        self._wake.send_bytes(b"\0")
        self._thread.join()
        self._wake.close()
        self._woken.close()
        for slot in [*(batch.slot for batch in self._pending), *(batch.slot for batch in self._ready)]:
            if slot is not None:
                self._slots.give_back(slot)

    @property
    def failed(self) -> bool:
        """Whether it ended by an error, after which the pool may not be used again."""
        return self._error is not None

    def _run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # else pinning would wake up GPU 0 from every rank
            while not self._stop:
                self._begin_batches()
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

    def _begin_batches(self) -> None:
        """Cut further batches into tasks as far as there is room."""
        with self._changed:
            room = self._prefetch - len(self._pending) - len(self._ready)
        for _ in range(room):
            epoch, ids = next(self._batches)
            slot = self._slots.take()
            starts = range(0, len(ids), self._part_rows)
            pending = _Pending(ids, slot, [None] * len(starts))
            self._pending.append(pending)
            for part, start in enumerate(starts):
                some = ids[start : start + self._part_rows]
                self._tasks.append((pending, part, ReadTask(epoch, some, slot, start)))

    def _finish_batches(self) -> None:
        while self._pending and all(part is not None for part in self._pending[0].parts):
            batch = self._pending[0]
            finished = self._finish(batch.ids, [part for part in batch.parts if part is not None])
            slot: int | None = batch.slot
            pinned = None
            if self._pinned:
                view = self._slots.view(batch.slot)
                pinned = torch.empty(view.shape, dtype=view.dtype, pin_memory=True).copy_(view)
                self._slots.give_back(batch.slot)
                slot = None
            with self._changed:
                self._pending.popleft()
                self._ready.append(_Ready(finished, slot, pinned))
                self._changed.notify_all()
