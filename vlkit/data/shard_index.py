"""Random access into tar shards: which samples there are, and where their bytes lie.

`ShardIndex` is one tar with its sidecar (`shard_sidecar.py`), `ShardSet` is a list of them with one running number
over all samples. Columns are memory-mapped Arrow, so a sample costs no Python object, processes share the pages, and
a set travels to workers as a list of paths.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vlkit.contracts import Progress
from vlkit.data.records import ImageRef, Problems
from vlkit.data.remote import prepare
from vlkit.data.remote_cache import ShardCache
from vlkit.data.remote_listing import prepare_all
from vlkit.data.shard_columns import Columns, RawSample, fitting_table, open_columns, store_table
from vlkit.data.shard_paths import ShardSpec, expand_shards, unfinished_build
from vlkit.data.shard_sidecar import TokenIds, build_table, sidecar_path, summary_of, write_table
from vlkit.errors import DataError

__all__ = ["ShardIndex", "ShardSet", "ShardSpec", "expand_shards", "sidecar_path", "write_index"]

# A damaged label must not make whoever lists the classes fill the memory with their names.
MAX_CLASSES = 5_000_000


def write_index(tar_path: str | Path, token_ids: TokenIds | None = None) -> Path:
    """Index a tar and write the sidecar beside it.

    Args:
        tar_path: the shard.
        token_ids: per tokenizer id, for every sample in the tar's order, the ids of each of its captions.

    Raises:
        DataError: the tar cannot be read or is compressed.
        OSError: the sidecar cannot be written.
    """
    path = sidecar_path(tar_path)
    write_table(build_table(tar_path, token_ids), path)
    return path


@dataclass(frozen=True)
class ShardIndex:
    """The samples of one tar. Sample numbers run from 0 in the tar's order.

    Opening looks at the sidecar's metadata only; columns are mapped on first use and let go when many other shards
    were used since.
    """

    path: Path
    num_samples: int
    digest: str  # hash over keys, places and the tar's ends: changes when the data do
    problems: Problems = field(compare=False, repr=False)  # samples left out, by cause and key
    notes: Problems = field(compare=False, repr=False)  # samples that are in, but worth a look
    note: str | None = field(default=None, compare=False)  # what happened to the sidecar, if it is worth telling

    @staticmethod
    def open(path: str | Path) -> "ShardIndex":
        """Open a tar through its sidecar, which is made when it is missing or belongs to another tar.

        Where the folder cannot be written to, the index stays in memory (of each process), and `note` says so.

        Raises:
            DataError: the tar cannot be read or is compressed.
        """
        path = Path(path)
        prepare(path)
        table, reason = fitting_table(path)
        note = None
        if table is None:
            table = build_table(path)
            note = _note(reason, store_table(table, path))
        summary = summary_of(table)
        return ShardIndex(path, summary.num_samples, summary.digest, summary.problems, summary.notes, note)

    def __len__(self) -> int:
        return self.num_samples

    @property
    def name(self) -> str:
        """File name without `.tar`, as used in messages."""
        return self.path.name.removesuffix(".tar")

    @property
    def tokenizers(self) -> tuple[str, ...]:
        """Ids of the tokenizers whose token ids are stored."""
        return tuple(sorted(self._columns.tokens))

    def key(self, i: int) -> str:
        """Key of sample `i` as it stands in the tar."""
        return self._columns.key(i).decode("utf-8", "backslashreplace")

    def image(self, i: int) -> ImageRef:
        """Where the encoded image lies."""
        offset, size = self._columns.place("image", i)
        return ImageRef(path=str(self.path), offset=offset, size=size)

    def image_bytes(self, i: int) -> bytes:
        """The encoded image, through a file that stays open: faster than `image(i).read()` for many of one shard."""
        return self._read(*self._columns.place("image", i))

    def captions(self, i: int) -> tuple[str, ...]:
        """Captions from the `.txt` file, one a line, else from the `.json` file (`captions`, `caption` or `text`)."""
        offset, size = self._columns.place("caption", i)
        if offset >= 0:
            lines = self._read(offset, size).decode("utf-8-sig", "replace").split("\n")
            return tuple(line.strip() for line in lines if line.strip())
        return _captions_of(self.json(i) or {})

    def json(self, i: int) -> dict[str, Any] | None:
        """The `.json` file, None when there is none.

        Raises:
            DataError: it is no JSON object.
        """
        offset, size = self._columns.place("json", i)
        if offset < 0:
            return None
        try:
            value = json.loads(self._read(offset, size))
        except (ValueError, RecursionError) as error:  # the latter for brackets nested by the thousand
            raise DataError(f"shard {self.path.name}, sample {self.key(i)}: bad JSON: {error}.") from error
        if not isinstance(value, dict):
            raise DataError(
                f"shard {self.path.name}, sample {self.key(i)}: JSON is a {type(value).__name__}, not an object."
            )
        return value

    def label(self, i: int) -> int | None:
        """The class number in the `.cls` file, None when there is none.

        Raises:
            DataError: it is no class number.
        """
        offset, size = self._columns.place("cls", i)
        if offset < 0:
            return None
        text = self._read(offset, size)
        try:
            label = int(text)
        except ValueError:
            label = -1
        if not 0 <= label < MAX_CLASSES:
            where = f"shard {self.path.name}, sample {self.key(i)}"
            raise DataError(f"{where}: .cls holds {text[:40]!r}, expected a class number, 0 to {MAX_CLASSES - 1:,}.")
        return label

    def tokens(self, tokenizer_id: str, i: int) -> list[NDArray[Any]] | None:
        """Token ids of each caption of sample `i`, None when this tokenizer's are not stored."""
        return self._columns.tokens_of(tokenizer_id, i)

    def raw_samples(self) -> Iterator[RawSample]:
        """Key, encoded image and caption file of all samples in the tar's order: the fastest way through a shard."""
        return self._columns.raw_samples()

    def members(self, i: int) -> dict[str, tuple[int, int]]:
        """All files of sample `i`: suffix -> (offset, size) in the tar."""
        return self._columns.members(i)

    def read_member(self, i: int, suffix: str) -> bytes | None:
        """Content of the file of sample `i` with this suffix, None when there is none."""
        place = self.members(i).get(suffix)
        return None if place is None else self._read(*place)

    def column(self, name: str) -> NDArray[np.int64]:
        """(S,) a column of the sidecar as it is: `image_offset`, `image_size`, `caption_size`, ... Bytes."""
        return self._columns.numbers[name]

    @property
    def _columns(self) -> Columns:
        return open_columns(str(self.path), self.digest)

    def _read(self, offset: int, size: int) -> bytes:
        return self._columns.read(offset, size)


