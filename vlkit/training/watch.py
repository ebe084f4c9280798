"""Processes that train together end together: one that dies or hangs is named, and the others stop within a bound.

    with join(launch(), "gloo", timeout=120) as peers:       # torch.distributed runs inside
        ...                                                   # PeerError: process 3 of 8 on host b7 has ended: ...

Each process says in a shared store, every second, that it is alive, and how it ended. A thread in each looks at the
others. Waiting in an exchange cannot be interrupted from Python, so that thread ends the process itself.
"""

import itertools
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from vlkit.distributed import Launch
from vlkit.errors import VlkitError

_log = logging.getLogger(__name__)

_dist: Any = dist  # whose annotations leave out stores and rendezvous

BEAT = 1.0  # seconds

# How long an exchange waits for a process that lives: the main one may write, upload or score meanwhile.
PATIENCE = timedelta(hours=6)

# What a process that stopped because of another one ends with; the first one ends with its own code.
STOPPED = 75

DONE = "done"

# How often this process has joined others: the store outlives a group, and its keys must not be met again.
_groups = itertools.count()


class PeerError(VlkitError):
    """Another of the processes that train together has ended."""


@contextmanager
def join(launched: Launch, backend: str, timeout: float) -> Iterator[None]:
    """Run torch.distributed, and watch the other processes, until the block ends.

    Args:
        timeout: seconds after which a process that says nothing counts as dead.

    Raises:
        PeerError: another process ended, which this one noticed in an exchange.
    """
    os.environ.update(launched.environment())  # for torch's rendezvous, and for processes started from here
    # All must have come within ten minutes: nodes start at different times.
    rendezvous = _dist.rendezvous("env://", launched.rank, launched.world_size, timeout=timedelta(minutes=10))
    store, _, _ = next(iter(rendezvous))
    number = next(_groups)
    dist.init_process_group(
        backend,
        store=_dist.PrefixStore(f"group{number}", store),
        rank=launched.rank,
        world_size=launched.world_size,
        timeout=PATIENCE,
    )
    watch = Watch(_dist.PrefixStore(f"watch{number}", store.clone()), launched.rank, launched.world_size, timeout)
    try:
        yield
        dist.barrier()  # the one that holds the store must not leave before the others
    except BaseException as error:
        dead = watch.who() if isinstance(error, RuntimeError) else None
        watch.end(f"{type(error).__name__}: {error}" if dead is None else dead)
        if dead is not None:
            raise PeerError(dead) from error
        raise
    watch.end(DONE)
    dist.destroy_process_group()


class Watch:
    """Says that this process lives, and looks whether the others do.

    Args:
        store: a torch.distributed.Store shared by all; not used by anyone else, because a call may wait.
        rank, world_size: which of how many this one is.
        timeout: seconds of silence after which another one counts as dead.
        leave: ends this process, which may be waiting in an exchange; called with a message.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        timeout: float,
        leave: Callable[[str], None] = lambda message: _leave(message),
    ) -> None:
        self._store, self._rank, self._timeout, self._leave = store, rank, timeout, leave
        self._others = [other for other in range(world_size) if other != rank]
        self._last = {other: ("", time.monotonic()) for other in self._others}  # what it said, and when that was new
        self._ended = threading.Event()
        self._dead: str | None = None
        self._beat(0)
        dist.barrier()  # afterwards every key is there, so that no call waits for one
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def who(self, seconds: float = 5 * BEAT) -> str | None:
        """Which process has ended, waiting so long for news; None when all live."""
        deadline = time.monotonic() + seconds
        while self._dead is None and time.monotonic() < deadline:
            # An exchange has failed, so silence means more than otherwise.
            self._look(min(self._timeout, 3 * BEAT))
            time.sleep(BEAT / 10)
        return self._dead

    def end(self, how: str) -> None:
        """Say how this process ends, and look no more."""
        self._ended.set()
        with suppress(RuntimeError):  # the store may have died with its process
            self._store.set(str(self._rank), json.dumps({"host": socket.gethostname(), "end": how[:1000]}))

    def _run(self) -> None:
        count = 0
        while not self._ended.wait(BEAT):
            count += 1
            try:
                self._beat(count)
                self._look(self._timeout)
            except RuntimeError as error:  # of the store
                number = len(self._others) + 1
                self._dead = f"Process 0 of {number}, which keeps the others together, is gone ({error})."
            # Given a moment, an exchange fails by itself and the error goes the usual way.
            if self._dead is not None and not self._ended.wait(5 * BEAT):
                self._leave(self._dead)
                return

    def _beat(self, count: int) -> None:
        self._store.set(str(self._rank), json.dumps({"host": socket.gethostname(), "beat": count}))

    def _look(self, timeout: float) -> None:
        now = time.monotonic()
        for other in self._others:
            said = self._store.get(str(other)).decode()
            before, when = self._last[other]
            if said != before:
                self._last[other] = (said, now)
            end = json.loads(said).get("end")
            silent = said == before and now - when > timeout
            if self._dead is None and (silent or end not in (None, DONE)):
                name = f"Process {other} of {len(self._others) + 1} on host {json.loads(said)['host']}"
                reason = f"has said nothing for {now - when:.0f} s" if silent else f"has ended: {end}"
                self._dead = end if end and end.startswith("Process ") else f"{name} {reason}"


def _leave(message: str) -> None:
    _log.critical("%s. This process stops too; --resume continues from the last checkpoint.", message.rstrip("."))
    logging.shutdown()
    os._exit(STOPPED)
