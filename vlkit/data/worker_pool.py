"""Processes that run one job on small tasks; results come back by pipe, pixels through shared memory.

Each worker has a pipe of its own and no lock is shared, so a worker that is killed can neither block the others nor
the main process: its end is seen at once and reported. Workers leave when the main process does, however it ends.
"""

import contextlib
import multiprocessing
import signal
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

import torch
from torch import Tensor

from vlkit.data.shared_block import SharedBlock
from vlkit.errors import DataError, VlkitError

StartMethod = Literal["forkserver", "spawn", "fork"]

# One task being done and one waiting: enough to keep a worker busy, too little to fill a pipe and block on it.
_TASKS_PER_WORKER = 2

Job = Callable[[Any, Tensor], Any]  # (task, shared memory) -> result


@dataclass
class _Worker:
    number: int
    process: Any  # a multiprocessing process; its type depends on the start method
    pipe: Connection
    tags: deque[Any] = field(default_factory=deque)  # of the tasks it has, in order


class WorkerPool:
    """Workers that hold a job and a piece of shared memory (`memory`, a flat uint8 tensor)."""

    def __init__(self, job: Job, num_workers: int, num_bytes: int, start_method: StartMethod | None = None):
        """Start the workers.

        Args:
            job: called as job(task, memory) in a worker; it must be picklable unless the start method is "fork".
            num_workers: at least 1.
            num_bytes: size of the shared memory.
            start_method: how Python starts them. None: a fork server where there is one, because it imports torch
                once for all workers and, unlike "fork", is safe beside threads and CUDA; else "spawn".
        """
        context = _context(start_method)
        shared = SharedBlock(num_bytes)
        self.memory = shared.tensor
        self._workers: list[_Worker] = []
        try:
            for number in range(num_workers):
                self._workers.append(_start(context, number, job, shared, [one.pipe for one in self._workers]))
        except BaseException:
            self.close()
            raise

    @property
    def busy(self) -> bool:
        """Whether any worker has a task."""
        return any(worker.tags for worker in self._workers)

    def submit(self, tag: Any, task: Any) -> bool:
        """Give a task to the worker with the least to do; False when all have enough."""
        worker = min(self._workers, key=lambda one: len(one.tags))
        if len(worker.tags) >= _TASKS_PER_WORKER:
            return False
        try:
            worker.pipe.send(task)
        except OSError as error:
            raise _death(worker) from error
        worker.tags.append(tag)
        return True

    def wait(self, wake: Connection | None = None, seconds: float | None = None) -> list[tuple[Any, Any]]:
        """Wait for results (as (tag, result)), for the end of a worker, for `wake` to hold something, or so long.

        Raises:
            DataError: a worker ended.
            VlkitError: one that a job raised.
            RuntimeError: another exception in a job, with its traceback.
        """
        pipes = {worker.pipe: worker for worker in self._workers}
        ends = {worker.process.sentinel: worker for worker in self._workers}
        ready = wait([*pipes, *ends, *([] if wake is None else [wake])], seconds)
        results = []
        for item in ready:
            if item is not wake and item in pipes:
                results.append(_receive(pipes[item]))
        for item in ready:
            if item in ends and not results:  # its last results first
                raise _death(ends[item])
        return results

    def drain(self, seconds: float = 10.0) -> None:
        """Wait until no worker has a task; results are thrown away.

        Raises:
            TimeoutError: a worker is still at work after `seconds`. One that was forked while another thread of this
                process held a lock waits for that lock forever; such a pool can only be closed, which kills it.
        """
        deadline = time.monotonic() + seconds
        while self.busy:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"a data worker is still at work after {seconds:g} s")
            self.wait(seconds=left)

    def close(self) -> None:
        """End the workers. May be called twice."""
        for worker in self._workers:
            with contextlib.suppress(OSError):  # it has ended already
                worker.pipe.send(None)
        for worker in self._workers:
            worker.process.join(2)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
            worker.process.close()
        self._workers = []


def prepare(start_method: StartMethod | None) -> None:
    """Let the fork server, if there will be one, begin its imports, seconds of work beside what is done meanwhile."""
    if _context(start_method).get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()


def _context(start_method: StartMethod | None) -> Any:
    method = start_method or ("spawn" if sys.platform == "win32" else "forkserver")
    context: Any = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(["vlkit.data.sample_reader"])
    return context


def _start(context: Any, number: int, job: Job, shared: SharedBlock, others: list[Connection]) -> _Worker:
    ours, theirs = context.Pipe()
    # A forked worker inherits our ends of all pipes, and would never see them close when we are gone.
    inherited = [*others, ours] if context.get_start_method() == "fork" else []
    process = context.Process(
        target=_work, args=(job, shared, theirs, inherited), name=f"vlkit-data-{number}", daemon=True
    )
    process.start()
    theirs.close()  # so that the end of the worker is the end of the pipe
    return _Worker(number, process, ours)


def _work(job: Job, shared: SharedBlock, pipe: Connection, inherited: list[Connection]) -> None:
    """A worker's life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle
    torch.set_num_threads(1)
    for end in inherited:
        end.close()
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return  # the main process is gone
        if task is None:
            return
        try:
            answer: tuple[bool, Any] = (True, job(task, shared.tensor))
        except VlkitError as error:
            answer = (False, error)
        except BaseException:
            answer = (False, traceback.format_exc())
        try:
            pipe.send(answer)
        except OSError:
            return


def _receive(worker: _Worker) -> tuple[Any, Any]:
    try:
        well, result = worker.pipe.recv()
    except (EOFError, OSError) as error:
        raise _death(worker) from error
    tag = worker.tags.popleft()
    if well:
        return tag, result
    if isinstance(result, VlkitError):
        raise result
    raise RuntimeError(f"Data worker {worker.number} failed:\n{result}")


def _death(worker: _Worker) -> DataError:
    worker.process.join(5)
    code = worker.process.exitcode
    if code is not None and code < 0:
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
        advice = "Most often the machine ran out of memory: use fewer workers or a smaller batch."
    else:
        how = f"ended with exit code {code}"
        advice = (
            "Its own message stands above. A script that loads data with workers needs the line "
            "`if __name__ == '__main__':` before what it runs."
        )
    return DataError(f"Data worker {worker.number} (process {worker.process.pid}) {how}. {advice}")
