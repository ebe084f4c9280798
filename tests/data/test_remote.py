"""Shards at URLs: the same samples as from a local copy, in a bounded cache that processes share."""

import functools
import io
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from vlkit.contracts import ImageTextBatch
from vlkit.data import remote, remote_requests
from vlkit.data.loader import Loader
from vlkit.data.remote_cache import Lease, ShardCache, file_lock
from vlkit.data.remote_listing import expand_url
from vlkit.data.remote_requests import as_url, request, shown
from vlkit.data.shard_index import ShardSet, expand_shards, write_index
from vlkit.data.sources import read_source
from vlkit.data.transforms import Preprocess
from vlkit.errors import ConfigError, DataError, RemoteError
from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer

SIZES = (5, 9, 2, 7, 8, 6)


def files_of(shard: int, rows: int) -> Iterator[tuple[str, bytes]]:
    """Coloured squares."""
    for row in range(rows):
        image = io.BytesIO()
        Image.new("RGB", (16, 16), (shard * 40, row * 25, 99)).save(image, "PNG")
        yield f"{shard:03}{row:04}.png", image.getvalue()
        yield f"{shard:03}{row:04}.txt", f"square {shard} {row}".encode()


@pytest.fixture
def write_shards(write_tar: Callable[..., Path]) -> Callable[..., Path]:
    """`write_shards(folder, (4, 5))`: tars of equal length."""

    def write(folder: Path, sizes: tuple[int, ...] = SIZES, indexed: bool = True) -> Path:
        for shard, size in enumerate(sizes):
            path = write_tar(folder / f"{shard:05}.tar", files_of(shard, size))
            path.write_bytes(path.read_bytes().ljust(40960, b"\0"))
            if indexed:
                write_index(path)
        return folder

    return write


class Handler(SimpleHTTPRequestHandler):
    """Without ranges, as Python's own; `asked` counts, and `slow` paths wait for the event."""

    asked: Counter[tuple[str, str]]
    gate: threading.Event

    def do_GET(self) -> None:
        self.asked["GET", self.path.partition("?")[0]] += 1
        if self.path.endswith("slow.tar"):
            self.send_response(200)
            self.send_header("Content-Length", "40960")
            self.end_headers()
            self.wfile.write(bytes(512))
            self.gate.wait(60)
            return
        super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path, Counter[tuple[str, str]]]]:
    """URL and folder of a web server, and what it was asked for."""
    folder = tmp_path / "web"
    folder.mkdir()
    asked: Counter[tuple[str, str]] = Counter()
    gate = threading.Event()
    kind = type("Counting", (Handler,), {"asked": asked, "gate": gate})
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(kind, directory=str(folder))) as running:
        running.daemon_threads = True
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", folder, asked
        gate.set()
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ShardCache:
    monkeypatch.setenv("VLKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_requests, "_LONGEST_PAUSE", 0.01)
    return ShardCache.default()


@pytest.fixture
def memory(tmp_path: Path, write_shards: Callable[..., Path]) -> Iterator[tuple[str, Path]]:
    """The shards in fsspec's memory file system, and a local copy of them."""
    local, files = write_shards(tmp_path / "local"), fsspec.filesystem("memory")
    files.put(str(local), "/bucket/set", recursive=True)
    yield "memory://bucket/set", local
    files.rm("/bucket", recursive=True)


def read(
    shards: ShardSet, *, workers: int = 0, epochs: int = 1, window: int = 12, **settings: Any
) -> list[ImageTextBatch]:
    with Loader(
        shards,
        TextTokenizer(CLIP_BPE, 12),
        batch_size=4,
        preprocess=Preprocess(size=16),
        seed=1,
        remainder="keep",
        workers=workers,
        window=window,
        **settings,
    ) as loader:
        return [batch for epoch in range(epochs) for batch in loader.epoch(epoch)]


def check_equal(found: list[ImageTextBatch], expected: list[ImageTextBatch]) -> None:
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.images, theirs.images) and torch.equal(ours.tokens, theirs.tokens)
        assert ours.keys == theirs.keys and torch.equal(ours.valid, ours.ids >= 0)


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_small_cache_gives_the_same_batches(memory: tuple[str, Path], cache: ShardCache, workers: int) -> None:
    url, local = memory
    shards = ShardSet.open(url, cache_size=5 * 40960)
    assert shards.fingerprint == ShardSet.open(local).fingerprint
    check_equal(read(shards, workers=workers, epochs=2), read(ShardSet.open(local), epochs=2))
    assert 0 < len(cache.bodies()) <= 5 and not cache.leases()


