"""From a URL with braces or wildcards, or of a folder, to places in the cache for the shards that are there."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from vlkit.contracts import Progress
from vlkit.data.remote import RemoteShard, prepare, read_marker, said_of, write_marker
from vlkit.data.remote_cache import ShardCache
from vlkit.data.remote_requests import ENDPOINTS, RemoteFiles, connect, request, shown
from vlkit.data.shard_paths import BUILD_PLAN, stats_path
from vlkit.data.shard_sidecar import sidecar_path
from vlkit.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

_REQUESTS = 16  # at a time
_LIST_FROM = 8  # shards of one folder: from here on listing it takes fewer requests than asking for each

Info = dict[str, Any]


def expand_url(url: str, names: Sequence[str]) -> list[Path]:
    """Places in the cache (see `vlkit.data.remote`) for the shards that a URL names.

    Args:
        url: as the user wrote it.
        names: the URLs that its braces stand for, `url` itself where it has none.

    Raises:
        DataError: nothing is there, a shard is missing, an unfinished build, no access, a library is missing.
        RemoteError: the server could not be reached.
    """
    found = _Found()
    urls = [one for name in names for one in found.expand(name)]
    folders = Counter(_folder(one) for one in urls)
    for folder, count in folders.items():
        if count >= _LIST_FROM:
            found.list_folder(folder)
    infos = _at_once(found.info, urls)
    missing = [one for one, info in zip(urls, infos, strict=True) if info is None]
    if missing:
        named = ", ".join(map(shown, missing[:3])) + (", ..." if len(missing) > 3 else "")
        folder = shown(_folder(missing[0]))
        raise DataError(
            f"{len(missing)} of {len(urls)} shards at {shown(url)} are missing: {named}. Look at the bucket and the "
            f"names in {folder}; expected a tar, a folder of tars, braces like {{00000..00099}}.tar, or a glob."
        )
    return _at_once(found.place, urls)


def prepare_all(paths: Sequence[Path], progress: Progress | None = None) -> None:
    """Have the indexes of all remote shards among `paths` in the cache, several at a time.

    Raises:
        As `prepare`.
    """
    remote = [path for path in paths if read_marker(path) is not None]
    done = 0
    with ThreadPoolExecutor(_REQUESTS, "vlkit-index") as threads:
        running = [threads.submit(prepare, path) for path in remote]
        try:
            for future in running:
                future.result()
                done += 1
                if progress:
                    progress(done, len(remote))
        finally:
            for future in running:
                future.cancel()


class _Found:
    """What has been learnt of a server while a URL is expanded."""

    def __init__(self) -> None:
        self._folders: dict[str, dict[str, Info]] = {}  # URL of a folder -> name -> info
        self._infos: dict[str, Info | None] = {}

    def expand(self, url: str) -> list[str]:
        """A URL without braces: itself, what fits its wildcards, or the tars of the folder that it names."""
        files = connect(url)
        wildcard = r"[*\[]" if not files.lists else r"[*?\[]"  # a question mark begins a query in a web address
        if re.search(wildcard, url):
            return self._glob(url, files)
        if not files.lists or url.endswith(".tar"):
            return [url]
        listed = self.list_folder(url)
        tars = sorted(name for name in listed if name.endswith(".tar") and not name.startswith("."))
        if not tars:
            raise DataError(f"No .tar files in {shown(url)}. Name a folder of tars, a tar, braces or a glob.")
        self._refuse_unfinished(url, listed)
        return [f"{url.rstrip('/')}/{name}" for name in tars]

    def list_folder(self, url: str) -> dict[str, Info]:
        """Files of a folder by name; none where the server does not list."""
        files = connect(url)
        url = url.rstrip("/")
        if url not in self._folders and files.lists:
            try:
                listed = request(f"Folder {shown(url)}", lambda: files.files.ls(files.path, detail=True))
            except FileNotFoundError as error:
                raise DataError(
                    f"Nothing at {shown(url)}: the server knows no such bucket or folder. Look at the name, and at "
                    "the endpoint (AWS_ENDPOINT_URL) if it is not the provider's own."
                ) from error
            self._folders[url] = {
                PurePosixPath(info["name"]).name: info for info in listed if info.get("type") != "directory"
            }
        return self._folders.get(url, {})

    def info(self, url: str) -> Info | None:
        """What the server says of a file, None when there is none."""
        folder, name = _folder(url), _name(url)
        if folder in self._folders:
            return self._folders[folder].get(name)
        if url not in self._infos:
            try:
                files = connect(url)
                self._infos[url] = request(shown(url), lambda: dict(files.files.info(files.path)))
            except FileNotFoundError:
                self._infos[url] = None
        return self._infos[url]

    def place(self, url: str) -> Path:
        """The path of a shard in the cache, where it is written what is there to be had."""
        info = self.info(url)
        assert info is not None, url
        said = said_of(connect(url), info)
        body = _place(url, f"{said['size']}\0{said['version']}")
        shard = RemoteShard(url=url, **said, sidecar=None, sidecar_md5=None, stats=False, stats_md5=None)
        index = self._beside(shard, body, sidecar_path(body))
        stats = self._beside(shard, body, stats_path(body.parent, body.name.removesuffix(".tar")))
        about, about_stats = (said_of(connect(url), info or {}) for info in (index, stats))
        shard = replace(
            shard,
            sidecar=None if index is None else f"{about['size']} {about['version']}",
            sidecar_md5=about["md5"],
            stats=stats is not None,
            stats_md5=about_stats["md5"],
        )
        write_marker(body, shard)
        return body

    def _beside(self, shard: RemoteShard, body: Path, file: Path) -> Info | None:
        try:
            return self.info(shard.beside(body, file))
        except DataError:  # a signed link opens one file only
            return None

    def _glob(self, url: str, files: RemoteFiles) -> list[str]:
        try:
            paths = request(f"The files {shown(url)}", lambda: files.files.glob(files.path))
        except FileNotFoundError:
            paths = []
        if not paths:
            raise DataError(f"No file fits {shown(url)}. A web server without listings needs braces in place of *.")
        return [str(files.files.unstrip_protocol(path)) for path in sorted(paths)]

    def _refuse_unfinished(self, url: str, listed: dict[str, Info]) -> None:
        if BUILD_PLAN not in listed:
            return
        files = connect(f"{url.rstrip('/')}/{BUILD_PLAN}")
        text = request(f"Build plan in {shown(url)}", lambda: files.files.cat_file(files.path))
        try:
            expected = int(json.loads(text)["num_shards"])
        except (ValueError, KeyError, TypeError):
            return
        finished = sum(name.endswith(".stats.json") for name in listed)
        if finished < expected:
            raise DataError(
                f"{shown(url)} is not finished: {finished} of {expected} shards. Build and copy the others, or name "
                "the tars themselves to use what is there."
            )


def _place(url: str, contents: str) -> Path:
    # Two servers of one protocol may have buckets of the same name.
    server = [os.environ.get(name, "") for name in (*ENDPOINTS, "FSSPEC_S3_ENDPOINT_URL")]
    origin = hashlib.sha256("\0".join([_folder(url), *server]).encode()).hexdigest()[:16]
    version = hashlib.sha256(f"{_name(url)}\0{contents}".encode()).hexdigest()[:16]
    return ShardCache.default().folder / origin / version / _name(url)


def _folder(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[0]


def _name(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]


def _at_once(action: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    with ThreadPoolExecutor(_REQUESTS, "vlkit-list") as threads:
        return list(threads.map(action, items))
