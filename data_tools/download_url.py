"""One image over HTTP, from hosts that may be slow, broken or hostile.

    session = open_session(rules)
    fetched = await fetch(session, "https://host/image.jpg", rules)

All of an image's time (redirects, repeats and waiting between them) and size are limited. A connection is made only to
public addresses: the address is checked where the socket is opened, so neither a redirect nor a name that resolves to
something else a second time leads into the network this runs in.
"""

import asyncio
import errno
import ipaddress
import random
import socket
import ssl
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import aiohttp
from yarl import URL

import vlkit

EVERYWHERE = ("0.0.0.0/0", "::/0")

_NOT_PUBLIC = "is no public address"
_REDIRECTS = {301, 302, 303, 307, 308}
_WORTH_REPEATING = {408, 425, 429, 500, 502, 503, 504}
_OPTED_OUT = {"noai", "noimageai", "noindex", "noimageindex"}
_WITH_VALUE = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}
_AGENT = "vlkit"

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class DownloadRules:
    """What a download may cost and where it may lead."""

    timeout: float = 20.0  # seconds for one image, with everything
    max_bytes: int = 20_000_000
    retries: int = 2  # after the first attempt, where another may help
    max_redirects: int = 5
    connections: int = 64  # at a time, in one process
    per_host: int = 16  # of these to one host
    honour_opt_out: bool = True  # leave out what X-Robots-Tag: noai, noimageai, noindex, noimageindex forbids
    allowed_networks: tuple[str, ...] = ()  # that may be reached beside public addresses: "10.1.0.0/16", ...


class Fetched(NamedTuple):
    """The image, or why there is none."""

    data: bytes | None
    cause: str | None = None  # one of a few, so that causes can be counted
    message: str | None = None
    http_status: int | None = None
    attempts: int = 0


class _FailedError(Exception):
    def __init__(self, cause: str, message: str, status: int | None = None, again: bool = False, wait: float = 0):
        super().__init__(message)
        self.cause = cause
        self.status = status
        self.again = again
        self.wait = wait  # seconds the host asks for


