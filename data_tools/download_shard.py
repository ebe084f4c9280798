"""One shard from links: its images are downloaded side by side into a scratch file, then written in the table's order.

The scratch file keeps memory small, and the order makes shards of equal answers equal byte for byte.
"""

import asyncio
import os
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from yarl import URL

from data_tools.download_url import DownloadRules, Fetched, fetch, open_session
from data_tools.url_table import Segment, read_rows
from data_tools.url_text import UrlRow
from data_tools.write_shard import Missing, ShardOptions, ShardPart, fold_captions, write_error, write_shard
from vlkit.data.atomic import TEMPORARY
from vlkit.data.records import ImageRef, Record

_EXAMPLES = 5  # failures of each cause that a shard's stats name; its table has them all
_RESOLVERS = 32  # threads that look up names: a name server that does not answer holds one for seconds


@dataclass(frozen=True)
class UrlPart:
    """One unit of work: some rows of the table."""

    name: str  # "00000"
    key_digits: int
    segments: Sequence[Segment]
    columns: tuple[str, str, str | None]
    folder: Path
    options: ShardOptions
    rules: DownloadRules

    @property
    def num_rows(self) -> int:
        """Rows of the table in this part."""
        return sum(segment.stop - segment.start for segment in self.segments)


def download_shard(part: UrlPart) -> dict[str, Any]:
    """Download the images of a part and write them as a shard; see `write_shard`.

    Returns:
        The stats: counts, bytes, hashes, and every row left out with its cause.

    Raises:
        DataError: the table cannot be read, no space left, or the folder cannot be written to.
    """
    rows = read_rows(part.segments, part.columns)
    scratch = part.folder / f"{part.name}.images.{os.getpid()}{TEMPORARY}"
    try:
        with open(scratch, "wb") as file:
            places, fetched = asyncio.run(_download(rows, part.rules, file))
        columns: dict[str, list[Any]] = {
            "url": [row.url for row in rows],
            "http_status": [one.http_status for one in fetched],
            "attempts": [one.attempts for one in fetched],
        }
        if part.columns[2] is not None:
            columns["uid"] = [row.uid for row in rows]
        records = [_record(*of_row, scratch) for of_row in zip(rows, places, fetched, strict=True)]
        in_json = tuple(name for name in ("url", "uid") if name in columns)
        return write_shard(
            ShardPart(part.name, part.key_digits, records, part.folder, part.options, columns, in_json, _EXAMPLES)
        )
    except OSError as error:
        raise write_error(error, part.folder) from error
    finally:
        scratch.unlink(missing_ok=True)


def _record(row: UrlRow, place: tuple[int, int], fetched: Fetched, scratch: Path) -> Record | Missing:
    key = row.uid or row.url or "row that cannot be read"
    captions = tuple(row.caption.split("\n")) if row.caption else ()
    if fetched.cause is not None:
        return Missing(key, fetched.cause, fetched.message or "", captions)
    return Record(key, ImageRef(path=str(scratch), offset=place[0], size=place[1]), captions)


async def _download(
    rows: Sequence[UrlRow], rules: DownloadRules, file: IO[bytes]
) -> tuple[list[tuple[int, int]], list[Fetched]]:
    """Where in the file the image of each row lies (offset, size), and how its download went, without the bytes."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_RESOLVERS, "resolve"))
    in_all = asyncio.Semaphore(rules.connections)
    # A row waits for its host before it takes one of the connections, so that a busy host holds up no other.
    of_host: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(rules.per_host))
    places = [(0, 0)] * len(rows)
    fetched = [Fetched(None)] * len(rows)
    async with open_session(rules) as session:

        async def one(number: int, row: UrlRow) -> None:
            early = _no_download(row)
            if early is not None or row.url is None:
                fetched[number] = early or Fetched(None)
                return
            async with of_host[_host(row.url)], in_all:
                found = await fetch(session, row.url, rules)
            if found.data is not None:
                places[number] = (file.tell(), len(found.data))
                file.write(found.data)
            fetched[number] = found._replace(data=None)

        async with asyncio.TaskGroup() as tasks:
            for number, row in enumerate(rows):
                tasks.create_task(one(number, row))
    return places, fetched


def _no_download(row: UrlRow) -> Fetched | None:
    """Why a row is left out before anything is asked of a host."""
    if row.url is None or not row.url.strip():
        return Fetched(None, "row that cannot be read", f"no link in this row: {(row.caption or '')[:100]}")
    if not fold_captions((row.caption or "").split("\n")):
        return Fetched(None, "no caption", "the row has no caption")
    return None


def _host(url: str) -> str:
    try:
        return URL(url.strip()).host or ""
    except ValueError:
        return ""
