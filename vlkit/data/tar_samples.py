"""From the files of one tar to its samples: which file is the image, the caption, the label of which sample.

The rule is webdataset's: a sample is the run of neighbouring files whose names agree up to the first dot of the
base name. Whatever makes it doubtful which file belongs to which takes the whole sample out and is named in
`problems`; one shard is grouped at a time, so files of two shards never meet.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vlkit.data.records import Problems
from vlkit.data.tar_walk import NO_CONTENT, Damage, TarMembers

IMAGE_EXTENSIONS = frozenset(
    b"jpg jpeg jpe jfif png webp gif bmp tif tiff avif heic heif ppm pgm pbm img image".split()
)
ROLES: dict[str, frozenset[bytes]] = {
    "image": IMAGE_EXTENSIONS,
    "caption": frozenset({b"txt", b"text"}),
    "json": frozenset({b"json"}),
    "cls": frozenset({b"cls"}),
}

# Names that webdataset keeps for itself and never hands out.
_META = re.compile(rb"__[^/]*__($|/)")

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Samples:
    """The usable samples of one tar, in its order; S samples made of F files."""

    keys: list[bytes]
    places: dict[str, tuple[Array, Array]]  # role -> offsets (S,) and sizes (S,); -1 and 0 where it has none
    first_file: Array  # (S+1,) the files of sample i are rows first_file[i] : first_file[i + 1] of the next three
    suffix: Array  # (F,) position in `suffixes`
    offset: Array  # (F,)
    size: Array  # (F,)
    suffixes: list[bytes]
    problems: Problems  # what was left out, by cause and key
    notes: Problems  # what is in, but worth a look


class _Runs(NamedTuple):
    """Files in runs of equal key: R runs of F files."""

    keys: list[bytes]  # (R,)
    run: Array  # (F,) run of each file
    code: Array  # (F,) suffix of each file
    offset: Array  # (F,)
    size: Array  # (F,)
    suffixes: list[bytes]


def group_samples(members: TarMembers, problems: Problems, notes: Problems) -> Samples:
    """Samples of a tar; `problems` and `notes` collect what was left out and what looks odd."""
    runs = _find_runs(members, notes)
    left_out: dict[int, str] = {}  # run -> why; the first reason found stays
    _mark_damage(members.damage, runs, left_out, problems)
    _mark(left_out, runs.run[runs.size == NO_CONTENT], "a file of the sample is a link or sparse, without content")
    _mark(left_out, _repeated_suffix(runs), "duplicate key")
    _mark_recurring_keys(runs, left_out)
    chosen = _choose_files(runs, left_out, notes)
    for run, cause in sorted(left_out.items()):
        problems.add(cause, _text(runs.keys[run]))
    without_caption = (chosen["caption"] < 0) & (chosen["json"] < 0) & (chosen["cls"] < 0)
    kept = np.ones(len(runs.keys), bool)
    kept[list(left_out)] = False
    for run in np.flatnonzero(kept & without_caption).tolist():
        problems.add("no caption and no label (kept)", _text(runs.keys[run]))
    return _assemble(runs, kept, chosen, problems, notes)


def _find_runs(members: TarMembers, notes: Problems) -> _Runs:
    keys: list[bytes] = []
    run: list[int] = []
    code: list[int] = []
    rows: list[int] = []
    codes: dict[bytes, int] = {}
    last = b""  # no key is empty
    for row, name in enumerate(members.names):
        base = name.rfind(b"/") + 1
        dot = name.find(b".", base)
        if dot <= base or _META.match(name):  # no extension, or a hidden file
            notes.add("file outside any sample", _text(name))
            continue
        if name[:dot] != last:
            last = name[:dot]
            keys.append(last)
        run.append(len(keys) - 1)
        code.append(codes.setdefault(name[dot + 1 :].lower(), len(codes)))
        rows.append(row)
    places = np.array(rows, np.int64)
    run_of, code_of = np.array(run, np.int64), np.array(code, np.int64)
    return _Runs(keys, run_of, code_of, members.offsets[places], members.sizes[places], [*codes])


def _mark(left_out: dict[int, str], runs: Array, cause: str) -> None:
    for run in np.unique(runs).tolist():
        left_out.setdefault(run, cause)


def _mark_damage(damage: Damage | None, runs: _Runs, left_out: dict[int, str], problems: Problems) -> None:
    """The sample that damage struck, or may have robbed of files, goes out."""
    if damage is None:
        return
    struck = damage.name and damage.name[: damage.name.find(b".", damage.name.rfind(b"/") + 1)]
    last = len(runs.keys) - 1
    place = f"byte {damage.offset}" + ("" if damage.name is None else f", {_text(damage.name)}")
    problems.add(f"{damage.cause}; nothing after it can be read", place)
    if last < 0 or "after the end mark" in damage.cause:
        return
    if runs.keys[last] == struck or (struck is None and not _has_all_of_previous(runs, last)):
        left_out[last] = "not all files of the sample could be read"


def _has_all_of_previous(runs: _Runs, last: int) -> bool:
    """Whether the last sample has every kind of file the one before it has, so that it can be taken as whole."""
    previous = set(runs.code[runs.run == last - 1].tolist())
    return bool(previous) and previous <= set(runs.code[runs.run == last].tolist())


def _repeated_suffix(runs: _Runs) -> Array:
    pairs = np.sort(runs.run * (len(runs.suffixes) + 1) + runs.code)
    repeated: Array = pairs[1:][pairs[1:] == pairs[:-1]] // (len(runs.suffixes) + 1)
    return repeated


def _mark_recurring_keys(runs: _Runs, left_out: dict[int, str]) -> None:
    """A key in several runs: which files belong together is a guess, so none of them is used."""
    if len(set(runs.keys)) == len(runs.keys):
        return
    places: dict[bytes, list[int]] = {}
    for run, key in enumerate(runs.keys):
        places.setdefault(key, []).append(run)
    starts = np.searchsorted(runs.run, np.arange(len(runs.keys) + 1))
    for recurring in (found for found in places.values() if len(found) > 1):
        codes = np.concatenate([runs.code[starts[run] : starts[run + 1]] for run in recurring])
        apart = len(set(codes.tolist())) == len(codes)
        for run in recurring:
            left_out.setdefault(run, "files of the sample are not adjacent" if apart else "duplicate key")


def _choose_files(runs: _Runs, left_out: dict[int, str], notes: Problems) -> dict[str, Array]:
    """The file (F) of each role for every run (R,), -1 where it has none.

    `x.jpg` is the image of `x`; when there is only `x.v1.jpg`, that is. Its caption must then be `x.v1.txt`: the
    image and the files about it agree up to the last dot, so two photographs under one key never share a caption.
    """
    count = len(runs.keys)
    stem_of, role_of = _read_suffixes(runs.suffixes)
    stem, role = stem_of[runs.code], role_of[runs.code]
    images = np.flatnonzero(role == 0)
    plain, dotted = images[stem[images] == 0], images[stem[images] != 0]
    image, plain_count = _pick(runs.run, plain, count)
    other, dotted_count = _pick(runs.run, dotted, count)
    image = np.where(plain_count > 0, image, other)
    two_dots = "key with two dots: several images share what precedes the first dot"
    _mark(left_out, np.flatnonzero((plain_count == 0) & (dotted_count > 1)), two_dots)
    _mark(left_out, np.flatnonzero(plain_count > 1), "several images")
    _mark(left_out, np.flatnonzero(plain_count + dotted_count == 0), "no image")
    for run in np.flatnonzero((dotted_count > 0) & (plain_count + dotted_count > 0)):
        if int(run) not in left_out:
            notes.add("key with two dots", _text(runs.keys[run]))
    chosen = {"image": image}
    stem_of_run = np.where(image >= 0, stem[image], -1) if len(stem) else np.full(count, -1)
    for position, name in enumerate([*ROLES][1:], start=1):
        about = np.flatnonzero((role == position) & (stem == stem_of_run[runs.run])) if count else images
        chosen[name], found = _pick(runs.run, about, count)
        _mark(left_out, np.flatnonzero(found > 1), f"several files with a {name}")
    return chosen


def _read_suffixes(suffixes: list[bytes]) -> tuple[Array, Array]:
    """Per suffix: a number for what precedes its last dot (0: nothing), and the role of its extension, or -1."""
    stems: dict[bytes, int] = {b"": 0}
    parts = [suffix.rpartition(b".") for suffix in suffixes]
    stem = [stems.setdefault(before, len(stems)) for before, _, _ in parts]
    role = [next((i for i, known in enumerate(ROLES.values()) if last in known), -1) for _, _, last in parts]
    return np.array(stem, np.int64), np.array(role, np.int64)


def _pick(run: Array, files: Array, count: int) -> tuple[Array, Array]:
    """For every run the last of `files` in it, or -1, and how many there are."""
    picked = np.full(count, -1, np.int64)
    picked[run[files]] = files
    return picked, np.bincount(run[files], minlength=count)


def _assemble(
    runs: _Runs, kept: NDArray[np.bool_], chosen: dict[str, Array], problems: Problems, notes: Problems
) -> Samples:
    places = {}
    for name, picked in chosen.items():
        files, there = picked[kept], picked[kept] >= 0
        offset, size = np.full(len(files), -1, np.int64), np.zeros(len(files), np.int64)
        offset[there], size[there] = runs.offset[files[there]], runs.size[files[there]]
        places[name] = (offset, size)
    in_kept = kept[runs.run] if len(runs.run) else np.zeros(0, bool)
    counts = np.bincount(runs.run, minlength=len(kept))[kept]
    first_file = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    keys = [key for key, keep in zip(runs.keys, kept.tolist(), strict=True) if keep]
    files_of_kept = (runs.code[in_kept], runs.offset[in_kept], runs.size[in_kept])
    return Samples(keys, places, first_file, *files_of_kept, runs.suffixes, problems, notes)


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
