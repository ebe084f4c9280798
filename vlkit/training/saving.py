"""Checkpoints written and uploaded while training goes on.

writer = BackgroundWriter()
writer.submit(lambda: write_snapshot(...))      # returns at once; waits only while an earlier one is being written
writer.check()                                  # raises what went wrong in one that is finished
writer.close()                                  # waits for the last

uploader = Uploader("s3://bucket/run", say)
uploader.submit(folder, "checkpoints/step_00000100")
uploader.close()
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from vlkit.errors import ConfigError
from vlkit.models.saved import MANIFEST

# Waits between attempts to upload one folder, in seconds: in all two and a half minutes of a network that is away.
RETRY_AFTER = (1.0, 5.0, 25.0, 120.0)


class BackgroundWriter:
    """At most one piece of work at a time in a thread of its own.

    Args:
        in_background: False does each at once, in the caller's thread.
    """

    def __init__(self, in_background: bool = True) -> None:
        self._pool = ThreadPoolExecutor(1, "checkpoint") if in_background else None
        self._running: Future[None] | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Start a piece of work, once the one before is done.

        Raises:
            Exception: what went wrong in the one before.
        """
        self.wait()
        if self._pool is None:
            work()
        else:
            self._running = self._pool.submit(work)

    def check(self) -> None:
        """Raise what went wrong in a piece of work that has ended; does not wait."""
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Until nothing is being written. Raises what went wrong in it."""
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def close(self) -> None:
        """Wait for the last one and end the thread.

        Raises:
            Exception: what went wrong in it.
        """
        try:
            self.wait()
        finally:
            if self._pool is not None:
                self._pool.shutdown()


class Uploader:
    """Copies finished folders to an fsspec URL, one after the other, in a thread of its own.

    An upload that fails is tried again and then said, never raised: the local copy is what counts. The manifest goes
    last, so that a folder that was cut short is recognised as such. Nothing there is ever deleted.

    Args:
        url: where to, e.g. "s3://bucket/run".
        say: takes remarks; called from that thread.
        retry_after: seconds between attempts.

    Raises:
        ConfigError: an unknown protocol, or one whose package is missing.
    """

    def __init__(self, url: str, say: Callable[[str], None], retry_after: tuple[float, ...] = RETRY_AFTER) -> None:
        import fsspec

        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"checkpoint.upload = {url!r}: {error}. Expected a URL that fsspec knows; s3:// and gs:// need "
                "pip install 'vlkit[remote]'."
            ) from error
        self._root, self._url, self._say, self._retry_after = root.rstrip("/"), url.rstrip("/"), say, retry_after
        self._pool = ThreadPoolExecutor(1, "upload")
        self._closing = threading.Event()

    def submit(self, source: Path, name: str) -> None:
        """Upload a folder, or a single file, under a name."""
        self._pool.submit(self._upload, source, name)

    def close(self) -> None:
        """Wait for all uploads. No further attempts are waited for."""
        self._closing.set()
        self._pool.shutdown()

    def _upload(self, source: Path, name: str) -> None:
        for wait in (*self._retry_after, None):
            try:
                self._put(source, name)
            except Exception as error:  # whatever a remote file system raises
                if not source.exists():
                    self._say(f"{source.name} was deleted before it was uploaded; newer ones follow.")
                    return
                if wait is None or self._closing.is_set():
                    self._say(f"Could not upload {source} to {self._url}/{name}: {error!r}. The local copy is whole.")
                    return
                self._closing.wait(wait)
            else:
                return

    def _put(self, source: Path, name: str) -> None:
        files = sorted(path for path in source.rglob("*") if path.is_file()) if source.is_dir() else [source]
        for path in sorted(files, key=lambda path: path.name == MANIFEST and path.parent == source):
            relative = "" if path == source else f"/{path.relative_to(source).as_posix()}"
            target = f"{self._root}/{name}{relative}"
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), target)
