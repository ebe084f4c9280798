"""Tools and run files take shards at URLs like local ones."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from data_tools.summarize import summarize_shards
from data_tools.validate import validate_shards
from vlkit.config import load_run
from vlkit.data.shard_index import write_index
from vlkit.errors import ConfigError


def files_of(shard: int) -> Iterator[tuple[str, bytes]]:
    for row in range(3):
        image = io.BytesIO()
        Image.new("RGB", (20, 10 + row), (shard * 90, row * 50, 9)).save(image, "PNG")
        yield f"{shard}{row}.png", b"no picture" if (shard, row) == (1, 2) else image.getvalue()
        yield f"{shard}{row}.txt", f"square {shard} {row}".encode()


@pytest.fixture
def copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_tar: Callable[..., Path]
) -> Iterator[tuple[str, Path]]:
    """URL and folder of two small shards, one sample of which is broken."""
    monkeypatch.setenv("VLKIT_CACHE", str(tmp_path / "cache"))
    local = tmp_path / "local"
    for shard in range(2):
        write_index(write_tar(local / f"{shard:05}.tar", files_of(shard)))
    files = fsspec.filesystem("memory")
    files.put(str(local), "/tools/set", recursive=True)
    yield "memory://tools/set", local
    files.rm("/tools", recursive=True)


def test_tools_say_the_same_of_a_url(copies: tuple[str, Path]) -> None:
    url, local = copies
    assert summarize_shards(url, workers=0).to_json()["num_samples"] == 6
    found, expected = validate_shards(url, workers=0), validate_shards(local, workers=0)
    assert found.problems.counts == expected.problems.counts and found.problems.total == 1
    assert found.num_decoded == expected.num_decoded == 5


def test_the_size_of_the_cache_in_a_run_file() -> None:
    tree = {"run": {"out": "x", "epochs": 1}, "model": {"name": "ViT-B-32"}, "data": {"train": "s3://b/{0..9}.tar"}}
    assert load_run(tree).data.cache_size is None
    run = load_run(tree, ['data.cache_size="1.5 GB"'])
    assert run.data.cache_size == 1_500_000_000
    with pytest.raises(ConfigError, match=r'data.cache_size = "much": expected a size such as "200 GB"'):
        load_run(tree, ['data.cache_size="much"'])