def test_a_file_url_is_read_where_it_lies(tmp_path: Path, cache: ShardCache, write_shards: Callable[..., Path]) -> None:
    local = write_shards(tmp_path / "local", (2, 3))
    for spec in (f"file://{local}", f"file://{local}/{{00000..00001}}.tar", f"file://{local}/*.tar"):
        assert expand_shards(spec) == [local / "00000.tar", local / "00001.tar"]
    assert not cache.bodies()


def test_a_web_server_without_ranges_and_indexes(
    web: tuple[str, Path, Counter[Any]], tmp_path: Path, write_shards: Callable[..., Path]
) -> None:
    url, folder, asked = web
    local = write_shards(folder / "set", (4, 5, 3), indexed=False)
    shards = ShardSet.open(f"{url}/set/{{00000..00002}}.tar")
    assert asked["GET", "/set/00001.tar"] == 1  # to make the index
    check_equal(read(shards, epochs=2), read(ShardSet.open(local), epochs=2))
    assert {count for (_, path), count in asked.items() if path.endswith(".tar")} == {1}
    # Signed links: the query is part of the address, and of no message.
    with pytest.raises(DataError, match=r"00007.tar") as caught:
        ShardSet.open(f"{url}/set/00007.tar?signature=secret")
    assert "secret" not in str(caught.value)
    assert len(ShardSet.open(f"{url}/set/00001.tar?signature=secret")) == 5
    with pytest.raises(DataError, match=r"No file fits .*/nothing/\*\.tar"):
        ShardSet.open(f"{url}/nothing/*.tar")


def test_changed_shards_are_not_taken_from_the_cache(memory: tuple[str, Path], tmp_path: Path) -> None:
    url, local = memory
    before = ShardSet.open(f"{url}/00001.tar")
    assert before.shards[0].captions(3) == ("square 1 3",)
    files = fsspec.filesystem("memory")
    # Of the same length, and with the index of the old contents still beside it.
    changed = (local / "00001.tar").read_bytes().replace(b"square 1 3", b"circle 1 3")
    files.pipe("/bucket/set/00001.tar", changed)
    after = ShardSet.open(f"{url}/00001.tar")
    assert after.shards[0].captions(3) == ("circle 1 3",)
    assert before.shards[0].path != after.shards[0].path and before.shards[0].captions(3) == ("square 1 3",)


def test_an_index_of_other_contents_is_made_anew(memory: tuple[str, Path], cache: ShardCache) -> None:
    url, local = memory
    files = fsspec.filesystem("memory")
    files.put(str(local / "00004.index.arrow"), "/bucket/set/00001.index.arrow")
    files.pipe("/bucket/set/00002.index.arrow", b"no index")
    assert ShardSet.open(url).fingerprint == ShardSet.open(local).fingerprint
    assert sorted(path.name for _, path, _ in cache.bodies()) == ["00001.tar", "00002.tar"]


