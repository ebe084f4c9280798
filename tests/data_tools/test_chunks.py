"""Chunks cover every sample once, and results keep their order whichever worker ends first."""

import time
from pathlib import Path

from data_tools.chunks import CHUNK, Chunk, cut_chunks, map_chunks


def slow_at_the_start(chunk: Chunk) -> tuple[str, int]:
    time.sleep(0.3 if chunk.start == 0 else 0.0)
    return chunk.tar, chunk.start


def test_chunks_cover_every_sample_once():
    chunks = cut_chunks([(Path("a.tar"), 2 * CHUNK + 1), (Path("empty.tar"), 0), (Path("b.tar"), 3)])
    assert [(chunk.tar, chunk.start, chunk.stop) for chunk in chunks] == [
        ("a.tar", 0, CHUNK),
        ("a.tar", CHUNK, 2 * CHUNK),
        ("a.tar", 2 * CHUNK, 2 * CHUNK + 1),
        ("b.tar", 0, 3),
    ]


def test_results_of_workers_come_in_order():
    chunks = cut_chunks([(Path("a.tar"), 3 * CHUNK), (Path("b.tar"), 10)])
    seen = []
    results = list(map_chunks(slow_at_the_start, chunks, workers=2, progress=lambda done, total: seen.append(done)))
    assert results == [(chunk.tar, chunk.start) for chunk in chunks]
    assert seen == [CHUNK, 2 * CHUNK, 3 * CHUNK, 3 * CHUNK + 10]
