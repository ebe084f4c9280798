"""Existing tar shards as a source: records that point into the tars, nothing is unpacked."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vlkit.data.records import Problems, Record, Source
from vlkit.data.sources.annotated import Layout, read_text
from vlkit.data.sources.options import STANDARD_SPLITS, SourceOptions, canonical_split, require_split
from vlkit.errors import DataError

if TYPE_CHECKING:
    from vlkit.data.shard_index import ShardIndex

LAYOUT = Layout(
    "webdataset",
    """\
  shards/00000.tar, 00001.tar, ...   with members KEY.jpg, KEY.txt (one caption a line), KEY.cls, KEY.json
  or shards/{train,val,test}/*.tar; class names in classnames.txt beside the tars
""",
)


def read_webdataset(path: Path, options: SourceOptions) -> Source:
    """Read tar shards.

    Args:
        path: what `expand_shards` takes: a tar, a folder of tars, a glob, braces, `a::b`.
        options: `split` picks the tars in the folder of that name below `path`.

    Returns:
        Records in the order of the shards; the key is `SHARD/KEY`, after `SPLIT/` where the tars lie in split
        folders. Class names come from `classnames.txt`, otherwise they are the labels' numbers.

    Raises:
        DataError: no shards, a shard that cannot be read, no such split, or no usable sample.
    """
    from vlkit.data.shard_index import ShardSet  # arrow and numpy only where shards are read

    options.check_used("webdataset", ["split"])
    problems = Problems()
    records: list[Record] = []
    for folder, split in _split_folders_of(path, options.split):
        for shard in ShardSet.open(str(folder)).shards:
            _merge(shard.problems, shard.path.name, problems)
            records += _records(shard, split, problems)
    if not records:
        raise LAYOUT.error(f"No usable sample in the shards of {path}: {'; '.join(problems.lines())}.")
    labels = [record.label for record in records if record.label is not None]
    root = Path(records[0].image.path or "").parent
    return Source(tuple(records), "webdataset", root, class_names_beside(root, labels), problems)


def is_shard_spec(path: Path) -> bool:
    """Whether a path is a tar or a pattern of tars rather than a plain folder or file."""
    text = str(path)
    return ".tar" in path.name.lower() and (path.is_file() or any(mark in text for mark in ("::", "{", "*", "?", "[")))


def holds_shards(folder: Path) -> bool:
    """Whether tars lie in a folder, or in folders named after splits below it."""
    return any(folder.glob("*.tar")) or bool(_split_folders(folder))


def class_names_beside(folder: Path, labels: list[int]) -> tuple[str, ...]:
    """The names that labels of shards point into: `classnames.txt` in or above their folder, else plain numbers.

    Raises:
        DataError: a label is beyond the names.
    """
    if not labels:
        return ()
    for place in (folder, folder.parent):
        if (place / "classnames.txt").is_file():
            # Only the end may be blank: a blank line in between would shift the names of all labels after it.
            names = tuple(line.strip() for line in read_text(place / "classnames.txt").rstrip().split("\n"))
            if max(labels) < len(names):
                return names
            raise DataError(f"{place / 'classnames.txt'} has {len(names)} names, but a label is {max(labels)}.")
    return tuple(str(label) for label in range(max(labels) + 1))


def _split_folders(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        return {}
    below = sorted(entry for entry in folder.iterdir() if canonical_split(entry.name) in STANDARD_SPLITS)
    return {canonical_split(entry.name): entry for entry in below if any(entry.glob("*.tar"))}


def _split_folders_of(path: Path, split: str | None) -> list[tuple[Path, str | None]]:
    """What to open, with the split it is: the folder itself, one split of it, or all."""
    folders = _split_folders(path)
    wanted = require_split(split, folders, path)
    if wanted:
        return [(folders[wanted], wanted)]
    if folders and not any(path.glob("*.tar")):
        return [(folder, name) for name, folder in folders.items()]
    return [(path, None)]


def _records(shard: "ShardIndex", split: str | None, problems: Problems) -> Iterator[Record]:
    for row in range(shard.num_samples):
        key = f"{shard.name}/{shard.key(row)}" if split is None else f"{split}/{shard.name}/{shard.key(row)}"
        try:
            record = Record(key, shard.image(row), shard.captions(row), shard.label(row), split)
        except DataError as error:
            problems.add("label or captions that cannot be read", f"{key} ({error})")
        else:
            yield record


def _merge(found: Problems, shard: str, problems: Problems) -> None:
    for cause, count in found.counts.items():
        for key in found.examples[cause]:
            problems.add(cause, f"{shard}: {key}")
        problems.counts[cause] += count - len(found.examples[cause])
