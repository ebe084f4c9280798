"""Shards in a bucket, behind a proxy that drops connections, is slow, and cuts and alters what it sends.

The server is moto on loopback. `make s3 ENDPOINT=https://...` runs the same against a real one:

    VLKIT_S3_ENDPOINT                          its address
    VLKIT_S3_BUCKET                            an existing bucket; default: one is made and removed
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY   who may write to it
    AWS_DEFAULT_REGION                         default us-east-1
"""

import contextlib
import http.client
import io
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import boto3
import numpy as np
import pytest
import torch
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from PIL import Image

from vlkit.contracts import ImageTextBatch
from vlkit.data import remote, remote_requests
from vlkit.data.loader import Loader
from vlkit.data.remote_cache import ShardCache
from vlkit.data.shard_index import ShardSet, write_index
from vlkit.data.transforms import Augment, Preprocess
from vlkit.errors import DataError, RemoteError
from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer

FAULTS = ("drop", "503", "cut", "short", "alter", "slow")


class Faults:
    """Which of the requests for contents go wrong, and how: drawn by a seed; and a count of what was asked for."""

    def __init__(self, seed: int, rate: float, kinds: tuple[str, ...] = FAULTS):
        self.rate, self.kinds, self._random = rate, kinds, random.Random(seed)
        self.asked: Counter[tuple[str, str]] = Counter()  # (method, path)
        self.made: Counter[str] = Counter()
        self._lock = threading.Lock()

    def draw(self, method: str, path: str) -> str | None:
        with self._lock:
            self.asked[method, path] += 1
            if self._random.random() >= self.rate:
                return None
            fault = self._random.choice(self.kinds)
            if method == "HEAD" or not path.endswith((".tar", ".arrow", ".json")):
                fault = "drop"  # nothing in the answer could be checked
            self.made[fault] += 1
            return fault