def test_a_checksum_that_differs(memory: tuple[str, Path], cache: ShardCache) -> None:
    url, local = memory
    body = (local / "00003.tar").read_bytes()
    files = fsspec.filesystem("memory")
    stats = '{"tar_bytes": 40960, "tar_sha256": "%s"}'
    files.pipe("/bucket/set/00003.stats.json", (stats % ("0" * 64)).encode())
    shards = ShardSet.open(f"{url}/00003.tar")
    with pytest.raises(RemoteError, match=r"00003.tar arrived damaged 8 times: its SHA-256 is .*, expected 000"):
        shards.shards[0].image_bytes(0)
    assert not cache.bodies()
    # Where the stats agree, a byte that changed on the way is found, wherever it lies.
    import hashlib

    files.pipe("/bucket/set/00003.stats.json", (stats % hashlib.sha256(body).hexdigest()).encode())
    for path in shards.shards[0].path.parent.iterdir():
        path.unlink()
    shards = ShardSet.open(f"{url}/00003.tar")
    files.store["/bucket/set/00003.tar"].seek(20000)
    files.store["/bucket/set/00003.tar"].write(b"x")
    with pytest.raises(RemoteError, match=r"arrived damaged"):
        shards.shards[0].image_bytes(0)
    files.store["/bucket/set/00003.tar"].seek(20000)
    files.store["/bucket/set/00003.tar"].write(body[20000:20001])
    assert shards.shards[0].image_bytes(0)


def test_who_was_used_longest_ago_goes_first(memory: tuple[str, Path], cache: ShardCache) -> None:
    shards = ShardSet.open(memory[0], cache_size=3 * 40960).shards
    bodies = [shard.path for shard in shards]
    for age, number in enumerate((1, 0, 2)):
        assert remote.bring_ahead(bodies[number], threading.Event(), urgent=False)
        os.utime(bodies[number], (age, age))
    lease = Lease(cache)
    lease.say([bodies[1]])  # in use, though the oldest
    assert remote.bring_ahead(bodies[3], threading.Event(), urgent=False)
    assert [body.exists() for body in bodies[:4]] == [False, True, True, True]
    lease.say(bodies[:4])
    assert not remote.bring_ahead(bodies[4], threading.Event(), urgent=False)  # no room: all are in use
    assert remote.bring_ahead(bodies[4], threading.Event(), urgent=True)
    lease.close()
    remote.bring(bodies[5])
    assert len(cache.bodies()) <= 3 and bodies[5].exists()
    ShardSet.open(memory[0], cache_size=40959)
    with pytest.raises(DataError, match=r"has 40,960 bytes, and the cache .* is bounded to 40,959"):
        remote.bring(bodies[0])


def test_a_cache_too_small_for_the_order(memory: tuple[str, Path]) -> None:
    shards = ShardSet.open(memory[0], cache_size=2 * 40960)
    with pytest.raises(ConfigError, match=r"batches read from \d shards .* lower data.window"):
        read(shards, window=1000)


