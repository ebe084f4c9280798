"""Downloads from a real server on loopback that drips, redirects, cuts, refuses and lies."""

import asyncio
import contextlib
import gzip
import io
import random
import socket
import struct
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler
from typing import ClassVar

import pytest
from PIL import Image

from data_tools.download_url import EVERYWHERE, DownloadRules, fetch, is_public, open_session

RULES = DownloadRules(timeout=3, max_bytes=100_000, retries=1, allowed_networks=EVERYWHERE)


def jpeg():
    stream = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 30, 40)).save(stream, "JPEG")
    return stream.getvalue()


JPEG = jpeg()


class Handler(BaseHTTPRequestHandler):
    """What it does is named by the path; each request is counted."""

    hits: ClassVar[Counter[str]] = Counter()

    def do_GET(self):
        name = self.path.partition("?")[0].strip("/")
        Handler.hits[name] += 1
        getattr(self, name, self.missing)()

    def log_message(self, *arguments):
        pass

    def answer(self, data=JPEG, status=200, kind="image/jpeg", length=None, **headers):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        for header, value in headers.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def go(self, place, status=302):
        self.answer(b"", status, Location=place)

    def missing(self):
        self.answer(b"gone", 404)

    def fine(self):
        self.answer()

    def drip(self):
        self.answer(b"", length=1000)
        self._drip()

    def drip_headers(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-A: ")
        self._drip()

    def _drip(self):
        try:
            while True:
                self.wfile.write(b"x")
                time.sleep(0.05)
        except OSError:
            pass

    def cut(self):
        self.answer(JPEG[:100], length=len(JPEG))

    def reset(self):
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def rubbish(self):
        self.wfile.write(b"\x00\x01\x02 no http\r\n\r\n")

    def once(self):
        self.go("/fine")

    def loop(self):
        self.go("/loop")

    def nowhere(self):
        self.answer(b"", 302)

    def to_file(self):
        self.go("file:///etc/passwd")

    def to_other_host(self):
        self.go(f"http://127.0.0.2:{self.server.server_address[1]}/fine")

    def page(self):
        self.answer(b"<html>", kind="text/html; charset=utf-8")

    def empty(self):
        self.answer(b"")

    def large(self):
        self.answer(b"", length=10**12)

    def endless(self):
        self.send_response(200)
        self.end_headers()  # without a length: until the connection ends
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            pass

    def busy_twice(self):
        self.answer(*((b"", 429) if Handler.hits["busy_twice"] < 3 else (JPEG, 200)))

    def busy_for_an_hour(self):
        self.answer(b"", 429, Retry_After="3600")

    def broken(self):
        self.answer(b"", 500)

    def noai(self):
        self.answer(X_Robots_Tag="NoAI, NoImageAI")

    def noindex_to_us(self):
        self.answer(X_Robots_Tag="otherbot: nofollow, vlkit: noimageindex")

    def noai_to_others(self):
        self.answer(X_Robots_Tag="unavailable_after: 2030-01-01, nosnippet, otherbot: noai, noimageai")

    def zipped(self):
        self.answer(gzip.compress(JPEG), Content_Encoding="gzip")

    def bomb(self):
        self.answer(gzip.compress(bytes(50_000_000)), Content_Encoding="gzip")

    def no_gzip(self):
        self.answer(Content_Encoding="gzip")

    def brotli(self):
        self.answer(Content_Encoding="br")


@pytest.fixture(scope="module")
def server(serving):
    Handler.hits.clear()
    with serving(Handler) as address:
        yield address


def get(url, rules=RULES):
    async def run():
        async with open_session(rules) as session:
            return await fetch(session, url, rules)

    return asyncio.run(run())


@pytest.mark.parametrize("name", ["fine", "once", "zipped", "noai_to_others", "fine?a=%20b&c=ä#part"])
def test_images_that_come(server, name):
    found = get(f"{server}/{name}")
    assert (found.data, found.cause, found.http_status, found.attempts) == (JPEG, None, 200, 1)


@pytest.mark.parametrize(
    ("name", "cause", "attempts"),
    [
        ("gone", "HTTP 404", 1),
        ("loop", "too many redirects", 1),
        ("nowhere", "redirect without a place", 1),
        ("to_file", "bad URL", 1),
        ("page", "not an image", 1),
        ("empty", "empty answer", 1),
        ("large", "too large", 1),
        ("endless", "too large", 1),
        ("bomb", "too large", 1),
        ("no_gzip", "unknown encoding", 1),
        ("brotli", "unknown encoding", 1),
        ("noai", "opt-out", 1),
        ("noindex_to_us", "opt-out", 1),
        ("busy_for_an_hour", "HTTP 429", 1),
        ("broken", "HTTP 500", 2),
        ("cut", "connection cut", 2),
        ("reset", "connection cut", 2),
        ("rubbish", "connection cut", 2),
    ],
)
def test_causes(server, name, cause, attempts):
    Handler.hits.clear()
    rules = RULES if attempts == 1 else DownloadRules(**{**vars(RULES), "timeout": 10})
    found = get(f"{server}/{name}", rules)
    assert (found.data, found.cause) == (None, cause)
    # aiohttp repeats a request by itself, once, when a connection ends before the answer.
    assert found.attempts == attempts and Handler.hits[name] in (attempts, 2 * attempts, RULES.max_redirects + 1)
    assert found.message


@pytest.mark.parametrize("name", ["drip", "drip_headers"])
def test_a_host_that_drips_ends_in_time(server, name):
    start = time.monotonic()
    found = get(f"{server}/{name}", DownloadRules(timeout=0.6, allowed_networks=EVERYWHERE))
    assert found.cause == "timed out" and 0.5 < time.monotonic() - start < 2.5


def test_a_host_that_is_busy_for_a_moment(server):
    Handler.hits.clear()
    found = get(f"{server}/busy_twice", DownloadRules(allowed_networks=EVERYWHERE))
    assert (found.data, found.attempts) == (JPEG, 3)
    Handler.hits.clear()
    once = get(f"{server}/busy_twice", DownloadRules(retries=0, allowed_networks=EVERYWHERE))
    assert (once.cause, once.http_status, once.attempts) == ("HTTP 429", 429, 1)


def test_opt_out_may_be_ignored(server):
    assert get(f"{server}/noai", DownloadRules(honour_opt_out=False, allowed_networks=EVERYWHERE)).data == JPEG


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "localhost", "[::1]", "2130706433", "0x7f.1", "169.254.169.254", "10.0.0.1"]
)
def test_private_addresses_are_not_connected_to(server, host):
    Handler.hits.clear()
    found = get(f"http://{host}:{server.rpartition(':')[2]}/fine", DownloadRules(timeout=3, retries=0))
    assert found.cause in {"private address", "bad URL", "host not found"}, found
    assert found.data is None and not Handler.hits
    if host in {"127.0.0.1", "localhost", "169.254.169.254"}:
        assert found.cause == "private address" and "is no public address" in found.message


