"""Samples that can be told apart, in shards, and loaders of them.

Fixtures:
    coloured       `ColouredSamples`: writes shards of them and checks what a batch holds.
    shards         83 of them in eight uneven shards.
    make_loader    `make_loader(shards, workers=2)`: ten images a batch, of 16 x 16.
    assert_equal   `assert_equal(ours, theirs)`: two lists of batches, all fields of them.
    worker_pids    `worker_pids()`: processes that read data for this one.
    triples        `triples(keys, size=700)`: image, text and JSON of samples, no real ones; each content names its key.
    textured       `textured(width, height)`: waves and a sharp rectangle.
"""

import io
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlkit.contracts import ImageTextBatch
from vlkit.data.captions import caption_hash
from vlkit.data.loader import Loader
from vlkit.data.shard_index import ShardSet
from vlkit.data.transforms import Preprocess
from vlkit.models.tokenizers import CLIP_BPE, TextTokenizer

SIZES = (3, 17, 1, 24, 9, 2, 20, 7)
TOKENIZER = TextTokenizer(CLIP_BPE, 16)
Files = dict[str, bytes]  # of a sample, by suffix
Edit = Callable[[int, Files], Files]


class ColouredSamples:
    """Samples by their number, from 0."""

    def __init__(self, write_tar: Callable[..., Path]) -> None:
        self.write_tar = write_tar

    def colour(self, number: int) -> tuple[int, int, int]:
        return (number * 3 % 256, (number * 7 + 40) % 256, 250 - number)

    def captions(self, number: int) -> list[str]:
        """One, two or three captions, which name the sample."""
        return [f"picture {number} view {view}" for view in range(1 + number % 3)]

    def files(self, number: int) -> Files:
        """A left half of the sample's own colour, a white right half."""
        image = Image.new("RGB", (36, 28 + number % 9), (255, 255, 255))
        image.paste(self.colour(number), (0, 0, 18, image.height))
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return {"png": buffer.getvalue(), "txt": "\n".join(self.captions(number)).encode()}

    def write(self, folder: Path, sizes: Iterable[int] = SIZES, edit: Edit = lambda number, files: files) -> ShardSet:
        """Shards of these sizes, each sample as `edit` leaves it."""
        first = 0
        for shard, size in enumerate(sizes):
            numbers = range(first, first + size)
            files = ((n, suffix, data) for n in numbers for suffix, data in edit(n, self.files(n)).items())
            self.write_tar(folder / f"{shard:05}.tar", ((f"{n:06}.{suffix}", data) for n, suffix, data in files))
            first += size
        return ShardSet.open(folder)

    def check_pairs(self, batch: ImageTextBatch, shards: ShardSet) -> None:
        """Image, key, number, text and hash of every row belong together."""
        for row, number in enumerate(batch.ids.tolist()):
            assert batch.keys[row] == shards.key(number) and batch.keys[row].endswith(f"/{number:06}")
            assert tuple(batch.images[row, :, 8, 1].tolist()) == self.colour(number)
            hashes = {caption_hash(caption): caption for caption in self.captions(number)}
            for text in (batch.text_to_image == row).nonzero().flatten().tolist():
                expected = TOKENIZER([hashes[int(batch.caption_hash[text])]])[0]
                assert torch.equal(batch.tokens[text, : len(expected)], expected)
                assert not batch.tokens[text, len(expected) :].any()


@pytest.fixture(scope="session")
def coloured(write_tar: Callable[..., Path]) -> ColouredSamples:
    return ColouredSamples(write_tar)


@pytest.fixture(scope="session")
def shards(coloured: ColouredSamples, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return coloured.write(tmp_path_factory.mktemp("shards"))


@pytest.fixture(scope="session")
def make_loader() -> Callable[..., Loader]:
    def make(shards: ShardSet, **settings: Any) -> Loader:
        return Loader(shards, TOKENIZER, **{"batch_size": 10, "preprocess": Preprocess(size=16), **settings})

    return make


@pytest.fixture(scope="session")
def assert_equal() -> Callable[..., None]:
    def check(ours: list[ImageTextBatch], theirs: list[ImageTextBatch]) -> None:
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert a.keys == b.keys and a.extra.keys() == b.extra.keys()
            for name in ("images", "tokens", "text_to_image", "ids", "caption_hash", "valid"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
            for name, value in a.extra.items():
                assert torch.equal(value, b.extra[name]), name

    return check


@pytest.fixture(scope="session")
def worker_pids() -> Callable[[], set[int]]:
    def running() -> set[int]:
        return {child.pid for child in multiprocessing.active_children() if child.pid and "vlkit-data" in child.name}

    return running


@pytest.fixture(scope="session")
def triples() -> Callable[..., Iterator[tuple[str, bytes]]]:
    def files(keys: Iterable[str], size: int = 700) -> Iterator[tuple[str, bytes]]:
        for key in keys:
            yield f"{key}.jpg", f"{key}|image".encode().ljust(size, b"\xff")
            yield f"{key}.txt", f"{key}|caption".encode()
            yield f"{key}.json", b'{"key": "%s"}' % key.encode()

    return files


@pytest.fixture(scope="session")
def textured() -> Callable[[int, int], Image.Image]:
    def draw(width: int, height: int) -> Image.Image:
        y, x = np.mgrid[0:height, 0:width].astype(float)
        periods = ((3, 7, 90), (11, 2, 300), (5, 5, 40))
        waves = [127 + 60 * np.sin(x / a + y / b) + 50 * np.cos(x * y / c) for a, b, c in periods]
        pixels = np.stack(waves, 2)
        pixels[height // 3 : height // 2, width // 4 : width // 2] = (255, 0, 30)
        return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))

    return draw
