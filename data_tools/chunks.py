"""Work on every sample of a set of shards, in one process or several, with results in order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from vlkit.contracts import Progress
from vlkit.engine import map_parts

CHUNK = 256  # samples: about a tenth of a second of decoding, so that progress moves and workers end together

Result = TypeVar("Result")


class Chunk(NamedTuple):
    """A run of samples of one tar."""

    tar: str
    start: int
    stop: int  # exclusive


def cut_chunks(shards: Iterable[tuple[Path, int]]) -> list[Chunk]:
    """Chunks that cover all samples of (tar, number of samples), in order."""
    return [
        Chunk(str(path), start, min(start + CHUNK, num_samples))
        for path, num_samples in shards
        for start in range(0, num_samples, CHUNK)
    ]


def map_chunks(
    work: Callable[[Chunk], Result], chunks: Sequence[Chunk], workers: int = 0, progress: Progress | None = None
) -> Iterator[Result]:
    """`work` of every chunk, in order.

    Args:
        work: a function of a module, so that it can be sent to another process.
        chunks: what to work on.
        workers: processes; up to 1 works in this one. They are spawned, so a script that asks for them needs the
            usual `if __name__ == "__main__":`.
        progress: called with (samples done, all samples).

    Raises:
        VlkitError: a worker died, as it does when memory runs out.
    """
    total = sum(chunk.stop - chunk.start for chunk in chunks)
    done = 0
    for chunk, result in zip(chunks, _in_order(map_parts(work, chunks, workers)), strict=True):
        yield result
        done += chunk.stop - chunk.start
        if progress is not None:
            progress(done, total)


def _in_order(results: Iterable[tuple[int, Result]]) -> Iterator[Result]:
    """Results of parts that finish in any order; what is early waits here."""
    early: dict[int, Result] = {}
    following = 0
    for position, result in results:
        early[position] = result
        while following in early:
            yield early.pop(following)
            following += 1
