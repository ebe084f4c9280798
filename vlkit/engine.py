"""Work in parts on several processes. A part that is finished stays finished: writing it whole is the part's business.

for position, result in map_parts(build_one, parts, workers=8):
    ...
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait as wait_for_handles
from typing import TypeVar

from vlkit.errors import VlkitError

Part = TypeVar("Part")
Result = TypeVar("Result")


def default_workers() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_parts(function: Callable[[Part], Result], parts: Sequence[Part], workers: int) -> Iterator[tuple[int, Result]]:
    """Apply `function` to every part.

    Args:
        function: importable by name (no lambda), as it is sent to fresh processes.
        parts: each is sent to the process that takes it.
        workers: processes; up to 1 works in this one.

    Yields:
        Position of a part and its result, in the order in which they finish.

    Raises:
        VlkitError: a process died. What `function` raises is raised here, after the parts under way have ended.
    """
    if min(workers, len(parts)) <= 1:
        yield from ((position, function(part)) for position, part in enumerate(parts))
        return
    # Fresh processes: forking one that has started threads (torch has) may leave a lock held for ever.
    pool = ProcessPoolExecutor(min(workers, len(parts)), get_context("spawn"), _start_worker)
    todo = iter(enumerate(parts))
    running: dict[Future[Result], int] = {}
    try:
        while True:
            # A short queue, so that the parts are pickled as they are needed.
            while len(running) < 2 * workers and (following := next(todo, None)):
                running[pool.submit(function, following[1])] = following[0]
            if not running:
                return
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(done), done.result()
    except BrokenProcessPool as error:
        raise VlkitError(
            "A worker process died: killed from outside, or out of memory. Run the same command again, with fewer "
            "workers if memory is short; finished parts are kept."
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported here: processes are the threads
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which lets the parts under way end
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its workers, and they would wait for work for ever."""
    parent = parent_process()
    assert parent is not None
    wait_for_handles([parent.sentinel])
    os._exit(1)
