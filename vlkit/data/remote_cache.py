"""A bounded folder of downloaded shards that all processes of a machine share.

    VLKIT_CACHE/shards/limit                      bytes; without it nine tenths of what the disk has for it
                      /leases/ID.{json,lock}      what a running process is using
                      /SET/VERSION/00000.tar      the body; goes when room is needed and nobody uses it
                                  /00000.index.arrow, .remote.json, ...     small, and stay

A folder SET is where the shard came from, VERSION its state there: the contents at a path never change. The shards
used longest ago go first, those that a live process has a lease on never; a lease is live as long as its process
holds the lock beside it, so nothing is left to clean up after a kill.
"""

import contextlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlkit.data.atomic import TEMPORARY
from vlkit.data.cache_folder import VARIABLE, cache_folder
from vlkit.errors import DataError

try:
    import fcntl

    _LOCKS = True
except ImportError:  # Windows: two processes may download the same shard, which costs time only
    _LOCKS = False

_SMALL = {".json", ".arrow", ".lock", ".version"}  # what beside a body is kept
_POLL = 0.05  # seconds


@contextlib.contextmanager
def file_lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a file, which is made; False when another thread or process has it and `wait` is off."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not _lock(descriptor, wait):
            yield False
            return
        try:
            yield True
        finally:
            _unlock(descriptor)  # said aloud: a process forked meanwhile has the same lock open
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class ShardCache:
    """The cache in one folder."""

    folder: Path

    @classmethod
    def default(cls) -> "ShardCache":
        """In `VLKIT_CACHE`, else below the user's cache folder; it is made.

        Raises:
            DataError: it cannot be made.
        """
        folder = cache_folder() / "shards"
        try:
            (folder / "leases").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(
                f"Shards at a URL are kept in {folder}, which cannot be made: {error.strerror or error}. "
                f"Name another folder in {VARIABLE}."
            ) from error
        return cls(folder)

    @classmethod
    def of(cls, body: Path) -> "ShardCache":
        """The cache that a body lies in."""
        return cls(body.parents[2])

    @property
    def limit(self) -> int:
        """Bytes that bodies may take."""
        with contextlib.suppress(OSError, ValueError):
            return int((self.folder / "limit").read_text())
        used = sum(size for _, _, size in self.bodies())
        return (shutil.disk_usage(self.folder).free + used) * 9 // 10

    def set_limit(self, num_bytes: int) -> None:
        """Bound the bodies; it holds for all processes that share the cache, until it is set again."""
        with self.locked():
            (self.folder / "limit").write_text(str(num_bytes))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Alone among all processes: for a few file operations, never during a download."""
        with file_lock(self.folder / "all.lock"):
            yield

    def bodies(self) -> list[tuple[float, Path, int]]:
        """Time of last use, path and bytes of every body, those being downloaded included."""
        found = []
        for path in self.folder.glob("*/*/*"):
            if not _is_small(path):
                with contextlib.suppress(OSError):  # gone meanwhile
                    status = path.stat()
                    found.append((status.st_mtime, path, status.st_size))
        return sorted(found)

    def begin(self, body: Path, size: int, urgent: bool) -> Path | None:
        """Make room, and a temporary file that takes it.

        Args:
            body: what it will be.
            size: bytes.
            urgent: then the bound gives way to what is being used; else None is returned when there is no room.

        Raises:
            DataError: the shard alone is larger than the bound.
        """
        with self.locked():
            limit = self.limit
            if size > limit:
                raise DataError(
                    f"Shard {body.name} has {size:,} bytes, and the cache {self.folder} is bounded to {limit:,}. "
                    "Raise data.cache_size, or free space on its disk."
                )
            if not self._make_room(limit - size) and not urgent:
                return None
            temporary = body.with_name(f"{body.name}.{uuid.uuid4().hex[:12]}{TEMPORARY}")
            with open(temporary, "wb") as file:
                file.truncate(size)  # takes no space yet, but is counted
            return temporary

    def _make_room(self, limit: int) -> bool:
        """Throw out what was used longest ago until `limit` bytes are left; False when too much is in use."""
        # What killed downloads left goes first, room or not.
        found = [entry for entry in self.bodies() if entry[1].suffix != TEMPORARY or not _remove(entry[1])]
        used = sum(size for _, _, size in found)
        if used <= limit:
            return True
        held = {path for lease in self.leases() for path in lease["held"]}
        for _, path, size in found:
            if str(path) not in held and _remove(path):
                used -= size
            if used <= limit:
                return True
        return False

    def leases(self) -> list[dict[str, Any]]:
        """What live processes say; what dead ones left is removed. Only while `locked`, or for a glance."""
        found = []
        for path in (self.folder / "leases").glob("*.json"):
            lock = path.with_suffix(".lock")
            with contextlib.suppress(OSError, ValueError):
                with file_lock(lock, wait=False) as dead:
                    if dead and _LOCKS:
                        path.unlink(missing_ok=True)
                        lock.unlink(missing_ok=True)
                        continue
                found.append(json.loads(path.read_text()))
        return found

    def wait_for_promise(self, body: Path) -> str | None:
        """Wait as long as a live process says that this body is coming and it is not here.

        Returns:
            Why it did not come, when that process says so; None when it is here, or nobody promises it.
        """
        name = str(body)
        while not body.exists():
            leases = self.leases()
            failed = next((lease["failed"][name] for lease in leases if name in lease["failed"]), None)
            if failed is not None:
                return str(failed)
            if not any(name in lease["coming"] for lease in leases):
                return None
            time.sleep(_POLL)
        return None


class Lease:
    """What a process is using, said to the others; ends with `close`, or with the process."""

    def __init__(self, cache: ShardCache):
        self._cache = cache
        self._path = cache.folder / "leases" / f"{os.getpid()}-{uuid.uuid4().hex[:12]}.json"
        self._said = ""
        self._descriptor = os.open(self._path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o644)
        _lock(self._descriptor, wait=True)

    def say(self, held: Sequence[Path], coming: Sequence[Path] = (), failed: dict[str, str] | None = None) -> None:
        """Replace what was said: bodies that must stay, those of them that will be here soon, those that failed."""
        text = json.dumps({"held": [*map(str, held)], "coming": [*map(str, coming)], "failed": failed or {}})
        if text == self._said:
            return
        temporary = self._path.with_suffix(TEMPORARY)
        with self._cache.locked():
            temporary.write_text(text)
            os.replace(temporary, self._path)
        self._said = text

    def close(self) -> None:
        """Let go of everything. May be called twice."""
        if self._descriptor < 0:
            return
        with self._cache.locked():
            self._path.unlink(missing_ok=True)
            self._path.with_suffix(".lock").unlink(missing_ok=True)
        _unlock(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1


def body_lock(body: Path) -> Path:
    """The lock that whoever downloads a body, or makes its index, holds."""
    return body.with_name(f"{body.name}.lock")


def _is_small(path: Path) -> bool:
    name = path.name.rsplit(".", 2)[0] if path.suffix == TEMPORARY else path.name
    return Path(name).suffix in _SMALL


def _remove(path: Path) -> bool:
    """Remove a body, or what a killed download left of one; False when it is being downloaded or read."""
    try:
        if path.suffix != TEMPORARY:
            path.unlink()
            return True
        body = path.with_name(path.name.rsplit(".", 2)[0])
        with file_lock(body_lock(body), wait=False) as alone:
            if alone:
                path.unlink()
            return alone
    except FileNotFoundError:
        return True
    except OSError:  # Windows does not remove what is open
        return False


def _lock(descriptor: int, wait: bool) -> bool:
    if not _LOCKS:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _unlock(descriptor: int) -> None:
    if _LOCKS:
        fcntl.flock(descriptor, fcntl.LOCK_UN)