def test_redirects_are_checked_again(server):
    allowed = DownloadRules(timeout=3, allowed_networks=("127.0.0.1/32",))
    assert get(f"{server}/once", allowed).data == JPEG
    assert get(f"{server}/to_other_host", allowed).cause == "private address"


def test_hosts_that_are_not_there(server):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/x"
        assert get(nobody, DownloadRules(retries=1, allowed_networks=EVERYWHERE))[1] == "no connection"
    assert get(server.replace("http:", "https:") + "/fine")[1] in {"TLS", "no connection"}


@pytest.mark.parametrize(
    "url", ["", "ftp://host/a.jpg", "no link", "http://", "http://host:99999/", "data:,x", "http://[::1"]
)
def test_what_is_no_link(url):
    assert get(url).cause == "bad URL"


def test_public_and_other_addresses():
    for address in ("1.1.1.1", "2606:4700::1111", "64:ff9b::0101:0101"):
        assert is_public(address), address
    for address in (
        "127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "255.255.255.255", "::1", "::", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1",
        "2002:7f00:1::", "192.0.2.1",
    ):  # fmt: skip
        assert not is_public(address), address


def test_answers_of_random_bytes_are_counted_and_never_raise():
    """Valid answers with bytes changed, dropped and doubled, each on its own connection."""
    rng = random.Random(5)
    valid = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: 9\r\nRetry-After: 1\r\n\r\n123456789"

    def changed():
        data = bytearray(valid.replace(b"200 OK", rng.choice([b"200 OK", b"302 X\r\nLocation: /x", b"503 X"])))
        for _ in range(rng.randint(0, 2)):
            place = rng.randrange(len(data))
            data[place : place + rng.randint(0, 3)] = rng.randbytes(rng.randint(0, 3))
        return bytes(data)

    async def answer(reader, writer):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(changed())
            await writer.drain()
        writer.close()

    async def run():
        rules = DownloadRules(timeout=2, retries=0, allowed_networks=EVERYWHERE)
        async with await asyncio.start_server(answer, "127.0.0.1", 0) as serving, open_session(rules) as session:
            port = serving.sockets[0].getsockname()[1]
            found = [await fetch(session, f"http://127.0.0.1:{port}/{n}", rules) for n in range(150)]
        return found

    found = asyncio.run(run())
    assert all((one.data is None) == (one.cause is not None) for one in found)
    causes = Counter(one.cause for one in found)
    assert causes[None] > 9 and len(causes) > 2, causes