class Server(NamedTuple):
    endpoint: str
    client: Any
    bucket: str
    prefix: str

    def upload(self, folder: Path, names: list[str]) -> None:
        for name in names:
            self.client.put_object(Bucket=self.bucket, Key=f"{self.prefix}/{name}", Body=(folder / name).read_bytes())


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    patch = pytest.MonkeyPatch()
    endpoint, moto = os.environ.get("VLKIT_S3_ENDPOINT", ""), None
    if not endpoint:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        patch.setenv("AWS_ACCESS_KEY_ID", "testing")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
        moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        moto.start()
        endpoint = "http://{}:{}".format(*moto.get_host_and_port())
    elif not {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"} <= os.environ.keys():
        pytest.fail(f"Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for {endpoint}.")
    patch.setenv("AWS_DEFAULT_REGION", os.environ.get("AWS_DEFAULT_REGION", "us-east-1"))
    client = boto3.client("s3", endpoint_url=endpoint)
    bucket = os.environ.get("VLKIT_S3_BUCKET", "")
    own = not bucket
    if own:
        bucket = f"vlkit-{uuid.uuid4().hex[:12]}"
        client.create_bucket(Bucket=bucket)
    prefix = f"vlkit-test-{uuid.uuid4().hex[:12]}"
    yield Server(endpoint, client, bucket, prefix)
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for entry in page.get("Contents", []):
            client.delete_object(Bucket=bucket, Key=entry["Key"])
    if own:
        client.delete_bucket(Bucket=bucket)
    client.close()
    if moto is not None:
        moto.stop()
    patch.undo()


class Proxy(ThreadingHTTPServer):
    """Passes questions on, signed anew for the server behind it; answers go wrong as `faults` has it."""

    daemon_threads = True
    faults: Faults
    upstream: Server


class Handler(BaseHTTPRequestHandler):
    server: Proxy
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        fault = self.server.faults.draw(self.command, path)
        if fault == "drop":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "503":
            self.answer(503, {"Content-Type": "application/xml"}, b"<Error><Code>SlowDown</Code></Error>")
            return
        status, headers, body = self.ask()
        length = len(body)
        if fault == "short":  # a cut that looks well
            body = body[: length // 2]
            length = len(body)
        elif fault == "cut":
            body = body[: length // 2]
            self.close_connection = True
        elif fault == "alter" and body:
            body = body[: length // 3] + bytes([body[length // 3] ^ 0x10]) + body[length // 3 + 1 :]
        elif fault == "slow":
            time.sleep(0.1)
        self.answer(status, headers, body, length)

    do_HEAD = do_GET  # noqa: N815

    def ask(self) -> tuple[int, dict[str, str], bytes]:
        upstream = urlsplit(self.server.upstream.endpoint)
        wanted = {"Range": self.headers["Range"]} if "Range" in self.headers else {}
        signed = AWSRequest(self.command, self.server.upstream.endpoint + self.path, headers=wanted)
        who = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])
        S3SigV4Auth(who, "s3", os.environ["AWS_DEFAULT_REGION"]).add_auth(signed)
        kind = http.client.HTTPSConnection if upstream.scheme == "https" else http.client.HTTPConnection
        connection = kind(upstream.netloc, timeout=30)
        try:
            connection.request(self.command, self.path, headers=dict(signed.headers.items()))
            reply = connection.getresponse()
            headers = {
                name: value for name, value in reply.getheaders() if name not in ("Connection", "Date", "Server")
            }
            return reply.status, headers, reply.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        lengths = {"content-length", "transfer-encoding"} if self.command != "HEAD" else {"transfer-encoding"}
        for name, value in headers.items():
            if name.lower() not in lengths:
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":  # else the next answer on this connection would begin with it
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError):  # the other side is gone
            super().handle()


@pytest.fixture
def proxy(server: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    with Proxy(("127.0.0.1", 0), Handler) as running:
        running.faults, running.upstream = Faults(0, 0.0), server
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{running.server_port}")
        monkeypatch.setenv("VLKIT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(remote_requests, "_LONGEST_PAUSE", 0.3)
        yield running
        running.shutdown()
        thread.join()


def files_of(shard: int, rows: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Noise pictures."""
    random_ = np.random.default_rng([seed, shard])
    for row in range(rows):
        image = io.BytesIO()
        Image.fromarray(random_.integers(0, 256, (28, 30, 3), dtype=np.uint8)).save(image, "PNG")
        yield f"{shard:03}{row:04}.png", image.getvalue()
        yield f"{shard:03}{row:04}.txt", f"picture {row} of shard {shard}".encode()


@pytest.fixture
def write_shards(write_tar: Callable[..., Path]) -> Callable[..., list[str]]:
    """`write_shards(folder, (4, 5), seed)`: all but every third have an index; gives the names of all files."""

    def write(folder: Path, sizes: tuple[int, ...], seed: int) -> list[str]:
        for shard, size in enumerate(sizes):
            path = write_tar(folder / f"{shard:05}.tar", files_of(shard, size, seed))
            if shard % 3:
                write_index(path)
        return sorted(path.name for path in folder.iterdir())

    return write


def all_batches(shards: ShardSet, workers: int, epochs: int, window: int) -> list[ImageTextBatch]:
    with Loader(
        shards,
        TextTokenizer(CLIP_BPE, 16),
        batch_size=8,
        preprocess=Preprocess(size=24),
        augment=Augment(hflip=0.5),
        seed=3,
        workers=workers,
        remainder="keep",
        window=window,
    ) as loader:
        return [batch for epoch in range(epochs) for batch in loader.epoch(epoch)]


def check_epochs(server: Server, proxy: Proxy, folder: Path, seed: int, sizes: tuple[int, ...], window: int) -> None:
    """Two epochs through the faulty proxy, with a cache smaller than the data, equal those over local files."""
    names = sorted(path.name for path in folder.iterdir())
    server.upload(folder, names)
    proxy.faults = faults = Faults(seed, 0.35)
    bound = 5 * max((folder / name).stat().st_size for name in names if name.endswith(".tar"))
    spec = f"s3://{server.bucket}/{server.prefix}/{{00000..{len(sizes) - 1:05}}}.tar"
    shards = ShardSet.open(spec, cache_size=bound)
    found = all_batches(shards, 2, 2, window)
    local = ShardSet.open(folder)
    expected = all_batches(local, 0, 2, window)
    assert shards.fingerprint == local.fingerprint
    assert len(found) == len(expected) == 2 * -(-sum(sizes) // 8)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.ids, theirs.ids) and ours.keys == theirs.keys
        assert torch.equal(ours.valid, ours.ids >= 0)
    half = len(found) // 2
    for epoch in (found[:half], found[half:]):  # each sample exactly once
        ids = torch.cat([batch.ids for batch in epoch])
        assert sorted(ids[ids >= 0].tolist()) == list(range(sum(sizes)))
    cache = ShardCache.default()
    assert sum(size for _, _, size in cache.bodies()) <= bound < sum((folder / name).stat().st_size for name in names)
    assert not cache.leases() and not list(cache.folder.rglob("*.tmp"))
    assert faults.made.total() > 10, faults.made


def test_each_sample_once_through_a_faulty_connection(
    server: Server, proxy: Proxy, tmp_path: Path, write_shards: Callable[..., list[str]]
) -> None:
    sizes = (9, 14, 3, 12, 8, 11, 5, 13, 10)
    write_shards(tmp_path / "local", sizes, 7)
    check_epochs(server, proxy, tmp_path / "local", 7, sizes, window=16)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(8))
def test_each_sample_once_at_length(
    server: Server, proxy: Proxy, tmp_path: Path, write_shards: Callable[..., list[str]], seed: int
) -> None:
    sizes = tuple(int(size) for size in np.random.default_rng(seed).integers(1, 40, 30))
    write_shards(tmp_path / "local", sizes, seed)
    check_epochs(server, proxy, tmp_path / "local", seed, sizes, window=64)


def test_nothing_is_downloaded_to_open_shards_with_indexes(
    server: Server, proxy: Proxy, tmp_path: Path, write_shards: Callable[..., list[str]]
) -> None:
    names = write_shards(tmp_path / "local", (3, 4, 5), 1)
    server.upload(tmp_path / "local", names)
    shards = ShardSet.open(f"s3://{server.bucket}/{server.prefix}/0000[12].tar")
    assert [shard.name for shard in shards.shards] == ["00001", "00002"] and len(shards) == 9
    assert not ShardCache.default().bodies()
    read = shards.shards[0].image_bytes(2)
    assert read == ShardSet.open(tmp_path / "local/00001.tar").shards[0].image_bytes(2)
    assert shards.shards[0].image(2).read() == read
    assert [path.name for _, path, _ in ShardCache.default().bodies()] == ["00001.tar"]
    # A second opening asks for no index again.
    before = proxy.faults.asked.copy()
    ShardSet.open(f"s3://{server.bucket}/{server.prefix}/0000[12].tar")
    assert not any(path.endswith((".tar", ".arrow")) for method, path in proxy.faults.asked - before if method == "GET")


def test_what_went_wrong_is_said(
    server: Server,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_shards: Callable[..., list[str]],
) -> None:
    names = write_shards(tmp_path / "local", (2, 2), 2)
    server.upload(tmp_path / "local", names)
    where = f"s3://{server.bucket}/{server.prefix}"
    with pytest.raises(DataError, match=r"1 of 2 shards .* are missing: s3://.*/00077.tar\. Look at the bucket"):
        ShardSet.open(f"{where}/{{00001,00077}}.tar")
    with pytest.raises(DataError, match="no such bucket or folder"):
        ShardSet.open("s3://vlkit-there-is-no-such-bucket/folder")
    shards = ShardSet.open(f"{where}/00001.tar")
    monkeypatch.setattr(remote_requests, "_LONGEST_PAUSE", 0.0)
    proxy.faults = Faults(0, 1.0, ("cut",))
    with pytest.raises(RemoteError, match=r"Shard s3://.*/00001.tar could not be read: 8 attempts .*--resume"):
        shards.shards[0].image_bytes(0)
    with pytest.raises(RemoteError, match=r"00001.tar could not be read"):  # stops a run, is no broken sample
        all_batches(shards, 0, 1, 16)
    # The same byte changed on the way, time after time: the server's MD5 tells, also for the index.
    proxy.faults = Faults(0, 1.0, ("alter",))
    with pytest.raises(RemoteError, match=r"00001.tar arrived damaged 8 times: its"):
        shards.shards[0].image_bytes(0)
    proxy.faults = Faults(0, 0.0)
    assert shards.shards[0].image_bytes(0)
    for path in shards.shards[0].path.parent.glob("*.index.*"):
        path.unlink()
    monkeypatch.setattr(proxy.faults, "draw", lambda method, path: "alter" if path.endswith(".arrow") else None)
    with pytest.raises(RemoteError, match=r"its file 00001.index.arrow could not be read: 8 attempts .* another MD5"):
        remote.prepare(shards.shards[0].path)


def test_no_access(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(Handler):
        def do_GET(self) -> None:
            text = b"<Error><Code>InvalidAccessKeyId</Code><Message>no such key</Message></Error>"
            self.answer(403, {"Content-Type": "application/xml"}, text)

        do_HEAD = do_GET  # noqa: N815

    monkeypatch.setattr(proxy, "RequestHandlerClass", Refusing)
    for spec in ("s3://bucket/00000.tar", "s3://bucket/folder", "s3://bucket/*.tar"):
        with pytest.raises(DataError, match=r"refuses access\. Look at the credentials"):
            ShardSet.open(spec)
