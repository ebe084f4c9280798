"""Shards at a URL: each is streamed whole into the cache when it is needed, checked, and read from there.

A remote shard goes by the path of its body in the cache (`remote_cache.py`), whether that is there at the moment or
not; `NAME.remote.json` beside it says where it comes from. So whatever reads shards reads these too. The index is the
one that lies beside the tar, or is made when the shard is first downloaded; either way it is the one that a local copy
has, and so is the order of an epoch.
"""

import base64
import contextlib
import functools
import hashlib
import json
import os
import shutil
import threading
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlkit.data.atomic import atomic_file
from vlkit.data.remote_cache import Lease, ShardCache, body_lock, file_lock
from vlkit.data.remote_requests import ATTEMPTS, RemoteFiles, connect, pause, request, shown
from vlkit.data.shard_paths import stats_path
from vlkit.data.shard_sidecar import (
    build_table,
    ends_hash,
    ends_of_length,
    map_table,
    sidecar_path,
    summary_of,
    tar_identity,
    write_table,
)
from vlkit.errors import DataError, RemoteError

_PIECE = 16 << 20  # bytes of one request; what is repeated after a failure
_POLL = 0.05  # seconds
_HELD_ON_DEMAND = 2  # shards a process that follows no plan keeps from being thrown out: the ones it asked for last
_TOUCH_SECONDS = 1.0
_MADE_HERE = "made here"  # version of an index that did not come from the server


@dataclass(frozen=True)
class RemoteShard:
    """Where a body comes from, and what the server said of it."""

    url: str
    size: int | None
    version: str  # of the contents: ETag, time of change, ...
    md5: str | None  # hexadecimal
    sha256: str | None
    ranges: bool  # parts can be asked for
    sidecar: str | None  # version of the index beside it, None when there is none
    sidecar_md5: str | None
    stats: bool  # whether stats lie beside it
    stats_md5: str | None

    @property
    def title(self) -> str:
        """For messages."""
        return f"Shard {shown(self.url)}"

    def beside(self, body: Path, file: Path) -> str:
        """The URL of a neighbour: `file` lies beside `body` in the cache."""
        plain, question, query = self.url.partition("?")
        return plain[: -len(body.name)] + file.name + question + query


def marker_path(body: Path) -> Path:
    """Where it is written what a body is a copy of."""
    return body.with_name(f"{body.name}.remote.json")


