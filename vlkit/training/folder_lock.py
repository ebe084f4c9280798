"""One writer a run folder: a lock that the system lets go of when its process ends, however it ends.

lock = FolderLock(Path("runs/a"))        # CheckpointError: process 4711 on host gpu3 writes it since 12:30
lock.ended_badly                         # what the one before left behind: it was killed
lock.release()
"""

import json
import os
import socket
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vlkit.errors import CheckpointError

NAME = "writer.lock"

# The system's locks are between processes; within one process this set does it.
_held: set[Path] = set()


class FolderLock:
    """Held from its construction to `release`, or to the end of the process.

    Attributes:
        ended_badly: how the process before, which did not let go itself, describes itself; None when it did.

    Raises:
        CheckpointError: another live process holds it, or it cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = (folder / NAME).resolve()
        if self._path in _held:
            raise CheckpointError(f"{folder} is being written by this very process. Wait for its end.")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise CheckpointError(f"Cannot write the run folder {folder}: {error.strerror or error}.") from error
        try:
            before = self._read()
            if not _try_to_lock(self._file):
                raise CheckpointError(
                    f"{folder} is being written by {describe(before)}. Stop that run, wait for its end, or give "
                    "another folder as run.out."
                )
        except BaseException:
            os.close(self._file)
            raise
        self.ended_badly = describe(before) if before else None
        _held.add(self._path)
        self._write({"pid": os.getpid(), "host": socket.gethostname(), "since": _now()})

    def release(self) -> None:
        """Let go. May be called twice."""
        if self._path in _held:
            self._write({})
            os.close(self._file)  # unlocks
            _held.discard(self._path)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(os.pread(self._file, 4096, 0) if hasattr(os, "pread") else self._path.read_bytes())
        except (OSError, ValueError):  # not written yet, or half of it
            return {}
        return found if isinstance(found, dict) else {}

    def _write(self, record: dict[str, Any]) -> None:
        os.ftruncate(self._file, 0)
        os.lseek(self._file, 0, os.SEEK_SET)
        os.write(self._file, json.dumps(record).encode() if record else b"")


def describe(record: dict[str, Any]) -> str:
    """ "process 4711 on host gpu3 since 2026-01-31 12:30:00 UTC"."""
    if not record:
        return "another process"
    return f"process {record.get('pid')} on host {record.get('host')} since {record.get('since')}"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


if sys.platform == "win32":

    def _try_to_lock(file: int) -> bool:
        import msvcrt

        os.lseek(file, 1 << 20, os.SEEK_SET)  # a place nobody reads: locks are mandatory there
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:

    def _try_to_lock(file: int) -> bool:
        import errno
        import fcntl

        try:
            # Not flock: children that a killed run leaves behind for a moment would hold that on.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A file system without locks cannot say who writes; refusing all runs there would help nobody.
            return error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
        return True
