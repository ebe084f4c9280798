"""Work in a process of its own, and the memory that each phase of it takes; used by addon_costs.py beside it.

    found, memory = apart(work)         # work(watch) returns numbers; `with watch.phase("fit"):` around what is watched

The process is forked, so what is loaded is shared with it. Its anonymous resident memory is read every millisecond from
outside; what counts is the highest value of a phase above that at the phase's beginning.
"""

import ctypes
import gc
import json
import os
import select
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Watch:
    """Tells the process outside which phase begins and ends."""

    def __init__(self, end: int) -> None:
        self._end = end

    def say(self, line: str) -> None:
        os.write(self._end, f"{line}\n".encode())

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        gc.collect()
        if hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back
        self.say(f"{name} {anonymous_bytes(os.getpid())}")
        yield
        self.say("-")


def anonymous_bytes(process: int) -> int:
    """Resident memory that is no file's; 0 where that cannot be read."""
    try:
        with open(f"/proc/{process}/statm", encoding="ascii") as statm:
            resident, shared = (int(number) for number in statm.read().split()[1:3])
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def apart(work: Callable[[Watch], dict[str, float]]) -> tuple[dict[str, Any], dict[str, int]]:
    """What the work returns in a process of its own, and the most memory of each phase above its beginning.

    Where it fails, `error` says why, so that one failure does not end a long list.
    """
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        watch = Watch(write_end)
        # torch makes its thread pool anew in a child, on first use; two threads at once would find none.
        torch.set_num_threads(1)
        try:
            watch.say("done " + json.dumps(work(watch)))
        except Exception as error:  # nothing may leave the child but through the pipe
            watch.say("done " + json.dumps({"error": f"{type(error).__name__}: {error}"}))
        finally:
            os._exit(0)
    os.close(write_end)
    highest: dict[str, int] = {}
    phase, start, text = "-", 0, ""
    while True:
        if phase != "-":
            highest[phase] = max(highest.get(phase, 0), anonymous_bytes(child) - start)
        if not select.select([read_end], [], [], 0.001)[0]:
            continue
        more = os.read(read_end, 65536).decode()
        text += more
        *lines, text = text.split("\n")
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "done":
                _ended(child, read_end)
                return json.loads(rest), highest
            phase, start = word, int(rest or 0)
        if not more:
            _ended(child, read_end)
            return {"error": "its process ended without a result; too little memory?"}, highest


def _ended(child: int, read_end: int) -> None:
    os.close(read_end)
    os.waitpid(child, 0)
