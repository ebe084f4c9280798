"""Work in parts on several processes, of this machine or of a Ray cluster.

A part that is finished stays finished: writing it whole is the part's business.

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
from typing import Any, Literal, TypeVar, get_args

from vlkit.errors import ConfigError, VlkitError, did_you_mean

Part = TypeVar("Part")
Result = TypeVar("Result")
Engine = Literal["local", "ray"]


def default_workers() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_parts(
    function: Callable[[Part], Result], parts: Sequence[Part], workers: int, engine: str = "local"
) -> Iterator[tuple[int, Result]]:
    """Apply `function` to every part.

    Args:
        function: importable by name (no lambda), as it is sent to fresh processes.
        parts: each is sent to the process that takes it.
        workers: processes; up to 1 works in this one. On Ray: parts at a time, 0 for as many as it has processors.
        engine: "local", or "ray" (extra `ray`): the cluster of RAY_ADDRESS, else one that is started on this machine.
            All its machines need vlkit and see the same files under the same paths.

    Yields:
        Position of a part and its result, in the order in which they finish.

    Raises:
        ConfigError: unknown engine, or Ray is not installed.
        VlkitError: a process died, or Ray does not start. What `function` raises is raised here, after the parts under
            way have ended (on Ray they are cancelled).
    """
    if engine not in get_args(Engine):
        raise ConfigError(f"Unknown engine '{engine}'. {did_you_mean(engine, get_args(Engine))}")
    if engine == "ray":
        yield from _map_on_ray(function, parts, workers)
        return
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


def _map_on_ray(
    function: Callable[[Part], Result], parts: Sequence[Part], workers: int
) -> Iterator[tuple[int, Result]]:
    try:
        import ray
    except ImportError as error:
        raise ConfigError("The engine `ray` needs the extra of that name: pip install 'vlkit[ray]'.") from error
    ours = not ray.is_initialized()
    if ours:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reports to its makers unless told not to
        try:
            ray.init(log_to_driver=False, logging_level="error")
        except Exception as error:  # Ray raises whatever it meets, a plain Exception for a node that came up too late
            raise VlkitError(
                f"Ray does not start: {error} Look whether RAY_ADDRESS names a running cluster, or whether this "
                "machine is too busy for one of its own; then run the same command again."
            ) from error
    at_once = workers or int(ray.cluster_resources().get("CPU", 1))
    # Ray repeats a part whose machine is lost, as parts are written whole or not at all; not one that raised.
    task = ray.remote(max_retries=3)(function)
    todo = iter(enumerate(parts))
    running: dict[Any, int] = {}
    try:
        while True:
            while len(running) < at_once and (following := next(todo, None)):
                running[task.remote(following[1])] = following[0]
            if not running:
                return
            for done in ray.wait(list(running), num_returns=1)[0]:
                yield running.pop(done), ray.get(done)
    except ray.exceptions.RayTaskError as error:
        raise error.cause if isinstance(error.cause, Exception) else error from None
    except ray.exceptions.RayError as error:
        raise VlkitError(
            f"A worker of Ray was lost: {error}. Run the same command again; finished parts are kept."
        ) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
        if ours:
            ray.shutdown()


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
