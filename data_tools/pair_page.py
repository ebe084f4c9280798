"""One HTML page that shows pairs of samples side by side, for judging copies by eye."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from data_tools.dedupe import KINDS, DedupeReport
from data_tools.leakage import COLUMNS, Leak, LeakageReport
from data_tools.page import write_page
from data_tools.sample_facts import thumbnail_of
from data_tools.signatures import normal_caption
from vlkit.data.records import Record
from vlkit.data.shard_index import ShardSet
from vlkit.errors import DataError

_SIDE = 160  # pixels of a thumbnail
_PAIRS = 60  # of a section
_MAX_CAPTIONS = 3
_SAYS = {
    "bytes": "same bytes",
    "pixels": "same pixels",
    "near": "near copy, similarity {:.3f}",
    "captions": "same caption",
}


Item = TypeVar("Item")


class Side(NamedTuple):
    """One sample of a pair."""

    role: str
    key: str
    url: str | None  # JPEG data URL; None where the image does not decode
    captions: tuple[str, ...]


class Pair(NamedTuple):
    """Two samples side by side."""

    title: str
    left: Side
    right: Side


class Section(NamedTuple):
    """Pairs of one kind; `total` counts those that are not shown too, `ranked` ones begin with the least alike."""

    title: str
    total: int
    pairs: list[Pair]
    ranked: bool


def write_dedupe_page(report: DedupeReport, path: str | Path) -> None:
    """Copies beside what is kept for them, by kind.

    Raises:
        DataError: the page cannot be written.
    """
    sections = []
    for number, kind in enumerate(KINDS):
        copies = [row for _, rows in report.groups() for row in rows.tolist() if report.kind[row] == number]
        copies.sort(key=lambda row: (report.similarity[row], row))

        def pair(row: int, kind: str = kind) -> Pair:
            kept = _sample(report.shards, int(report.copy_of[row]), "kept")
            says = _SAYS[kind].format(report.similarity[row])
            return Pair(says, kept, _sample(report.shards, row, "copy"))

        sections += _section(_SAYS[kind].partition(",")[0], copies, pair)
    title, rows = "Copies in the shards", report.rows()
    write_page(path, "pairs.html.j2", title=title, columns=(), rows=rows, sections=sections)


def write_leakage_page(report: LeakageReport, path: str | Path) -> None:
    """Training samples beside what of each evaluation set they repeat.

    Raises:
        DataError: the page cannot be written.
    """
    sections = []
    for name, leaks in report.leaks.items():
        for kind in KINDS:
            found = sorted((leak for leak in leaks if leak.kind == kind), key=lambda leak: (leak.similarity, leak))

            def pair(leak: Leak, name: str = name) -> Pair:
                record = report.sources[name].records[leak.record]
                says = _SAYS[leak.kind].format(leak.similarity)
                if leak.kind == "captions":
                    says += f": {_shared_caption(report.shards, leak.sample, record)}"
                return Pair(says, _sample(report.shards, leak.sample, "training"), _record(record, "evaluation"))

            sections += _section(f"{name}: {_SAYS[kind].partition(',')[0]}", found, pair)
    title, rows = "Evaluation images in the training shards", report.rows()
    write_page(path, "pairs.html.j2", title=title, columns=COLUMNS, rows=rows, sections=sections)


def _section(title: str, items: Sequence[Item], pair: Callable[[Item], Pair]) -> list[Section]:
    return [Section(title, len(items), [pair(item) for item in items[:_PAIRS]], "near" in title)] if items else []


def _sample(shards: ShardSet, sample: int, role: str) -> Side:
    shard, row = shards.locate(sample)
    try:
        captions = shard.captions(row)[:_MAX_CAPTIONS]
    except DataError:
        captions = ()
    return Side(role, shards.key(sample), thumbnail_of(shard.image_bytes(row), "image", _SIDE), captions)


def _shared_caption(shards: ShardSet, sample: int, record: Record) -> str:
    shard, row = shards.locate(sample)
    own = {normal_caption(text) for text in shard.captions(row)}
    return next((text for text in record.captions if normal_caption(text) in own), "")


def _record(record: Record, role: str) -> Side:
    try:
        url = thumbnail_of(record.image.read(), record.key, _SIDE)
    except DataError:
        url = None
    return Side(role, record.key, url, record.captions[:_MAX_CAPTIONS])
