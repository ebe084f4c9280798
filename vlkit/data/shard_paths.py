"""From what a user writes for a set of shards to the list of tars: path, URL, folder, glob, braces, `a::b`, list."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vlkit.data.remote_requests import as_url
from vlkit.errors import DataError

ShardSpec = str | Path | Sequence[str | Path]

BUILD_PLAN = "build.json"  # what `vlkit shards build` is to do, in the folder of the shards
BUILD_FORMAT = "vlkit shards 1"

_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_BRACES = re.compile(r"\{([^{}]*)\}")
_MAX_SHARDS = 1_000_000


def expand_shards(spec: ShardSpec) -> list[Path]:
    """The tars that a specification names, in its order (folders and globs sorted by name).

    Args:
        spec: a tar, a folder of tars, a glob, braces (`{00000..00099}.tar`, `{a,b}.tar`), each a path or a URL;
            several of these joined by `::`, or a list of these.

    Returns:
        Paths; of a shard at a URL the path of its copy in the cache, which need not be there yet.

    Raises:
        DataError: nothing is there, a named shard is missing, a shard is named twice, or a server refuses.
        RemoteError: a server cannot be reached.
    """
    parts = [spec] if isinstance(spec, str | Path) else list(spec)
    if not parts:
        raise DataError("No shards given; expected a tar, a folder of tars, a glob or a list.")
    paths: list[Path] = []
    missing: list[Path] = []
    for piece in (piece for part in parts for piece in str(part).split("::")):
        found, remote = _expand_one(piece)
        paths += found
        missing += [path for path in found if not remote and not path.is_file()]
    if missing:
        raise DataError(_say_missing(missing, len(paths)))
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            raise DataError(f"Shard {path} is named twice; an epoch has each sample once, so name it once.")
        seen.add(path)
    return paths


def stats_path(folder: Path, name: str) -> Path:
    """Where `vlkit shards build` puts the stats of shard `name`, last of its files: what has stats is finished."""
    return folder / f"{name}.stats.json"


def read_build_plan(folder: Path) -> dict[str, Any] | None:
    """The plan of the `vlkit shards build` that wrote to a folder; None when none did."""
    try:
        plan = json.loads((folder / BUILD_PLAN).read_text())
    except (OSError, ValueError):
        return None
    return plan if isinstance(plan, dict) and plan.get("format") == BUILD_FORMAT else None


def unfinished_build(spec: ShardSpec) -> str | None:
    """What is missing, when `spec` names a folder whose `vlkit shards build` was not finished."""
    parts = [spec] if isinstance(spec, str | Path) else list(spec)
    for folder in (Path(piece) for part in parts for piece in str(part).split("::")):
        plan = read_build_plan(folder)
        if plan is None:
            continue
        expected = plan["num_shards"]
        finished = len(list(folder.glob("*.stats.json")))
        if finished < expected:
            command = "reinforce" if "teacher" in plan else "build"
            return (
                f"{folder} is not finished: {finished} of {expected} shards. Run the same `vlkit shards {command}` "
                "again: it continues. Or name the tars themselves to use what is there."
            )
    return None


def _expand_one(piece: str) -> tuple[list[Path], bool]:
    """What one piece names, and whether that is at a URL, where only the server knows what is there."""
    url = as_url(piece)
    if piece.startswith("pipe:"):
        raise DataError(f"{piece}: no commands are run. Name a path or a URL: s3://bucket/{{00000..00099}}.tar.")
    if url is not None and url.partition("://")[0] not in ("file", "local"):
        from vlkit.data.remote_listing import expand_url  # which builds on this module

        return expand_url(url, [*_braces(url)]), True
    return _expand_path(piece if url is None else url.partition("://")[2]), False


def _expand_path(piece: str) -> list[Path]:
    if Path(piece).is_dir():
        return _in_folder(Path(piece))
    if Path(piece).exists():
        return [Path(piece)]
    paths: list[Path] = []
    for name in _braces(piece):
        paths += _glob(name) if re.search(r"[*?\[]", name) else [Path(name)]
    return paths


def _in_folder(folder: Path) -> list[Path]:
    tars = sorted(path for path in folder.iterdir() if path.suffix == ".tar" and not path.name.startswith("."))
    if tars:
        return tars
    below = sorted({path.parent for path in folder.glob("*/*.tar")})
    if below:
        raise DataError(f"No .tar files in {folder}, but in {', '.join(map(str, below[:5]))}: name one of these.")
    packed = [path.name for path in folder.iterdir() if re.search(r"\.(tar\.\w+|tgz)$", path.name)]
    hint = f" There is {packed[0]}: unpack compressed tars to plain .tar." if packed else ""
    raise DataError(f"No .tar files in {folder}.{hint} Shards are built with `vlkit shards build`.")


def _glob(pattern: str) -> list[Path]:
    anchor = Path(pattern).anchor
    found = sorted(path for path in Path(anchor).glob(pattern[len(anchor) :]) if path.is_file())
    if not found:
        raise DataError(f"No file fits {pattern}.")
    return found


def _braces(text: str) -> Iterator[str]:
    """`a{00..02}{x,y}` -> a00x, a00y, a01x, ..., as in a shell; ranges keep their leading zeros."""
    found = _BRACES.search(text)
    if not found:
        yield text
        return
    numbers = _RANGE.fullmatch(found[1])
    choices: Iterator[str] | list[str] = found[1].split(",")
    if numbers:
        first, last = int(numbers[1]), int(numbers[2])
        if abs(last - first) >= _MAX_SHARDS:
            raise DataError(f"{found[0]} stands for {abs(last - first) + 1:,} shards; at most {_MAX_SHARDS:,}.")
        step = 1 if last >= first else -1
        choices = (str(number).zfill(len(numbers[1])) for number in range(first, last + step, step))
    for choice in choices:
        yield from _braces(text[: found.start()] + choice + text[found.end() :])


def _say_missing(missing: list[Path], total: int) -> str:
    named = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
    if total == 1:
        folder = missing[0].parent
        there = f" {folder} exists." if folder.is_dir() else f" The folder {folder} does not exist either."
        expected = "a tar, a folder of tars, a glob or braces like {00000..00099}.tar"
        return f"No shard at {named}; expected {expected}.{there}"
    return f"{len(missing)} of {total} shards are missing: {named}."
