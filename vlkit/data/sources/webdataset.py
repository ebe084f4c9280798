"""Existing tar shards as a source: records that point into the tars, nothing is unpacked.

CLIP_benchmark's `wds` layout (`wds_layout.py`) is one of these: tars in split folders, with names, templates and the
kind of the data set in text files beside them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vlkit.data.records import Problems, Record, Source
from vlkit.data.remote_requests import as_url
from vlkit.data.sources.annotated import Layout, read_text
from vlkit.data.sources.options import STANDARD_SPLITS, SourceOptions, canonical_split, require_split
from vlkit.data.sources.wds_layout import (
    MULTI_LABEL,
    check_shard_count,
    dataset_type,
    multi_hot_labels,
    templates_beside,
)
from vlkit.errors import DataError

if TYPE_CHECKING:
    from vlkit.data.shard_index import ShardIndex

LAYOUT = Layout(
    "webdataset",
    """\
  shards/00000.tar, 00001.tar, ...   with members KEY.jpg, KEY.txt (one caption a line), KEY.cls, KEY.json
  or shards/{train,val,test}/*.tar; class names in classnames.txt beside the tars (also CLIP_benchmark's layout)
""",
)


def read_webdataset(path: Path, options: SourceOptions) -> Source:
    """Read tar shards.

    Args:
        path: what `expand_shards` takes: a tar, a folder of tars, a glob, braces, `a::b`.
        options: `split` picks the tars in the folder of that name below `path`; where there is none, the samples
            whose `.json` names that split, as in shards built by vlkit.

    Returns:
        Records in the order of the shards; the key is `SHARD/KEY`, after `SPLIT/` where the tars lie in split
        folders. Class names come from `classnames.txt`, otherwise they are the labels' numbers; templates from
        `zeroshot_classification_templates.txt`.

    Raises:
        DataError: no shards, fewer than `nshards.txt` says, a shard that cannot be read, no such split, or no usable
            sample.
    """
    from vlkit.data.shard_index import ShardSet  # arrow and numpy only where shards are read

    options.check_used("webdataset", ["split"])
    problems = Problems()
    records: list[Record] = []
    for folder, split in _folders_to_read(path, options.split):
        check_shard_count(folder)
        _note_unfinished(folder, problems)
        for shard in ShardSet.open(str(folder)).shards:
            multi_label = dataset_type(shard.path.parent) == MULTI_LABEL
            _merge(shard.problems, shard.path.name, problems, labelled=multi_label)
            records += _records(shard, split, multi_label, problems)
    if not _split_folders(path):
        wanted = require_split(options.split, {record.split for record in records}, path)
        records = [record for record in records if wanted is None or record.split == wanted]
    if not records:
        raise LAYOUT.error(f"No usable sample in the shards of {path}: {'; '.join(problems.lines())}.")
    labels = [label for record in records for label in (record.labels or (record.label,)) if label is not None]
    root = Path(records[0].image.path or "").parent
    names = class_names_beside(root, labels)
    return Source(tuple(records), "webdataset", root, names, problems, templates_beside(root))


def is_shard_spec(path: Path) -> bool:
    """Whether a path is a tar or a pattern of tars rather than a plain folder or file."""
    text = str(path)
    if as_url(text) is not None:
        return True
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


def _folders_to_read(path: Path, split: str | None) -> list[tuple[Path, str | None]]:
    """What to open, with the split it is: the folder itself, one split of it, or all."""
    folders = _split_folders(path)
    if split is not None and folders:
        wanted = require_split(split, folders, path)
        assert wanted is not None
        return [(folders[wanted], wanted)]
    if folders and not any(path.glob("*.tar")):
        return [(folder, name) for name, folder in folders.items()]
    return [(path, None)]


def _note_unfinished(folder: Path, problems: Problems) -> None:
    """img2dataset writes a shard's statistics last; what of its tar is whole is used all the same."""
    if folder.is_dir() and any(folder.glob("*_stats.json")):
        for tar in sorted(folder.glob("*.tar")):
            if not tar.with_name(f"{tar.stem}_stats.json").is_file():
                problems.add("tar that img2dataset did not finish: no _stats.json (kept)", tar.name)


def _records(shard: "ShardIndex", split: str | None, multi_label: bool, problems: Problems) -> Iterator[Record]:
    has_own = split is None and _names_split(shard)
    for row in range(shard.num_samples):
        key = f"{shard.name}/{shard.key(row)}" if split is None else f"{split}/{shard.name}/{shard.key(row)}"
        try:
            own, labels = _own(shard, row) if has_own else (split, None)
            labels = _labels(shard, row, key) if labels is None and multi_label else labels
            record = Record(key, shard.image(row), shard.captions(row), shard.label(row), own, labels)
        except DataError as error:
            problems.add("label or captions that cannot be read", f"{key} ({error})")
        else:
            yield record


def _names_split(shard: "ShardIndex") -> bool:
    """Whether samples may name their split; asked once, as reading the `.json` of every sample takes time."""
    if (shard.path.parent / "build.json").is_file():
        return True
    try:
        return shard.num_samples > 0 and _own(shard, 0)[0] is not None
    except DataError:
        return False


def _own(shard: "ShardIndex", row: int) -> tuple[str | None, tuple[int, ...] | None]:
    """Split and labels that the `.json` of a sample names, as `vlkit shards build` writes them."""
    about = shard.json(row) or {}
    split, labels = about.get("split"), about.get("labels")
    whole = isinstance(labels, list) and all(isinstance(label, int) and label >= 0 for label in labels)
    return (
        canonical_split(split) if isinstance(split, str) and split.strip() else None,
        tuple(labels) if whole and isinstance(labels, list) else None,
    )


def _labels(shard: "ShardIndex", row: int, key: str) -> tuple[int, ...] | None:
    data = shard.read_member(row, "npy")
    return None if data is None else multi_hot_labels(data, key)


def _merge(found: Problems, shard: str, problems: Problems, labelled: bool) -> None:
    for cause, count in found.counts.items():
        if labelled and cause == "no caption and no label (kept)":
            continue  # the index knows labels in .cls only
        for key in found.examples[cause]:
            problems.add(cause, f"{shard}: {key}")
        problems.counts[cause] += count - len(found.examples[cause])
