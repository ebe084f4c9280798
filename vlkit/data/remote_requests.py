"""Requests to a file system behind a URL, through fsspec: tried again with growing pauses, with errors in plain words.

Credentials, endpoints and the like are fsspec's business: the usual variables of each provider
(AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...), or FSSPEC_S3_ANON=true for a public bucket.
"""

import os
import random
import re
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from vlkit.errors import DataError, RemoteError, did_you_mean

Result = TypeVar("Result")

ATTEMPTS = 8
_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 20.0  # seconds; each pause is drawn between 0 and twice the one before
_CONNECT_SECONDS, _SILENCE_SECONDS = 10, 30

_SCHEMES = ("s3", "gs", "https", "http", "hf", "file", "memory")
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/{1,3}(?!/)(.*)")
_WITHOUT_HOST = ("file", "local", "memory")
_TRANSPORT = {"aiohttp", "aiobotocore", "botocore", "gcsfs", "google", "httpx", "huggingface_hub", "requests"}
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_GONE = (404, 410)


class StoppedError(Exception):
    """A download was given up because nobody waits for it any more."""


class RemoteFiles(NamedTuple):
    """A file system, and the path that a URL means in it."""

    files: Any  # fsspec's AbstractFileSystem
    path: str

    @property
    def scheme(self) -> str:
        """`s3`, `http`, ..."""
        protocol = self.files.protocol
        return str(protocol if isinstance(protocol, str) else protocol[0])

    @property
    def lists(self) -> bool:
        """Whether folders can be listed; web servers show pages at best."""
        return self.scheme not in ("http", "https")


def as_url(text: str) -> str | None:
    """`text` as a URL, None when it is a path. `s3:/bucket/x`, which a URL becomes as a Path, is one too."""
    found = _URL.fullmatch(text)
    if not found:
        return None
    scheme = found[1].lower()
    return f"{scheme}://{'/' if scheme in _WITHOUT_HOST else ''}{found[2]}"


def shown(url: str) -> str:
    """A URL for messages: without password and query, where signatures stand."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def connect(url: str) -> RemoteFiles:
    """The file system of a URL. To be asked for anew in each process, as connections do not survive a fork.

    Raises:
        DataError: nothing installed speaks this protocol.
    """
    import fsspec

    scheme = url.partition("://")[0]
    try:
        files, path = fsspec.core.url_to_fs(url, **_options(scheme))
    except ImportError as error:
        ours = scheme in ("s3", "s3a", "gs", "gcs")
        how = ' It comes with the extra `remote`: pip install "vlkit[remote]"' if ours else ""
        raise DataError(f"{shown(url)}: {scheme}:// needs a library that is not here ({error}).{how}") from error
    except ValueError as error:
        hint = did_you_mean(scheme, _SCHEMES)
        raise DataError(f"{shown(url)}: no protocol {scheme}:// is known ({error}). {hint}") from error
    if hasattr(files, "retries"):
        files.retries = 1  # s3fs and gcsfs would try again on their own, and multiply our attempts
    return RemoteFiles(files, path)


def request(
    what: str, action: Callable[[], Result], stop: threading.Event | None = None, attempts: int = ATTEMPTS
) -> Result:
    """What `action` returns, which is called again after a failure on the way.

    Args:
        what: is asked for, in messages: "Shard s3://...".
        action: one request.
        stop: gives up when it is set.
        attempts: how often at most.

    Raises:
        FileNotFoundError: the server says that there is no such thing.
        DataError: the server refuses us.
        RemoteError: the last attempt failed too.
        StoppedError: `stop` was set.
    """
    began = time.monotonic()
    for attempt in range(1, attempts + 1):
        if stop is not None and stop.is_set():
            raise StoppedError
        try:
            return action()
        except Exception as error:  # each store's client has its own types; what none of these knows goes on as it is
            if _is_missing(error):
                raise FileNotFoundError(what) from error
            refusal = _refusal(error)
            if refusal:
                raise DataError(f"{what}: {refusal} ({_say(error)}).") from error
            if not _is_passing(error):
                raise
            if attempt == attempts:
                seconds = time.monotonic() - began
                raise RemoteError(
                    f"{what} could not be read: {attempt} attempts in {seconds:.0f} s failed, the last one with: "
                    f"{_say(error)}. Look at the network and the server, then run the same again: what was downloaded "
                    "is kept, and a training run continues with --resume."
                ) from error
        pause(attempt, stop)
    raise AssertionError(attempts)


def pause(attempt: int, stop: threading.Event | None) -> None:
    """Wait before the next attempt: longer each time, and not in step with others who failed at the same moment."""
    seconds = random.uniform(0, min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**attempt))
    if stop is None:
        time.sleep(seconds)
    else:
        stop.wait(seconds)


def _options(scheme: str) -> dict[str, Any]:
    """Time limits where a file system has none or does not see a server that stays silent; no stale listings."""
    if scheme in ("s3", "s3a"):
        from fsspec.config import conf

        once = {"retries": {"max_attempts": 0}, "connect_timeout": _CONNECT_SECONDS, "read_timeout": _SILENCE_SECONDS}
        given = conf.get(scheme, {})
        options = {"config_kwargs": {**once, **given.get("config_kwargs", {})}, "use_listings_cache": False}
        # botocore would find it too, but file systems are kept by their options, and one process may use two servers.
        endpoint = next((value for name in ENDPOINTS if (value := os.environ.get(name))), None)
        return options if endpoint is None or "endpoint_url" in given else {**options, "endpoint_url": endpoint}
    if scheme in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_SILENCE_SECONDS)
        return {"client_kwargs": {"timeout": limits}}
    return {"use_listings_cache": False} if scheme in ("gs", "gcs", "hf") else {}


def _is_missing(error: Exception) -> bool:
    if not isinstance(error, FileNotFoundError):
        return getattr(error, "status", None) in _GONE
    # fsspec says "not found" for whatever happens to a question over http; the cause tells.
    cause = error.__cause__
    return cause is None or isinstance(cause, FileNotFoundError) or not _is_transport(cause) or _status(cause) in _GONE


def _refusal(error: Exception) -> str | None:
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    if type(error).__name__ in ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"):
        return "no credentials were found. Set the provider's (AWS_ACCESS_KEY_ID, ...), or FSSPEC_S3_ANON=true"
    if isinstance(error, PermissionError) or _status(cause) in (401, 403):
        return "the server refuses access. Look at the credentials, and at what they are allowed to read"
    return None


def _status(error: BaseException) -> int | None:
    """The HTTP status of an answer: aiohttp, botocore."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def _is_transport(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _TRANSPORT or _status(error) is not None


def _is_passing(error: Exception) -> bool:
    """Whether another attempt may go better: whatever networks and servers do, but no bug of ours."""
    return isinstance(error, OSError | TimeoutError | EOFError) or _is_transport(error)


def _say(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ else error
    # Messages of libraries quote the address with its signature.
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", " ".join(str(cause).split()))
    return f"{type(cause).__name__}: {text[:300]}" if text else type(cause).__name__