def read_marker(body: Path) -> RemoteShard | None:
    """What a path in the cache is a copy of; None for local shards."""
    try:
        return RemoteShard(**json.loads(marker_path(body).read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None


def write_marker(body: Path, shard: RemoteShard) -> None:
    """Make a place in the cache for a shard."""
    text = json.dumps(asdict(shard), indent=1).encode()
    path = marker_path(body)
    if not path.exists() or path.read_bytes() != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(text)


def prepare(body: Path, stop: threading.Event | None = None) -> None:
    """Have the index of a remote shard in the cache; the body is downloaded only when there is no index for it.

    Raises:
        DataError: the server refuses it, or the tar cannot be indexed.
        RemoteError: it could not be downloaded.
        StoppedError: `stop` was set.
    """
    shard = read_marker(body)
    if shard is None or _is_prepared(body, shard):
        return
    with file_lock(body_lock(body)):
        if _is_prepared(body, shard):
            return
        if shard.sidecar is None or not _fetch_index(body, shard, stop):
            # Until the index is made, nobody may throw the body out.
            with contextlib.closing(Lease(ShardCache.of(body))) as lease:
                lease.say([body])
                if not body.exists():
                    _download(body, shard, stop, urgent=True)
                write_table(build_table(body), sidecar_path(body))
        _version_path(body).write_text(shard.sidecar or _MADE_HERE)


def bring(body: Path) -> bool:
    """Download a body unless it is there; False when `body` is no copy of anything.

    Raises:
        DataError: the server refuses it, it is gone, or it is too large for the cache.
        RemoteError: all attempts failed.
    """
    shard = read_marker(body)
    if shard is None:
        return False
    cache = ShardCache.of(body)
    while not body.exists():
        failure = cache.wait_for_promise(body)
        if failure is not None:
            raise RemoteError(failure)
        with file_lock(body_lock(body), wait=False) as alone:
            if alone and not body.exists():
                _hold_on_demand(cache, body)
                _download(body, shard, None, urgent=True)
        if not alone:
            time.sleep(_POLL)
    return True


def bring_ahead(body: Path, stop: threading.Event, urgent: bool) -> bool:
    """Download a body before it is needed; False when another process is at it, or the cache has no room.

    Raises:
        As `bring`, and StoppedError.
    """
    shard = read_marker(body)
    if shard is None or body.exists():
        return True
    with file_lock(body_lock(body), wait=False) as alone:
        return alone and (body.exists() or _download(body, shard, stop, urgent))


def read_at(body: Path, size: int, offset: int) -> bytes:
    """`size` bytes of a body, which is downloaded if need be.

    No file stays open, as a body that is thrown out takes disk space until everybody has closed it.
    """
    while True:
        try:
            with open(body, "rb", buffering=0) as file:
                _touch(str(body), int(time.monotonic() / _TOUCH_SECONDS))
                if hasattr(os, "pread"):
                    return os.pread(file.fileno(), size, offset)
                file.seek(offset)
                return file.read(size)
        except FileNotFoundError as error:
            if not bring(body):
                raise DataError(f"Cannot read shard {body}: {error.strerror}.") from error


@functools.lru_cache(maxsize=1024)
def _touch(body: str, now: int) -> None:
    """Note that a body is being used: who is used longest ago goes first."""
    del now  # once in a while
    with contextlib.suppress(OSError):
        os.utime(body)


def _version_path(body: Path) -> Path:
    return body.with_name(f"{body.name}.index.version")


def _is_prepared(body: Path, shard: RemoteShard) -> bool:
    try:
        version = _version_path(body).read_text()
    except FileNotFoundError:
        return False
    return version == (shard.sidecar or _MADE_HERE) and sidecar_path(body).exists()


def _fetch_index(body: Path, shard: RemoteShard, stop: threading.Event | None) -> bool:
    """Take over the index beside the remote tar; False when it is none or belongs to other contents."""
    index = sidecar_path(body)
    try:
        data = _small_file(shard, shard.beside(body, index), shard.sidecar_md5, stop)
        with atomic_file(index) as file:
            file.write(data)
        summary = summary_of(map_table(index))
        fits = summary.tar_size == shard.size if shard.size is not None else True
        fits = fits and (not shard.ranges or summary.tar_ends == _remote_ends(shard, stop))
    except (FileNotFoundError, DataError):
        fits = False
    if not fits:
        index.unlink(missing_ok=True)
    return fits


def _small_file(shard: RemoteShard, url: str, md5: str | None, stop: threading.Event | None) -> bytes:
    def get() -> bytes:
        files, path = connect(url)
        data: bytes = files.cat_file(path)
        if md5 is not None and hashlib.md5(data, usedforsecurity=False).hexdigest() != md5 and _etag_is_md5(url):
            raise EOFError(f"{len(data)} bytes with another MD5 than {md5} came")
        return data

    return request(f"{shard.title}, its file {url.rpartition('/')[2].partition('?')[0]}", get, stop)


def _remote_ends(shard: RemoteShard, stop: threading.Event | None) -> str:
    """The hash of a remote tar's first and last bytes, as `tar_identity` has it."""
    size = shard.size or 0
    places = [place for place in ends_of_length(size) if place[1] > place[0]]
    return ends_hash(b"".join(request(shard.title, functools.partial(_piece, shard, *at), stop) for at in places))


def _piece(shard: RemoteShard, start: int, end: int) -> bytes:
    files, path = connect(shard.url)
    data: bytes = files.cat_file(path, start=start, end=end)
    if len(data) != end - start:
        raise EOFError(f"{len(data)} of {end - start} bytes came")
    return data


def _download(body: Path, shard: RemoteShard, stop: threading.Event | None, urgent: bool) -> bool:
    """Stream a body into the cache, check it, and put it in its place; the caller holds its lock."""
    temporary = ShardCache.of(body).begin(body, shard.size or 0, urgent)
    if temporary is None:
        return False
    try:
        expected = _expected_sha256(body, shard, stop)
        for attempt in range(1, ATTEMPTS + 1):
            wrong = _stream(shard, temporary, body, expected, stop)
            if wrong is None:
                os.replace(temporary, body)
                return True
            pause(attempt, stop)
        raise RemoteError(
            f"{shard.title} arrived damaged {ATTEMPTS} times: {wrong}. If it was replaced meanwhile, start again; if "
            "its index or stats belong to other contents, delete or renew them there."
        )
    except FileNotFoundError as error:
        raise DataError(f"{shard.title} is no longer there. Start again with the shards that are.") from error
    except OSError as error:
        raise DataError(
            f"Cannot write {temporary}: {error.strerror or error}. Free space there, bound the cache by "
            "data.cache_size, or name another folder in VLKIT_CACHE."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def _stream(
    shard: RemoteShard,
    temporary: Path,
    body: Path,
    expected: str | None,
    stop: threading.Event | None,
) -> str | None:
    """Write the whole body into `temporary`; what is wrong with it, None when nothing is."""
    if shard.ranges and shard.size is not None:
        with open(temporary, "r+b") as file:
            for start in range(0, shard.size, _PIECE):
                end = min(start + _PIECE, shard.size)
                file.write(request(shard.title, functools.partial(_piece, shard, start, end), stop))
            file.flush()
            os.fsync(file.fileno())
    else:
        request(shard.title, functools.partial(_whole, shard, temporary), stop)
    return _what_is_wrong(shard, temporary, body, expected)


def _whole(shard: RemoteShard, temporary: Path) -> None:
    files, path = connect(shard.url)
    with files.open(path, "rb", block_size=0) as answer, open(temporary, "r+b") as file:
        shutil.copyfileobj(answer, file, 1 << 20)
        length = file.tell()
        file.truncate()
    if shard.size is not None and length != shard.size:
        raise EOFError(f"{length} of {shard.size} bytes came")


def _what_is_wrong(shard: RemoteShard, temporary: Path, body: Path, expected: str | None) -> str | None:
    size, ends = tar_identity(temporary)
    index = sidecar_path(body)
    if index.exists():
        summary = summary_of(map_table(index))
        if (size, ends) != (summary.tar_size, summary.tar_ends):
            return f"its {size} bytes are not what its index ({summary.tar_size} bytes) was made from"
    if expected is not None and (found := _digest(temporary, "sha256")) != expected:
        return f"its SHA-256 is {found}, expected {expected}"
    if expected is None and shard.md5 is not None and (found := _digest(temporary, "md5")) != shard.md5:
        return f"its MD5 is {found}, expected {shard.md5}" if _etag_is_md5(shard.url) else None
    return None


def _etag_is_md5(url: str) -> bool:
    """Whether the MD5 that a server names can be relied on: with some kinds of encryption S3's ETag is none."""
    files, path = connect(url)
    if not hasattr(files, "call_s3"):
        return True
    bucket, key, _ = files.split_path(path)
    said = request(shown(url), lambda: files.call_s3("head_object", Bucket=bucket, Key=key))
    return "SSECustomerAlgorithm" not in said and not str(said.get("ServerSideEncryption", "")).startswith("aws:kms")


def _digest(path: Path, name: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, name).hexdigest()


def _expected_sha256(body: Path, shard: RemoteShard, stop: threading.Event | None) -> str | None:
    """The hash of the whole tar that the server or the stats beside it name; the stats are kept in the cache."""
    path = stats_path(body.parent, body.name.removesuffix(".tar"))
    if shard.stats and not path.exists():
        with contextlib.suppress(FileNotFoundError), atomic_file(path) as file:
            file.write(_small_file(shard, shard.beside(body, path), shard.stats_md5, stop))
    with contextlib.suppress(OSError, ValueError):
        stats: Any = json.loads(path.read_bytes())
        if isinstance(stats, dict) and stats.get("tar_bytes") == shard.size:
            return shard.sha256 or stats.get("tar_sha256")
    return shard.sha256


# The leases of this process; a forked one starts its own.
_on_demand: OrderedDict[tuple[int, Path], tuple[Lease, list[Path]]] = OrderedDict()
_on_demand_lock = threading.Lock()


def _hold_on_demand(cache: ShardCache, body: Path) -> None:
    with _on_demand_lock:
        key = (os.getpid(), cache.folder)
        if key not in _on_demand:
            _on_demand[key] = (Lease(cache), [])
        lease, held = _on_demand[key]
        held.append(body)
        del held[:-_HELD_ON_DEMAND]
        lease.say(held)


def said_of(files: RemoteFiles, info: dict[str, Any]) -> dict[str, Any]:
    """Size, version and checksums out of what a file system says of a file, each of them in its own words."""
    etag = str(info.get("ETag") or info.get("etag") or "").removeprefix("W/").strip('"')
    md5 = etag if files.scheme in ("s3", "s3a") and len(etag) == 32 else None  # of an upload in parts it is no MD5
    coded = info.get("md5Hash") or info.get("Content-MD5")
    if isinstance(coded, str):
        with contextlib.suppress(ValueError):
            md5 = base64.b64decode(coded, validate=True).hex()
    lfs = info.get("lfs")
    sha256 = lfs.get("sha256") if isinstance(lfs, dict) else getattr(lfs, "sha256", None)
    names = ("generation", "blob_id", "LastModified", "Last-Modified", "mtime", "created")
    version = etag or sha256 or md5 or next((str(info[name]) for name in names if info.get(name)), "")
    return {
        "size": info.get("size"),
        "version": version,
        "md5": md5,
        "sha256": sha256,
        "ranges": files.lists or bool(info.get("partial")),
    }
