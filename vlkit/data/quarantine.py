"""`quarantine.jsonl`: every broken sample of a run, once.

{"sample": 30121, "shard": "00003.tar", "key": "00003/000120034", "cause": "truncated", "message": "..."}

`sample` is the position in the run's shards, which tells samples apart whose sources have shards of one name.

All ranks append to one file, a run that is continued as well. Whoever appends locks the file, reads what others have
added since, and writes only samples that are not in it; a line that a kill cut short is removed first. Everything but
ASCII is escaped, so that text out of the data acts on no terminal.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from vlkit.data.sample_reader import Failure
from vlkit.errors import DataError
from vlkit.escape import one_line

try:
    import fcntl
except ImportError:  # Windows, where only one process of a run may write
    fcntl = None  # type: ignore[assignment,unused-ignore]

FILE = "quarantine.jsonl"
_LONGEST_MESSAGE = 500


class Quarantine:
    """Appends to the list; the file comes into being with the first broken sample.

    Attributes:
        num_samples: in the list so far, of all ranks, as of the last `add` or `refresh`.
        causes: how many of each cause.
        shards: shard -> how many of each cause.
    """

    def __init__(self, path: Path):
        self.path = path
        self.causes: Counter[str] = Counter()
        self.shards: dict[str, Counter[str]] = {}
        self._known: set[int] = set()
        self._read = 0  # bytes of the file that are known

    @property
    def num_samples(self) -> int:
        """How many are listed."""
        return len(self._known)

    def add(self, failures: Sequence[Failure]) -> None:
        """List the samples that are not listed yet.

        Raises:
            DataError: the file cannot be written.
        """
        if all(failure.sample in self._known for failure in failures):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "ab+") as file, _locked(file):
                self._catch_up(file)
                lines = []
                for failure in failures:
                    line = {
                        "sample": failure.sample,
                        "shard": failure.shard,
                        "key": failure.key,
                        "cause": failure.cause,
                        "message": one_line(failure.message, _LONGEST_MESSAGE),
                    }
                    if self._count(line):
                        lines.append(json.dumps(line) + "\n")
                self._read += file.write("".join(lines).encode())
        except OSError as error:
            raise DataError(f"Cannot write {self.path}: {error.strerror or error}.") from error

    def refresh(self) -> None:
        """Read what other ranks, or an earlier part of the run, have listed."""
        if self.path.is_file():
            with open(self.path, "rb+") as file, _locked(file):
                self._catch_up(file)

    def record(self) -> dict[str, Any]:
        """The counts as JSON types."""
        return {
            "broken": self.num_samples,
            "causes": dict(self.causes.most_common()),
            "shards": {shard: dict(causes.most_common()) for shard, causes in sorted(self.shards.items())},
        }

    def _catch_up(self, file: IO[bytes]) -> None:
        file.seek(self._read)
        for line in file.read().splitlines(keepends=True):
            if not line.endswith(b"\n"):
                file.truncate(self._read)  # cut short by a kill
                return
            self._read += len(line)
            sample = _parsed(line)
            if sample is not None:
                self._count(sample)

    def _count(self, sample: dict[str, Any]) -> bool:
        """Whether the sample is new."""
        if sample["sample"] in self._known:
            return False
        self._known.add(sample["sample"])
        self.causes[sample["cause"]] += 1
        self.shards.setdefault(sample["shard"], Counter())[sample["cause"]] += 1
        return True


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of the list; None for what somebody else wrote into it."""
    try:
        sample = json.loads(line)
    except ValueError:
        return None
    wanted = {"sample": int, "shard": str, "key": str, "cause": str}
    whole = isinstance(sample, dict) and all(isinstance(sample.get(name), kind) for name, kind in wanted.items())
    return sample if whole else None


@contextmanager
def _locked(file: IO[bytes]) -> Iterator[None]:
    """Wait until no other process holds the file; closing it, or dying, lets it go."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
        file.flush()
    finally:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_UN)