@dataclass(frozen=True)
class ShardSet:
    """Samples of several shards under one running number: shard by shard, in the tars' order."""

    shards: tuple[ShardIndex, ...]

    @staticmethod
    def open(spec: ShardSpec, progress: Progress | None = None, *, cache_size: int | None = None) -> "ShardSet":
        """Open what `spec` names (see `expand_shards`), indexing the tars that have no sidecar yet.

        Args:
            spec: paths and URLs.
            progress: called with shards done and in all.
            cache_size: bytes that shards at URLs may take in the cache; None leaves its bound as it is.

        Raises:
            DataError: no shard, an unreadable or compressed one, an unfinished build, or no usable sample at all.
            RemoteError: shards at a URL are out of reach.
        """
        if cache_size is not None:
            ShardCache.default().set_limit(cache_size)
        paths = expand_shards(spec)
        prepare_all(paths, progress)
        unfinished = unfinished_build(spec)
        if unfinished:
            raise DataError(unfinished)
        shards = []
        for path in paths:
            shards.append(ShardIndex.open(path))
            if progress:
                progress(len(shards), len(paths))
        opened = ShardSet(tuple(shards))
        if opened.num_samples == 0:
            lines = "; ".join(f"{shard.path.name}: {line}" for shard in shards for line in shard.problems.lines())
            raise DataError(f"No usable sample in {spec}. {lines or 'The tars are empty.'}")
        return opened

    def __len__(self) -> int:
        return self.num_samples

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return int(self.offsets[-1])

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """(S+1,) the running number of each shard's first sample, and the total."""
        return np.concatenate([[0], np.cumsum([shard.num_samples for shard in self.shards])]).astype(np.int64)

    def locate(self, sample_id: int) -> tuple[ShardIndex, int]:
        """The shard of a sample and its row there."""
        if not 0 <= sample_id < self.num_samples:
            raise IndexError(f"sample {sample_id} of {self.num_samples}")
        position = bisect_right(self.offsets, sample_id) - 1
        return self.shards[position], int(sample_id - self.offsets[position])

    def key(self, sample_id: int) -> str:
        """`shard/key`, which names a sample in messages."""
        shard, row = self.locate(sample_id)
        return f"{shard.name}/{shard.key(row)}"

    @cached_property
    def fingerprint(self) -> str:
        """Changes when a shard's name, order, keys or places change; not with the folder they lie in."""
        hashed = hashlib.sha256()
        for shard in self.shards:
            line = f"{shard.path.name}\0{shard.num_samples}\0{shard.digest}\n"
            hashed.update(line.encode("utf-8", "backslashreplace"))
        return hashed.hexdigest()[:32]

    @property
    def problems(self) -> dict[str, Problems]:
        """Shard name -> what was left out of it; shards without problems are not in it."""
        return {shard.path.name: shard.problems for shard in self.shards if shard.problems.total}

    @property
    def notes(self) -> list[str]:
        """What happened while opening that is worth telling, one line a kind."""
        shards_of: dict[str, list[str]] = {}
        for shard in self.shards:
            if shard.note:
                shards_of.setdefault(shard.note, []).append(shard.path.name)
        return [
            f"{len(names)} x {note} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for note, names in shards_of.items()
        ]


def _note(reason: str | None, stored: bool) -> str | None:
    parts = []
    if reason:
        parts.append(f"the index {reason} and was made again, without token ids")
    if not stored:
        parts.append("the index cannot be written beside the tar, so every process makes it again in memory")
    return "; ".join(parts) or None


def _captions_of(values: dict[str, Any]) -> tuple[str, ...]:
    found = next((values[name] for name in ("captions", "caption", "text") if values.get(name)), ())
    texts = [found] if isinstance(found, str) else found if isinstance(found, list) else []
    return tuple(text.strip() for text in texts if isinstance(text, str) and text.strip())