def test_killed_while_downloading(
    web: tuple[str, Path, Counter[Any]], cache: ShardCache, write_shards: Callable[..., Path]
) -> None:
    url, folder, _ = web
    local = write_shards(folder / "set", (3,))
    (local / "slow.tar").write_bytes((local / "00000.tar").read_bytes())
    write_index(local / "slow.tar")
    code = (
        "import sys; from vlkit.data.remote import bring; from vlkit.data.shard_paths import expand_shards;"
        "bring(expand_shards(sys.argv[1])[0])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, f"{url}/set/slow.tar"])
    deadline = time.monotonic() + 60
    while not (leases := cache.leases()) or not list(cache.folder.rglob("slow.tar.*.tmp")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    assert len(leases[0]["held"]) == 1
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not cache.leases() and not list(cache.folder.rglob("slow.tar"))
    assert len(list(cache.folder.rglob("slow.tar.*.tmp"))) == 1
    # The next one in need of room clears it away; the shard itself can be had as if nothing had been.
    shards = ShardSet.open(f"{url}/set/00000.tar", cache_size=40960)
    assert shards.shards[0].captions(0) == ("square 0 0",)
    assert not list(cache.folder.rglob("*.tmp"))


def test_two_processes_download_each_shard_once(
    web: tuple[str, Path, Counter[Any]], write_shards: Callable[..., Path]
) -> None:
    url, folder, asked = web
    write_shards(folder / "set")
    code = """if True:
        import sys
        import numpy as np
        from vlkit.data.epoch_plan import EpochPlan
        from vlkit.data.remote_prefetch import Prefetcher
        from vlkit.data.shard_index import ShardSet
        shards = ShardSet.open(sys.argv[1])
        plan = EpochPlan(shards.offsets, seed=1, global_batch_size=2, rank=int(sys.argv[2]), world_size=2, window=12,
                         remainder="keep")
        ahead = Prefetcher(shards, 0)
        batches = (plan.batch(epoch, index) for epoch in range(2) for index in range(plan.num_batches))
        for ids in ahead.follow(batches, iter(())):
            for shard, row in (shards.locate(i) for i in ids if i >= 0):
                print(f"{shard.name}/{shard.key(row)}={shard.captions(row)[0].replace(' ', '_')}")
        ahead.close()
    """
    spec = f"{url}/set/{{00000..00005}}.tar"
    running = [
        subprocess.Popen([sys.executable, "-c", code, spec, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    keys = Counter(key for process in running for key in process.communicate()[0].split())
    assert [process.returncode for process in running] == [0, 0]
    named = [f"{shard:05}/{shard:03}{row:04}=square_{shard}_{row}" for shard in range(6) for row in range(SIZES[shard])]
    assert keys == Counter(dict.fromkeys(named, 2))
    assert {count for (_, path), count in asked.items() if path.endswith(".tar")} == {1}


def test_sources_read_urls(memory: tuple[str, Path]) -> None:
    url, local = memory
    found = read_source(url)
    expected = read_source(local)
    assert [record.captions for record in found] == [record.captions for record in expected]
    assert found.records[7].image.read() == expected.records[7].image.read()


def test_an_unfinished_build_is_refused(memory: tuple[str, Path]) -> None:
    files = fsspec.filesystem("memory")
    files.pipe("/bucket/set/build.json", b'{"format": "vlkit shards 1", "num_shards": 8}')
    with pytest.raises(DataError, match=r"memory:///bucket/set is not finished: 0 of 8 shards"):
        ShardSet.open(memory[0])
    assert len(ShardSet.open(f"{memory[0]}/*.tar")) == sum(SIZES)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as if it were not installed
    with pytest.raises(DataError, match=r'gs://b/0.tar: gs:// needs a library .* extra `remote`: pip install "vlkit\['):
        expand_shards("gs://b/0.tar")


def test_urls() -> None:
    assert as_url(str(Path("s3://bucket/a/0.tar"))) == "s3://bucket/a/0.tar"
    assert as_url("file:/a/b") == as_url("file:///a/b") == "file:///a/b"
    assert as_url("C:/shards") is None and as_url("a/b:c") is None and as_url("/a") is None
    assert shown("https://me:word@host:80/a/0.tar?X-Signature=1") == "https://host:80/a/0.tar"


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    monkeypatch.setattr(remote_requests, "_LONGEST_PAUSE", 20.0)
    monkeypatch.setattr(random, "uniform", lambda low, high: drawn.append(high) or 0.0)

    def fail() -> None:
        raise ConnectionResetError("gone")

    with pytest.raises(
        RemoteError, match=r"X could not be read: 8 attempts in 0 s failed, .*ConnectionResetError: gone"
    ):
        request("X", fail)
    np.testing.assert_allclose(drawn, [0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 20.0])
    with pytest.raises(ZeroDivisionError):  # a bug is not tried again
        request("X", lambda: 1 // 0)


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    with file_lock(tmp_path / "lock") as first, file_lock(tmp_path / "lock", wait=False) as second:
        assert first and not second
    with file_lock(tmp_path / "lock", wait=False) as free:
        assert free


def test_expand_url_gives_places_that_name_the_shards(memory: tuple[str, Path], cache: ShardCache) -> None:
    (path,) = expand_url(f"{memory[0]}/00002.tar", [f"{memory[0]}/00002.tar"])
    assert path.name == "00002.tar" and cache.folder in path.parents and not path.exists()
    with pytest.raises(DataError, match="named twice"):
        expand_shards([f"{memory[0]}/00002.tar", f"{memory[0]}/*.tar"])
