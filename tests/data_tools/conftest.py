"""Records of smooth pictures, to build shards of, and a web server.

Fixtures:
    picture      `picture(width, height, seed=0)`: smooth, as photographs are.
    encoded      `encoded(image, "PNG", **options)`: an image as the bytes of a file.
    records_of   `records_of(3)`: records of pictures with two captions each.
    serving      `with serving(Handler) as address`: a web server on this machine.
"""

import io
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlkit.data.records import ImageRef, Record


@pytest.fixture(scope="session")
def picture() -> Callable[..., Image.Image]:
    def draw(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
        """JPEG keeps it within a few grey levels."""
        y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
        waves = [np.sin(4 * x + c + seed) + np.cos(5 * y - seed * c) for c in range(3)]
        return Image.fromarray((127 + 60 * np.stack(waves, 2)).clip(0, 255).astype(np.uint8))

    return draw


@pytest.fixture(scope="session")
def encoded() -> Callable[..., bytes]:
    def encode(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def records_of(picture: Callable[..., Image.Image], encoded: Callable[..., bytes]) -> Callable[..., list[Record]]:
    def make(count: int, **sizes: int) -> list[Record]:
        images = [ImageRef(data=encoded(picture(seed=n, **sizes))) for n in range(count)]
        return [Record(f"photo {n}.jpg", image, (f"caption {n}", f"another {n}")) for n, image in enumerate(images)]

    return make


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients that hang up are the point here."""


@pytest.fixture(scope="session")
def serving() -> Callable[[type[BaseHTTPRequestHandler]], AbstractContextManager[str]]:
    @contextmanager
    def run(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
        server = _Quiet(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        server.server_close()
        thread.join()

    return run