def open_session(rules: DownloadRules) -> aiohttp.ClientSession:
    """A session that connects to allowed addresses only. Proxies of the environment are not used."""
    connector = aiohttp.TCPConnector(
        limit=0,  # counted by the caller, as waiting for a free connection must not use up an image's time
        ttl_dns_cache=300,
        socket_factory=partial(_socket_to, networks=[ipaddress.ip_network(name) for name in rules.allowed_networks]),
    )
    headers = {
        "User-Agent": f"Mozilla/5.0 (compatible; {_AGENT}/{vlkit.__version__}; image-text data sets)",
        "Accept": "image/*,*/*;q=0.5",
        "Accept-Encoding": "identity",
    }
    return aiohttp.ClientSession(
        connector=connector,
        headers=headers,
        timeout=aiohttp.ClientTimeout(total=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,  # a few bytes may unpack to gigabytes; see _unpack
    )


async def fetch(session: aiohttp.ClientSession, url: str, rules: DownloadRules) -> Fetched:
    """Download an image. Never raises for what a host or a URL does."""
    attempts = 0
    last: _FailedError | None = None
    try:
        async with asyncio.timeout(rules.timeout):
            while True:
                attempts += 1
                try:
                    data, status = await _attempt(session, url, rules)
                    return Fetched(data, http_status=status, attempts=attempts)
                except _FailedError as failed:
                    last = failed
                if not last.again or attempts > rules.retries or last.wait > rules.timeout:
                    return Fetched(None, last.cause, str(last), last.status, attempts)
                # Doubling, and spread, so that those who failed together do not come back together.
                await asyncio.sleep(max(0.5 * 2 ** (attempts - 1) * random.uniform(0.5, 1.5), last.wait))
    except TimeoutError:
        before = f"; before that: {last}" if last else ""
        message = f"not finished after {rules.timeout:g} seconds{before}"
        return Fetched(None, last.cause if last else "timed out", message, last.status if last else None, attempts)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the internet: not private, loopback, link-local, shared, multicast, reserved."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address):
        # Addresses that carry an IPv4 address lead to it: judge that one.
        carried = parsed.ipv4_mapped or parsed.sixtofour or (parsed.teredo and parsed.teredo[1])
        if not carried and parsed in ipaddress.IPv6Network("64:ff9b::/96"):
            carried = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if carried:
            return is_public(str(carried))
    return parsed.is_global and not parsed.is_multicast and not parsed.is_reserved


async def _attempt(session: aiohttp.ClientSession, url: str, rules: DownloadRules) -> tuple[bytes, int]:
    target = _checked(url)
    for _ in range(rules.max_redirects + 1):
        try:
            async with session.get(target, allow_redirects=False) as response:
                _check_opt_out(response.headers.getall("X-Robots-Tag", ()), rules)
                if response.status not in _REDIRECTS:
                    return await _body(response, rules), response.status
                place = response.headers.get("Location", "")
                if not place:
                    raise _FailedError("redirect without a place", f"{target} redirects nowhere", response.status)
                target = _checked(place, target)
        except _FailedError:
            raise
        except Exception as error:  # what a library makes of hostile bytes is not all declared; see _explain
            raise _explain(error, target) from error
    raise _FailedError("too many redirects", f"more than {rules.max_redirects} redirects, the last to {target}")


def _checked(url: str, base: URL | None = None) -> URL:
    try:
        target = URL(url.strip()) if base is None else base.join(URL(url.strip()))
        port = target.port
    except ValueError as error:
        raise _FailedError("bad URL", f"{url[:200]}: {error}") from error
    if target.scheme not in ("http", "https") or not target.host or not port:
        raise _FailedError("bad URL", f"{str(target)[:200]} is no http or https address")
    return target.with_fragment(None).with_user(None)


def _check_opt_out(headers: Iterable[str], rules: DownloadRules) -> None:
    for header in headers if rules.honour_opt_out else ():
        agent = _AGENT  # `otherbot: noai` speaks to another, until the next name
        for word in header.lower().split(","):
            name, colon, rest = word.partition(":")
            if colon and name.strip() not in _WITH_VALUE:
                agent, word = name.strip(), rest
            if agent == _AGENT and word.strip() in _OPTED_OUT:
                raise _FailedError("opt-out", f"X-Robots-Tag: {header[:100]}")


async def _body(response: aiohttp.ClientResponse, rules: DownloadRules) -> bytes:
    status = response.status
    if status != 200:
        wait = response.headers.get("Retry-After", "")
        raise _FailedError(
            f"HTTP {status}",
            f"HTTP {status} {response.reason or ''}".strip(),
            status,
            again=status in _WORTH_REPEATING,
            wait=float(wait) if wait.isdecimal() else 0,
        )
    if response.content_type == "text/html":
        raise _FailedError("not an image", "a web page (text/html) where an image was expected", status)
    too_large = _FailedError("too large", f"more than {rules.max_bytes:,} bytes", status)
    if (response.content_length or 0) > rules.max_bytes:
        raise too_large
    pieces, size = [], 0
    async for piece in response.content.iter_chunked(1 << 16):
        size += len(piece)
        if size > rules.max_bytes:
            raise too_large
        pieces.append(piece)
    data = _unpack(b"".join(pieces), response.headers.get("Content-Encoding", ""), rules.max_bytes, status)
    if len(data) > rules.max_bytes:
        raise too_large
    if not data:
        raise _FailedError("empty answer", "an answer without content", status)
    return data


def _unpack(data: bytes, encoding: str, max_bytes: int, status: int) -> bytes:
    """Undo gzip and deflate, which some hosts apply unasked, no further than the limit."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return data
    if name not in ("gzip", "x-gzip", "deflate"):
        raise _FailedError("unknown encoding", f"Content-Encoding: {name[:40]}", status)
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 32).decompress(data, max_bytes + 1)
    except zlib.error as error:
        raise _FailedError("unknown encoding", f"not what Content-Encoding: {name} says ({error})", status) from error


def _explain(error: Exception, target: URL) -> _FailedError:
    """A cause for what went wrong below HTTP, most special first."""
    message = f"{target.host}: {str(error) or type(error).__name__}"
    if _NOT_PUBLIC in str(error):
        return _FailedError("private address", message)
    if isinstance(error, aiohttp.InvalidURL | ValueError):
        return _FailedError("bad URL", message)
    if isinstance(error, aiohttp.ClientConnectorDNSError):
        return _FailedError("host not found", message, again=True)  # resolvers give up under load
    if isinstance(error, aiohttp.ClientSSLError | ssl.SSLError):
        return _FailedError("TLS", message)
    if isinstance(error, aiohttp.ClientConnectorError):
        return _FailedError("no connection", message, again=True)
    if isinstance(error, aiohttp.ClientError | OSError):
        return _FailedError("connection cut", message, again=True)
    return _FailedError("bad answer", f"{message} ({type(error).__name__})")


def _socket_to(address: tuple[Any, ...], networks: Sequence[_Network]) -> socket.socket:
    """A socket for the address that is about to be connected to, whatever led there."""
    family, kind, protocol, _, place = address
    host = str(place[0]).partition("%")[0]
    if not is_public(host) and not any(ipaddress.ip_address(host) in network for network in networks):
        raise OSError(errno.EACCES, f"{host} {_NOT_PUBLIC}")
    return socket.socket(family, kind, protocol)
